"""Samplers of masked models on the exact conditionals of a table: laws worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.generators import logits as processing
from smalti.generators.generator import example_keys, generate
from smalti.generators.masked import MaskedConfig, MaskedSettings
from smalti.generators.tabular import conditionals
from smalti.generators.unmasking import plan, unmask
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

P = np.array([[.4, .1], [.2, .3]])
MARGINALS = np.array([[.5, .5], [.6, .4]])


@jax.jit
def draw(table, settings, keys, given, unknown):
  """Codes, states and passes with what the table knows of the unknown ones."""
  def predict(tokens, masked, now):
    return conditionals(table, tokens[..., None], ~masked[..., None])[:, :, 0]

  steps, order = plan(settings, keys, unknown, (unknown.shape[1],))
  return unmask(predict, settings, steps, order, keys=keys, given=given, unknown=unknown)


def sample(table, n=20000, unknown=None, given=None, **settings):
  length = np.ndim(table)
  unknown = jnp.ones((n, length), bool) if unknown is None else jnp.asarray(unknown)
  given = jnp.zeros(unknown.shape, jnp.int32) if given is None else jnp.asarray(given)
  return draw(jnp.asarray(table), MaskedSettings(**settings), example_keys(0, jnp.arange(n)),
              given, unknown)


@pytest.fixture
def fits(fits):
  """Of tokens int[n, N] instead of counts."""
  return lambda tokens, law: fits(np.bincount(np.ravel_multi_index(
      tuple(np.asarray(tokens).T), np.shape(law)), minlength=np.size(law)), law)


# ---- confidence sampling (GenMol)

def test_confidence_moves_between_greedy_and_exact(fits):
  greedy, random = (sample(P, sampler='confidence', choice_temperature=t)[0] for t in (0., 1e9))
  assert fits(greedy, [[.56, .04], [.28, .12]]) and not fits(greedy, P)
  assert fits(random, P) and not fits(random, [[.56, .04], [.28, .12]])


def test_confidence_reveals_as_many_as_it_says_in_every_row():
  """Rows have their own counts and their own annealing; a finished row is left alone."""
  length = 6
  unknown = np.arange(length) < np.array([0, 1, 2, 5, 6])[:, None]
  given = np.full((5, length), 1, np.int32)
  table = np.full((2,) * length, 2. ** -length)
  tokens, states, passes = sample(
      table, 5, unknown, given, sampler='confidence', reveal=2, choice_temperature=0., trace=True)
  left = (np.asarray(states) == -1).sum(-1)  # all confidences tie
  np.testing.assert_array_equal(left, [[0, 0, 0, 3, 4], [0, 0, 0, 1, 2], [0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(np.where(unknown, 1, tokens), given)
  assert passes == 3
  noise = plan(MaskedSettings(sampler='confidence', reveal=2, choice_temperature=2.),
               example_keys(0, jnp.arange(5)), jnp.asarray(unknown), (length,))[0]['noise']
  np.testing.assert_allclose(noise, [[2, 2, 2, 2, 2], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
  one = plan(MaskedSettings(sampler='confidence'), example_keys(0, jnp.arange(1)),
             jnp.ones((1, 1), bool), (1,))[0]['noise']
  assert np.isfinite(one).all()  # k / (steps - 1) would not be


@pytest.mark.parametrize('sampler', ['maskgit', 'confidence'])
@pytest.mark.parametrize('kept', [{'temperature': 0.}, {'top_k': 1}, {'top_p': .3}, {'min_p': 1.}])
def test_the_surest_come_first_also_where_one_code_is_left(sampler, kept):
  sure = functools.reduce(np.multiply.outer, [[p, 1 - p] for p in (.7, .95, .6)])
  _, states, _ = sample(sure, 2, sampler=sampler, steps=3, choice_temperature=0., trace=True,
                        ratio='arccos', **kept)
  masked = np.asarray(states)[:, 0] < 0
  np.testing.assert_array_equal(masked[0], [True, False, True])
  np.testing.assert_array_equal(masked[1], [False, False, True])


@pytest.mark.parametrize('sampler', ['confidence', 'first_hitting'])
def test_heat_and_guidance_run_over_the_steps_of_each_row(sampler, monkeypatch):
  """Where a code takes a step; a row is over with its last unknown one."""
  unknown = np.arange(6) < np.array([6, 3, 1, 0])[:, None]
  settings = MaskedSettings(sampler=sampler, anneal=True, guidance=4., guidance_schedule='linear')
  keys = example_keys(0, jnp.arange(4))
  heat = np.asarray(plan(settings, keys, jnp.asarray(unknown), (6,))[0]['heat'])
  np.testing.assert_allclose(heat[:, 0], .5 + .8 * (1 - np.arange(1, 7) / 6), rtol=1e-6)
  np.testing.assert_allclose(heat[:3, 1], .5 + .8 * (1 - np.arange(1, 4) / 3), rtol=1e-6)
  np.testing.assert_allclose(heat[0, 2:], .5, rtol=1e-6)
  model, scales = MaskedConfig(classes=2, transformer=TransformerConfig(
      layers=1, width=8, heads=1)).build(TokenSpec(grid=(6,), vocab=(2,)), rngs=nnx.Rngs(0)), []

  def note(both, scale):
    jax.debug.callback(lambda x: scales.append(np.asarray(x)), scale, ordered=True)
    return both[::2]

  monkeypatch.setattr(processing, 'guide_pairs', note)
  jax.block_until_ready(model.sample(
      {'label': jnp.zeros(4, jnp.int32)}, keys=keys, settings=settings,
      known=jnp.zeros((4, 6, 1), jnp.int32), known_mask=~jnp.asarray(unknown)[..., None]).tokens)
  found = np.array(scales)
  np.testing.assert_allclose(found[:, 0], 1 + 3 * np.arange(6) / 6, rtol=1e-6)
  np.testing.assert_allclose(found[:3, 1], (1, 2, 3), rtol=1e-6)


def test_rows_are_guided_by_scales_of_their_own():
  c, u = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
  both = processing.pair(jnp.asarray(c), jnp.asarray(u))
  scale = np.array([0., 1., 3.], np.float32)
  found = processing.guide_pairs(both, jnp.asarray(scale))
  np.testing.assert_allclose(found, u + scale[:, None, None] * (c - u), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('sampler', ['maskgit', 'confidence', 'halton', 'ancestral'])
def test_a_row_does_not_depend_on_what_others_know(sampler):
  """Counts and annealing of a row are its own (published samplers take the first row's)."""
  table = np.random.default_rng(0).dirichlet(np.full(16, .5)).reshape((2,) * 4)
  unknown = np.arange(4) < np.array([4, 1, 3, 2, 4, 0])[:, None]
  given, keys = jnp.ones((6, 4), jnp.int32), example_keys(0, jnp.arange(6))
  settings = MaskedSettings(sampler=sampler, steps=3)
  shape = (2, 2) if sampler == 'halton' else (4,)

  @jax.jit
  def draw(keys, unknown):
    def predict(tokens, masked, now):
      return conditionals(jnp.asarray(table), tokens[..., None], ~masked[..., None])[:, :, 0]
    steps, order = plan(settings, keys, unknown, shape)
    return unmask(predict, settings, steps, order, keys=keys, given=given[:len(keys)],
                  unknown=unknown)[0]

  together = np.asarray(draw(keys, jnp.asarray(unknown)))
  alone = [draw(keys[i:i + 1], jnp.asarray(unknown[i:i + 1]))[0] for i in range(6)]
  np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize('noise', ['choice', 'both'])
@pytest.mark.parametrize('sampler', ['maskgit', 'confidence'])
def test_noise_on_the_confidence_keeps_its_tail(sampler, noise, monkeypatch):
  """Without mode='high' a float32 Gumbel is at most 15.94."""
  model, modes, gumbel = network(), [], jax.random.gumbel

  def noted(*arguments, **options):
    modes.append(options.get('mode'))
    return gumbel(*arguments, **options)

  monkeypatch.setattr(jax.random, 'gumbel', noted)
  jax.eval_shape(lambda keys: model.sample(
      None, keys=keys, settings=MaskedSettings(sampler=sampler, noise=noise)).tokens,
                 example_keys(0, jnp.arange(2)))
  assert set(modes) == {'high'}


# ---- noise on the logits too, falling temperatures (TiTok)

@pytest.mark.parametrize('anneal', [False, True])
def test_noise_on_both_heats_the_draw_and_compares_logits(fits, anneal):
  """Two steps: one position at the temperature of half the noise, then the likelier of the other.

  Gumbel noise of scale s on the logits is a draw at temperature s, and of two logits with such
  noise the first is larger by the logistic function of their difference over s.
  """
  scale, warm = 1.5 / 2, .9 if anneal else 1.
  logit = np.log(MARGINALS) / warm
  first = np.exp(logit / scale) / np.exp(logit / scale).sum(1, keepdims=True)
  law, other = np.zeros((2, 2)), np.zeros((2, 2))
  for a, b in np.ndindex(2, 2):
    chosen = 1 / (1 + np.exp(-(logit[0, a] - logit[1, b]) / scale))
    law[a, P[a].argmax()] += first[0, a] * first[1, b] * chosen
    law[P[:, b].argmax(), b] += first[0, a] * first[1, b] * (1 - chosen)
    other[a, P[a].argmax()] += first[0, a] * first[1, b] / 2
    other[P[:, b].argmax(), b] += first[0, a] * first[1, b] / 2
  tokens = sample(P, steps=2, noise='both', choice_temperature=1.5, anneal=anneal)[0]
  assert fits(tokens, law) and not fits(tokens, other)


def test_noise_on_both_is_of_every_row_by_its_own_steps():
  """GenMol's noise falls with a row's own steps; one row is drawn as it is among others."""
  draws = [sample(P, n, sampler='confidence', noise='both', choice_temperature=1.5)[0]
           for n in (1, 2, 5)]
  for few in draws[:2]:
    np.testing.assert_array_equal(few, draws[2][:len(few)])


def test_annealing_multiplies_the_temperature(fits):
  """0.5 + 0.8 (1 - r): 0.9 and 0.5 in two steps."""
  assert np.array_equal(sample(P, 500, steps=1, anneal=True)[0],
                        sample(P, 500, steps=1, temperature=.5)[0])
  warm = MARGINALS ** (1 / .9) / (MARGINALS ** (1 / .9)).sum(1, keepdims=True)
  rows = (P / P.sum(1, keepdims=True)) ** 2, (P / P.sum(0)) ** 2
  rows = rows[0] / rows[0].sum(1, keepdims=True), rows[1] / rows[1].sum(0)
  law = warm[0][:, None] * rows[0] / 2 + warm[1] * rows[1] / 2
  tokens = sample(P, steps=2, anneal=True, choice_temperature=1e9)[0]
  assert fits(tokens, law) and not fits(tokens, P)


def test_counts_follow_the_ratio():
  table = np.full((2,) * 7, 2. ** -7)
  left = {ratio: (np.asarray(sample(table, 1, ratio=ratio, steps=4, trace=True)[1]) == -1).sum(-1)
          for ratio in ('cosine', 'arccos')}
  np.testing.assert_array_equal(left['cosine'][:, 0], np.floor(
      np.round(7 * np.cos(np.pi / 2 * np.arange(1, 5) / 4), 6)))
  np.testing.assert_array_equal(left['arccos'][:, 0], np.floor(
      np.round(7 * np.arccos(np.arange(1, 5) / 4) * 2 / np.pi, 6)))


# ---- a network: no pass where nothing is revealed, context guidance

@functools.cache
def network(**options):
  """8 codes of 5, which depend on each other."""
  spec = TokenSpec(grid=(2, 4), vocab=(5,), **options)
  model = MaskedConfig(transformer=TransformerConfig(
      layers=1, width=16, heads=2, remat=False)).build(spec, rngs=nnx.Rngs(0))
  model.token.embedding[...] *= 40
  nnx.update(model.transformer.blocks, jax.tree.map(  # kernels, not gains
      lambda leaf: 10 * leaf if leaf.ndim > 2 else leaf, nnx.state(model.transformer.blocks)))
  model.head.kernel[...] = .3 * jax.random.normal(jax.random.key(1), model.head.kernel.shape)
  return model


def generated(model, keys, **settings):
  known = jax.random.randint(jax.random.key(2), (len(keys), 8, 1), 0, 4)
  mask = jnp.broadcast_to(jnp.arange(8)[:, None] % 4 == 1, known.shape)
  return generate(model, None, keys=keys, known=known, known_mask=mask,
                  settings=MaskedSettings(**settings))


@pytest.mark.parametrize('settings', [
    dict(sampler='ancestral', grid='uniform'), dict(sampler='remdm', remask='conf'),
    dict(sampler='remdm', remask='loop'), dict(sampler='first_hitting'),
    dict(sampler='confidence', context_guidance=2., context_share=.5)],
    ids=lambda settings: '-'.join(map(str, settings.values())))
def test_without_idle_passes_the_tokens_are_the_same(settings):
  """Bit for bit, on the way too; and every pass that is made reveals something."""
  model, keys = network(), example_keys(0, jnp.arange(2))
  plain, lazy = (generated(model, keys, steps=30, trace=True, cache=cache, **settings)
                 for cache in (False, True))
  np.testing.assert_array_equal(plain.steps, lazy.steps)
  np.testing.assert_array_equal(plain.tokens, lazy.tokens)
  states = np.asarray(lazy.steps)[..., 0]
  before = np.concatenate([np.where(np.arange(8) % 4 == 1, 0, -1) + 0 * states[:1], states[:-1]])
  busy = ((before == -1) & (states >= 0)).any((1, 2)).sum()
  double = 2 if 'context_guidance' in settings else 1
  assert lazy.nfe == double * busy < plain.nfe == double * len(states)


def test_context_guidance_at_one_is_the_plain_prediction():
  model, keys = network(), example_keys(0, jnp.arange(64))
  plain, one, two = (generated(model, keys, sampler='confidence', context_guidance=w,
                               context_share=.5) for w in (None, 1., 2.))
  np.testing.assert_array_equal(plain.tokens, one.tokens)
  assert np.any(plain.tokens != two.tokens) and one.nfe == two.nfe == 2 * plain.nfe
  tokens, masked = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3]]), jnp.arange(8)[None] < 2
  poor = masked | (jnp.arange(8)[None] == 4)
  good, bad = (model.logits(tokens, m, None) for m in (masked, poor))
  np.testing.assert_allclose(model._guided(tokens, masked, None, jnp.array(2.), poor),
                             2 * good - bad, atol=1e-5)
  np.testing.assert_array_equal(model._guided(tokens, masked, None, jnp.array(1.), poor), good)


