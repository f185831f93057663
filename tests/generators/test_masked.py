"""Masked generation against distributions known exactly.

`Exact` replaces the network by the conditionals of a joint table, so that bounds, samplers and
infilling can be compared with numbers worked out by hand.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from smalti.generators import masking, schedules
from smalti.generators.generator import example_keys, generate
from smalti.generators.masked import Masked, MaskedConfig, MaskedSettings
from smalti.generators.tabular import conditionals
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

P = np.array([[.4, .1], [.2, .3]])
PAIR = TokenSpec(grid=(2,), vocab=(2,))
PAIRS = jnp.array(list(itertools.product(range(2), repeat=2)), jnp.int32)[..., None]
INDEPENDENT = np.outer([.5, .5], [.6, .4])
ENTROPY, INFORMATION = 1.2798542258, .0863046217
SCHEDULES = ('linear', 'cosine', 'polynomial', 'geometric')
SAMPLERS = ('ancestral', 'maskgit', 'first_hitting', 'confidence', 'halton', 'remdm')


def config(**options) -> MaskedConfig:
  body = dict(layers=1, width=16, heads=2, remat=False) | options.pop('transformer', {})
  return MaskedConfig(transformer=TransformerConfig(**body), **options)


class Exact(Masked):
  """The conditionals of one table per label (or of one table), instead of a network."""

  def __init__(self, spec, *tables, **options):
    super().__init__(config(**options), spec, rngs=nnx.Rngs(0))
    self.tables = tuple(map(tuple, (np.asarray(t).reshape(-1) for t in tables)))

  def logits(self, tokens, masked, labels, **_):
    shape = self.flat.vocab * self.flat.length
    rows = [conditionals(jnp.array(table).reshape(shape), tokens[..., None], ~masked[..., None])
            for table in self.tables]
    rows = jnp.stack(rows)[:, :, :, 0]
    if labels is None:
      return rows[0]
    return jnp.take_along_axis(rows, labels[None, :, None, None], 0)[0]


class Blind(Exact):
  """The marginals, whatever is visible."""

  def logits(self, tokens, masked, labels, **options):
    return super().logits(tokens, jnp.ones_like(masked), labels, **options)


def frequencies(model, settings, n=20000, seed=0, **known):
  """How often every token array is drawn."""
  if known:
    known = {k: jnp.broadcast_to(v, (n, *v.shape[-2:])) for k, v in known.items()}
  sample = generate(model, None, keys=example_keys(seed, jnp.arange(n)), settings=settings, **known)
  tokens = np.asarray(sample.tokens).reshape(n, -1)
  flat = np.ravel_multi_index(tuple(tokens.T), model.flat.vocab * model.flat.length)
  return np.bincount(flat, minlength=model.flat.vocab[0] ** model.flat.length)


# ---- the bound

@pytest.mark.parametrize('schedule', SCHEDULES)
def test_bound_is_tight_pointwise_with_exact_conditionals(schedule):
  model = Exact(PAIR, P, schedule=schedule)
  truth = np.array([.9162907, 2.3025851, 1.6094379, 1.2039728])
  np.testing.assert_allclose(
      -model.elbo({'tokens': PAIRS}, mode='enumerate'), truth, atol=1e-6)
  keys = jax.random.split(jax.random.key(1), 256)
  for mode in ('count', 'mc'):
    draws = jax.jit(jax.vmap(lambda key, mode=mode: -model.elbo(
        {'tokens': PAIRS}, key=key, mode=mode, samples=32)))(keys)
    error = np.std(draws, 0) / np.sqrt(len(keys))
    assert np.all(error < .15)
    assert np.all(np.abs(np.mean(draws, 0) - truth) < 4 * error), (mode, draws.mean(0), error)


def test_bound_of_context_free_and_uniform_predictors():
  blind = Blind(PAIR, P)
  np.testing.assert_allclose(
      -blind.elbo({'tokens': PAIRS}, mode='enumerate'),
      (1.2039728, 1.6094379, 1.2039728, 1.6094379), atol=1e-6)
  spec = TokenSpec(grid=(5,), vocab=(7,))
  fresh = Masked(config(), spec, rngs=nnx.Rngs(0))  # the head starts at zero
  batch = {'tokens': jnp.arange(10).reshape(2, 5, 1) % 7}
  for options in ({'mode': 'enumerate'}, {'mode': 'count', 'key': jax.random.key(0)}):
    np.testing.assert_allclose(-fresh.elbo(batch, **options), 5 * math.log(7), rtol=1e-6)


@pytest.mark.parametrize('steps', (1, 4))
def test_bound_of_discrete_steps_is_entropy_plus_information_over_steps(steps):
  model = Exact(PAIR, P)
  bound = -model.elbo({'tokens': PAIRS}, mode='enumerate', steps=steps)
  np.testing.assert_allclose(
      P.reshape(-1) @ np.asarray(bound), ENTROPY + INFORMATION / steps, atol=1e-6)
  draws = jax.vmap(lambda key: -model.elbo(
      {'tokens': PAIRS}, key=key, mode='mc', steps=steps, samples=64))(
          jax.random.split(jax.random.key(2), 64))
  error = np.std(draws, 0) / 8
  assert np.all(np.abs(np.mean(draws, 0) - bound) < 4 * error + 1e-5)


def test_bound_counts_what_geometric_leaves_visible():
  """A schedule that ends at alpha(1) = e^-high pays log V for each token it never hides."""
  model = Exact(PAIR, P, schedule='geometric')
  rest = float(model.schedule.alpha(jnp.ones(())))
  one = -model.elbo({'tokens': PAIRS}, mode='enumerate', steps=1)
  assert rest > 0
  np.testing.assert_allclose(
      one, -np.log(INDEPENDENT.reshape(-1)) + 2 * rest * math.log(2), atol=1e-6)


@pytest.mark.parametrize('options', (
    {'schedule': 'linear'}, {'schedule': 'cosine'}, {'schedule': 'polynomial'},
    {'schedule': 'geometric'}, {'objective': 'maskgit'},
    {'objective': 'maskgit', 'ratio': 'arccos'}, {'objective': 'maskgit', 'ratio': 'linear'},
    {'objective': 'maskgit', 'counts': 'round'},
    {'objective': 'maskgit', 'ratio': 'arccos', 'counts': 'bernoulli'}),
    ids=lambda options: '-'.join(options.values()))
def test_training_metric_is_an_unbiased_bound(options):
  model = Exact(PAIR, P, **options)
  batch = {'tokens': jnp.tile(PAIRS, (16, 1, 1))}  # each of the four 16 times
  truth = -np.log(P).mean() / 2

  def nll(key, train):
    return model.loss(batch, step=jnp.array(0), key=key, train=train)[1]['metrics']['nll']

  for train in (True, False) if options == {'schedule': 'linear'} else (True,):
    draws = jax.jit(jax.vmap(functools.partial(nll, train=train)))(
        jax.random.split(jax.random.key(3), 256))
    error = np.std(draws) / 16
    assert error < .02
    assert abs(np.mean(draws) - truth) < 4 * error


def test_held_out_estimator_has_less_variance_than_the_training_one():
  model = Exact(PAIR, P)
  batch = {'tokens': jnp.tile(PAIRS, (16, 1, 1))}
  spread = [np.std(jax.vmap(lambda key, train=train: model.loss(
      batch, step=jnp.array(0), key=key, train=train)[0])(jax.random.split(jax.random.key(3), 128)))
      for train in (True, False)]
  assert spread[1] < spread[0] / 2


@pytest.mark.parametrize('objective', ('elbo', 'maskgit'))
def test_times_are_the_strata_of_the_whole_batch_on_any_mesh(objective):
  """Strata that every device drew for itself would hide other tokens."""
  model = randomised(Masked(config(objective=objective), TokenSpec(grid=(6,), vocab=(5,)),
                            rngs=nnx.Rngs(0)))
  tokens = jax.random.randint(jax.random.key(3), (16, 6, 1), 0, 5)
  loss = jax.jit(lambda tokens: model.loss(
      {'tokens': tokens}, step=jnp.array(0), key=jax.random.key(0))[0])
  mesh = jax.sharding.Mesh(np.array(jax.devices()), 'data')
  sharded = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P('data')))
  np.testing.assert_allclose(loss(sharded), loss(tokens), rtol=1e-5)
  assert abs(loss(tokens) - loss(tokens[:8])) > 1e-3  # other strata, another value


def test_label_smoothing_spreads_over_possible_codes_only():
  spec = TokenSpec(grid=(3,), vocab=(3,), eos=2)
  model = Masked(config(objective='maskgit'), spec, rngs=nnx.Rngs(0))
  tokens = jnp.array([[0, 1, 2], [1, 2, 2], [2, 2, 2], [0, 0, 0]], jnp.int32)[..., None]
  for i in range(8):
    value, aux = model.loss({'tokens': tokens}, step=jnp.array(0), key=jax.random.key(i))
    assert np.isfinite(value) and 0 <= value <= math.log(3) + 1e-6
    assert aux['weight'] == aux['weight'].astype(int) >= 4  # hidden tokens


def test_cross_entropy_of_visible_tokens_has_its_weight():
  """(1 - e) -log p + e mean of -log p, over hidden tokens and at the weight over visible ones."""
  seen, spec = [], TokenSpec(grid=(6,), vocab=(5,))

  class Watched(Masked):
    def scores(self, tokens, masked, labels, **options):
      scores = super().scores(tokens, masked, labels, **options)
      seen.append((np.asarray(masked), np.asarray(jax.nn.log_softmax(scores))))
      return scores

  tokens = jax.random.randint(jax.random.key(3), (4, 6, 1), 0, 5)
  for weight in (0., .1, 1.):
    model = randomised(Watched(config(
        objective='maskgit', visible=weight, label_smoothing=.2), spec, rngs=nnx.Rngs(0)))
    value, aux = model.loss({'tokens': tokens}, step=jnp.array(0), key=jax.random.key(0))
    masked, log = seen[-1]
    smoothed = -.8 * np.take_along_axis(log, np.asarray(tokens), -1)[..., 0] - .2 * log.mean(-1)
    share = np.where(masked, 1, weight)
    np.testing.assert_allclose(value, (share * smoothed).sum() / share.sum(), rtol=1e-5)
    np.testing.assert_allclose(aux['weight'], share.sum(), rtol=1e-6)


def test_loss_is_per_valid_token():
  spec = TokenSpec(grid=(4,), vocab=(3,), eos=2)
  model = Masked(config(), spec, rngs=nnx.Rngs(0))
  tokens = jnp.array([[0, 1, 2, 2], [2, 2, 2, 2]], jnp.int32)[..., None]
  value, aux = model.loss({'tokens': tokens}, step=jnp.array(0), key=jax.random.key(0), train=False)
  assert aux['weight'] == 3 + 1
  np.testing.assert_allclose(aux['metrics']['bits_per_token'], value / math.log(2), rtol=1e-6)


def test_keep_leaves_out_what_is_not_real():
  """The bound of a prefix does not depend on what follows, which is neither seen nor scored."""
  spec = TokenSpec(grid=(4,), vocab=(3,), order='nested')
  model = randomised(Masked(config(), spec, rngs=nnx.Rngs(0)))
  keep = jnp.array([2, 2])
  tokens = jnp.array([[0, 1, 2, 0], [0, 1, 1, 2]], jnp.int32)[..., None]
  bound = model.elbo({'tokens': tokens, 'keep': keep}, mode='enumerate')
  np.testing.assert_allclose(bound[0], bound[1], rtol=1e-6)
  full = model.elbo({'tokens': tokens}, mode='enumerate')
  assert abs(full[0] - full[1]) > 1e-3
  batch = {'tokens': tokens, 'keep': keep}
  value, aux = model.loss(batch, step=jnp.array(0), key=jax.random.key(0))
  assert aux['weight'] == 4 and np.isfinite(value)


def randomised(model, scale=.5):
  """A network whose head is not zero."""
  head = model.head.kernel
  head[...] = scale * jax.random.normal(jax.random.key(9), head[...].shape)
  return model


def test_prediction_does_not_read_hidden_tokens_and_tells_positions_apart():
  spec = TokenSpec(grid=(2, 3), vocab=(5,))
  model = randomised(Masked(config(transformer={'axes': 2}), spec, rngs=nnx.Rngs(0)))
  tokens = jax.random.randint(jax.random.key(1), (1, 6), 0, 5)
  masked = jnp.array([[True, False, True, True, False, False]])
  other = jnp.where(masked, (tokens + 1) % 5, tokens)
  np.testing.assert_array_equal(
      model.logits(tokens, masked, None), model.logits(other, masked, None))
  blank = model.logits(tokens, jnp.ones_like(masked), None)[0]
  assert np.all(np.abs(blank[1:] - blank[:1]).max(-1) > 1e-3)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_the_last_step_to_the_clean_end_is_part_of_the_bound(schedule, monkeypatch):
  """For a context-free predictor all discretisations have one bound, however long that step is."""
  monkeypatch.setattr(masking, 'FLOOR', .3)
  model = Blind(PAIR, P, schedule=schedule)
  truth = model.elbo({'tokens': PAIRS}, mode='enumerate')
  draws = jax.jit(jax.vmap(lambda key: model.elbo(
      {'tokens': PAIRS}, key=key, mode='mc', samples=64)))(
          jax.random.split(jax.random.key(4), 256))
  error = np.std(draws, 0) / 16
  assert np.all(error < .02) and np.all(np.abs(np.mean(draws, 0) - truth) < 4 * error)


@pytest.mark.parametrize('objective', ('elbo', 'maskgit'))
def test_gradients_are_finite_beside_impossible_codes(objective):
  spec = TokenSpec(grid=(4,), vocab=(3,), eos=2)
  model = Masked(config(objective=objective, transformer={'dropout': .1}), spec, rngs=nnx.Rngs(0))
  tokens = jnp.array([[0, 1, 2, 2], [2, 2, 2, 2], [1, 0, 0, 1]] * 4, jnp.int32)[..., None]
  graph, params = nnx.split(model)

  @jax.jit
  def gradients(params, key):
    return jax.grad(lambda params: nnx.merge(graph, params).loss(
        {'tokens': tokens}, step=jnp.array(0), key=key)[0])(params)

  for i in range(4):
    leaves = jax.tree.leaves(gradients(params, jax.random.key(i)))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
    assert any(np.any(leaf) for leaf in leaves)


# ---- samplers

def test_first_hitting_samples_the_joint_exactly(fits):
  settings = MaskedSettings(sampler='first_hitting')
  counts = frequencies(Exact(PAIR, P), settings)
  assert fits(counts, P)
  assert not fits(counts, INDEPENDENT)  # the control: a wrong law must be noticed


@pytest.mark.parametrize('grid, steps, weight', [
    ('uniform', 4, .25), ('cosine', 4, .30448187), ('uniform', 1, 1.), ('cosine', 1, 1.)])
def test_ancestral_sampler_mixes_in_what_is_revealed_together(fits, grid, steps, weight):
  settings = MaskedSettings(sampler='ancestral', grid=grid, steps=steps)
  counts = frequencies(Exact(PAIR, P), settings)
  assert fits(counts, weight * INDEPENDENT + (1 - weight) * P)
  assert not fits(counts, P)


@pytest.mark.parametrize('grid, weight', [('uniform', .25), ('cosine', .30448187)])
def test_the_grid_of_the_sampler_is_not_warped_again_by_the_schedule(fits, grid, weight):
  """Times of the sampler are those of the linear schedule, whatever the model's was."""
  settings = MaskedSettings(sampler='ancestral', grid=grid, steps=4)
  counts = frequencies(Exact(PAIR, P, schedule='cosine'), settings, n=100_000)
  assert fits(counts, weight * INDEPENDENT + (1 - weight) * P)
  alpha = schedules.named('cosine').alpha(1 - jnp.asarray(schedules.visible(grid, 4)))
  warped = float(jnp.sum(jnp.diff(alpha) ** 2))  # the control
  assert not fits(counts, warped * INDEPENDENT + (1 - warped) * P)


