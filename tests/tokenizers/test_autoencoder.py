"""The autoencoder: published parameter counts, its loss and metrics, and what it refuses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smalti.networks.convnet import ConvOptions
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.binary import LFQConfig
from smalti.tokenizers.image import LossWeights, psnr
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.quantizer import absorb
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.vq import VQConfig

SMALL = dict(image_size=(8, 8), channels=1, width=8, multipliers=(1, 2), blocks=1,
             quantizer=FSQConfig(levels=(5, 5)))


def build(**fields):
  return AutoencoderConfig(**{**SMALL, **fields}).build(rngs=nnx.Rngs(0))


@pytest.mark.parametrize('codes,dim,cosine,published', [
    (16384, 8, True, 71.9), (1024, 256, False, 72.1)], ids=['llamagen_vq16', 'taming_f16'])
def test_published_parameter_counts(codes, dim, cosine, published):
  """Counts of the official constructors, in millions (quant_conv and post_quant_conv included)."""
  config = AutoencoderConfig(
      image_size=(256, 256), width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, attention=(16,),
      quantizer=ProjectedConfig(dim=256, quantizer=VQConfig(
          codes=codes, dim=dim, cosine=cosine, update='gradient')))
  model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert round(count / 1e6, 1) == published
  assert model.spec.grid == (16, 16) and model.spec.vocab == (codes,)


def test_parameter_counts_of_other_layers():
  """MaskGIT's constructor has 54,515,587: where channels change, its shortcut is a 1x1 convolution
  of the block's own output and not of its input, with 81,920 weights more."""
  maskgit = ConvOptions(bias=False, extra=0, pointwise=True, down='pool')
  magvit = ConvOptions(
      bias=False, middle=4, extra=0, pointwise=True, up='shuffle', adaptive=True)
  for layers, blocks, quantizer, published in (
      (maskgit, 2, VQConfig(codes=1024, dim=256, update='gradient'), 54_515_587 - 81_920),
      (magvit, 4, LFQConfig(bits=18), 115_127_829)):
    config = AutoencoderConfig(
        image_size=(256, 256), width=128, multipliers=(1, 1, 2, 2, 4), blocks=blocks,
        layers=layers, quantizer=quantizer)
    model = nnx.eval_shape(lambda config=config: config.build(rngs=nnx.Rngs(0)))
    assert sum(
        math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == published


def test_psnr_of_known_images():
  x = jnp.zeros((2, 4, 4, 1))
  y = x.at[1].add(10 / 127.5)
  np.testing.assert_allclose(psnr(x, y), [100, 20 * np.log10(255 / 10)], rtol=1e-5)
  np.testing.assert_allclose(psnr(x, x + 5)[0], 20 * np.log10(255 / 127), rtol=1e-5)  # 128 to 255


@pytest.mark.parametrize('reconstruction', ['l1', 'l2'])
def test_the_loss_is_the_weighted_sum_of_its_terms(key, reconstruction):
  weights = LossWeights(reconstruction=3.0, codebook=0.5, commitment=0.1)
  t = build(quantizer=VQConfig(codes=8, dim=4, update='gradient'), reconstruction=reconstruction,
            weights=weights)
  x = jax.random.uniform(key, (4, 8, 8, 1), minval=-1, maxval=1)
  value, aux = jax.jit(
      lambda t, x: t.loss({'image': x}, step=0, key=jax.random.key(0), train=False))(t, x)
  m = aux['metrics']
  y = np.asarray(t.decode_latents(t.lookup(t.encode(x))))
  error = np.abs(x - y) if reconstruction == 'l1' else np.square(x - y)
  np.testing.assert_allclose(m['reconstruction'], error.mean(), rtol=1e-4)
  np.testing.assert_allclose(m['mse'], np.square(x - np.clip(y, -1, 1)).mean(), rtol=1e-4)
  total = 3 * m['reconstruction'] + 0.5 * m['codebook'] + 0.1 * m['commitment']
  np.testing.assert_allclose(value, total, rtol=1e-6)
  assert aux['weight'] == 4


def test_losses_of_micro_batches_average_to_that_of_the_batch(key):
  t = build()
  x = jax.random.uniform(key, (8, 8, 8, 1), minval=-1, maxval=1)
  loss = jax.jit(lambda t, x: t.loss({'image': x}, step=0, key=key, train=True)[0])
  np.testing.assert_allclose(
      loss(t, x), (loss(t, x[0::2]) + loss(t, x[1::2])) / 2, rtol=1e-5)


def test_training_learns_and_uses_its_codes():
  """Twelve epochs of real digits: the error falls well below the variance of the pixels."""
  from sklearn.datasets import load_digits
  images = jnp.asarray(load_digits().images[:512, :, :, None] / 8 - 1, jnp.float32)
  t = build(quantizer=VQConfig(codes=64, dim=8))
  t.prepare({'image': images}, key=jax.random.key(1))
  structure, params, rest = nnx.split(t, nnx.Param, ...)
  optimizer = optax.adam(4e-3)

  @jax.jit  # a loop in Python: convolutions inside a scan are many times slower on a CPU
  def step(params, rest, moments, rows, key):
    def loss(params):
      return nnx.merge(structure, params, rest).loss({'image': rows}, step=0, key=key, train=True)

    gradients, aux = jax.grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(gradients, moments, params)
    model = nnx.merge(structure, optax.apply_updates(params, updates), rest)
    absorb(model, aux['statistics'])
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return params, rest, moments, aux['metrics']

  moments, history = optimizer.init(params), []
  for i in range(96):
    rows = images[64 * (i % 8):64 * (i % 8 + 1)]
    params, rest, moments, metrics = step(params, rest, moments, rows, jax.random.key(i))
    history.append(metrics)
  last = jax.tree.map(lambda *x: np.mean(x), *history[-10:])
  assert last['mse'] < 0.4 * jnp.var(images)
  assert last['usage'] > 0.8
  assert last['psnr'] > history[0]['psnr'] + 3


@pytest.mark.parametrize('fields,message', [
    (dict(image_size=(8, 9)), 'image_size=.8, 9. must be a multiple of'),
    (dict(attention=(3,)), 'none of the resolutions .8, 4.'),
    (dict(multipliers=()), 'image_size')])
def test_impossible_shapes_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    build(**fields)


def test_a_term_without_weight_is_refused():
  t = build()
  inner = t.quantizer

  class Surprising(type(inner)):
    def __call__(self, z, *, key=None, train=False):
      out = super().__call__(z)
      return dataclasses.replace(out, losses={'surprise': jnp.float32(1)})

  t.quantizer = Surprising(FSQConfig(levels=(5, 5)))
  with pytest.raises(ValueError, match='surprise'):
    t.loss({'image': jnp.zeros((1, 8, 8, 1))}, step=0, key=jax.random.key(0))
