"""ViT-VQGAN: grids that are not square, tables of positions of another size, published counts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks.vision import interpolate, plain
from smalti.tokenizers import tokenizer as jitted
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.vision import VisionTokenizerConfig
from smalti.tokenizers.vq import VQConfig

SMALL = dict(image_size=(48, 32), patch=8, encoder=plain(1, 16, 2, init='xavier'),
             decoder=plain(1, 16, 2, init='xavier'), quantizer=FSQConfig(levels=(5, 5)),
             positions='learned')


@functools.cache
def weights():
  config = VisionTokenizerConfig(**SMALL)
  return nnx.state(jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0)))


def build(**changes):
  """A tokenizer with the same weights whatever changes."""
  config = VisionTokenizerConfig(**{**SMALL, **changes})
  graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), weights(), state)
  return nnx.merge(graph, jax.tree.map(jnp.copy, weights()))


def test_portrait_images_of_48_by_32():
  t = build()
  assert t.spec.grid == (6, 4)
  x = jax.random.uniform(jax.random.key(0), (1, 48, 32, 3), minval=-1, maxval=1)
  tokens = jitted.encode(t, x)
  assert tokens.shape == (1, 24, 1) and jitted.decode(t, tokens).shape == x.shape
  with pytest.raises(ValueError, match='do not fit image_size'):
    t.encode(jnp.swapaxes(x, 1, 2))


def test_pixels_come_back_where_their_patch_is():
  """Without attention between patches, a position of the grid paints its own patch alone."""
  t = build()
  for blocks in (t.encoder.transformer.blocks, t.decoder.transformer.blocks):
    blocks.attention.out.kernel[...] *= 0
  z = jax.random.normal(jax.random.key(0), (1, 24, 2))
  run = jax.jit(lambda t, z: t.decode_latents(z))
  changed = np.abs(run(t, z.at[0, 9].add(1.0)) - run(t, z)).max((0, 3))  # row 2, column 1
  assert changed[16:24, 8:16].min() > 0
  changed[16:24, 8:16] = 0
  assert changed.max() == 0


def test_weights_of_one_size_serve_another():
  """Half the resolution, the table of the whole: the same weights, positions interpolated."""
  half, x = build(image_size=(24, 16), table=(6, 4)), jnp.ones((1, 24, 16, 3))
  assert half.spec.grid == (3, 2)
  assert jitted.decode(half, jitted.encode(half, x)).shape == x.shape
  whole = half.encoder.patches(jnp.zeros((1, 48, 32, 3)))[0]  # positions, and a bias of zero
  np.testing.assert_array_equal(whole, half.encoder.patches.positions.table.embedding[...])
  want = interpolate(whole, (6, 4), (3, 2))
  np.testing.assert_allclose(half.encoder.patches(0 * x)[0], want, atol=1e-6)


@pytest.mark.parametrize('layers, width, heads, official', [
    (8, 512, 8, 50_908_195), (12, 768, 12, 170_664_483)], ids=['small', 'base'])
def test_published_parameter_counts(layers, width, heads, official):
  """Of the reimplementation's constructors; its last layer has 3 biases, ours one per value."""
  blocks = plain(layers, width, heads, mlp='tanh', qkv_bias=False)
  quantizer = VQConfig(codes=8192, dim=32, cosine=True, update='gradient')
  for q in (quantizer, ProjectedConfig(quantizer=quantizer, dim=width)):  # the same linear maps
    config = VisionTokenizerConfig(
        image_size=(256, 256), encoder=blocks, decoder=blocks, quantizer=q)
    model = nnx.eval_shape(lambda config=config: config.build(rngs=nnx.Rngs(0)))
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == official + 8 * 8 * 3 - 3
  assert model.spec.grid == (32, 32) and model.spec.vocab == (8192,)
