"""ResGen against what can be enumerated: counts, densities, codes drawn from exact mixtures.

`Exact` replaces the network by the conditionals of a joint table of codes, so that the sampler can
be compared with the table.
"""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings as budget, strategies as st
from scipy import special, stats

from smalti.generators import resgen, sums
from smalti.generators.generator import example_keys, generate
from smalti.generators.resgen import Mixture, ResGen, ResGenConfig, ResGenSettings
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SPEC = TokenSpec(grid=(2,), vocab=(2, 2), order='depth')
ARRAYS = np.array(list(itertools.product(range(2), repeat=4))).reshape(16, 2, 2)
TUPLES = np.array(list(itertools.product(range(2), repeat=2)))
LAW = np.random.default_rng(5).dirichlet(np.full(16, .4))
FAR = jnp.array([[[1., 1., -1.], [-1., -1., 1.]], [[.3, -.3, .3], [-.3, .3, -.3]]])
RANDOM = 1e9  # a choice temperature at which confidence plays no part


def config(**options) -> ResGenConfig:
  body = dict(layers=1, width=16, heads=2, remat=False) | options.pop('transformer', {})
  options = dict(channels=3, components=5, rank=2) | options
  return ResGenConfig(transformer=TransformerConfig(**body), **options)


def books(vocab, channels, ratio, seed=0):
  """Gaussian codebooks, each `ratio` times smaller than the one before; 0 past an alphabet."""
  rng = np.random.default_rng(seed)
  vectors = rng.normal(size=(len(vocab), max(vocab), channels))
  vectors *= ratio ** np.arange(len(vocab))[:, None, None]
  for d, v in enumerate(vocab):
    vectors[d, v:] = 0
  return jnp.asarray(vectors, jnp.float32)


def build(spec=SPEC, vectors=None, **options):
  model = ResGen(config(**options), spec, rngs=nnx.Rngs(0))
  if vectors is None:
    vectors = FAR if spec == SPEC else books(spec.vocab, options.get('channels', 3), .25)
  tokens = np.random.default_rng(0).integers(0, spec.vocab, (64, spec.length, spec.depth))
  model.prepare({'vectors': vectors, 'tokens': tokens}, key=jax.random.key(0))
  return model


def stirred(model, scale=.3):
  """A network none of whose outputs is constant."""
  for i, layer in enumerate((model.head, model.spread, model.affine, model.components)):
    kernel = layer.kernel
    kernel[...] = scale * jax.random.normal(jax.random.key(i), kernel[...].shape)
  return model


@functools.partial(jax.jit, static_argnames='train')
def judged(model, batch, key, train=False):
  return model.loss(batch, step=0, key=key, train=train)


class Exact(ResGen):
  """The exact law of the hidden sums, under one table of all arrays per label (or one)."""

  def __init__(self, *laws, **options):
    super().__init__(config(components=4, rank=3, **options), SPEC, rngs=nnx.Rngs(0))
    self.laws = tuple(map(tuple, laws))
    self.prepare({'vectors': FAR, 'tokens': ARRAYS}, key=jax.random.key(0))

  def mixture(self, tokens, count, labels, **_):
    seen = ~sums.hidden(count, 2)[:, None]
    fits = jnp.all(jnp.where(seen, tokens[:, None] == ARRAYS, True), (2, 3))  # [b, 16]
    laws = jnp.array(self.laws)
    law = fits * (laws[0] if labels is None else laws[labels])
    same = jnp.all(ARRAYS[:, :, None] == TUPLES, -1)  # [16, n, m]
    weight = jnp.einsum('ba,anm->bnm', law, same)
    each = jnp.broadcast_to(TUPLES[:, None], (4, 2, 2))  # every tuple at both positions
    z = jax.vmap(lambda count: jnp.swapaxes(self._standard(
        each, jnp.broadcast_to(count, (4, 2))), 0, 1))(count)
    return Mixture(weights=jnp.log(weight), low=z, spread=jnp.full(weight.shape, -30.),
                   shift=jnp.zeros((*count.shape, 3)), scale=jnp.zeros((*count.shape, 3)),
                   basis=jnp.eye(3))


