"""Laws of int8: rounding within half a scale, scales outside of the products, small caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from smalti.networks import attention, int8, transformer
from smalti.networks.int8 import Int8
from smalti.networks.quantized import Int8Linear, nbytes, quantized
from smalti.networks.transformer import Transformer, TransformerConfig

SMALL = TransformerConfig(layers=2, width=32, heads=4)
LENGTH = 9


@functools.cache
def build(**changes):
  model = Transformer(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))
  blocks = model.blocks
  for linear in (blocks.attention.query, blocks.attention.key_value, blocks.attention.out,
                 blocks.gate_up, blocks.down):
    linear.kernel[...] *= 10  # so that every part matters
  return model


def inputs(batch=2, axes=1):
  places = np.stack(np.unravel_index(np.arange(LENGTH), (3, 3)[:axes - 1] + (LENGTH,)), -1)
  return jax.random.normal(jax.random.key(1), (batch, LENGTH, 32)), jnp.asarray(places)


extend = jax.jit(lambda model, x, cache, places, index: model.extend(
    x, cache, positions=places, index=index))


def steps(model, x, places, cut, start=0, cache=None, kind='int8'):
  """The stretches of `cut` one after the other; outputs and the last cache."""
  cache, out = model.cache(len(x), LENGTH, kind) if cache is None else cache, []
  for size in cut:
    y, cache = extend(model, x[:, start:start + size], cache, places[start:start + size],
                      jnp.asarray(start))
    out.append(y)
    start += size
  return jnp.concatenate(out, 1), cache


# The rounding.

VALUES = st.floats(-2.0**99, 2.0**99, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-99)


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 6)), elements=VALUES))
def test_rounding_is_within_half_a_scale(x):
  found = int8.quantize(jnp.asarray(x))
  codes, scale = (np.asarray(part, np.float64) for part in found)
  largest = np.abs(x).max(-1, keepdims=True)
  np.testing.assert_allclose(scale, largest.astype(np.float64) / 127, rtol=1e-6)
  assert (np.abs(x - codes * scale) <= scale * (0.5 + 1e-4)).all()
  assert np.abs(codes).max() <= 127 and (np.abs(codes).max(-1)[largest[:, 0] > 0] == 127).all()
  assert (codes[largest[:, 0] == 0] == 0).all() and np.isfinite(found.dequantize()).all()


def test_a_row_in_int8():
  found = int8.quantize(jnp.array([[127.0, -1.49, 0.51, 0.0], [0.0, 0.0, 0.0, 0.0]]))
  np.testing.assert_array_equal(found.codes, [[127, -1, 1, 0], [0] * 4])
  np.testing.assert_array_equal(found.scale, [[1.0], [0.0]])


# Attention.


@pytest.mark.parametrize('backend', ['cpu', 'tpu'])
@pytest.mark.parametrize('index', [None, jnp.asarray(3), jnp.array([1, 4])], ids=str)
@pytest.mark.parametrize('masked', [False, True])
def test_folded_scales_equal_explicit_floats(backend, index, masked, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  query = jax.random.normal(jax.random.key(0), (2, 4, 3, 8))
  key, value = (int8.quantize(y * jnp.arange(1, 8)[:, None])
                for y in jax.random.normal(jax.random.key(1), (2, 2, 2, 7, 8)))
  mask = (jax.random.uniform(jax.random.key(2), (2, 7)) < 0.6) if masked else None
  run = functools.partial(attention.attend, query, causal=index is not None, mask=mask,
                          index=index)
  found, explicit = run(key, value), run(key.dequantize(), value.dequantize())
  np.testing.assert_allclose(found, explicit, atol=1e-5)
  assert np.abs(found - run(key.codes.astype(jnp.float32), value.dequantize())).max() > 1e-2


def simulate(model, x, places):
  """The causal pass in NumPy, keys and values rounded to 255 steps of a token's own size."""
  cos, sin = (np.asarray(t) for t in model.rotations(places))

  def unit(y, scale):
    return y / np.sqrt(np.mean(y * y, -1, keepdims=True) + 1e-5) * np.asarray(scale)

  def turn(y):
    left, right = np.split(y, 2, -1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

  def rounded(y):
    step = np.abs(y).max(-1, keepdims=True) / 127
    return np.rint(y / step) * step

  x = np.asarray(x)
  for i in range(model.layers):
    block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)
    a, y = block.attention, unit(x, block.attention_norm.scale[...])
    query = turn(unit(np.einsum('bnc,ckf->bknf', y, a.query.kernel[...]),
                      a.query_norm.scale[...]))
    key, value = np.einsum('bnc,cskf->sbknf', y, a.key_value.kernel[...])
    key, value = rounded(turn(unit(key, a.key_norm.scale[...]))), rounded(value)
    key, value = (np.repeat(z, query.shape[1] // key.shape[1], 1) for z in (key, value))
    score = np.einsum('bknf,bktf->bknt', query, key) / np.sqrt(query.shape[-1])
    weight = np.exp(np.where(np.tril(np.ones(score.shape[-2:], bool)), score, -np.inf))
    weight /= weight.sum(-1, keepdims=True)
    x = x + np.einsum('bknt,bktf,kfc->bnc', weight, value, a.out.kernel[...])
    gate, up = np.einsum('bnc,csh->sbnh', unit(x, block.mlp_norm.scale[...]),
                         block.gate_up.kernel[...])
    x = x + (gate / (1 + np.exp(-gate)) * up) @ np.asarray(block.down.kernel[...])
  return unit(x, model.norm.scale[...])


@pytest.mark.parametrize('kv_heads, cut', [(4, (1,) * 9), (4, (9,)), (2, (5, 1, 3))], ids=str)
def test_decoding_equals_a_simulation_in_numpy(kv_heads, cut):
  model, (x, places) = build(kv_heads=kv_heads), inputs()
  found, _ = steps(model, x, places, cut)
  np.testing.assert_allclose(found, simulate(model, x, places), atol=1e-4)
  exact, _ = steps(model, x, places, cut, kind=None)
  assert 1e-3 < np.abs(found - exact).max() < 0.2  # it is rounded, and close


@pytest.mark.parametrize('changes', [dict(), dict(kv_heads=2, axes=2, qk_norm=False)], ids=str)
def test_a_prefix_at_once_leaves_what_steps_leave(changes):
  model, (x, places) = build(**changes), inputs(axes=changes.get('axes', 1))
  one, single = steps(model, x, places, (1,) * 9)
  two, whole = steps(model, x, places, (6, 1, 1, 1))
  np.testing.assert_allclose(one, two, atol=1e-4)
  for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)  # codes and all


def test_ragged_rows_and_grown_caches_hold_the_same_entries():
  model, (x, places) = build(), inputs(batch=3)
  want, _ = steps(model, x, places, (1,) * 9)
  start = jnp.array([2, 5, 7])
  _, cache = steps(model, x, places, (7,), cache=model.cache(3, 7, 'int8'))
  cache = model.grow(cache, LENGTH)
  assert {entry.codes.shape[2] for layer in cache for entry in layer} == {LENGTH}
  for step in range(2):
    index = start + step
    y, cache = extend(model, x[jnp.arange(3), index][:, None], cache, places[index][:, None], index)
    np.testing.assert_allclose(y[:, 0], want[jnp.arange(3), index], atol=1e-4)


def test_the_cache_is_a_quarter_and_its_scales():
  model = build()
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
  floats, codes = (size(jax.tree.map(np.asarray, model.cache(2, 64, kind)))
                   for kind in (None, 'int8'))
  assert codes == floats // 4 + floats // model.features
  for kind, message in (('int4', 'int4'), ('float32', 'say int8')):
    with pytest.raises(ValueError, match=message):
      model.cache(2, 64, kind)


@pytest.mark.parametrize('size', [1, 3])
def test_no_float_copy_of_the_cache_is_held(size):
  """Temporary memory of a step, its cache given away; the control dequantizes before attending."""
  model, length = build(heads=1), 2048
  cache = jax.eval_shape(lambda: model.cache(1, length, 'int8'))
  copy = 4 * cache[0][0].codes.size  # of the keys of one layer
  x, places = jnp.ones((1, size, 32)), jnp.zeros((size, 1), int)

  def step(model, x, cache):
    return model.extend(x, cache, positions=places, index=5)

  def explicit(model, x, cache):
    y, _ = step(model, x, [tuple(e.dequantize() for e in layer) for layer in cache])
    return y, cache

  kept, control = (jax.jit(f, donate_argnums=2).lower(model, x, cache).compile().memory_analysis()
                   for f in (step, explicit))
  assert kept.temp_size_in_bytes < copy and kept.alias_size_in_bytes >= copy  # written in place
  assert control.temp_size_in_bytes > 2 * copy


# Weights.


def test_kernels_of_blocks_alone_are_int8():
  model = build(modulated=True)
  before = {k: np.array(v[...]) for k, v in nnx.to_flat_state(nnx.state(model))}
  found = dict(nnx.to_flat_state(nnx.state(quantized(model))))
  changed = {'/'.join(k) for k, v in found.items() if v[...].dtype == jnp.int8}
  assert changed == {'blocks/attention/query/kernel', 'blocks/attention/key_value/kernel',
                     'blocks/attention/out/kernel', 'blocks/gate_up/kernel', 'blocks/down/kernel'}
  for path, leaf in found.items():
    if path in before and '/'.join(path) not in changed:
      np.testing.assert_array_equal(leaf[...], before[path])
  for path, old in before.items():  # the model itself is as it was
    np.testing.assert_array_equal(dict(nnx.to_flat_state(nnx.state(model)))[path][...], old)
  kernel, scale = (found['blocks', 'attention', 'out', name][...] for name in ('kernel', 'scale'))
  want = before['blocks', 'attention', 'out', 'kernel']  # [layers, heads, features, width]
  np.testing.assert_allclose(scale, np.abs(want).max((1, 2)) / 127, rtol=1e-6)
  assert (np.abs(kernel * scale[:, None, None] - want) <= scale[:, None, None] * 0.5001).all()


def test_bytes_are_a_quarter_and_twice_is_once():
  model = build()
  small = quantized(model)
  kernels = sum(4 * leaf.size for path, leaf in nnx.to_flat_state(nnx.state(model))
                if path[-1] == 'kernel')
  scales = sum(4 * leaf.size for path, leaf in nnx.to_flat_state(nnx.state(small))
               if path[-1] == 'scale' and len(path) > 3 or path[1] in ('gate_up', 'down'))
  assert nbytes(small) < nbytes(model) - 0.75 * kernels + scales
  again = quantized(small)
  for a, b in zip(jax.tree.leaves(nnx.state(small)), jax.tree.leaves(nnx.state(again)),
                  strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_product_equals_that_of_rounded_kernels(dtype):
  linear = transformer.Linear(6, (2, 5), bias=True, std=1.0, dtype=dtype, rngs=nnx.Rngs(0))
  linear.bias[...] += jnp.arange(5)
  x = jax.random.normal(jax.random.key(0), (3, 4, 6)).astype(dtype)
  found = Int8Linear(linear, stacked=False)(x)
  rounded = int8.quantize(linear.kernel[...], 0).dequantize()
  want = jnp.einsum('abc,cde->abde', x.astype(jnp.float32), rounded) + linear.bias[...]
  assert found.dtype == dtype
  close = dict(atol=1e-5) if dtype == 'float32' else dict(rtol=1e-2)
  np.testing.assert_allclose(found.astype(jnp.float32), want, **close)


def test_what_cannot_be_rounded_is_refused():
  with pytest.raises(ValueError, match='no transformer'):
    quantized(transformer.RMSNorm(4))
  with pytest.raises(ValueError, match="weights='int4' is not one of int8"):
    quantized(build(), 'int4')


def test_an_entry_is_a_pytree_of_its_parts():
  entry = int8.quantize(jnp.ones((2, 3)))
  assert [leaf.dtype for leaf in jax.tree.leaves(entry)] == [jnp.int8, jnp.float32]
  assert isinstance(jax.tree.map(lambda x: x, entry), Int8) and entry.shape == (2, 3)
