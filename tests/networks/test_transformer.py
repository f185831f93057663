"""Laws of the transformer: scan, remat, groups, masks; cached decoding equals the full pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from smalti.launch import mesh as meshes, state as states
from smalti.networks import attention, transformer
from smalti.networks.transformer import Transformer, TransformerConfig

SMALL = TransformerConfig(layers=3, width=32, heads=4)
LENGTH = 9


def build(config=SMALL, **changes):
  config = dataclasses.replace(config, **changes)
  model = Transformer(config, rngs=nnx.Rngs(0))
  if config.modulated:  # adaLN-zero starts as a constant
    for linear in (model.blocks.modulation, model.modulation):
      linear.kernel[...] = 0.1 * jax.random.normal(jax.random.key(9), linear.kernel.shape)
  # larger than at initialisation, so that every part matters
  for linear in (model.blocks.attention.query, model.blocks.attention.key_value,
                 model.blocks.attention.out, model.blocks.gate_up, model.blocks.down):
    linear.kernel[...] *= 10
  for i, (_, leaf) in enumerate(nnx.iter_modules(model.blocks.attention)):
    for name in {'scale', 'bias'} & set(vars(leaf)):  # at initialisation ones and zeros
      value = getattr(leaf, name)
      if value is not None:
        value[...] += 0.3 * jax.random.normal(jax.random.key(20 + i), value.shape)
  return model


def inputs(model, batch=2, length=LENGTH):
  x = jax.random.normal(jax.random.key(1), (batch, length, 32))
  places = np.stack(np.unravel_index(np.arange(length), (3,) * (model.axes - 1) + (length,)), -1)
  vector = jax.random.normal(jax.random.key(2), (batch, 32)) if model.modulated else None
  return x, jnp.asarray(places), vector


@functools.partial(jax.jit, static_argnames='causal')
def forward(model, x, places, vector=None, mask=None, causal=False):
  return model(x, positions=places, causal=causal, mask=mask, modulation=vector)


@jax.jit
def extend(model, x, cache, places, index, vector=None):
  return model.extend(x, cache, positions=places, index=index, modulation=vector)


def test_scan_equals_the_loop():
  model = build()
  x, places, _ = inputs(model)

  @jax.jit
  def loop(model, x):
    for block in model.unstack():
      x, _ = block(x, table=model.rotations(places), causal=True, mask=None)
    return model.norm(x)

  np.testing.assert_allclose(forward(model, x, places, causal=True), loop(model, x), atol=1e-5)


def test_remat_changes_neither_value_nor_gradient():
  def run(remat):
    model = build(remat=remat)
    graph, params = nnx.split(model)
    x, places, _ = inputs(model)
    return jax.jit(jax.value_and_grad(
        lambda params: jnp.sum(nnx.merge(graph, params)(x, positions=places) ** 3)))(params)

  for a, b in zip(jax.tree.leaves(run(True)), jax.tree.leaves(run(False))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_programs_do_not_grow_with_depth():
  def size(layers):
    config = dataclasses.replace(SMALL, layers=layers)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    places = jnp.arange(LENGTH)[:, None]
    return len(forward.lower(model, jnp.ones((2, LENGTH, 32)), places).as_text())

  assert size(24) <= 1.05 * size(2)


def test_groups_equal_repeated_key_heads():
  grouped, full = build(kv_heads=2), build()
  source = grouped.blocks.attention
  full.blocks.attention.query.kernel[...] = source.query.kernel[...]
  full.blocks.attention.key_value.kernel[...] = jnp.repeat(source.key_value.kernel[...], 2, 3)
  full.blocks.attention.out.kernel[...] = source.out.kernel[...]
  for name in ('gate_up', 'down'):
    getattr(full.blocks, name).kernel[...] = getattr(grouped.blocks, name).kernel[...]
  x, places, _ = inputs(full)
  np.testing.assert_allclose(
      forward(grouped, x, places), forward(full, x, places), atol=1e-5)


def test_attention_equals_the_built_in():
  query, key, value = jax.random.normal(jax.random.key(3), (3, 2, 4, 7, 8))
  mask = jnp.arange(7) < jnp.array([[3], [7]])
  ours = attention.attend(query, key, value, causal=True, mask=mask)
  seen = (mask[:, None, None] & jnp.tril(jnp.ones((7, 7), bool))) | jnp.eye(7, dtype=bool)
  theirs = jax.nn.dot_product_attention(
      *(jnp.swapaxes(y, 1, 2) for y in (query, key, value)), mask=seen)
  np.testing.assert_allclose(ours, jnp.swapaxes(theirs, 1, 2), atol=1e-5)


def test_a_causal_model_does_not_see_what_follows():
  model = build()
  x, places, _ = inputs(model)
  changed = x.at[:, 5:].add(1.0)
  causal = [forward(model, y, places, causal=True)[:, :5] for y in (x, changed)]
  np.testing.assert_array_equal(*causal)
  both = [forward(model, y, places)[:, :5] for y in (x, changed)]
  assert np.abs(both[0] - both[1]).max() > 1e-2


def test_masked_keys_are_not_seen_and_a_row_of_them_is_finite():
  model = build()
  x, places, _ = inputs(model)
  mask = jnp.ones((2, LENGTH), bool).at[0, 4].set(False).at[1].set(False)
  y, z = (forward(model, v, places, mask=mask) for v in (x, x.at[:, 4].add(1.0)))
  others = np.arange(LENGTH) != 4
  np.testing.assert_array_equal(y[:, others], z[:, others])
  assert np.abs(y[0, 4] - z[0, 4]).max() > 1e-2 and np.isfinite(y).all()


def test_a_pattern_says_which_keys_each_query_sees():
  model = build()
  x, places, _ = inputs(model)
  pattern = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]
  np.testing.assert_allclose(forward(model, x, places, mask=pattern),
                             forward(model, x, places, causal=True), atol=1e-6)


def test_adaln_zero_begins_as_the_identity():
  model = Transformer(dataclasses.replace(SMALL, modulated=True), rngs=nnx.Rngs(0))
  x, places, vector = inputs(model)
  np.testing.assert_allclose(
      forward(model, x, places, vector), model.norm(x), atol=1e-6)


CACHED = [dict(), dict(kv_heads=2), dict(axes=2, qk_norm=False), dict(modulated=True), dict(axes=0),
          dict(norm='affine', qkv_bias=True, kv_heads=1)]


@pytest.mark.parametrize('prefill', [0, 1, LENGTH - 1])
@pytest.mark.parametrize('changes', CACHED, ids=lambda c: '-'.join(c) or 'plain')
def test_cached_steps_equal_the_full_pass(changes, prefill):
  model = build(**changes)
  x, places, vector = inputs(model) if model.axes else (*inputs(build())[:1], None, None)
  full = forward(model, x, places, vector, causal=True)
  cache, out = model.cache(2, LENGTH + 2), []
  steps = [(0, prefill)] * (prefill > 0) + [(i, i + 1) for i in range(prefill, LENGTH)]
  for i, j in steps:
    place = None if places is None else places[i:j]
    y, cache = extend(model, x[:, i:j], cache, place, jnp.asarray(i), vector)
    out.append(y)
  np.testing.assert_allclose(jnp.concatenate(out, 1), full, atol=1e-4)


def ragged(model, spoil=lambda cache: cache):
  """Rows with prefixes of 2, 5 and 7 entries, read at once, then one step each at its own place."""
  x, places, _ = inputs(model, batch=3)
  full = forward(model, x, places, causal=True)
  start = jnp.array([2, 5, 7])
  _, cache = extend(model, x[:, :7], model.cache(3, LENGTH), places[:7], jnp.asarray(0))
  cache, error = spoil(cache), 0.0
  for step in range(2):
    index = start + step
    y, cache = extend(
        model, x[jnp.arange(3), index][:, None], cache, places[index][:, None], index)
    error = max(error, float(jnp.abs(y[:, 0] - full[jnp.arange(3), index]).max()))
  return error


def test_ragged_prefixes_equal_the_full_pass():
  assert ragged(build()) < 1e-4


def test_a_pattern_over_the_cache_says_which_entries_each_query_sees():
  """Stretches of two positions, each written twice, see each other and those before."""
  model = build()
  x, places, _ = inputs(model)
  stretch = np.arange(LENGTH) // 2
  full = forward(model, x, places, mask=jnp.asarray(stretch <= stretch[:, None])[None, None])
  cache, write = model.cache(2, LENGTH + 1), jax.jit(model.extend)
  for first in range(0, LENGTH, 2):
    here = slice(first, min(first + 2, LENGTH))
    seen = jnp.arange(LENGTH + 1) < here.stop
    mask = jnp.broadcast_to(seen, (1, 1, here.stop - first, LENGTH + 1))
    for spoiled in (1.0, 0.0):
      y, cache = write(x[:, here] + spoiled, cache, positions=places[here], index=first, mask=mask)
    np.testing.assert_allclose(y, full[:, here], atol=1e-4)


def test_a_rolled_cache_slot_is_noticed():
  """The negative control of the parity: one layer's keys shifted by one place."""
  def roll(cache):
    return [(jnp.roll(cache[0][0], 1, 2), cache[0][1]), *cache[1:]]
  assert ragged(build(), roll) > 1e-2