def test_maskgit_choice_temperature_moves_between_greedy_and_exact(fits):
  model = Exact(PAIR, P)
  greedy = frequencies(model, MaskedSettings(steps=2, choice_temperature=0.))
  random = frequencies(model, MaskedSettings(steps=2, choice_temperature=1e9))
  assert fits(greedy, [[.56, .04], [.28, .12]])
  assert not fits(greedy, P)
  assert fits(random, P)
  assert not fits(random, [[.56, .04], [.28, .12]])


@functools.cache
def wide():
  """A 2 x 2 grid of two codes from three letters: correlated, with zeros."""
  spec = TokenSpec(grid=(2, 2), vocab=(3,))
  table = np.random.default_rng(0).dirichlet(np.full(81, .3)).reshape((3,) * 4)
  return Exact(spec, np.where(table < 1e-3, 0, table) / np.where(table < 1e-3, 0, table).sum())


def settings_of(sampler, **options):
  return MaskedSettings(sampler=sampler, steps=3, **options)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_same_tokens_in_any_batch_order_and_mesh(sampler):
  model, keys = wide(), example_keys(5, jnp.arange(64))

  def draw(keys):
    return np.asarray(generate(model, None, keys=keys, settings=settings_of(sampler)).tokens)

  tokens = draw(keys)
  assert len(np.unique(tokens, axis=0)) > 10
  np.testing.assert_array_equal(draw(keys[:1]), tokens[:1])
  np.testing.assert_array_equal(draw(keys[7:14]), tokens[7:14])
  if sampler == 'maskgit':
    np.testing.assert_array_equal(np.concatenate([draw(keys[:32]), draw(keys[32:])]), tokens)
  order = np.random.default_rng(0).permutation(64)
  np.testing.assert_array_equal(draw(keys[order]), tokens[order])
  mesh = jax.sharding.Mesh(np.array(jax.devices()), 'data')
  sharded = jax.device_put(keys, jax.NamedSharding(mesh, jax.P('data')))
  np.testing.assert_array_equal(draw(sharded), tokens)


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('steps', (1, 5))
def test_masks_shrink_to_nothing_and_known_tokens_stay(sampler, steps):
  """One count per row, known tokens never touched, nothing left masked, no MASK in a sample."""
  spec = TokenSpec(grid=(3, 4), vocab=(5,))
  model = randomised(Masked(config(), spec, rngs=nnx.Rngs(0)), 5.)
  known = jax.random.randint(jax.random.key(0), (6, 12, 1), 0, 5)
  known_mask = jnp.arange(12)[None, :, None] < jnp.array([0, 1, 5, 10, 11, 12])[:, None, None]
  sample = generate(
      model, None, keys=example_keys(0, jnp.arange(6)), known=known, known_mask=known_mask,
      settings=MaskedSettings(sampler=sampler, steps=steps, trace=True))
  tokens, states = np.asarray(sample.tokens), np.asarray(sample.steps)
  assert tokens.shape == (6, 12, 1) and tokens.min() >= 0 and tokens.max() < 5
  np.testing.assert_array_equal(tokens[known_mask], known[known_mask])
  np.testing.assert_array_equal(states[-1], tokens)
  left = (states == -1).sum((2, 3))
  assert np.all(left[-1] == 0)
  before = np.concatenate([np.array([[12, 11, 7, 2, 1, 0]]), left[:-1]])
  if sampler not in ('ancestral', 'remdm'):
    assert np.all((left < before) | (before == 0))
  for now, then in zip(states[:-1], states[1:]):
    if sampler != 'remdm':  # revealed tokens are final
      np.testing.assert_array_equal(then[now >= 0], now[now >= 0])
  assert sample.nfe == (12 if sampler in ('first_hitting', 'confidence') else steps)


