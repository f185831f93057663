"""Laws of vision transformers: patches, interpolated positions, what registers see and hide."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks import vision
from smalti.networks.transformer import TransformerConfig

TITOK = TransformerConfig(layers=2, width=16, heads=2, qk_norm=False, norm='affine', mlp='gelu',
                          bias=True, qkv_bias=True)
FLEXTOK = TransformerConfig(layers=2, width=16, heads=2, norm='layer', init='xavier')
GRID = (3, 2)  # 12 x 8 pixels in patches of 4


def images(key=1, shape=(12, 8)):
  return jax.random.normal(jax.random.key(key), (2, *shape, 3))


def encoder(config=TITOK, **changes):
  return build('RegisterEncoder', config, **{**dict(
      channels=3, patch=4, grid=GRID, registers=5, positions='learned'), **changes})


def decoder(config=TITOK, **changes):
  return build('RegisterDecoder', config, **{**dict(
      features=6, grid=GRID, registers=5, positions='learned'), **changes})


def build(kind, config, **options):
  """Kernels are larger than at initialisation, so that every part matters.

  A constant added to all channels would be invisible to layer norms: tests change a single one.
  """
  model = jax.jit(lambda: getattr(vision, kind)(config, **options, rngs=nnx.Rngs(0)))()
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if path[-1] == 'kernel':
      leaf[...] *= 10
  return model


def bicubic(n, m):
  """[m, n]: Keys' kernel with a = -1/2 over pixel centres, widened where m < n."""
  scale = max(n / m, 1)
  x = np.abs((np.arange(m)[:, None] + 0.5) * n / m - 0.5 - np.arange(n)) / scale
  w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
  w = np.where(x < 2, w, 0)
  return w / w.sum(1, keepdims=True)


@pytest.mark.parametrize('target', [(6, 3), (2, 7), (3, 4)])
def test_positions_are_interpolated_bicubically(target):
  table = np.random.default_rng(0).normal(size=(5, 4, 3))
  rows, columns = bicubic(5, target[0]), bicubic(4, target[1])
  want = np.einsum('ip,jq,pqc->ijc', rows, columns, table).reshape(-1, 3)
  got = vision.interpolate(jnp.asarray(table.reshape(20, 3), jnp.float32), (5, 4), target)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('kind', ['sincos', 'learned'])
