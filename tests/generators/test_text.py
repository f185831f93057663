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
def build(way, kind='features', spec=SPEC, classes=0, scale=10, **changes):
  """A model with weights large enough that text decides much of its distribution."""
  body = TransformerConfig(layers=1, width=WIDTH, heads=2)
  text = (TextConfig(length=SLOTS, width=WIDTH) if kind == 'features' else
          TextConfig(length=SLOTS, encoder=ByteEncoderConfig(transformer=body)))
  options = {'axes': len(spec.view('flat').grid)} | changes.pop('transformer', {})
  config = AutoregressiveConfig(classes=classes, text=text, transformer=TransformerConfig(
      layers=2, width=32, heads=4, memory=WIDTH if way == 'memory' else 0, **options), **changes)
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
    linear.kernel[...] *= scale
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
    tokens, jnp.full(len(tokens), model.classes), None, None, model._read(given, len(tokens))))
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
  model = build(way, spec=SMALL)
  arrays = jnp.asarray(list(itertools.product(range(4), repeat=3)))[..., None]
  one = jax.tree.map(lambda x: jnp.repeat(x[:1], len(arrays), 0), condition(4))
  total = np.exp(np.asarray(log_prob(model, {'tokens': arrays} | one), np.float64))
  assert total.sum() == pytest.approx(1, abs=1e-5)
  assert total.max() > 2 * total.mean()


@either
@pytest.mark.parametrize('changes', [
    {}, {'kv_heads': 2}, {'anneal': (0, 0)}, {'anneal': (0, 0), 'modulated': True}], ids=str)
def test_decoding_equals_the_full_pass(way, changes):
  """What cached steps say of a sample, with ragged text, is what the parallel pass says of it."""
  body = {k: v for k, v in changes.items() if k in ('kv_heads', 'modulated')}
  rest = {k: v for k, v in changes.items() if k == 'anneal'}
  if rest:
    body |= {'axes': 0}
  # not through the cache of `build`: its arguments must hash
  model = build.__wrapped__(way, transformer=body, **rest)
  if body.get('modulated'):
    model.transformer.blocks.modulation.kernel[...] = 0.1 * jax.random.normal(
        jax.random.key(5), model.transformer.blocks.modulation.kernel.shape)
  given = condition(8)
  drawn = sample(model, 8, given)
  batch = {'tokens': drawn.tokens}
  np.testing.assert_allclose(drawn.log_prob, log_prob(model, batch | given), atol=1e-4)
  assert np.abs(drawn.log_prob - log_prob(model, batch)).max() > 1e-2
  assert drawn.nfe == SPEC.length + (way == 'prefix')