def test_masking_again_with_no_strength_is_ancestral():
  model, keys = wide(), example_keys(5, jnp.arange(64))
  plain = generate(model, None, keys=keys, settings=settings_of('ancestral'))
  for remask in ('cap', 'rescale'):
    again = generate(model, None, keys=keys,
                     settings=settings_of('remdm', remask=remask, strength=0.))
    np.testing.assert_array_equal(again.tokens, plain.tokens)


@pytest.mark.parametrize('remask', ['cap', 'rescale', 'conf', 'loop'])
def test_revealed_tokens_are_masked_again_but_never_known_ones(remask):
  spec = TokenSpec(grid=(40,), vocab=(5,))
  model = randomised(Masked(config(), spec, rngs=nnx.Rngs(0)), 5.)
  known = jax.random.randint(jax.random.key(0), (64, 40, 1), 0, 5)
  known_mask = jnp.broadcast_to(jnp.arange(40)[None, :, None] < 8, known.shape)
  sample = generate(
      model, None, keys=example_keys(0, jnp.arange(64)), known=known, known_mask=known_mask,
      settings=MaskedSettings(sampler='remdm', grid='uniform', remask=remask, strength=.3, steps=20,
                              trace=True))
  states = np.asarray(sample.steps)[..., 0]
  np.testing.assert_array_equal(states[:, :, :8] == known[None, :, :8, 0], True)
  back = (states[:-1] >= 0) & (states[1:] == -1)
  assert 1 < back.sum((0, 2)).mean() and (states[-1] >= 0).all()
  assert not sample.exact.any()
  alpha = 1 - (states[:, :, 8:] == -1).mean((1, 2))
  want = np.arange(1, 21) / 20
  if remask == 'loop':
    want = np.interp(1 - want, [0, .05, .55, 1], [1, .9, .9, 0])
  if remask == 'conf':  # its chance is that of one token in all
    chance = schedules.remasking('conf', 'uniform', 20, 0.)[1]
    np.testing.assert_allclose(back.sum(2).mean(1), chance[1:], atol=4 / 64 ** .5)
  else:
    np.testing.assert_allclose(alpha, want, atol=4 * .5 / (64 * 32) ** .5)


