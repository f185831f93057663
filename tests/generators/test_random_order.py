"""Autoregression in any order: every order is a distribution, and infilling is exact in all."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from smalti.generators import autoregressive
from smalti.generators.autoregressive import (
    Autoregressive,
    AutoregressiveConfig,
    AutoregressiveSettings,
    _shuffled,
)
from smalti.generators.generator import example_keys, generate
from smalti.generators.text import TextConfig
from smalti.networks.transformer import Transformer, TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SPEC = TokenSpec(grid=(3,), vocab=(4,))
ALL = jnp.array(list(itertools.product(range(4), repeat=3)), jnp.int32)[..., None]


@functools.cache
def build(modulated=False, classes=0):
  config = AutoregressiveConfig(
      classes=classes, anneal=(10, 20), transformer=TransformerConfig(
          layers=2, width=32, heads=4, axes=0, modulated=modulated))
  model = config.build(SPEC, rngs=nnx.Rngs(0))
  rows = [model.token, model.label, model.place, model.next]
  for table in [*rows, model.slot] if modulated else rows:
    table.embedding[...] *= 40
  model.head.kernel[...] = 0.3 * jax.random.normal(jax.random.key(7), model.head.kernel.shape)
  if modulated:
    for kernel in (model.transformer.blocks.modulation.kernel, model.transformer.modulation.kernel):
      kernel[...] = 0.1 * jax.random.normal(jax.random.key(8), kernel.shape)
  return model


log_prob = jax.jit(lambda model, batch, order: model.log_prob(batch, order))


def orders(order):
  return jnp.broadcast_to(jnp.array(order), (len(ALL), 3))


def sample(model, n, seed=0, known=None, known_mask=None, **settings):
  return generate(model, None, keys=example_keys(seed, jnp.arange(n)), known=known,
                  known_mask=known_mask, settings=AutoregressiveSettings(**settings))


@pytest.mark.parametrize('modulated', [False, True])
def test_every_order_is_a_distribution_of_its_own(modulated):
  model = build(modulated)
  found = [np.asarray(log_prob(model, {'tokens': ALL}, orders(order)))
           for order in itertools.permutations(range(3))]
  for row in found:
    assert np.exp(row).sum() == pytest.approx(1, abs=1e-5)
  assert min(np.abs(a - b).max() for a, b in itertools.combinations(found, 2)) > 1e-2
  np.testing.assert_array_equal(
      log_prob(model, {'tokens': ALL}, None), found[0])  # row-major


def test_random_orders_have_the_mean_over_all_of_them():
  """A bound of log mean p(x | order), which is a distribution; row by row it is exact."""
  model, batch = build(), {'tokens': ALL}
  nats = jax.jit(lambda model, key, settings: model.nats(batch, key=key, settings=settings))
  found = np.array([log_prob(model, batch, orders(order))
                    for order in itertools.permutations(range(3))])
  random = AutoregressiveSettings(order='random')
  drawn = np.array([nats(model, key, random) for key in jax.random.split(jax.random.key(1), 300)])
  error = found.std(0) / 8 ** .5 / 300 ** .5
  assert (abs(drawn.mean(0) - found.mean(0)) < 4.5 * error + 1e-4).all()
  assert (abs(drawn.mean(0) - found[0]) > 4.5 * error + 1e-4).any()  # not those of row by row
  assert model.likelihood(random) == 'bound' and model.likelihood() == 'exact'
  np.testing.assert_allclose(
      nats(model, jax.random.key(0), AutoregressiveSettings()), found[0], atol=1e-6)


def test_a_slot_reads_the_codes_before_it_and_is_told_what_comes_next():
  model = build()
  tokens, label = jnp.array([[1, 2, 3]]), jnp.zeros(1, int)
  logits = lambda tokens, order: model._logits(  # noqa: E731
      tokens, label, None, jnp.array([order]))[0]
  base, other = logits(tokens, [2, 0, 1]), logits(tokens.at[0, 2].set(0), [2, 0, 1])
  np.testing.assert_array_equal(base, other)  # the last code is predicted alone
  later = logits(tokens.at[0, 1].set(0), [2, 0, 1])
  np.testing.assert_array_equal(base[:2], later[:2])
  assert np.abs(base[2] - later[2]).max() > 1e-3
  swapped = logits(tokens, [2, 1, 0])
  assert np.abs(base[1] - swapped[1]).max() > 1e-3  # the same codes before, another to predict


@pytest.mark.parametrize('table, moved', [
    ('place', {2: [1, 2], 0: [2], 1: []}), ('next', {2: [0, 1, 2], 0: [1, 2], 1: [2]})])
def test_tables_of_places_follow_the_order_of_the_codes(table, moved):
  """In the order 2, 0, 1 slot i reads the place of its code and of the next, then all see it."""
  model = nnx.clone(build())
  rows = getattr(model, table).embedding
  before, tokens, label = rows[...], jnp.array([[1, 2, 3]]), jnp.zeros(1, int)
  base = model._logits(tokens, label, None, jnp.array([[2, 0, 1]]))[0]
  for row, outputs in moved.items():
    rows[...] = before.at[row].multiply(-1)
    change = np.abs(model._logits(tokens, label, None, jnp.array([[2, 0, 1]]))[0] - base).max(-1)
    np.testing.assert_array_equal(np.flatnonzero(change), outputs)
    assert (change[outputs] > 1e-3).all()


@pytest.mark.parametrize('modulated', [False, True])
def test_samples_report_the_log_probability_of_their_own_order(modulated):
  model, n = build(modulated), 64
  found = sample(model, n)
  np.testing.assert_allclose(
      found.log_prob, log_prob(model, {'tokens': found.tokens}, None), atol=1e-4)
  drawn = sample(model, n, order='random')
  own = jax.vmap(lambda key: jax.random.permutation(jax.random.fold_in(key, 3), 3))(
      example_keys(0, jnp.arange(n)))
  own = jnp.argsort(own, -1)
  np.testing.assert_allclose(
      drawn.log_prob, log_prob(model, {'tokens': drawn.tokens}, own), atol=1e-4)
  assert len(np.unique(np.asarray(own), axis=0)) == 6


@pytest.mark.parametrize('held', [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_infilling_is_the_exact_conditional_wherever_the_known_codes_are(held):
  model, n = build(), 4000
  free = [i for i in range(3) if i not in held]
  known = jnp.broadcast_to(jnp.array([[[1], [2], [3]]], jnp.int32), (n, 3, 1))
  mask = jnp.zeros((n, 3, 1), bool).at[:, jnp.array(held)].set(True)
  found = sample(model, n, known=known, known_mask=mask)
  assert found.exact.all()
  np.testing.assert_array_equal(found.tokens[:, jnp.array(held)], known[:, jnp.array(held)])
  table = np.exp(np.asarray(log_prob(model, {'tokens': ALL}, orders([*held, *free])), np.float64))
  table = table.reshape(4, 4, 4)
  given = table[tuple(i + 1 if i in held else slice(None) for i in range(3))].reshape(-1)
  given = given / given.sum()
  codes = np.asarray(found.tokens)[:, free, 0] @ (4 ** np.arange(len(free))[::-1])
  counts = np.bincount(codes, minlength=len(given))
  enough = given * n > 5  # rare ones together
  pool = lambda x: np.append(x[enough], x[~enough].sum() + 1e-9)  # noqa: E731
  want = pool(given * n)
  assert stats.chisquare(pool(counts), want * pool(counts).sum() / want.sum()).pvalue > 1e-3
  wrong = np.roll(given, 1) * n + 1e-9  # the control
  assert stats.chisquare(counts, wrong * n / wrong.sum()).pvalue < 1e-6


def test_the_share_of_random_orders_falls_as_the_config_says(key):
  model = build()
  np.testing.assert_allclose([model._share(i) for i in (0, 10, 15, 20, 99)], [1, 1, .5, 0, 0])
  raster = model._raster(6000)
  for share in (0.0, 0.5, 1.0):
    found = np.asarray(_shuffled(key, raster, jnp.float32(share)))
    assert (np.sort(found, -1) == np.arange(3)).all()
    places = np.bincount(found @ [9, 3, 1], minlength=27)
    places = places[places > 0] / 6000
    same = (found == np.arange(3)).all(-1).mean()
    assert same == pytest.approx(1 - share + share / 6, abs=0.03)
    if share == 1:
      np.testing.assert_allclose(places, 1 / 6, atol=0.03)
  tokens = jnp.broadcast_to(jnp.array([[[1], [2], [3]]]), (64, 3, 1))
  values = [model.loss({'tokens': tokens}, step=s, key=key)[0] for s in (0, 20)]
  assert float(values[1]) == pytest.approx(
      -float(log_prob(model, {'tokens': tokens[:1]}, None)[0]) / 3, rel=1e-5)
  assert abs(float(values[0] - values[1])) > 1e-3


def test_no_two_draws_of_a_step_share_a_key(monkeypatch):
  """`split(key, n)[i]` is `fold_in(key, i)`: an order must not come from a key of dropout."""
  model = AutoregressiveConfig(
      classes=2, text=TextConfig(length=2, width=4), dropout=.1, anneal=(10, 20),
      transformer=TransformerConfig(layers=1, width=8, heads=2, axes=0)).build(
          SPEC, rngs=nnx.Rngs(0))
  text, seen = model.text, []

  def note(key):
    seen.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))

  def bernoulli(key, rate, shape):
    note(key)
    return jnp.zeros(shape, bool)

  monkeypatch.setattr(autoregressive, '_shuffled', lambda key, order, _: (note(key), order)[1])
  monkeypatch.setattr(autoregressive, 'dropout', lambda x, _, key: (note(key), x)[1])
  monkeypatch.setattr(Autoregressive, '_read', lambda self, batch, size, dropped, key: (
      note(key), text(batch, size))[1])
  monkeypatch.setattr(Transformer, '__call__', lambda self, x, *, key, **_: (note(key), x)[1])
  monkeypatch.setattr(jax.random, 'bernoulli', bernoulli)
  model.loss({'tokens': ALL[:4], 'label': jnp.zeros(4, int), 'text': jnp.ones((4, 2, 4)),
              'text_mask': jnp.ones((4, 2), bool)}, step=0, key=jax.random.key(0))
  assert len(seen) == 5 and len(set(seen)) == 5


def test_what_cannot_be_permuted_is_refused():
  options = dict(anneal=(0, 1), transformer=TransformerConfig(layers=1, width=8, heads=2, axes=0))
  for spec in (TokenSpec(grid=(3,), vocab=(4, 4)), TokenSpec(grid=(3,), vocab=(4,), eos=3)):
    with pytest.raises(ValueError, match='leave anneal at none'):
      AutoregressiveConfig(**options).build(spec, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='positions are learned; set 0'):
    AutoregressiveConfig(anneal=(0, 1), transformer=TransformerConfig(
        layers=1, width=8, heads=2)).build(SPEC, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='the second no earlier'):
    AutoregressiveConfig(**{**options, 'anneal': (5, 1)}).build(SPEC, rngs=nnx.Rngs(0))
  plain = AutoregressiveConfig(transformer=TransformerConfig(
      layers=1, width=8, heads=2)).build(SPEC, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='train it with anneal'):
    sample(plain, 2, order='random')
  nested = TokenSpec(grid=(3,), vocab=(4,), order='nested', budgets=(1, 2, 3))
  model = AutoregressiveConfig(**options).build(nested, rngs=nnx.Rngs(0))
  last = jnp.broadcast_to(jnp.arange(3)[:, None] == 2, (2, 3, 1))
  with pytest.raises(ValueError, match='keep=2 with known codes'):  # it would draw one of two
    sample(model, 2, known=jnp.zeros((2, 3, 1), jnp.int32), known_mask=last, keep=2)
