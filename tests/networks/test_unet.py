"""The U-Net: scanned blocks are the same blocks one after the other, mirror images joined."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks.transformer import TransformerConfig
from smalti.networks.unet import UNet

GRID, WIDTH, BLOCKS = (4, 6), 8, 2
BODY = dict(layers=1, width=16, heads=2, axes=0)


def build(**options):
  """A network none of whose parameters are zero."""
  model = UNet(inputs=3, outputs=5, grid=GRID, width=WIDTH, blocks=BLOCKS, rngs=nnx.Rngs(0),
               **options)
  rng = np.random.default_rng(1)
  nnx.update(model, jax.tree.map(
      lambda leaf: leaf + np.float32(.3) * rng.normal(size=leaf.shape).astype(np.float32),
      nnx.state(model, nnx.Param)))
  return model


apply = jax.jit(lambda model, x: model(x))
IMAGES = jax.random.normal(jax.random.key(0), (2, *GRID, 3))


@functools.cache
def unrolled():
  """`build()` at IMAGES, by a list of skips from which the last is taken first."""
  model, options = build(), dict(key=None, train=False)

  def block(stack, i):
    graph, params = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], params))

  x = model.input(IMAGES)
  skips = [x]
  for i in range(BLOCKS):
    x = block(model.down, i)(x, **options)
    skips.append(x)
  x = model.middle.second(model.middle.attention(model.middle.first(x, **options)), **options)
  for i in reversed(range(BLOCKS + 1)):
    x = block(model.up, i)(jnp.concatenate([x, skips.pop()], -1), **options)
  return np.asarray(model.output(model.norm(x)))


@pytest.mark.parametrize('backend, remat', [('cpu', True), ('cpu', False), ('tpu', True)])
def test_stacked_blocks_run_one_after_the_other(backend, remat, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)  # in a loop, but on a CPU
  got = jax.jit(lambda model, x: model(x))(build(remat=remat), IMAGES)
  np.testing.assert_allclose(got, unrolled(), atol=2e-5)
  assert np.abs(unrolled()).max() > .5


def test_a_fresh_network_says_nothing():
  model = UNet(inputs=3, outputs=5, grid=GRID, width=WIDTH, blocks=1, rngs=nnx.Rngs(0))
  assert not np.any(apply(model, IMAGES))


def test_every_pixel_sees_every_pixel_through_patches():
  model = build(transformer=TransformerConfig(**BODY))
  x = IMAGES[:1]
  moved = np.abs(apply(model, x.at[0, 0, 0].add(1.0)) - apply(model, x)).max(-1)[0]
  assert moved.min() > 1e-4  # 5 convolutions do not reach the last column by themselves
  assert model.middle.place.embedding.shape == (2 * 3, 16)


def test_patches_keep_rows_and_columns_apart():
  """Without a table of positions, patches that are shifted in a circle are shifted patches."""
  model = build(transformer=TransformerConfig(**BODY)).middle
  x = jax.random.normal(jax.random.key(2), (1, *GRID, WIDTH))
  run = jax.jit(lambda middle, x: middle(x, condition=None, key=None, train=False))
  shifted = jnp.roll(x, (2, 2), (1, 2))
  assert np.abs(run(model, shifted) - jnp.roll(run(model, x), (2, 2), (1, 2))).max() > .01
  model.place.embedding[...] = jnp.zeros_like(model.place.embedding[...])
  np.testing.assert_allclose(run(model, shifted), jnp.roll(run(model, x), (2, 2), (1, 2)),
                             atol=1e-5)


def test_a_condition_modulates_norms_as_scale_and_shift():
  model = build(condition=4)
  block = nnx.merge(*(lambda graph, params: (graph, jax.tree.map(lambda leaf: leaf[0], params)))(
      *nnx.split(model.down)))
  x, vector = jax.random.normal(jax.random.key(3), (2, *GRID, WIDTH)), jnp.eye(2, 4)
  got = block(x, condition=vector, key=None, train=False)
  parts = vector @ block.modulation.kernel[...] + block.modulation.bias[...]
  scale1, shift1, scale2, shift2 = (p[:, None, None] for p in jnp.split(parts, 4, -1))

  def norm(layer, x, scale, shift):
    groups = np.asarray(x).reshape(2, -1, 8, 1)  # gcd(32, 8) groups: a channel each
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    y = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    return jax.nn.swish((y * layer.scale[...] + layer.bias[...]) * (1 + scale) + shift)

  y = block.conv2(norm(block.norm2, block.conv1(norm(block.norm1, x, scale1, shift1)),
                       scale2, shift2))
  np.testing.assert_allclose(got, x + y, atol=1e-4)


def test_dropout_is_drawn_for_every_block_in_training_alone():
  model = build(dropout=.5)
  run = jax.jit(lambda model, key, train: model(IMAGES, key=key, train=train), static_argnums=2)
  first, again, other = (run(model, jax.random.key(i), True) for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > .01
  np.testing.assert_allclose(run(model, jax.random.key(0), False), unrolled(), atol=2e-5)
  with pytest.raises(ValueError, match='pass key'):
    model(IMAGES, train=True)


def test_refusals_say_why():
  make = functools.partial(UNet, inputs=3, outputs=5, grid=GRID, width=WIDTH, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='blocks=0'):
    make(blocks=0)
  with pytest.raises(ValueError, match='patch=4 must divide'):
    make(blocks=1, patch=4, transformer=TransformerConfig(**BODY))
  with pytest.raises(ValueError, match='axes=1 must be 0 or 2'):
    make(blocks=1, transformer=TransformerConfig(**BODY | {'axes': 1}))
  with pytest.raises(ValueError, match='width=18 must be a multiple of 4'):
    make(blocks=1, transformer=TransformerConfig(**BODY | {'width': 18}))