def test_the_least_sure_tokens_are_masked_again_most():
  table = np.outer([.5, .5], [.98, .02])  # the second code is nearly certain
  sample = generate(
      Exact(PAIR, table), None, keys=example_keys(0, jnp.arange(4000)),
      settings=MaskedSettings(sampler='remdm', remask='conf', grid='uniform', steps=6, trace=True))
  states = np.asarray(sample.steps)[..., 0]
  both = (states[:-1] >= 0).all(-1, keepdims=True)
  back = (both & (states[1:] == -1)).sum((0, 1))
  want = np.exp([-.5, -.98]) / np.exp([-.5, -.98]).sum()  # of nearly all pairs
  np.testing.assert_allclose(back / back.sum(), want, atol=.03)


def test_masking_again_draws_from_the_marginals():
  counts = frequencies(Exact(PAIR, P), MaskedSettings(
      sampler='remdm', remask='rescale', strength=.5, grid='uniform', steps=8))
  ones = np.asarray(counts).reshape(2, 2)
  assert stats.chisquare(ones.sum(1), np.array([.5, .5]) * ones.sum()).pvalue > 1e-3
  assert stats.chisquare(ones.sum(0), np.array([.6, .4]) * ones.sum()).pvalue > 1e-3


def test_maskgit_counts_are_exact_when_all_confidences_tie():
  spec = TokenSpec(grid=(16,), vocab=(4,))
  model = Masked(config(), spec, rngs=nnx.Rngs(0))  # uniform: every confidence is the same
  sample = generate(
      model, None, keys=example_keys(0, jnp.arange(3)),
      settings=MaskedSettings(steps=4, choice_temperature=0., trace=True))
  left = (np.asarray(sample.steps) == -1).sum((2, 3))
  np.testing.assert_array_equal(left, np.array([[14], [11], [6], [0]]) + np.zeros((1, 3)))


