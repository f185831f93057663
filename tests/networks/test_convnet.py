"""The convolutional encoder and decoder: shapes, layers against NumPy, float32, and no slow ops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks.convnet import (
  AdaptiveNorm,
  Attention,
  ConvDecoder,
  ConvEncoder,
  ConvOptions,
  Norm,
  Pool,
  Shuffle,
  Up,
  depth_to_space,
  kernel_init,
  space_to_depth,
)

OPTIONS = dict(channels=3, features=5, width=8, multipliers=(1, 2, 2), blocks=1)


def pair(**changes):
  options = {**OPTIONS, **changes}
  return (ConvEncoder(**options, rngs=nnx.Rngs(0)), ConvDecoder(**options, rngs=nnx.Rngs(1)))


def flat(module):
  return {'/'.join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(module))}


MASKGIT = ConvOptions(bias=False, extra=0, pointwise=True, down='pool')
MAGVIT = ConvOptions(bias=False, middle=4, extra=0, pointwise=True, up='shuffle', adaptive=True)


@pytest.mark.parametrize('changes,factor', [
    ({}, 4), (dict(patch=2, attention=(2,)), 8), (dict(multipliers=(1,), patch=4), 4),
    (dict(layers=MASKGIT), 4), (dict(layers=MAGVIT), 4)])
def test_portrait_images_come_back_at_their_size(changes, factor):
  encoder, decoder = pair(**changes)
  x = jnp.zeros((2, 48, 32, 3))
  z = jax.eval_shape(lambda x: encoder(x), x)
  assert z.shape == (2, 48 // factor, 32 // factor, 5) and z.dtype == jnp.float32
  y = jax.eval_shape(lambda z: decoder(z), z)
  assert y.shape == x.shape and y.dtype == jnp.float32


def test_patches_are_a_bijection(key):
  x = jax.random.normal(key, (2, 6, 9, 2))
  patches = space_to_depth(x, 3)
  assert patches.shape == (2, 2, 3, 18)
  np.testing.assert_array_equal(patches[0, 1, 2].reshape(3, 3, 2), x[0, 3:6, 6:9])
  np.testing.assert_array_equal(depth_to_space(patches, 3), x)


def test_norm_is_group_normalisation(key):
  x = 100 + 3 * jax.random.normal(key, (2, 4, 6, 48))
  norm = Norm(48, swish=False, rngs=nnx.Rngs(0))
  groups = np.asarray(x, np.float64).reshape(2, 24, 16, 3)  # gcd(32, 48) = 16 groups
  want = (groups - groups.mean((1, 3), keepdims=True)) / groups.std((1, 3), keepdims=True)
  np.testing.assert_allclose(norm(x), want.reshape(x.shape), atol=2e-4)  # the mean is 30 deviations
  low = Norm(48, rngs=nnx.Rngs(0))(x.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16


def test_attention_is_softmax_over_all_pixels(key):
  a = Attention(8, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jax.random.normal(key, (2, 3, 5, 8))
  y = np.asarray(a.norm(x), np.float64).reshape(2, 15, 8)
  q, k, v = (y @ np.asarray(m.kernel[...]) + np.asarray(m.bias[...]) for m in (a.q, a.k, a.v))
  scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(8))
  mixed = scores / scores.sum(-1, keepdims=True) @ v
  want = np.asarray(x) + (mixed @ np.asarray(a.proj.kernel[...])).reshape(x.shape)
  np.testing.assert_allclose(a(x), want, atol=1e-5)


def test_upsampling_repeats_pixels_first(key):
  up = Up(4, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jax.random.normal(key, (1, 3, 2, 4))
  np.testing.assert_allclose(
      up(x), up.conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)), atol=1e-6)


def test_other_resizes_are_their_definitions(key):
  x = jax.random.normal(key, (1, 4, 6, 4))
  pooled = Pool(4, dtype=jnp.float32, rngs=nnx.Rngs(0))(x)
  np.testing.assert_allclose(pooled[0, 1, 2], x[0, 2:4, 4:6].mean((0, 1)), atol=1e-6)
  up = Shuffle(4, dtype=jnp.float32, rngs=nnx.Rngs(0))
  y, wide = up(x), up.conv(x)
  np.testing.assert_array_equal(y[0, 3, 4], wide[0, 1, 2, 8:12])  # row 1, column 0 of the pixel


def test_adaptive_norm_takes_gain_and_shift_from_the_latents(key):
  norm = AdaptiveNorm(8, 3, rngs=nnx.Rngs(0))
  x, z = (jax.random.normal(k, shape) for k, shape in zip(
      jax.random.split(key), ((2, 4, 4, 8), (2, 5, 3, 3))))
  flat = np.asarray(z, np.float64).reshape(2, 15, 3)
  gain, shift = (each @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
                 for each, layer in ((flat.std(1), norm.gain), (flat.mean(1), norm.shift)))
  y = np.asarray(x, np.float64)
  y = (y - y.mean((1, 2), keepdims=True)) / y.std((1, 2), keepdims=True)  # 8 groups of 8 channels
  want = y * gain[:, None, None] + shift[:, None, None]
  np.testing.assert_allclose(norm(x, z), want, atol=1e-4)


def test_kernels_start_like_pytorch():
  kernel = kernel_init(jax.random.key(0), (3, 3, 64, 32))
  bound = (9 * 64) ** -0.5
  assert 0.98 * bound < float(jnp.abs(kernel).max()) <= bound
  np.testing.assert_allclose(jnp.var(kernel), bound**2 / 3, rtol=0.02)
  want = jax.random.uniform(jax.random.key(0), (3, 3, 64, 32), minval=-bound, maxval=bound)
  np.testing.assert_array_equal(kernel, want)  # drawn flat, the same numbers


def test_leaf_names_follow_the_path_rules():
  for module in pair(patch=2, attention=(0, 2)):
    assert {path.rsplit('/')[-1] for path in flat(module)} == {'kernel', 'bias', 'scale'}


def test_bfloat16_keeps_parameters_norms_and_the_last_convolution_in_float32(key):
  encoder, decoder = pair(dtype=jnp.bfloat16, multipliers=(1, 2))
  assert all(v.dtype == jnp.float32 for m in (encoder, decoder) for v in flat(m).values())
  x = jax.random.normal(key, (1, 8, 8, 3))
  text = str(jax.make_jaxpr(lambda x: decoder(encoder(x)))(x))
  convolutions = [line for line in text.splitlines() if 'conv_general_dilated' in line]
  low = ['bf16[' in line.split('=')[0] for line in convolutions]
  assert len(low) > 10 and all(low[:-1]) and not low[-1]
  full = pair(multipliers=(1, 2))
  want = full[1](full[0](x))
  assert jnp.std(decoder(encoder(x)) - want) < 0.1 * jnp.std(want)


def test_no_convolution_that_is_slow_on_cpus():
  encoder, decoder = pair(attention=(2,))
  text = str(jax.make_jaxpr(lambda x: decoder(encoder(x)))(jnp.zeros((1, 16, 16, 3))))
  assert 'lhs_dilation=(2' not in text  # transposed
  assert 'feature_group_count=1' in text
  assert not set(text.split()) & {f'feature_group_count={n}' for n in range(2, 65)}


def test_dropout_draws_from_its_key(key):
  encoder, _ = pair(dropout=0.5, multipliers=(1,))
  x = jax.random.normal(key, (1, 4, 4, 3))
  run = jax.jit(lambda x, key: encoder(x, key=key, train=True))
  np.testing.assert_array_equal(run(x, key), run(x, key))
  assert not np.array_equal(run(x, key), run(x, jax.random.key(1)))
  assert not np.array_equal(run(x, key), encoder(x))
  with pytest.raises(ValueError, match='pass key'):
    encoder(x, train=True)