@pytest.mark.parametrize('rank', [2, 3, 5])
def test_components_start_at_sums_of_codes(rank):
  spec = TokenSpec(grid=(4,), vocab=(3, 2), order='depth')
  model = build(spec, components=60, rank=rank, floor=-12.)
  tokens = jnp.asarray(list(itertools.product(range(3), range(2))))[:, None]
  sums = jnp.concatenate([model._standard(tokens, jnp.full((6, 1), k))[:, 0] for k in (1, 2)])
  found = model.mixture(jnp.zeros((1, 4, 2), int), jnp.full((1, 4), 2), None)
  basis = found.basis[:3]  # of three channels no more directions are there
  np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-5)
  means = (found.low @ found.basis)[0, 0]
  away = jnp.linalg.norm(means[:, None] - sums @ basis.T @ basis, axis=-1)
  np.testing.assert_allclose(away.min(1), 0, atol=1e-4)
  np.testing.assert_allclose(away.min(0), 0, atol=1e-4)  # 60 draws miss none of 2 + 6


def test_components_of_one_sum_are_told_apart():
  spec = TokenSpec(grid=(4,), vocab=(3, 2), order='depth')
  model = build(spec, components=60, rank=3, floor=-2.)  # of 2 + 6 sums
  tokens = np.random.default_rng(1).integers(0, spec.vocab, (8, 4, 2))
  gradient = nnx.grad(lambda model: model.loss({'tokens': jnp.asarray(tokens)}, step=0,
                                               key=jax.random.key(1))[0])(model)
  for rows in (model.centre.embedding[...], gradient.centre.embedding[...]):
    apart = np.linalg.norm(rows[:, None] - rows, axis=-1) / np.linalg.norm(rows, axis=-1).mean()
    assert np.where(np.eye(60), np.inf, apart).min() > 1e-5


@pytest.mark.parametrize('floor', [-100., -7., 1.])
@pytest.mark.parametrize('components', [1, 2, 40])
def test_components_start_as_wide_as_they_are_apart(components, floor):
  spec = TokenSpec(grid=(4,), vocab=(50, 50), order='depth')
  model = build(spec, components=components, rank=3, floor=floor)
  found = model.mixture(jnp.zeros((1, 4, 2), int), jnp.full((1, 4), 2), None)
  means = np.asarray(found.low @ found.basis)[0, 0]
  apart = ((means[:, None] - means) ** 2).mean(-1) + np.diag(np.full(components, np.inf))
  wanted = min(np.sqrt(apart.min(-1).mean()), 1)  # one alone is as wide as all sums
  log_sigma = found._log_sigma(found.spread, found.scale[:, :, None])
  np.testing.assert_allclose(log_sigma, max(np.log(wanted), floor + .05), atol=1e-3)


def chi_square(found, law) -> bool:
  """p > 1e-3 of the counts of outcomes under a law of all possible ones; no others occur."""
  if set(found) - set(law):
    return False
  size = sum(found.values())
  return stats.chisquare([found.get(k, 0) for k in law],
                         [p * size for p in law.values()]).pvalue > 1e-3


asked = jax.jit(lambda model, *arguments: model.mixture(*arguments))


def tally(rows):
  return collections.Counter(map(tuple, np.asarray(rows).reshape(len(rows), -1).tolist()))


def hypergeometric(left, counts):
  """The law MVHG(left; counts) by enumeration."""
  every = itertools.product(*(range(k + 1) for k in counts))
  total = math.comb(sum(counts), left)
  return {k: math.prod(map(math.comb, counts, k)) / total for k in every if sum(k) == left}


# ---- masking

def test_counts_of_the_forward_process_are_multivariate_hypergeometric():
  draws, shape = 20000, (3, 3)
  noise = jax.random.uniform(jax.random.key(0), (draws, *shape))
  count = resgen.deepest(noise, jnp.ones(noise.shape, bool), jnp.full(draws, 4))
  law = hypergeometric(4, (3, 3, 3))
  assert math.isclose(sum(law.values()), 1)
  assert chi_square(tally(count), law)
  assert not chi_square(tally(count), dict.fromkeys(law, 1 / len(law)))  # the control
  count = np.asarray(count)
  assert np.all(count.sum(1) == 4) and count.min() >= 0 and count.max() <= 3
  error = count.std(0) / draws ** .5
  assert np.all(np.abs(count.mean(0) - 4 / 3) < 4 * error)
  variance = 4 * (1 / 3) * (2 / 3) * (9 - 4) / (9 - 1)
  np.testing.assert_allclose(count.var(0), variance, rtol=.03)
  np.testing.assert_allclose(np.cov(count.T)[0, 1], -variance / 2, rtol=.06)