def test_halton_reveals_in_its_order():
  spec = TokenSpec(grid=(16, 16), vocab=(2,))
  model = Masked(config(transformer={'width': 8, 'heads': 1}), spec, rngs=nnx.Rngs(0))
  sample = generate(model, None, keys=example_keys(0, jnp.arange(1)),
                    settings=MaskedSettings(sampler='halton', steps=32, trace=True))
  states = np.asarray(sample.steps)[:, 0, :, 0]
  first = [divmod(int(i), 16) for i in np.flatnonzero(states[0] >= 0)]
  assert sorted(first) == sorted([(8, 5), (4, 10), (12, 1), (2, 7), (10, 12)])
  np.testing.assert_array_equal((states >= 0).sum(1)[[1, 2, -2]], (10, 15, 215))


def test_temperature_zero_takes_the_likeliest_and_top_k_one_too(fits):
  model = Exact(PAIR, P)
  for options in ({'temperature': 0.}, {'top_k': 1}):
    counts = frequencies(model, MaskedSettings(steps=1, **options), n=64)
    np.testing.assert_array_equal(counts, (64, 0, 0, 0))  # .5 ties to 0, .6 is 0
  sharp = frequencies(model, MaskedSettings(steps=1, temperature=.5))
  law = np.outer([.5, .5], [.36 / .52, .16 / .52])
  assert fits(sharp, law) and not fits(sharp, INDEPENDENT)


# ---- infilling

@pytest.mark.parametrize('position', (0, 1))
def test_infilling_draws_the_conditional(fits, position):
  model = Exact(PAIR, P)
  known = jnp.array([1, 1])[:, None]
  known_mask = (jnp.arange(2) == position)[:, None]
  law = np.zeros((2, 2))
  law[(1, slice(None)) if position == 0 else (slice(None), 1)] = (
      P[1] / P[1].sum() if position == 0 else P[:, 1] / P[:, 1].sum())
  for sampler in ('first_hitting', 'maskgit', 'ancestral'):
    settings = MaskedSettings(sampler=sampler, steps=2)
    counts = frequencies(model, settings, known=known, known_mask=known_mask)
    assert fits(counts, law)


def test_infilling_of_a_larger_grid_is_exact_by_first_hitting(fits):
  model = wide()
  known = jnp.array([0, 2, 0, 1])[:, None]
  known_mask = jnp.array([False, True, False, True])[:, None]
  table = np.array(model.tables[0]).reshape((3,) * 4)
  law = np.zeros((3,) * 4)
  law[:, 2, :, 1] = table[:, 2, :, 1] / table[:, 2, :, 1].sum()
  counts = frequencies(model, MaskedSettings(sampler='first_hitting'),
                       known=known, known_mask=known_mask)
  assert fits(counts, law)
  assert not fits(frequencies(model, MaskedSettings(sampler='ancestral', steps=1),
                              known=known, known_mask=known_mask), law)