def test_positions_tell_rows_from_columns_and_keep_their_grid(kind):
  positions = vision.GridPositions((3, 2), 8, kind=kind, rngs=nnx.Rngs(0))
  table = positions((3, 2))
  assert positions((6, 5)).shape == (30, 8)
  if kind == 'sincos':  # row 1, column 0 and row 0, column 1, by hand: frequencies 1 and 1/100
    wave = [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    np.testing.assert_allclose(table[2], [*wave, 0, 0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(table[1], [0, 0, 1, 1, *wave], atol=1e-6)
  else:
    np.testing.assert_array_equal(table, positions.table.embedding[...])


def test_patches_are_row_major_and_invertible():
  x = jnp.arange(2 * 12 * 8 * 3, dtype=jnp.float32).reshape(2, 12, 8, 3)
  patches = vision.patchify(x, 4)
  np.testing.assert_array_equal(patches[0, 1], x[0, :4, 4:].reshape(-1))  # the second of row 0
  np.testing.assert_array_equal(patches[0, 2], x[0, 4:8, :4].reshape(-1))  # the first of row 1
  np.testing.assert_array_equal(vision.unpatchify(patches, GRID, 4), x)


@pytest.mark.parametrize('config', [TITOK, FLEXTOK], ids=['titok', 'flextok'])
def test_a_causal_register_is_independent_of_those_after_it(config):
  model = encoder(config, mask='causal', token=config is TITOK)
  run = jax.jit(lambda model, x: model(x))
  before = run(model, images())
  table = model.registers.embedding[...]
  model.registers.embedding[...] = table.at[3:, 0].add(1.0)
  after = run(model, images())
  np.testing.assert_array_equal(before[:, :3], after[:, :3])
  assert np.abs(before[:, 3:] - after[:, 3:]).max(-1).min() > 1e-3
  model.registers.embedding[...] = table.at[0, 0].add(1.0)  # and depends on those before it
  assert np.abs(run(model, images())[:, 1:] - before[:, 1:]).max(-1).min() > 1e-4


def test_full_registers_see_each_other():
  model = encoder()
  run = jax.jit(lambda model, x: model(x))
  before = run(model, images())
  model.registers.embedding[...] = model.registers.embedding[...].at[4, 0].add(1.0)
  assert np.abs(run(model, images())[:, :4] - before[:, :4]).max(-1).min() > 1e-4


def test_the_causal_pattern():
  seen = vision.causal_registers(3, 2)
  np.testing.assert_array_equal(seen.astype(int), [
      [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def test_no_patch_attends_to_a_dropped_register():
  model = decoder(token=True, normed=True)
  z, other = jax.random.normal(jax.random.key(2), (2, 2, 5, 6))
  keep = jnp.array([2, 4])
  run = jax.jit(lambda model, z, keep: model(z, GRID, keep=keep))
  mixed = jnp.where(jnp.arange(5)[:, None] < keep[:, None, None], z, 1e3 * other)
  np.testing.assert_array_equal(run(model, z, keep), run(model, mixed, keep))
  one = run(model, z.at[1, 3].add(1.0), keep)  # kept by the second example alone
  assert np.abs(one - run(model, z, keep))[1].max() > 1e-3
  # all registers are no mask at all, and a slice is what a mask means
  whole = jax.jit(lambda model, z: model(z, GRID))(model, z)
  np.testing.assert_allclose(run(model, z, jnp.array([5, 5])), whole, atol=1e-5)
  graph, short = nnx.split(nnx.eval_shape(lambda: vision.RegisterDecoder(
      TITOK, features=6, grid=GRID, registers=2, positions='learned', token=True, normed=True,
      rngs=nnx.Rngs(0))))
  cut = nnx.merge(graph, jax.tree.map(lambda a, b: a[:b.shape[0]], nnx.state(model), short))
  np.testing.assert_allclose(
      jax.jit(lambda m, z: m(z, GRID))(cut, z[:1, :2]), run(model, z, keep)[:1], atol=1e-5)


def test_other_grids_go_through_the_same_weights():
  model = encoder(mask='causal')
  assert jax.eval_shape(lambda x: model(x), images(shape=(16, 24))).shape == (2, 5, 16)
  plain = nnx.eval_shape(lambda: vision.VisionEncoder(
      FLEXTOK, channels=3, patch=4, grid=GRID, rngs=nnx.Rngs(0)))
  assert jax.eval_shape(
      lambda m, x: m(x), plain, images(shape=(16, 24))).shape == (2, 24, 16)


def test_a_smooth_last_layer_is_the_convolution_alone():
  pixels = vision.Pixels(TITOK, channels=3, patch=4, smooth=True, rngs=nnx.Rngs(0))
  features = jax.random.normal(jax.random.key(0), (1, 6, 16))
  image = pixels.trunk(features, GRID)
  assert image.shape == (1, 12, 8, 3)
  np.testing.assert_array_equal(pixels.paint(image, GRID), pixels.smooth(image))
  plain = vision.Pixels(TITOK, channels=3, patch=4, smooth=False, rngs=nnx.Rngs(0))
  assert plain.trunk(features, GRID) is features and plain.paint(features, GRID).shape[1:] == (
      12, 8, 3)


def test_layer_norm_and_plain_mlp_equal_their_equations():
  """One block of TiTok's kind against NumPy: x + attention(norm(x)), then x + mlp(norm(x))."""
  config = dataclasses.replace(TITOK, layers=1, axes=0)
  model = build('Transformer', config)
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if path[-1] in ('bias', 'scale'):
      leaf[...] += 0.3 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
  x = np.asarray(jax.random.normal(jax.random.key(1), (4, 16)), np.float64)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64)[0], nnx.to_pure_dict(
      nnx.state(model.blocks)))
  erf = np.vectorize(math.erf)

  def norm(x, q):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + 1e-5) * q['scale'] + q['bias']

  a, y = p['attention'], norm(x, p['attention_norm'])
  q = np.einsum('nc,ckf->knf', y, a['query']['kernel']) + a['query']['bias'][:, None]
  k, v = (np.einsum('nc,ckf->knf', y, a['key_value']['kernel'][:, i])
          + a['key_value']['bias'][i][:, None] for i in range(2))
  w = np.exp(np.einsum('knf,ktf->knt', q, k) / np.sqrt(8))
  w /= w.sum(-1, keepdims=True)
  x = x + np.einsum('knt,ktf,kfc->nc', w, v, a['out']['kernel']) + a['out']['bias']
  h = norm(x, p['mlp_norm']) @ p['up']['kernel'] + p['up']['bias']
  x = x + (h * (1 + erf(h / np.sqrt(2))) / 2) @ p['down']['kernel'] + p['down']['bias']
  last = {k: np.asarray(v, np.float64) for k, v in nnx.to_pure_dict(nnx.state(model.norm)).items()}
  start = jax.random.normal(jax.random.key(1), (4, 16))[None]
  np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(model, start)[0], norm(x, last), atol=1e-4)