def test_counts_given_later_ones_are_the_exact_reverse():
  """The chain is nested, so that k_s given k_t is MVHG(n_s; k_t)."""
  noise = jax.random.uniform(jax.random.key(1), (60000, 3, 2))
  everything = jnp.ones(noise.shape, bool)
  later, sooner = (np.asarray(resgen.deepest(noise, everything, jnp.full(len(noise), n)))
                   for n in (4, 2))
  assert np.all(sooner <= later)
  for counts in ((2, 1, 1), (2, 2, 0)):
    rows = sooner[np.all(later == counts, -1)]
    assert len(rows) > 3000 and chi_square(tally(rows), hypergeometric(2, counts))
  assert not chi_square(tally(rows), hypergeometric(2, (2, 1, 1)))  # the control
  # drawn afresh from k_t, whatever the scores were, it is the same law
  masked = sums.hidden(jnp.broadcast_to(jnp.array([2, 1, 1]), (20000, 3)), 2)
  again = resgen.deepest(jax.random.gumbel(jax.random.key(2), masked.shape), masked,
                         jnp.full(len(masked), 2))
  assert chi_square(tally(again), hypergeometric(2, (2, 1, 1)))


def test_of_one_code_per_position_counts_are_uniform_subsets():
  noise = jax.random.uniform(jax.random.key(3), (20000, 5, 1))
  count = resgen.deepest(noise, jnp.ones(noise.shape, bool), jnp.full(len(noise), 2))
  subsets = [tuple(int(i in pair) for i in range(5))
             for pair in itertools.combinations(range(5), 2)]
  assert chi_square(tally(count), dict.fromkeys(subsets, .1))


@given(st.data())
@budget(max_examples=30, deadline=None)
def test_what_is_visible_is_a_prefix_of_every_position(data):
  depth = data.draw(st.integers(1, 5))
  count = np.array(data.draw(st.lists(st.integers(0, depth), min_size=3, max_size=3)))[None]
  mask = np.asarray(sums.hidden(jnp.asarray(count), depth))
  assert np.array_equal(mask.sum(-1), count)
  assert np.all(np.diff(mask.astype(int), axis=-1) >= 0)  # once hidden, hidden to the end


# ---- densities

