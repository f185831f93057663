"""Laws of int8 settings: drawn as it is scored, rounded once, and nothing changes without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smalti.generators.autoregressive import AutoregressiveConfig, AutoregressiveSettings
from smalti.generators.generator import example_keys, generate
from smalti.networks import int8
from smalti.networks.quantized import quantized
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

GRID = TokenSpec(grid=(3, 3), vocab=(5,))
DEEP = TokenSpec(grid=(3,), vocab=(3, 3))
STRING = TokenSpec(grid=(4,), vocab=(3,), eos=2)
BOTH = dict(cache='int8', weights='int8')


@functools.cache
def build(spec=GRID, classes=0, anneal=None):
  """A model with weights large enough that its distribution is far from uniform."""
  axes = 0 if anneal else len(spec.view('flat').grid)
  config = AutoregressiveConfig(classes=classes, anneal=anneal, transformer=TransformerConfig(
      layers=2, width=32, heads=4, kv_heads=2, axes=axes, modulated=bool(anneal)))
  model = config.build(spec, rngs=nnx.Rngs(0))
  model.head.kernel[...] = 0.3 * jax.random.normal(jax.random.key(7), model.head.kernel.shape)
  for table in (model.token, model.label):
    table.embedding[...] *= 50
  for linear in (model.transformer.blocks.attention.key_value, model.transformer.blocks.down):
    linear.kernel[...] *= 10
  return model


def sample(model, n, label=None, **settings):
  condition = None if label is None else {'label': label}
  return generate(model, condition, keys=example_keys(0, jnp.arange(n)),
                  settings=AutoregressiveSettings(**settings))


log_prob = jax.jit(lambda model, batch: model.log_prob(batch))


@functools.partial(jax.jit, static_argnames=('cache', 'weights'))
def forced(model, batch, cache=None, weights=None):
  return model.forced(batch, cache=cache, weights=weights)


def random(spec, n=8):
  draw = np.random.default_rng(0)
  return jnp.asarray(spec.canonical(
      draw.integers(0, spec.vocab[0], (n, spec.length, spec.depth)).astype(np.int32)))


@pytest.mark.parametrize('model', [
    build(), build(DEEP), build(STRING), build(classes=3), build(anneal=(1, 2))],
    ids=['grid', 'deep', 'eos', 'labels', 'orders'])
def test_code_by_code_equals_the_one_pass(model):
  batch = {'tokens': random(model.spec)}
  if model.classes:
    batch['label'] = jnp.arange(8) % 3
  nats, likeliest = forced(model, batch)
  np.testing.assert_allclose(-nats.sum(-1), log_prob(model, batch), atol=1e-4)
  if model.anneal is None:
    logits = model._logits(batch['tokens'].reshape(8, -1), model._label(batch, 8), None)
    np.testing.assert_array_equal(likeliest, jnp.argmax(logits, -1))


@pytest.mark.parametrize('spec, settings', [(GRID, dict(cache='int8')), (STRING, BOTH)],
                         ids=['grid', 'eos'])
def test_a_sample_has_the_probability_that_scoring_gives_it(spec, settings):
  model = build(spec)
  drawn = sample(model, 8, **settings)
  nats, _ = forced(model, {'tokens': drawn.tokens}, **settings)
  np.testing.assert_allclose(drawn.log_prob, -nats.sum(-1), atol=1e-4)
  exact = log_prob(model, {'tokens': drawn.tokens})
  assert 1e-4 < np.abs(drawn.log_prob - exact).max() < 0.5  # rounded, and close


def test_a_known_prefix_in_one_pass_leaves_the_draws():
  model = build()
  whole = sample(model, 8, **BOTH)
  mask = jnp.broadcast_to((jnp.arange(9) < 4)[:, None], (8, 9, 1))
  again = generate(model, None, keys=example_keys(0, jnp.arange(8)), known=whole.tokens,
                   known_mask=mask, settings=AutoregressiveSettings(prefill=4, **BOTH))
  np.testing.assert_array_equal(again.tokens, whole.tokens)


def test_int8_weights_are_those_rounded_by_hand():
  model = build()
  by_hand = nnx.clone(model)
  blocks = by_hand.transformer.blocks
  for linear in (blocks.attention.query, blocks.attention.key_value, blocks.gate_up, blocks.down):
    linear.kernel[...] = int8.quantize(linear.kernel[...], 1).dequantize()
  linear = blocks.attention.out  # two axes of inputs
  linear.kernel[...] = int8.quantize(linear.kernel[...], (1, 2)).dequantize()
  batch = {'tokens': random(GRID)}
  found = jax.jit(lambda model, batch: quantized(model).log_prob(batch))(model, batch)
  np.testing.assert_allclose(found, log_prob(by_hand, batch), rtol=1e-5)
  assert np.abs(found - log_prob(model, batch)).max() > 1e-3
  nats, _ = forced(model, batch, weights='int8')
  np.testing.assert_allclose(-nats.sum(-1), found, atol=1e-4)


def test_copies_made_before_and_within_a_call_draw_the_same():
  inside, outside = sample(build(), 8, **BOTH), sample(quantized(build()), 8, cache='int8')
  np.testing.assert_array_equal(inside.tokens, outside.tokens)
  np.testing.assert_array_equal(inside.log_prob, outside.log_prob)


def test_without_the_settings_nothing_is_int8():
  arguments = dict(keys=example_keys(0, jnp.arange(2)), settings=AutoregressiveSettings())
  assert 'xi8>' not in generate.lower(build(), None, **arguments).as_text()
  rounded = dict(arguments, settings=AutoregressiveSettings(**BOTH))
  assert 'xi8>' in generate.lower(build(), None, **rounded).as_text()


def rounds(jaxpr, inside=False):
  """(outside, inside) loops: how many arrays are rounded."""
  count = np.zeros(2, int)
  for equation in jaxpr.eqns:
    count[int(inside)] += equation.primitive.name == 'round'
    for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns')):
      part = getattr(part, 'jaxpr', part)
      if hasattr(part, 'eqns'):
        count += rounds(part, inside or equation.primitive.name in ('while', 'scan'))
  return count


@pytest.mark.parametrize('settings, expected', [
    (dict(), (0, 0)), (dict(weights='int8'), (5, 0)), (dict(cache='int8'), (0, 4))], ids=str)
def test_weights_are_rounded_once_and_entries_as_they_come(settings, expected):
  model, keys = build(), example_keys(0, jnp.arange(2))
  jaxpr = jax.make_jaxpr(lambda model, keys: model.sample(
      None, keys=keys, settings=AutoregressiveSettings(**settings)).tokens)(model, keys)
  assert tuple(rounds(jaxpr.jaxpr)) == expected  # 5 stacked kernels; keys and values of 2 layers


def test_settings_share_one_program(calls):
  model = build(classes=3)
  programs = calls(type(model.transformer), 'cache')
  for label, temperature, guidance in ((0, 1.0, 1.5), (2, 0.5, 3.0), (1, 0.0, 0.0)):
    sample(model, 4, label=jnp.full(4, label), temperature=temperature, guidance=guidance, **BOTH)
  assert len(programs) == 1


def test_eight_devices_draw_the_same_without_moving_the_batch():
  model, settings = build(), AutoregressiveSettings(**BOTH)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  keys = example_keys(0, jnp.arange(16))
  with jax.default_matmul_precision('highest'):
    one = generate(model, None, keys=keys, settings=settings).tokens
    with jax.set_mesh(mesh):
      batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (['data'], []))
      placed, split = jax.device_put(model, whole), jax.device_put(keys, batch)
      program = generate.lower(placed, None, keys=split, settings=settings).compile()
      eight = program(placed, None, keys=split, settings=settings).tokens
  assert np.mean(np.asarray(one) == np.asarray(eight)) >= 0.99
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in program.as_text()


def test_unknown_kinds_are_refused():
  for settings in (dict(cache='int4'), dict(weights='int4')):
    with pytest.raises(ValueError, match='int4'):
      sample(build(), 2, **settings)