def test_bfloat16_is_close_to_float32():
  x, places, _ = inputs(build())
  exact, rounded = (forward(build(dtype=d), x, places, causal=True)
                    for d in ('float32', 'bfloat16'))
  assert rounded.dtype == jnp.bfloat16
  error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
  assert error < 2e-2
  model = build(dtype='bfloat16')
  cache, out = model.cache(2, LENGTH), []
  for i in range(LENGTH):
    y, cache = extend(model, x[:, i:i + 1], cache, places[i:i + 1], jnp.asarray(i))
    out.append(y.astype(jnp.float32))
  error = jnp.linalg.norm(jnp.concatenate(out, 1) - exact) / jnp.linalg.norm(exact)
  assert error < 2e-2


def test_a_grown_cache_holds_the_same_entries():
  model = build()
  x, places, _ = inputs(model)
  full = forward(model, x, places, causal=True)
  _, cache = extend(model, x[:, :4], model.cache(2, 4), places[:4], jnp.asarray(0))
  y, _ = extend(model, x[:, 4:], model.grow(cache, LENGTH), places[4:], jnp.asarray(4))
  np.testing.assert_allclose(y, full[:, 4:], atol=1e-5)


@pytest.mark.parametrize('backend, dtype', [('gpu', 'bfloat16'), ('cpu', 'float32')])
def test_a_cache_is_of_the_compute_dtype_but_on_a_cpu(backend, dtype, monkeypatch):
  """Keys and values of the two heads that share queries, in half the memory on an accelerator."""
  model = nnx.eval_shape(lambda: Transformer(
      dataclasses.replace(SMALL, kv_heads=2, dtype='bfloat16'), rngs=nnx.Rngs(0)))
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  entries = jax.tree.leaves(jax.eval_shape(lambda: model.cache(2, 9)))
  assert len(entries) == 2 * SMALL.layers
  assert {(entry.shape, str(entry.dtype)) for entry in entries} == {((2, 2, 9, 8), dtype)}


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_a_mesh_moves_weights_and_sums_but_reshards_no_activation(sizes):
  """Loss and gradient under the path rules of launch: gathers and reductions only."""
  abstract = nnx.eval_shape(lambda: Transformer(
      dataclasses.replace(SMALL, width=64, heads=8), rngs=nnx.Rngs(0)))
  structure = states.Structure.of(abstract)
  params, buffers = structure.split(abstract)
  mesh = jax.make_mesh(sizes, meshes.AXES, axis_types=(AxisType.Auto,) * 3)
  weights = meshes.shardings(mesh, {'params': params, 'buffers': buffers})['params']
  rows = NamedSharding(mesh, meshes.BATCH)

  def loss(params, x):
    places = jnp.arange(x.shape[1])[:, None]
    return jnp.sum(structure.merge(params, buffers)(x, positions=places, causal=True) ** 2)

  with jax.set_mesh(mesh):
    program = jax.jit(jax.value_and_grad(loss), in_shardings=(weights, rows),
                      out_shardings=(None, weights)).lower(
        params, jax.ShapeDtypeStruct((16, 16, 64), jnp.float32)).compile().as_text()
  assert 'all-reduce' in program
  assert 'all-to-all' not in program and 'collective-permute' not in program