def random_mixture(channels=4, components=70, low=3, batch=2, positions=3, seed=0):
  """More components than are in memory at once."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  where = batch, positions
  return Mixture(weights=draw(*where, components), low=draw(*where, components, low),
                 spread=draw(*where, components), shift=draw(*where, channels),
                 scale=draw(*where, channels), basis=draw(low, channels), floor=-3.)


def numpy_mixture(mixture):
  """Log weights, means, deviations in float64, from the definition."""
  fields = {f: np.asarray(getattr(mixture, f), np.float64)
            for f in ('weights', 'low', 'spread', 'shift', 'scale', 'basis')}
  mean = fields['shift'][:, :, None] + fields['low'] @ fields['basis']
  total = fields['spread'][..., None] + fields['scale'][:, :, None]
  sigma = np.exp(mixture.floor + np.log1p(np.exp(total - mixture.floor)))
  return special.log_softmax(fields['weights'], -1), mean, sigma


def test_densities_match_scipy():
  mixture = random_mixture()
  weight, mean, sigma = numpy_mixture(mixture)
  assert np.log(sigma).min() > -3
  z = np.random.default_rng(1).normal(size=(2, 3, 4))
  normal = stats.norm.logpdf(z[:, :, None], mean, sigma).sum(-1)
  np.testing.assert_allclose(mixture.log_normal(jnp.asarray(z)), normal, rtol=1e-5, atol=1e-4)
  truth = special.logsumexp(weight + normal, -1)
  np.testing.assert_allclose(mixture.log_density(jnp.asarray(z)), truth, rtol=1e-5, atol=1e-4)
  peak = special.logsumexp(weight + stats.norm.logpdf(0, 0, sigma).sum(-1), -1)
  sure = mixture.confidence(jnp.asarray(z))
  np.testing.assert_allclose(sure, truth - peak, rtol=1e-5, atol=1e-4)
  assert np.all(sure <= 0)


def test_loss_is_the_mean_density_of_positions_that_hide_codes():
  model = stirred(build(classes=2))
  tokens = jnp.asarray(ARRAYS, jnp.int32)
  batch = {'tokens': tokens, 'label': jnp.arange(16) % 2}
  key = jax.random.key(3)
  value, aux = judged(model, batch, key)
  first, second = jax.random.split(jax.random.split(key, 3)[1])
  u = (np.asarray(jax.random.uniform(first)) + np.arange(16) / 16) % 1
  left = np.clip(np.ceil(np.cos(np.pi / 2 * u) * 4), 1, 4)
  order = np.argsort(np.argsort(np.asarray(jax.random.uniform(second, (16, 2, 2))).reshape(16, 4)))
  count = (order.reshape(16, 2, 2) < left[:, None, None]).sum(-1)
  vectors = np.asarray(model.vectors[...], np.float64)
  mixture = asked(model, tokens, jnp.asarray(count), batch['label'])
  weight, mean, sigma = numpy_mixture(mixture)
  nats = []
  for b, n in np.argwhere(count > 0):
    levels = range(2 - count[b, n], 2)
    z = sum(vectors[d, ARRAYS[b, n, d]] for d in levels)
    z = (z - sum(vectors[d].mean(0) for d in levels)) / np.sqrt(
        sum(vectors[d].var(0) for d in levels))
    normal = stats.norm.logpdf(z, mean[b, n], sigma[b, n]).sum(-1)
    nats.append(-special.logsumexp(weight[b, n] + normal))
  assert aux['weight'] == len(nats)
  np.testing.assert_allclose(value, np.mean(nats) / 3, rtol=1e-4)
  assert value == aux['metrics']['nll_z_per_dim']
  assert not any('bits' in name or name == 'nll' for name in aux['metrics'])
  assert not hasattr(model, 'elbo') and not hasattr(model, 'log_prob')


def test_split_is_a_bound_and_tight_at_the_posterior():
  mixture = random_mixture()
  z = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)))
  weight, normal = jax.nn.log_softmax(mixture.weights), mixture.log_normal(z)
  nll = -mixture.log_density(z)
  shares = [jax.nn.softmax(normal), jax.nn.softmax(weight), jnp.full_like(weight, 1 / 70),
            jax.nn.softmax(jax.random.normal(jax.random.key(0), weight.shape))]
  for share in shares:
    assert np.all(resgen.split(weight, normal, share) > nll + 1e-3)
  tight = resgen.split(weight, normal, jax.nn.softmax(weight + normal))
  np.testing.assert_allclose(tight, nll, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter_and_are_finite():
  model = stirred(build(classes=2, objective='split'))
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  batch = {'tokens': jnp.asarray(ARRAYS, jnp.int32), 'label': jnp.arange(16) % 2}
  gradients = jax.jit(jax.grad(lambda params: nnx.merge(graph, params, rest).loss(
      batch, step=0, key=jax.random.key(0))[0]))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.all(np.isfinite(leaf)) and np.any(leaf), path


def test_hidden_codes_are_not_read():
  model = stirred(build())
  tokens = jnp.asarray(ARRAYS, jnp.int32)
  count = jnp.tile(jnp.array([[1, 2]]), (16, 1))
  seen = ~sums.hidden(count, 2)
  found = asked(model, tokens, count, None)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(
      asked(model, jnp.where(seen, tokens, 1 - tokens), count, None))):
    np.testing.assert_array_equal(a, b)
  assert np.abs(found.weights[0] - found.weights[-1]).max() > 1e-3  # but visible ones are


def test_sums_are_standardised_by_the_codebooks_they_are_of():
  spec = TokenSpec(grid=(1,), vocab=(4, 3, 2), order='depth')
  model = build(spec, books(spec.vocab, 3, .5))
  every = jnp.asarray(list(itertools.product(range(4), range(3), range(2))), jnp.int32)[:, None]
  for k in (1, 2, 3):
    z = model._standard(every, jnp.full((24, 1), k))
    np.testing.assert_allclose(jnp.mean(z, 0), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.std(z, 0), 1, atol=1e-5)
  np.testing.assert_array_equal(model._standard(every, jnp.zeros((24, 1), int)), 0)


def test_without_vectors_there_is_no_finite_loss():
  model = ResGen(config(), SPEC, rngs=nnx.Rngs(0))
  value, _ = judged(model, {'tokens': jnp.asarray(ARRAYS, jnp.int32)}, jax.random.key(0))
  assert np.isnan(value)
  nnx.eval_shape(lambda: ResGen(config(), SPEC, rngs=nnx.Rngs(0)))


# ---- quantizing again

def test_held_out_batches_say_how_many_positions_are_recoded():
  spec = TokenSpec(grid=(6,), vocab=(7, 5, 4), order='depth')
  vectors = books(spec.vocab, 3, .7)
  tokens = np.random.default_rng(1).integers(0, spec.vocab, (50, 6, 3))

  def changed(sizes):
    book = np.asarray(vectors, np.float64)
    rest, same = book[np.arange(3), tokens].sum(2), True
    for d, size in enumerate(sizes):
      code = np.square(rest[:, :, None] - book[d, :size]).sum(-1).argmin(-1)
      rest, same = rest - book[d, code], same & (code == tokens[..., d])
    return np.mean(~same)

  batch = {'tokens': jnp.asarray(tokens, jnp.int32)}
  found = judged(build(spec, vectors), batch, jax.random.key(0))[1]['metrics']['recoded']
  assert float(found) == pytest.approx(changed(spec.vocab), abs=1e-6)
  assert .2 < changed(spec.vocab) < changed((7, 7, 7)) - .01  # rows past an alphabet are no codes


@pytest.mark.parametrize('count', range(5))
def test_requantising_hidden_sums_returns_their_codes(count):
  spec = TokenSpec(grid=(6,), vocab=(7, 5, 4, 3), order='depth')
  model = build(spec, books(spec.vocab, 8, .2), channels=8)
  tokens = jax.random.randint(jax.random.key(1), (50, 6, 4), 0, jnp.array(spec.vocab))
  counts = jnp.full((50, 6), count)
  _, z = model.sums(tokens, counts)
  found = sums.requantise(model.vectors[...], z, jnp.asarray(spec.support()), counts)
  mask = sums.hidden(counts, 4)
  np.testing.assert_array_equal(found[mask], tokens[mask])
  assert np.all(found < np.array(spec.vocab))  # rows past an alphabet are no codes


# ---- sampling

def frequencies(model, settings, n=20000, condition=None, **known):
  known = {k: jnp.broadcast_to(v, (n, *np.shape(v))) for k, v in known.items()}
  sample = generate(model, condition, keys=example_keys(0, jnp.arange(n)), settings=settings,
                    **known)
  return tally(sample.tokens)


def as_law(probabilities):
  return {tuple(a.reshape(-1).tolist()): p for a, p in zip(ARRAYS, probabilities) if p > 0}


def independent(law=LAW):
  """Positions drawn apart, codes of one together: what one step does."""
  law = law.reshape(4, 4)
  return np.outer(law.sum(1), law.sum(0)).reshape(-1)


def test_one_code_at_a_time_draws_the_joint():
  counts = frequencies(Exact(LAW), ResGenSettings(steps=4, choice_temperature=RANDOM))
  assert chi_square(counts, as_law(LAW))
  assert not chi_square(counts, as_law(independent()))


def test_one_step_draws_positions_apart_and_their_codes_together():
  counts = frequencies(Exact(LAW), ResGenSettings(steps=1))
  assert chi_square(counts, as_law(independent()))
  assert not chi_square(counts, as_law(LAW))


def test_without_confidence_counts_are_the_reverse_of_the_masking():
  """For any known prefix: n of them are hidden after a step, MVHG(n; counts at the start)."""
  spec = TokenSpec(grid=(3,), vocab=(3, 3, 3), order='depth')
  model = stirred(build(spec), 3.)
  n, prefix = 8000, np.array([0, 1, 3])
  fixed = jnp.broadcast_to(np.arange(3) < prefix[:, None], (n, 3, 3))

  def first(**options):
    sample = generate(model, None, keys=example_keys(0, jnp.arange(n)), settings=ResGenSettings(
        steps=2, ratio='linear', trace=True, **options), known=jnp.zeros((n, 3, 3), jnp.int32),
        known_mask=fixed)
    return (np.asarray(sample.steps)[0] == -1).sum(-1)

  law = hypergeometric(3, (3, 2, 0))
  assert chi_square(tally(first(choice_temperature=RANDOM)), law)
  assert not chi_square(tally(first(choice_temperature=0.)), law)  # the control


def test_noise_on_the_confidence_keeps_its_tail(monkeypatch):
  """Without mode='high' a float32 Gumbel is at most 15.94."""
  modes, gumbel = [], jax.random.gumbel

  def noted(*arguments, **options):
    modes.append(options.get('mode'))
    return gumbel(*arguments, **options)

  monkeypatch.setattr(jax.random, 'gumbel', noted)
  jax.eval_shape(lambda keys: build().sample(None, keys=keys, settings=ResGenSettings()).tokens,
                 example_keys(0, jnp.arange(2)))
  assert set(modes) == {'high'}


@pytest.mark.parametrize('steps', (1, 5))
def test_counts_are_exact_depth_is_in_order_and_known_codes_stay(steps):
  spec = TokenSpec(grid=(2, 2), vocab=(5, 4, 3), order='depth')
  model = stirred(build(spec, transformer={'axes': 2}), 2.)
  rng = np.random.default_rng(0)
  known = jnp.asarray(rng.integers(0, spec.vocab, (8, 4, 3)), jnp.int32)
  prefix = rng.integers(0, 4, (8, 4, 1))
  fixed = np.arange(3) < prefix
  fixed[:2] = False  # nothing known
  fixed[2] = True  # everything
  fixed[3, 0], fixed[3, 1:] = (True, True, False), True  # one code unknown
  fixed[4, 0], fixed[4, 1:] = (False, True, True), True  # one code unknown, the others below it
  sample = generate(model, None, keys=example_keys(0, jnp.arange(8)), known=known,
                    known_mask=jnp.asarray(fixed), settings=ResGenSettings(steps=steps, trace=True))
  tokens, states = np.asarray(sample.tokens), np.asarray(sample.steps)
  np.testing.assert_array_equal(tokens[fixed], np.asarray(known)[fixed])
  assert tokens.min() >= 0 and np.all(tokens < spec.vocab)
  np.testing.assert_array_equal(states[-1], tokens)
  shown = np.cumprod(fixed, -1).astype(bool)
  hidden = np.concatenate([np.where(shown, 0, -1)[None], states]) == -1
  assert np.all(np.diff(hidden.astype(int), axis=-1) >= 0)  # never a deep code without the others
  assert np.all(hidden[1:] <= hidden[:-1])  # what is revealed stays
  for now, then in zip(states[:-1], states[1:]):
    np.testing.assert_array_equal(then[now >= 0], now[now >= 0])
  left, total = hidden[1:].sum((2, 3)), hidden[0].sum((1, 2))
  want, before = [], total
  for i in range(steps):
    gamma = 0 if i == steps - 1 else math.cos(math.pi / 2 * (i + 1) / steps)
    before = np.maximum(np.minimum(np.ceil(gamma * total - 1e-9), before - 1), 0)
    want.append(before)
  np.testing.assert_array_equal(left, want)
  np.testing.assert_array_equal(sample.exact[:5], (False, False, True, True, False))
  assert sample.nfe == steps


@pytest.mark.parametrize('prefix', ((1, 0), (2, 0), (1, 1)))
def test_infilling_draws_the_conditional(prefix):
  mask = np.arange(2) < np.array(prefix)[:, None]
  known = ARRAYS[np.argmax(LAW)]
  law = LAW * np.all(np.where(mask, ARRAYS == known, True), (1, 2))
  law /= law.sum()
  counts = frequencies(Exact(LAW), ResGenSettings(steps=4, choice_temperature=RANDOM),
                       known=jnp.asarray(known, jnp.int32), known_mask=jnp.asarray(mask))
  assert chi_square(counts, as_law(law))


def test_a_known_code_below_an_unknown_one_is_kept_but_not_asked_for():
  mask = np.array([[False, True], [False, False]])
  known = np.array([[0, 1], [0, 0]])
  settings = ResGenSettings(steps=4, choice_temperature=RANDOM)
  sample = generate(Exact(LAW), None, keys=example_keys(0, jnp.arange(4000)), settings=settings,
                    known=jnp.broadcast_to(known, (4000, 2, 2)),
                    known_mask=jnp.broadcast_to(mask, (4000, 2, 2)))
  assert np.all(sample.tokens[:, 0, 1] == 1) and not np.any(sample.exact)


def test_same_tokens_in_any_batch_order_and_mesh():
  model, keys = Exact(LAW), example_keys(5, jnp.arange(64))
  draw = lambda keys: np.asarray(generate(  # noqa: E731
      model, None, keys=keys, settings=ResGenSettings(steps=3)).tokens)
  tokens = draw(keys)
  assert len(np.unique(tokens, axis=0)) > 5
  np.testing.assert_array_equal(draw(keys[7:14]), tokens[7:14])
  order = np.random.default_rng(0).permutation(64)
  np.testing.assert_array_equal(draw(keys[order]), tokens[order])
  mesh = jax.sharding.Mesh(np.array(jax.devices()), 'data')
  sharded = jax.device_put(keys, jax.NamedSharding(mesh, jax.P('data')))
  np.testing.assert_array_equal(draw(sharded), tokens)


def test_temperature_and_truncation_are_of_the_components():
  model = Exact(LAW)
  best = tally(ARRAYS[[np.argmax(independent())]])
  for options in ({'temperature': 0.}, {'top_p': 0.}):
    counts = frequencies(model, ResGenSettings(steps=1, **options), n=64)
    assert set(counts) == set(best)
  sharp = frequencies(model, ResGenSettings(steps=1, temperature=.5))
  law = LAW.reshape(4, 4)
  first, second = law.sum(1) ** 2, law.sum(0) ** 2
  want = np.outer(first / first.sum(), second / second.sum()).reshape(-1)
  assert chi_square(sharp, as_law(want)) and not chi_square(sharp, as_law(independent()))


def test_drawn_vectors_have_the_moments_of_the_mixture():
  mixture = random_mixture(components=3, batch=1)
  keys, n = example_keys(0, jnp.arange(20000)), 20000
  wide = dataclasses.replace(mixture, **{
      f: jnp.broadcast_to(getattr(mixture, f), (n, *getattr(mixture, f).shape[1:]))
      for f in ('weights', 'low', 'spread', 'shift', 'scale')})
  weight, mean, sigma = numpy_mixture(mixture)
  p = np.exp(weight)[0, ..., None]
  center = (p * mean[0]).sum(1)
  variance = (p * (sigma[0] ** 2 + mean[0] ** 2)).sum(1) - center ** 2
  for noise in (1., 0.):
    z = np.asarray(wide.draw(keys, noise=noise))
    spread = variance if noise else (p * mean[0] ** 2).sum(1) - center ** 2
    np.testing.assert_array_less(np.abs(z.mean(0) - center), 5 * np.sqrt(spread / n) + 1e-5)
    np.testing.assert_allclose(z.var(0), spread, rtol=.15, atol=1e-5)


# ---- labels and guidance

OTHER = LAW[::-1]


def test_labels_select_the_law():
  model = Exact(LAW, OTHER, (LAW + OTHER) / 2, classes=2)
  settings = ResGenSettings(steps=4, choice_temperature=RANDOM)
  for label, law in ((0, LAW), (1, OTHER), (-1, (LAW + OTHER) / 2)):
    counts = frequencies(model, settings, condition={'label': jnp.full(20000, label)})
    assert chi_square(counts, as_law(law))


def test_labels_are_dropped_per_example_and_only_in_training(check_dropped):
  seen = []

  class Watched(ResGen):
    def mixture(self, tokens, count, labels, **options):
      seen.append(np.asarray(labels))
      return super().mixture(tokens, count, labels, **options)

  model = Watched(config(classes=4, label_dropout=.5), SPEC, rngs=nnx.Rngs(0))
  batch = {'tokens': jnp.tile(jnp.asarray(ARRAYS, jnp.int32), (16, 1, 1)),
           'label': jnp.arange(256) % 4}
  check_dropped(model, batch, seen)


def test_guidance_interpolates_logits_means_and_log_deviations():
  both = random_mixture(batch=4, components=6)
  weight, mean, sigma = numpy_mixture(both)
  for s in (0., 1., 2.5):
    found = numpy_mixture(both.guided(jnp.float32(s)))
    np.testing.assert_allclose(found[1], mean[1::2] + s * (mean[::2] - mean[1::2]), rtol=1e-4,
                               atol=1e-4)
    raw = np.asarray(both.weights, np.float64)
    raw = special.log_softmax(raw[1::2] + s * (raw[::2] - raw[1::2]), -1)
    np.testing.assert_allclose(found[0], raw, rtol=1e-4, atol=1e-4)
    if s in (0., 1.):
      np.testing.assert_allclose(found[2], sigma[1 - int(s)::2], rtol=1e-4)
    assert np.log(found[2]).min() > both.floor


def test_guidance_of_one_is_no_guidance_and_of_zero_no_label():
  model = stirred(build(classes=2, transformer={'modulated': True}), 2.)
  kernel = model.transformer.modulation.kernel  # adaLN-zero starts blind to the label
  kernel[...] = .3 * jax.random.normal(jax.random.key(0), kernel.shape)
  keys, label = example_keys(0, jnp.arange(32)), {'label': jnp.arange(32) % 2}
  draw = lambda condition, **options: np.asarray(generate(  # noqa: E731
      model, condition, keys=keys, settings=ResGenSettings(steps=3, **options)).tokens)
  np.testing.assert_array_equal(draw(label, guidance=1.), draw(label))
  np.testing.assert_array_equal(draw(label, guidance=0.), draw(None))
  assert np.any(draw(label, guidance=8.) != draw(label))
  assert generate(model, label, keys=keys, settings=ResGenSettings(steps=3, guidance=2.)).nfe == 6


# ---- refusals

def test_what_cannot_be_is_refused():
  keys = example_keys(0, jnp.arange(2))
  model = build()
  for spec in (TokenSpec(grid=(4,), vocab=(8,)), TokenSpec(grid=(4,), vocab=(8,), order='depth'),
               TokenSpec(grid=(4,), vocab=(8, 8))):
    with pytest.raises(ValueError, match='not residual codes'):
      ResGen(config(), spec, rngs=nnx.Rngs(0))
  for options, reason in (
      ({'objective': 'l2'}, 'exact, split'), ({'ratio': 'square'}, 'cosine, arccos'),
      ({'components': 0}, '1 or more'), ({'transformer': {'axes': 3}}, 'axes=3'),
      ({'transformer': {'modulated': True}}, 'classes > 0'), ({'label_dropout': 2.}, '0..1')):
    with pytest.raises(ValueError, match=reason):
      ResGen(config(**options), SPEC, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='code vectors of its tokenizer'):
    model.prepare({}, key=None)
  with pytest.raises(ValueError, match='set channels=5'):
    model.prepare({'vectors': jnp.zeros((2, 2, 5)), 'tokens': ARRAYS}, key=None)
  with pytest.raises(ValueError, match='keep'):
    model.loss({'tokens': jnp.zeros((1, 2, 2), int), 'keep': jnp.ones(1)}, step=0,
               key=jax.random.key(0))
  with pytest.raises(ValueError, match='at least 1'):
    model.sample(None, keys=keys, settings=ResGenSettings(steps=0))
  with pytest.raises(ValueError, match='guidance needs'):
    model.sample(None, keys=keys, settings=ResGenSettings(guidance=2.))
  with pytest.raises(ValueError, match='go together'):
    model.sample(None, keys=keys, settings=ResGenSettings(), known=jnp.zeros((2, 2, 2), int))


# ---- learning

# the second position copies each code of the first, but for one in seven
COPY = np.repeat([.4, .1, .2, .3], 4) * np.prod(
    np.where(ARRAYS[:, 0] == ARRAYS[:, 1], 6 / 7, 1 / 7), -1)


def least_nats(floor):
  """Nats per channel of the exact conditionals, with all deviations at the floor.

  Sums are many deviations apart, so that it is their entropy and what every channel costs.
  """
  edges = np.arccos(np.arange(5) / 4) * 2 / np.pi
  nats = weight = 0.
  for left, chance in enumerate(edges[:-1] - edges[1:], 1):  # of ceil(4 cos(pi u / 2))
    for count, p in hypergeometric(left, (2, 2)).items():
      seen = ~np.asarray(sums.hidden(jnp.array([count]), 2))[0]
      for i in np.flatnonzero(count):
        joint, context = collections.Counter(), collections.Counter()
        for array, q in zip(ARRAYS, COPY):
          visible = tuple(np.where(seen, array, -1).reshape(-1))
          joint[visible, tuple(array[i])] += q
          context[visible] += q
        entropy = -sum(q * math.log(q / context[v]) for (v, _), q in joint.items())
        nats += chance * p * (entropy / 3 + floor + math.log(2 * math.pi) / 2)
        weight += chance * p
  return nats / weight


@pytest.mark.parametrize('objective', (
    'exact', pytest.param('split', marks=pytest.mark.slow)))
def test_training_reaches_the_density_and_draws_the_joint(objective):
  floor = -2.
  model = build(objective=objective, components=12, rank=3, floor=floor,)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 1e-2, 20, 800), b2=.95)
  data = jnp.asarray(ARRAYS, jnp.int32)

  def drawn(key, size):
    return {'tokens': data[jax.random.choice(key, 16, (size,), p=jnp.array(COPY))]}

  @jax.jit
  def train(params, key):
    def step(state, key):
      params, moments = state
      pick, key = jax.random.split(key)

      def loss(params):
        return nnx.merge(graph, params, rest).loss(drawn(pick, 256), step=0, key=key)[0]

      updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
      return (optax.apply_updates(params, updates), moments), None

    state, _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 800))
    return state[0]

  params = train(params, jax.random.key(0))
  model = nnx.merge(graph, params, rest)
  keys = jax.random.split(jax.random.key(1), 2)
  value, _ = judged(model, drawn(keys[0], 20000), keys[1])
  counts = frequencies(model, ResGenSettings(steps=4, choice_temperature=RANDOM))
  found = np.array([counts[tuple(a.reshape(-1).tolist())] for a in ARRAYS]) / 20000
  distance = np.abs(found - COPY).sum() / 2
  print(f'{objective}: {value:.4f} of {least_nats(floor):.4f} nats, {distance:.3f} apart')
  assert least_nats(floor) - .005 < value < least_nats(floor) + .01
  assert distance < .08 < .2 < np.abs(independent(COPY) - COPY).sum() / 2