def test_exact_says_which_draws_are_the_model_s_own():
  model, keys = Exact(PAIR, P), example_keys(0, jnp.arange(3))
  known = jnp.zeros((3, 2, 1), jnp.int32)
  known_mask = jnp.array([[0, 0], [0, 1], [1, 1]], bool)[..., None]
  for sampler, exact in (('maskgit', (False, True, True)), ('first_hitting', (True,) * 3)):
    sample = generate(model, None, keys=keys, settings=MaskedSettings(sampler=sampler),
                      known=known, known_mask=known_mask)
    np.testing.assert_array_equal(sample.exact, exact)


# ---- strings with an end

def strings():
  """Three letters and an end, N = 4: a law over strings of 0 to 4 letters."""
  spec = TokenSpec(grid=(4,), vocab=(4,), eos=3)
  table = np.zeros((4,) * 4)
  weights = np.random.default_rng(1).gamma(.5, size=4**4)
  for i, row in enumerate(itertools.product(range(4), repeat=4)):
    row = np.array(row)[None, :, None]
    if np.array_equal(spec.canonical(row), row):
      table[tuple(row.reshape(-1))] = weights[i] + .05
  return Exact(spec, table / table.sum())


@pytest.mark.parametrize('sampler', ('ancestral', 'maskgit', 'first_hitting'))
def test_nothing_but_eos_follows_an_eos(sampler):
  model = strings()
  sample = generate(model, None, keys=example_keys(0, jnp.arange(500)),
                    settings=MaskedSettings(sampler=sampler, steps=2))
  tokens = np.asarray(sample.tokens)
  np.testing.assert_array_equal(model.spec.canonical(tokens), tokens)
  assert len(np.unique((tokens == 3).sum(1))) > 2  # several lengths occur


def test_strings_are_drawn_from_their_law(fits):
  model = strings()
  assert fits(frequencies(model, MaskedSettings(sampler='first_hitting')), model.tables[0])


def test_bound_of_strings_is_tight():
  model = strings()
  table = np.array(model.tables[0]).reshape((4,) * 4)
  rows = np.argwhere(table > 0)
  bound = model.elbo({'tokens': jnp.asarray(rows)[..., None]}, mode='enumerate')
  np.testing.assert_allclose(bound, np.log(table[tuple(rows.T)]), atol=1e-5)


def test_the_loss_is_the_mean_over_tokens_and_not_over_strings(check_token_mean):
  check_token_mean(strings())


def test_end_facts_hold_without_being_learned():
  """After a visible EOS only EOS; before a visible letter none: free of charge in the bound."""
  spec = TokenSpec(grid=(4,), vocab=(4,), eos=3)
  model = Masked(config(), spec, rngs=nnx.Rngs(0))
  tokens = jnp.array([[0, 3, 3, 3], [0, 1, 2, 0]])
  masked = jnp.array([[True, False, True, True], [True, True, False, True]])
  probs = np.asarray(jax.nn.softmax(model.scores(tokens, masked, None)))
  np.testing.assert_allclose(probs[0, 0], np.full(4, .25), rtol=1e-6)  # may be a repeat
  np.testing.assert_allclose(probs[0, 2:], np.tile(np.eye(4)[3], (2, 1)))
  np.testing.assert_allclose(probs[1, :2], np.tile([1/3, 1/3, 1/3, 0], (2, 1)), rtol=1e-6)
  np.testing.assert_allclose(probs[1, 3], np.full(4, .25), rtol=1e-6)


@pytest.mark.parametrize('sampler', ('ancestral', 'maskgit', 'first_hitting'))
def test_no_eos_between_a_known_prefix_and_a_known_eos(sampler):
  spec = TokenSpec(grid=(6,), vocab=(3,), eos=2)
  model = Masked(config(), spec, rngs=nnx.Rngs(0))
  model.head.bias[...] = jnp.array([0., 0., 4.])  # would rather stop
  known = jnp.tile(jnp.array([0, 1, 0, 0, 2, 2], jnp.int32)[None, :, None], (64, 1, 1))
  known_mask = jnp.tile(jnp.array([1, 0, 0, 0, 1, 0], bool)[None, :, None], (64, 1, 1))
  sample = generate(model, None, keys=example_keys(0, jnp.arange(64)), known=known,
                    known_mask=known_mask, settings=MaskedSettings(sampler=sampler, steps=2))
  tokens = np.asarray(sample.tokens)[..., 0]
  assert np.all(tokens[:, :4] < 2) and np.all(tokens[:, 4:] == 2)
  assert not np.any(sample.exact)  # the letters know more than the model was asked
  letter = known_mask.at[:, 4].set(False).at[:, 3].set(True)
  sample = generate(model, None, keys=example_keys(0, jnp.arange(64)), known=known,
                    known_mask=letter, settings=MaskedSettings(sampler=sampler, steps=2))
  tokens = np.asarray(sample.tokens)[..., 0]
  assert np.all(tokens[:, :4] < 2)