def test_the_context_that_is_hidden_is_each_row_s_own():
  spec = TokenSpec(grid=(10,), vocab=(4,), eos=3)
  model = MaskedConfig(transformer=TransformerConfig(layers=1, width=8, heads=1)).build(
      spec, rngs=nnx.Rngs(0))
  tokens = jnp.broadcast_to(jnp.array([0, 1, 2, 0, 1, 2, 0, 3, 3, 3]), (200, 10))
  masked = jnp.arange(10)[None] < jnp.arange(200)[:, None] % 3
  hidden = np.asarray(model._context(example_keys(0, jnp.arange(200)), tokens, masked, 0.43))
  assert not (hidden & masked).any() and not hidden[:, 7:].any()  # what repeats an EOS stays
  np.testing.assert_array_equal(hidden.sum(1), np.array([3, 2, 2])[np.arange(200) % 3])
  assert len(np.unique(hidden, axis=0)) > 40  # of 35 + 15 + 10
  again = model._context(example_keys(1, jnp.arange(200)), tokens, masked, 0.43)
  assert (np.asarray(again) != hidden).any(1).mean() > .8
  third = model._context(example_keys(1, jnp.arange(1)), tokens[:1], masked[:1], 3 / 7)
  assert third.sum() == 3  # not 2 by rounding


