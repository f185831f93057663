"""The style networks: what modulation is, and that nothing else reaches the image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks.styled import (
  Modulated,
  StyleDecoder,
  StyleEncoder,
  coarsest,
  instance_norm,
  upsample,
)

OPTIONS = dict(size=(16, 24), channels=3, patch=2, widths=(4, 8), hidden=8, features=6)


def test_instance_norm_is_per_image_and_channel():
  x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3)) * jnp.array([1.0, 5, 9]) + 7
  y = np.asarray(instance_norm(x))
  np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(y.std((1, 2)), 1, rtol=1e-4)
  alone = instance_norm(x[1:])
  np.testing.assert_allclose(y[1:], alone, atol=1e-6)
  low = instance_norm(x.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16 and np.abs(np.asarray(low, np.float32) - y).max() < 0.05


def test_modulation_is_scale_and_shift_of_the_normed_features():
  layer = Modulated(3, 5, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
  style = jnp.array([[0.3, -0.2], [0.0, 0.0]])
  affine = np.asarray(layer.affine(style))
  normed = np.asarray(instance_norm(jax.nn.leaky_relu(layer.conv(x), 0.2)))
  want = normed * (1 + affine[:, None, None, :5]) + affine[:, None, None, 5:]
  np.testing.assert_allclose(layer(x, style), want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(layer(x, style)[1], normed[1], atol=1e-5)  # no style, no change


def test_the_decoder_sees_its_input_through_the_modulations_alone():
  decoder = StyleDecoder(**OPTIONS, rngs=nnx.Rngs(0))
  z = jax.random.normal(jax.random.key(0), (2, 6))
  assert decoder(z).shape == (2, 16, 24, 3)
  assert np.abs(np.diff(decoder(z), axis=0)).max() > 1e-3
  for level in decoder.levels:
    level.affine.kernel[...] = jnp.zeros_like(level.affine.kernel[...])
  assert np.abs(np.diff(decoder(z), axis=0)).max() == 0


def test_every_latent_reaches_every_layer_of_the_decoder():
  decoder = StyleDecoder(**OPTIONS, rngs=nnx.Rngs(0))
  for i in range(len(decoder.levels)):
    def features(z, i=i):
      style = z
      for layer in decoder.style:
        style = jax.nn.leaky_relu(layer(style), 0.2)
      return decoder.levels[i].affine(style)
    assert np.all(np.abs(jax.jacobian(features)(0.1 * jnp.ones(6))).max(0) > 0)


def test_the_encoder_takes_rectangles_and_other_pixels_matter():
  encoder = StyleEncoder(**OPTIONS, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 16, 24, 3))
  assert encoder(x).shape == (1, 6) and encoder(x).dtype == jnp.float32
  sensitivity = jax.jacobian(lambda x: encoder(x)[0, 0])(x)
  assert np.mean(np.abs(sensitivity) > 0) > 0.95


def test_upsampling_repeats_pixels():
  x = jnp.arange(6.0).reshape(1, 2, 3, 1)
  np.testing.assert_array_equal(upsample(x), np.repeat(np.repeat(x, 2, 1), 2, 2))


def test_sizes_that_do_not_divide_are_refused():
  assert coarsest((16, 24), 2, (4, 8)) == (4, 6)
  for size in ((16, 22), (0, 16), (16,)):
    with pytest.raises(ValueError, match='multiple of 4'):
      coarsest(size, 2, (4, 8))
