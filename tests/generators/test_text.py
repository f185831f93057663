"""Laws of text conditions: padding is never read, no text is the null condition, both ways in."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.generators.autoregressive import AutoregressiveConfig, AutoregressiveSettings
from smalti.generators.generator import example_keys, generate
from smalti.generators.text import ByteEncoderConfig, TextConfig
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SPEC = TokenSpec(grid=(2, 3), vocab=(5,))
SMALL = TokenSpec(grid=(3,), vocab=(4,))
SLOTS, WIDTH = 6, 16
WAYS = ['prefix', 'memory']


@functools.cache
def build(way, kind='features', spec=SPEC, classes=0, anneal=None, axes=2, slots=SLOTS,
          **transformer):
  """A model with weights large enough that text decides much of its distribution."""
  body = TransformerConfig(layers=1, width=WIDTH, heads=2, remat=False)
  text = (TextConfig(length=slots, width=WIDTH) if kind == 'features' else
          TextConfig(length=slots, encoder=ByteEncoderConfig(transformer=body)))
  config = AutoregressiveConfig(
      classes=classes, text=text, anneal=anneal, transformer=TransformerConfig(
          layers=2, width=32, heads=4, axes=axes, memory=WIDTH if way == 'memory' else 0,
          remat=False, **transformer))
  model = config.build(spec, rngs=nnx.Rngs(0))
  model.head.kernel[...] = 0.3 * jax.random.normal(jax.random.key(7), model.head.kernel.shape)
  model.token.embedding[...] *= 50
  blocks = model.transformer.blocks
  linears = [blocks.attention.key_value, blocks.attention.out]
  if way == 'memory':
    linears += [blocks.cross.attention.query, blocks.cross.attention.key_value,
                blocks.cross.attention.out]
  else:
    linears += [model.text.up, model.text.down]
  if kind != 'features':
    model.text.encoder.byte.embedding[...] *= 50
  for linear in linears:
    linear.kernel[...] *= 10
  return model


def condition(n, kind='features', seed=3):
  """Texts of 1 to T slots, one of them with its padding on the left and one with a gap."""
  rng = np.random.default_rng(seed)
  mask = np.arange(SLOTS) < rng.integers(1, SLOTS + 1, n)[:, None]
  if n > 2:
    mask[0], mask[1] = np.arange(SLOTS) >= 2, np.arange(SLOTS) % 2 == 0
  text = (rng.normal(size=(n, SLOTS, WIDTH)).astype(np.float32) if kind == 'features' else
          rng.integers(0, 256, (n, SLOTS)).astype(np.uint8))
  return {'text': jnp.asarray(text), 'text_mask': jnp.asarray(mask)}


def codes(n, spec=SPEC, seed=1):
  return jax.random.randint(jax.random.key(seed), (n, spec.length, spec.depth), 0, spec.vocab[0])


def sample(model, n, given, seed=0, **settings):
  return generate(model, given, keys=example_keys(seed, jnp.arange(n)),
                  settings=AutoregressiveSettings(**settings))


log_prob = jax.jit(lambda model, batch: model.log_prob(batch))
logits = jax.jit(lambda model, tokens, given: model._logits(
    tokens, model._label(given, len(tokens)), None, None, model._read(given, len(tokens))))
either = pytest.mark.parametrize('way', WAYS)


@either
@pytest.mark.parametrize('kind', ['features', 'bytes'])
def test_what_is_padded_is_never_read(way, kind):
  model, given = build(way, kind), condition(4, kind)
  batch = {'tokens': codes(4)}
  plain = log_prob(model, batch | given)
  mask = given['text_mask']
  other = condition(4, kind, seed=8)['text']
  wide = mask[..., None] if kind == 'features' else mask
  changed = given | {'text': jnp.where(wide, given['text'], other)}
  np.testing.assert_array_equal(log_prob(model, batch | changed), plain)
  if kind == 'features':
    broken = given | {'text': jnp.where(wide, given['text'], jnp.nan)}
    np.testing.assert_array_equal(log_prob(model, batch | broken), plain)
  real = given | {'text': jnp.where(wide, other, given['text'])}  # the negative control
  assert np.abs(log_prob(model, batch | real) - plain).min() > 1e-3
  drawn = [sample(model, 4, x).tokens for x in (given, changed)]
  np.testing.assert_array_equal(*drawn)


@either
@pytest.mark.parametrize('kind', ['features', 'bytes'])
def test_padding_leaves_no_trace(way, kind):
  """Slots that are masked might as well not be there: a model of as many slots as are real."""
  model, given = build(way, kind), condition(4, kind)
  short = build.__wrapped__(way, kind, slots=3)
  graph, params = nnx.split(short)
  null = params['text']['null']
  params = nnx.state(model, nnx.Param)
  params['text']['null'] = null
  few = {'text': given['text'][:, :3], 'text_mask': jnp.ones((4, 3), bool)}
  mask = jnp.broadcast_to(jnp.arange(SLOTS) < 3, (4, SLOTS))
  tokens = codes(4)
  np.testing.assert_allclose(
      log_prob(model, {'tokens': tokens, 'text': given['text'], 'text_mask': mask}),
      log_prob(nnx.merge(graph, params), {'tokens': tokens} | few), atol=1e-4)


@either
@pytest.mark.parametrize('kind', ['features', 'bytes'])
def test_no_text_is_the_null_condition(way, kind):
  model, given = build(way, kind), condition(4, kind)
  batch = {'tokens': codes(4)}
  empty = given | {'text_mask': jnp.zeros((4, SLOTS), bool)}
  null = log_prob(model, batch)
  assert np.isfinite(null).all()
  np.testing.assert_array_equal(log_prob(model, batch | empty), null)
  assert np.abs(log_prob(model, batch | given) - null).min() > 1e-3
  drawn = sample(model, 4, empty)
  np.testing.assert_array_equal(drawn.tokens, sample(model, 4, None).tokens)
  np.testing.assert_allclose(  # not through the same code only: an empty row beside full ones
      log_prob(model, batch | given | {'text_mask': given['text_mask'].at[2].set(False)})[2],
      null[2], atol=1e-5)


@either
def test_probabilities_of_all_arrays_sum_to_one(way):
  model = build(way, spec=SMALL, axes=1)
  arrays = jnp.asarray(list(itertools.product(range(4), repeat=3)))[..., None]
  one = jax.tree.map(lambda x: jnp.repeat(x[:1], len(arrays), 0), condition(4))
  total = np.exp(np.asarray(log_prob(model, {'tokens': arrays} | one), np.float64))
  assert total.sum() == pytest.approx(1, abs=1e-5)
  assert total.max() > 2 * total.mean()


@pytest.mark.parametrize('way, kv_heads, anneal, modulated', [
    ('prefix', None, None, False), ('memory', 2, None, False), ('prefix', None, (0, 0), True),
    ('memory', None, (0, 0), True)])
def test_decoding_equals_the_full_pass(way, kv_heads, anneal, modulated):
  """What cached steps say of a sample, with ragged text, is what the parallel pass says of it."""
  model = build.__wrapped__(
      way, anneal=anneal, kv_heads=kv_heads, modulated=modulated, axes=0 if anneal else 2)
  if modulated:
    model.transformer.blocks.modulation.kernel[...] = 0.1 * jax.random.normal(
        jax.random.key(5), model.transformer.blocks.modulation.kernel.shape)
  given = condition(8)
  drawn = sample(model, 8, given)
  batch = {'tokens': drawn.tokens}
  np.testing.assert_allclose(drawn.log_prob, log_prob(model, batch | given), atol=1e-4)
  assert np.abs(drawn.log_prob - log_prob(model, batch)).max() > 1e-2
  assert drawn.nfe == SPEC.length + (way == 'prefix')  # and one for the text


@either
def test_guided_decoding_equals_the_full_pass(way):
  """With labels beside text: both are dropped together."""
  model, scale = build(way, classes=3), 1.7
  given = condition(4) | {'label': jnp.array([0, 1, 2, 0])}
  drawn = sample(model, 4, given, guidance=scale)
  conditional = logits(model, drawn.tokens[..., 0], given)
  null = logits(model, drawn.tokens[..., 0], {})
  logs = jax.nn.log_softmax(null + scale * (conditional - null))
  picked = jnp.take_along_axis(logs, drawn.tokens, -1)[..., 0].sum(-1)
  np.testing.assert_allclose(drawn.log_prob, picked, atol=1e-4)
  assert drawn.nfe == 2 * (SPEC.length + (way == 'prefix'))
  one = sample(model, 4, given, guidance=1.0)  # the same program: only the scale is another
  np.testing.assert_array_equal(one.tokens, sample(model, 4, given).tokens)
  zero = sample(model, 4, given, guidance=0.0)
  np.testing.assert_array_equal(zero.tokens, sample(model, 4, None).tokens)
  assert (one.tokens != zero.tokens).any()


@either
def test_a_known_prefix_is_read_with_the_text(way):
  model, given = build(way), condition(4)
  whole = sample(model, 4, given)
  mask = jnp.broadcast_to((jnp.arange(6) < 2)[:, None], (4, 6, 1))
  again = generate(model, given, keys=example_keys(0, jnp.arange(4)), known=whole.tokens,
                   known_mask=mask, settings=AutoregressiveSettings(prefill=2))
  np.testing.assert_array_equal(again.tokens, whole.tokens)
  assert again.nfe == 5 and again.exact.all()


@either
def test_batch_size_leaves_the_tokens(way):
  model, given = build(way), condition(7)
  with jax.default_matmul_precision('highest'):
    whole = np.asarray(sample(model, 7, given).tokens)
    for i in range(7):
      alone = generate(model, jax.tree.map(lambda x, i=i: x[i:i + 1], given),
                       keys=example_keys(0, jnp.arange(i, i + 1)),
                       settings=AutoregressiveSettings())
      np.testing.assert_array_equal(alone.tokens[0], whole[i])
  assert len(np.unique(whole, axis=0)) > 4


def test_new_texts_share_one_program(calls):
  model = build.__wrapped__('memory', 'bytes')
  programs = calls(type(model), 'sample')
  for seed in range(3):
    sample(model, 2, condition(2, 'bytes', seed), seed, guidance=1.0 + seed)
  assert len(programs) == 1


@either
def test_the_whole_condition_is_dropped_per_example(way, key):
  """A share of rows has neither label nor text; none has one of both."""
  model = nnx.merge(*nnx.split(build(way, classes=3)))
  model.label_dropout = 0.5
  batch = {'tokens': codes(64), 'label': jnp.arange(64) % 3} | condition(64)
  full, null = (np.asarray(log_prob(model, x)) for x in (batch, {'tokens': batch['tokens']}))
  value = jax.jit(lambda batch: model.loss(batch, step=0, key=key)[0])(batch)
  dropped = np.asarray(jax.random.bernoulli(jax.random.split(key, 3)[0], 0.5, (64,)))
  assert 20 < dropped.sum() < 44
  expected = -np.where(dropped, null, full).mean() / 6
  assert float(value) == pytest.approx(expected, rel=1e-5)
  assert abs(full.mean() + 6 * expected) > 0.1 and abs(null.mean() + 6 * expected) > 0.1


@either
def test_the_encoder_and_the_null_are_trained(way, key):
  """Gradients reach the bytes that are there, those alone, and the null of dropped rows."""
  model = build(way, 'bytes')
  graph, params = nnx.split(model)
  batch = {'tokens': codes(8)} | condition(8, 'bytes')
  slope = jax.jit(jax.grad(lambda params, batch: nnx.merge(graph, params).loss(
      batch, step=0, key=jax.random.fold_in(key, 1))[0]))
  slopes = slope(params, batch)
  rows = np.abs(slopes['text']['encoder']['byte']['embedding'][...]).max(1) > 0
  shown = np.unique(np.asarray(batch['text'])[np.asarray(batch['text_mask'])])
  assert set(np.flatnonzero(rows)) <= set(shown) and rows.sum() > len(shown) / 2
  empty = batch | {'text_mask': jnp.zeros((8, SLOTS), bool)}
  slopes = slope(params, empty)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
  assert np.abs(slopes['text']['null']['embedding'][...]).max(1).min() > 0
  assert not np.abs(slopes['text']['encoder']['byte']['embedding'][...]).any()


def test_hidden_states_lead_to_the_logits():
  for way in WAYS:
    model, tokens = build(way), codes(2)
    states = jax.jit(lambda tokens, model=model: model.hidden(tokens, blocks=(2,)))(tokens)
    expected = logits(model, tokens[..., 0], {})  # the text is not told
    np.testing.assert_allclose(model.head(model.transformer.norm(states[0])), expected, atol=1e-4)


def test_slots_of_text_are_at_the_origin():
  places = np.asarray(build('prefix')._positions())
  np.testing.assert_array_equal(places[:SLOTS + 2], np.zeros((SLOTS + 2, 2)))
  np.testing.assert_array_equal(places[SLOTS + 2:], [[0, 1], [0, 2], [1, 0], [1, 1]])


def make(text, **transformer):
  options = dict(layers=1, width=32, heads=4, axes=2) | transformer
  return AutoregressiveConfig(text=text, transformer=TransformerConfig(**options)).build(
      SPEC, rngs=nnx.Rngs(0))


BODY = TransformerConfig(layers=1, width=WIDTH, heads=2)


@pytest.mark.parametrize('attempt, message', [
    (lambda: make(None, memory=16), 'is for text'),
    (lambda: make(TextConfig(length=4, width=8), memory=16), 'must be 8'),
    (lambda: make(TextConfig(length=4)), 'either a width'),
    (lambda: make(TextConfig(length=4, width=16, encoder=ByteEncoderConfig(transformer=BODY))),
     'either a width'),
    (lambda: make(TextConfig(length=4, encoder=ByteEncoderConfig(
        transformer=TransformerConfig(layers=1, width=16, heads=2, axes=2)))), 'axes=2'),
    (lambda: log_prob(build('memory'), {'tokens': codes(4), 'text': condition(4)['text']}),
     'needs text_mask'),
    (lambda: log_prob(build('memory'), {'tokens': codes(4)} | condition(4, 'bytes')),
     'is not float features'),
    (lambda: log_prob(build('memory', 'bytes'), {'tokens': codes(4)} | condition(4)),
     'is not bytes'),
    (lambda: build('memory').loss({'tokens': codes(4)}, step=0, key=jax.random.key(0)),
     'an entry `text`'),
    (lambda: sample(build('memory'), 4, {'label': jnp.zeros(4, int)}), 'reads text, text_mask'),
    (lambda: build('memory').advance(None, None, jnp.zeros(4, int), 0), '`advance` has no place'),
    (lambda: BODY and build('memory').transformer(jnp.zeros((1, 2, 32)), positions=jnp.zeros(
        (2, 2), int)), 'A memory of width 0')])
def test_what_cannot_work_is_refused(attempt, message, unchecked):
  with pytest.raises(ValueError, match=message):
    attempt()