def test_dropout_acts_in_training_alone(key):
  model = build(dropout=0.5)
  x, places, _ = inputs(model)
  still = model(x, positions=places, key=key)
  np.testing.assert_array_equal(still, model(x, positions=places))
  noisy = [model(x, positions=places, key=k, train=True) for k in jax.random.split(key)]
  assert np.abs(noisy[0] - noisy[1]).max() > 1e-2
  with pytest.raises(ValueError, match='needs a key'):
    model(x, positions=places, train=True)


def test_leaves_are_named_and_stacked():
  names = {'/'.join(map(str, path)): leaf.shape
           for path, leaf in nnx.to_flat_state(nnx.state(build()))}
  assert names['blocks/attention/query/kernel'] == (3, 32, 4, 8)
  assert names['blocks/attention/key_value/kernel'] == (3, 32, 2, 4, 8)
  assert names['blocks/attention/out/kernel'] == (3, 4, 8, 32)
  assert names['blocks/gate_up/kernel'] == (3, 32, 2, 96)  # 8/3 * 32 = 85, rounded up to 96
  assert names['blocks/down/kernel'] == (3, 96, 32)
  blocks = build().blocks.attention.query.kernel[...]
  assert np.abs(blocks[0] - blocks[1]).max() > 0  # every layer has its own draw


