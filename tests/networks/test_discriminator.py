"""Discriminators: published counts, blurs and pools against NumPy, and no look at the batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks.discriminator import (
  BlurDiscriminatorConfig,
  PatchDiscriminatorConfig,
  StyleDiscriminatorConfig,
  blur,
  deviation,
)

SMALL = {
    'patch': (PatchDiscriminatorConfig(width=8, layers=2), (16, 12), 2 * 1),
    'blur': (BlurDiscriminatorConfig(width=8, stages=2, pool=2), (16, 24), 2 * 2),
    'style': (StyleDiscriminatorConfig(most=8), (8, 12), 1),
}


def count(config, size):
  model = nnx.eval_shape(lambda: config.build(size=size, channels=3, rngs=nnx.Rngs(0)))
  return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model)))


def test_parameters_are_those_of_the_published_networks():
  """pix2pix's 2.77M with 3 channels in (BatchNorm and GroupNorm have as many); VQGAN+'s 1.91M."""
  assert count(PatchDiscriminatorConfig(), (256, 256)) == 2_765_633
  assert count(BlurDiscriminatorConfig(), (256, 256)) == 1_909_889


def test_published_networks_give_30_and_16_logits_a_side():
  x = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
  for config, side in ((PatchDiscriminatorConfig(), 30), (BlurDiscriminatorConfig(), 16)):
    model = nnx.eval_shape(
        lambda config=config: config.build(size=(256, 256), channels=3, rngs=nnx.Rngs(0)))
    assert jax.eval_shape(lambda m, x: m(x), model, x).shape == (2, side**2)


@pytest.mark.parametrize('name', SMALL)
def test_a_logit_depends_on_its_image_alone(name, key):
  config, size, logits = SMALL[name]
  d = config.build(size=size, channels=3, rngs=nnx.Rngs(0))
  x = jax.random.normal(key, (3, *size, 3))
  together, alone = jax.jit(lambda x: (d(x), d(x[1:2])))(x)
  assert together.shape == (3, logits) and together.dtype == jnp.float32
  np.testing.assert_allclose(together[1:2], alone, atol=1e-6)
  assert float(jnp.std(together)) > 0


def test_kernels_of_the_patch_network_start_at_deviation_02():
  d = PatchDiscriminatorConfig(width=16, layers=2).build(
      size=(16, 16), channels=3, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(jnp.std(d.convs[2].kernel[...]), 0.02, rtol=0.05)
  assert d.convs[0].bias is not None and d.convs[1].bias is None  # its norm has a shift


def test_blur_is_the_binomial_kernel_at_every_second_pixel(key):
  x = np.asarray(jax.random.normal(key, (2, 6, 4, 3)), np.float64)
  padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
  weights = np.array([1, 3, 3, 1]) / 8
  want = sum(weights[i] * weights[j] * padded[:, i:i + 5:2, j:j + 3:2]
             for i in range(4) for j in range(4))
  np.testing.assert_allclose(blur(jnp.asarray(x, jnp.float32)), want, atol=1e-6)


def test_widths_of_the_style_network_are_the_published_ones():
  model = nnx.eval_shape(lambda: StyleDiscriminatorConfig(group=4).build(
      size=(256, 256), channels=3, rngs=nnx.Rngs(0)))
  assert [stage.skip.kernel.shape for stage in model.stages] == [
      (64, 128), (128, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
  assert model.mix.kernel.shape == (3, 3, 513, 512)
  assert model.hidden.kernel.shape == (16 * 512, 512) and model.output.kernel.shape == (512, 1)


def test_deviation_compares_the_images_of_a_group(key):
  x = np.asarray(jax.random.normal(key, (4, 2, 2, 3)), np.float64)
  got = deviation(jnp.asarray(x, jnp.float32), 2)
  for i in (0, 2):
    np.testing.assert_allclose(got[i:i + 2], x[i:i + 2].std(0).mean(), rtol=1e-5)
  np.testing.assert_array_equal(  # the last batch of an evaluation, of 6 in groups of 4
      deviation(jnp.asarray(np.repeat(x, 2, 0)[:6], jnp.float32), 4),
      deviation(jnp.asarray(np.repeat(x, 2, 0)[:6], jnp.float32), 2))


def test_only_the_maxima_of_the_pool_are_judged(key):
  d = BlurDiscriminatorConfig(width=8, stages=1, pool=2).build(
      size=(8, 8), channels=3, rngs=nnx.Rngs(0))
  x = jax.random.normal(key, (1, 8, 8, 3))
  y = jax.nn.leaky_relu(d.norms[0](blur(d.stages[0](jax.nn.leaky_relu(d.input(x), 0.1)))), 0.1)
  maxima = np.asarray(y).reshape(2, 2, 2, 2, 8).max((1, 3))[None]
  want = d.output(jax.nn.leaky_relu(d.mix(jnp.asarray(maxima)), 0.1))
  np.testing.assert_allclose(d(x), want.reshape(1, 4), atol=1e-6)


@pytest.mark.parametrize('config,size,message', [
    (PatchDiscriminatorConfig(), (16, 16), 'leave no logit below 24; take fewer layers'),
    (BlurDiscriminatorConfig(), (36, 32), 'multiples of 8'),
    (BlurDiscriminatorConfig(pool=3), (32, 32), r'\[4, 4\] no more than pool'),
    (StyleDiscriminatorConfig(), (24, 24), 'do not halve to 4 pixels')])
def test_images_that_do_not_fit_are_refused(config, size, message):
  with pytest.raises(ValueError, match=message):
    config.build(size=size, channels=3, rngs=nnx.Rngs(0))