def test_known_tokens_stay_even_where_they_contradict_each_other():
  spec = TokenSpec(grid=(4,), vocab=(3,), eos=2)
  model = Masked(config(), spec, rngs=nnx.Rngs(0))
  known = jnp.array([[0, 2, 0, 1]], jnp.int32)[..., None]
  known_mask = jnp.array([[False, True, False, True]])[..., None]
  sample = generate(model, None, keys=example_keys(0, jnp.arange(1)), known=known,
                    known_mask=known_mask, settings=MaskedSettings(steps=2))
  np.testing.assert_array_equal(np.asarray(sample.tokens)[0, 1:, 0], (2, 2, 1))


# ---- labels and guidance

Q = np.array([[.05, .45], [.25, .25]])
NULL = (P + Q) / 2


def labelled(**options):
  return Exact(PAIR, P, Q, NULL, classes=2, **options)


def test_labels_select_the_law_and_none_is_the_null_label(fits):
  model, keys = labelled(), example_keys(0, jnp.arange(20000))
  settings = MaskedSettings(sampler='first_hitting')
  for label, law in ((0, P), (1, Q), (-1, NULL), (None, NULL)):
    condition = None if label is None else {'label': jnp.full(20000, label)}
    tokens = np.asarray(generate(model, condition, keys=keys, settings=settings).tokens)
    counts = np.bincount(tokens[:, 0, 0] * 2 + tokens[:, 1, 0], minlength=4)
    assert fits(counts, law)


def test_guidance_is_conditional_at_one_and_unconditional_at_zero():
  model, keys = labelled(), example_keys(0, jnp.arange(512))
  label = {'label': jnp.arange(512) % 2}

  def draw(condition, guidance):
    settings = MaskedSettings(sampler='ancestral', steps=3, guidance=guidance)
    sample = generate(model, condition, keys=keys, settings=settings)
    return np.asarray(sample.tokens), int(sample.nfe)

  plain, once = draw(label, None)
  one, twice = draw(label, 1.)
  assert (once, twice) == (3, 6)
  np.testing.assert_array_equal(one, plain)
  np.testing.assert_array_equal(draw(label, 0.)[0], draw(None, None)[0])
  assert np.any(draw(label, 3.)[0] != plain)


def test_guidance_combines_the_two_halves_of_one_doubled_batch():
  model = labelled()
  tokens, masked, labels = jnp.array([[0, 1], [1, 0]]), jnp.ones((2, 2), bool), jnp.array([0, 1])
  scores = model._guided(tokens, masked, labels, jnp.array(2.5))
  c, u = (model.logits(tokens, masked, y) for y in (labels, jnp.array([2, 2])))
  np.testing.assert_allclose(scores, u + 2.5 * (c - u), rtol=1e-5)


def test_one_program_for_labels_seeds_and_float_settings(calls):
  spec = TokenSpec(grid=(4,), vocab=(3,))
  model = Masked(config(classes=3), spec, rngs=nnx.Rngs(0))
  programs = calls(Masked, 'sample')
  for i in range(4):
    settings = MaskedSettings(
        steps=3, guidance=1. + i, temperature=.5 + i, choice_temperature=float(i),
        top_p=.9 - .1 * i, guidance_schedule='power_cosine', guidance_power=float(i))
    generate(model, {'label': jnp.full(5, i % 3)}, keys=example_keys(i, jnp.arange(5)),
             settings=settings)
  assert len(programs) == 1
  generate(model, {'label': jnp.zeros(5, int)}, keys=example_keys(0, jnp.arange(5)),
           settings=MaskedSettings(steps=4, guidance=1., top_p=.9))
  assert len(programs) == 2  # another number of steps is another program


def test_labels_are_dropped_per_example_and_only_in_training(check_dropped):
  seen = []

  class Watched(Masked):
    def logits(self, tokens, masked, labels, **options):
      seen.append(np.asarray(labels))
      return super().logits(tokens, masked, labels, **options)

  model = Watched(config(classes=4, label_dropout=.5), PAIR, rngs=nnx.Rngs(0))
  batch = {'tokens': jnp.tile(PAIRS, (64, 1, 1)), 'label': jnp.arange(256) % 4}
  check_dropped(model, batch, seen)


@pytest.mark.parametrize('modulated', (False, True))
def test_the_label_reaches_every_position(modulated):
  spec = TokenSpec(grid=(2, 2), vocab=(3,))
  model = randomised(Masked(
      config(classes=2, transformer={'axes': 2, 'modulated': modulated}), spec, rngs=nnx.Rngs(0)))
  if modulated:  # adaLN starts at zero
    kernel = model.transformer.modulation.kernel
    kernel[...] = jax.random.normal(jax.random.key(1), kernel[...].shape)
  model.label.embedding[...] *= 50
  tokens, masked = jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4), bool)
  scores = np.asarray(model.logits(tokens, masked, jnp.array([0, 1])))
  assert scores.shape == (2, 4, 3)
  assert np.all(np.abs(scores[0] - scores[1]).max(-1) > 1e-3)


# ---- several codes per position, refusals, training

def test_several_codes_per_position_are_a_flat_row(fits):
  spec = TokenSpec(grid=(1,), vocab=(2, 2))
  model = Exact(spec, P)
  sample = generate(model, None, keys=example_keys(0, jnp.arange(20000)),
                    settings=MaskedSettings(sampler='first_hitting', trace=True))
  tokens = np.asarray(sample.tokens)
  assert tokens.shape == (20000, 1, 2) and sample.steps.shape == (2, 20000, 1, 2)
  assert fits(np.bincount(tokens[:, 0, 0] * 2 + tokens[:, 0, 1], minlength=4), P)
  bound = model.elbo({'tokens': PAIRS.reshape(4, 1, 2)}, mode='enumerate')
  np.testing.assert_allclose(bound, np.log(P).reshape(-1), atol=1e-6)