@pytest.mark.parametrize('changes, message', [
    (dict(heads=5), 'multiple of heads'), (dict(kv_heads=3), 'must divide'),
    (dict(heads=16, axes=2), 'at least 2'), (dict(heads=32), 'even')])
def test_sizes_are_checked(changes, message):
  with pytest.raises(ValueError, match=message):
    build(**changes)


def test_wrong_inputs_are_named():
  model = build()
  with pytest.raises(ValueError, match='axes=1'):
    model(jnp.ones((1, 2, 32)), positions=jnp.zeros((2, 3), int))
  with pytest.raises(ValueError, match='modulated=False'):
    model(jnp.ones((1, 2, 32)), positions=jnp.zeros((2, 1), int), modulation=jnp.ones((1, 32)))


@pytest.mark.parametrize('modulated', [False, True])
def test_hidden_states_are_the_stream_between_the_blocks(modulated):
  model = build(modulated=modulated)
  x, places, vector = inputs(model)
  states = model.hidden(x, blocks=(3, 1), positions=places, causal=True, modulation=vector)
  np.testing.assert_allclose(model._last(states[0], vector),
                             forward(model, x, places, vector, causal=True), atol=1e-5)
  first, _ = model.unstack()[0](x, modulation=vector, table=model.rotations(places), causal=True,
                                mask=None)
  np.testing.assert_allclose(states[1], first, atol=1e-5)
  for blocks in ((), (0,), (4,)):
    with pytest.raises(ValueError, match='some of 1..3'):
      model.hidden(x, blocks=blocks, positions=places)


@pytest.mark.parametrize('kv_heads, qk_norm', [(4, False), (2, True)])
def test_cross_attention_equals_numpy(kv_heads, qk_norm):
  """softmax(q k^T / sqrt(f)) v over the real vectors of the memory alone, head by head."""
  config = dataclasses.replace(SMALL, memory=12, kv_heads=kv_heads, qk_norm=qk_norm)
  cross = transformer.CrossAttention(config, config.memory, rngs=nnx.Rngs(0))
  for linear in (cross.query, cross.key_value, cross.out):
    linear.kernel[...] *= 10
  x, memory = (np.asarray(jax.random.normal(jax.random.key(i), shape)) for i, shape in enumerate(
      [(2, 5, 32), (2, 6, 12)]))
  mask = np.array([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]], bool)
  unit = lambda y: y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) if qk_norm else y  # noqa: E731
  query = unit(np.einsum('bnc,ckf->bnkf', x, cross.query.kernel[...]))
  key, value = np.einsum('btc,cikf->ibtkf', memory, cross.key_value.kernel[...])
  key, value = (np.repeat(y, 4 // kv_heads, 2) for y in (unit(key), value))
  score = np.exp(np.einsum('bnkf,btkf->bknt', query, key) / np.sqrt(8)) * mask[:, None, None]
  mixed = np.einsum('bknt,btkf->bnkf', score / score.sum(-1, keepdims=True), value)
  expected = np.einsum('bnkf,kfc->bnc', mixed, cross.out.kernel[...])
  found = cross(jnp.asarray(x), *cross.read(jnp.asarray(memory)), jnp.asarray(mask))
  np.testing.assert_allclose(found, expected, atol=1e-5)