def test_context_guidance_draws_from_the_mixture_of_what_it_hides(fits):
  """One of two known codes is hidden, either with the same chance; good^2 / poor is drawn from."""
  table = np.random.default_rng(3).dirichlet(np.full(27, 1.)).reshape(3, 3, 3)
  spec = TokenSpec(grid=(3,), vocab=(3,))

  class Exact(type(network())):
    def logits(self, tokens, masked, labels, **_):
      return conditionals(jnp.asarray(table), tokens[..., None], ~masked[..., None])[:, :, 0]

  model = Exact(MaskedConfig(transformer=TransformerConfig(layers=1, width=8, heads=1)), spec,
                rngs=nnx.Rngs(0))
  known = jnp.broadcast_to(jnp.array([1, 2, 0])[:, None], (20000, 3, 1))
  found = generate(model, None, keys=example_keys(0, jnp.arange(20000)), known=known,
                   known_mask=jnp.broadcast_to(jnp.arange(3)[:, None] < 2, known.shape),
                   settings=MaskedSettings(sampler='confidence', context_guidance=2.,
                                           context_share=.5))
  good = table[1, 2] / table[1, 2].sum()
  rows = [good**2 / poor for poor in (table[1].sum(0) / table[1].sum(),
                                      table[:, 2].sum(0) / table[:, 2].sum())]
  law = sum(row / row.sum() for row in rows) / 2
  last = np.asarray(found.tokens)[:, 2]
  assert fits(last, law) and not fits(last, good)


def test_refusals_say_why():
  model, keys = network(), example_keys(0, jnp.arange(1))
  for settings, match in ((dict(noise='logits'), 'noise='), (dict(reveal=0), 'reveal=0'),
                          (dict(sampler='greedy'), 'confidence'), (dict(steps=0), 'at least 1')):
    with pytest.raises(ValueError, match=match):
      model.sample(None, keys=keys, settings=MaskedSettings(**settings))
  labelled = MaskedConfig(classes=2, transformer=TransformerConfig(
      layers=1, width=8, heads=1)).build(model.spec, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='leave one at none'):
    labelled.sample({'label': jnp.zeros(1, int)}, keys=keys,
                    settings=MaskedSettings(guidance=2., context_guidance=2.))