def test_the_head_has_no_column_for_mask():
  model = Masked(config(classes=3), TokenSpec(grid=(4,), vocab=(6,)), rngs=nnx.Rngs(0))
  assert model.head.kernel.shape == (16, 6)
  assert model.token.embedding.shape == (7, 16) and model.label.embedding.shape == (4, 16)


def test_refusals_say_why():
  build = functools.partial(Masked, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='equal alphabets'):
    build(config(), TokenSpec(grid=(4,), vocab=(8, 4)))
  with pytest.raises(ValueError, match='classes > 0'):
    build(config(transformer={'modulated': True}), PAIR)
  with pytest.raises(ValueError, match='axes=3'):
    build(config(transformer={'axes': 3}), PAIR)
  with pytest.raises(ValueError, match='label_dropout=2'):
    build(config(label_dropout=2.), PAIR)
  model, keys = Exact(PAIR, P), example_keys(0, jnp.arange(2))
  with pytest.raises(ValueError, match='guidance needs'):
    model.sample(None, keys=keys, settings=MaskedSettings(guidance=2.))
  with pytest.raises(ValueError, match='2D grid'):
    model.sample(None, keys=keys, settings=MaskedSettings(sampler='halton'))
  with pytest.raises(ValueError, match='go together'):
    model.sample(None, keys=keys, settings=MaskedSettings(), known=PAIRS[:2])
  with pytest.raises(ValueError, match='classes=0'):
    model.sample({'label': jnp.zeros(2)}, keys=keys, settings=MaskedSettings())
  with pytest.raises(ValueError, match='12 positions'):
    Masked(config(), TokenSpec(grid=(13,), vocab=(2,)), rngs=nnx.Rngs(0)).elbo(
        {'tokens': jnp.zeros((1, 13, 1), jnp.int32)}, mode='enumerate')
  with pytest.raises(ValueError, match='key'):
    model.elbo({'tokens': PAIRS})


@pytest.mark.parametrize('objective', ('elbo', 'maskgit'))
def test_training_reaches_the_entropy(objective):
  """-ELBO under the data law within .01 nats of H(P), from 10,000 samples."""
  options = {'label_smoothing': 0.} if objective == 'maskgit' else {}
  model = Masked(config(objective=objective, transformer={'width': 32}, **options),
                 PAIR, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  data = PAIRS[rng.choice(4, 10000, p=P.reshape(-1))]
  graph, params = nnx.split(model)
  optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, 300), weight_decay=0.)

  @jax.jit
  def train(params, moments, key):
    def step(state, key):
      params, moments = state
      pick, key = jax.random.split(key)
      batch = {'tokens': data[jax.random.randint(pick, (512,), 0, len(data))]}

      def loss(params):
        return nnx.merge(graph, params).loss(batch, step=jnp.array(0), key=key)[0]

      updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
      return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, (params, moments), jax.random.split(key, 300))[0]

  params, _ = train(params, optimizer.init(params), jax.random.key(0))
  model = nnx.merge(graph, params)
  bound = -np.asarray(model.elbo({'tokens': PAIRS}, mode='enumerate'))
  assert abs(P.reshape(-1) @ bound - ENTROPY) < .01
  if objective == 'elbo':
    counts = frequencies(model, MaskedSettings(sampler='first_hitting'))
    np.testing.assert_allclose(counts / counts.sum(), P.reshape(-1), atol=.03)


@pytest.mark.parametrize('modulated', [False, True])
def test_hidden_states_lead_to_the_logits(modulated):
  spec = TokenSpec(grid=(2, 3), vocab=(5, 5))
  model = config(classes=3, transformer=dict(layers=2, modulated=modulated)).build(
      spec, rngs=nnx.Rngs(0))
  model.head.kernel[...] = jax.random.normal(jax.random.key(1), model.head.kernel.shape)
  tokens = jax.random.randint(jax.random.key(2), (4, 6, 2), 0, 5)
  keys, null = example_keys(0, jnp.arange(4)), jnp.full(4, model.classes)

  @jax.jit
  def probed(tokens, keys, noise):
    states = model.hidden(tokens, blocks=(1, 2), keys=keys, noise=noise)
    vector = model.label(jnp.full(len(tokens), model.classes)) if modulated else None
    return states, model.head(model.transformer._last(states[1], vector))

  @jax.jit
  def expected(masked):  # the label is not told
    return model.logits(tokens.reshape(4, 12), masked, null)

  chosen = jax.vmap(lambda key: jax.random.uniform(key, (12,)))(keys).argsort(-1).argsort(-1)
  assert len({tuple(row) for row in np.asarray(chosen)}) == 4  # others for every example
  for noise, count in ((0.0, 0), (0.5, 6), (1.0, 12)):
    states, logits = probed(tokens, keys, noise)
    assert [state.shape for state in states] == [(4, 12, 16)] * 2
    np.testing.assert_allclose(logits, expected(chosen < count), atol=1e-5)
  # what is hidden depends on the example's key, not on its batch
  backwards, _ = probed(tokens[::-1], keys[::-1], 0.5)
  np.testing.assert_allclose(backwards[1][::-1], probed(tokens, keys, 0.5)[0][1], atol=1e-5)
