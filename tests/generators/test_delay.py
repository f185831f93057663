"""Patterns of delays: bijections, exact likelihoods, samplers of the pattern's own distribution."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings as laws, strategies as st
from scipy import stats

from smalti.generators.delay import Delay, DelayConfig, DelaySettings, Pattern
from smalti.generators.generator import example_keys, generate
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SPEC = TokenSpec(grid=(2,), vocab=(3, 2))  # 36 arrays, unequal alphabets
PATTERNS = {'delay': dict(), 'parallel': dict(delays=(0, 0)), 'flatten': dict(stride=2),
            'late': dict(delays=(0, 3))}
DRAWS = 8000


@functools.cache
def build(pattern='delay', classes=0, spec=SPEC):
  """A model with weights large enough that its distribution is far from uniform."""
  config = DelayConfig(classes=classes, transformer=TransformerConfig(layers=1, width=32, heads=2),
                       **PATTERNS[pattern])
  model = config.build(spec, rngs=nnx.Rngs(0))
  model.head.kernel[...] = 0.3 * jax.random.normal(jax.random.key(7), model.head.kernel.shape)
  for table in (model.token, model.label):
    table.embedding[...] *= 50
  return model


def every(spec=SPEC):
  codes = itertools.product(*map(range, spec.vocab * spec.length))
  return jnp.asarray(np.array(list(codes), np.int32).reshape(-1, spec.length, spec.depth))


log_prob = jax.jit(lambda model, batch: model.log_prob(batch))


def sample(model, n, *, label=None, seed=0, known=None, known_mask=None, **settings):
  condition = None if label is None else {'label': label}
  return generate(model, condition, keys=example_keys(seed, jnp.arange(n)),
                  settings=DelaySettings(**settings), known=known, known_mask=known_mask)


def counts(tokens, spec=SPEC):
  flat = np.asarray(tokens).reshape(len(tokens), -1)
  place = np.ravel_multi_index(flat.T, spec.vocab * spec.length)
  return np.bincount(place, minlength=len(every(spec)))


@laws(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 4))
def test_a_pattern_holds_every_code_once_and_gives_it_back(length, delays, stride):
  pattern = Pattern(length, tuple(np.array(delays) - min(delays)), stride)
  codes = jnp.arange(2 * length * len(delays)).reshape(2, length, -1)
  laid = pattern.lay(codes, -1)
  assert laid.shape == (2, pattern.steps, len(delays))
  assert sorted(np.asarray(laid)[laid >= 0]) == list(range(codes.size))
  np.testing.assert_array_equal(pattern.lift(laid), codes)
  # every code stands at its own step
  step = jnp.broadcast_to(jnp.arange(pattern.steps)[:, None], laid.shape[1:])
  np.testing.assert_array_equal(pattern.lift(step[None])[0], pattern.due())


def test_published_patterns_have_their_steps():
  assert Pattern(10, (0, 1, 2, 3)).steps == 13
  assert Pattern(10, (0, 0, 0, 0)).steps == 10
  assert Pattern(10, (0, 1, 2, 3), 4).steps == 40
  assert Pattern(3, (0, 1)).positions().tolist() == [[0, -1], [1, 0], [2, 1], [-1, 2]]


@pytest.mark.parametrize('pattern', PATTERNS)
def test_probabilities_of_all_arrays_sum_to_one(pattern):
  total = np.exp(np.asarray(log_prob(build(pattern), {'tokens': every()}), np.float64))
  assert total.sum() == pytest.approx(1, abs=1e-5)
  assert total.max() > 2 * total.mean()


@pytest.mark.parametrize('pattern', PATTERNS)
def test_cached_steps_draw_from_the_likelihood_of_the_full_pass(pattern):
  model = build(pattern)
  drawn = sample(model, DRAWS)
  np.testing.assert_allclose(drawn.log_prob, log_prob(model, {'tokens': drawn.tokens}), atol=1e-4)
  expected = DRAWS * np.exp(np.asarray(log_prob(model, {'tokens': every()}), np.float64))
  expected *= DRAWS / expected.sum()
  observed = counts(drawn.tokens)
  assert stats.chisquare(observed, expected).pvalue > 1e-3
  # the control: another pattern's distribution over the same arrays
  other = build('flatten' if pattern != 'flatten' else 'delay')
  wrong = DRAWS * np.exp(np.asarray(log_prob(other, {'tokens': every()}), np.float64))
  assert stats.chisquare(observed, wrong * DRAWS / wrong.sum()).pvalue < 1e-6


def dependence(pattern):
  """How far p(a, b | first position) is from the product of its margins, codes of position 2."""
  joint = np.exp(np.asarray(log_prob(build(pattern), {'tokens': every()}), np.float64))
  joint = joint.reshape(6, 3, 2)
  joint = joint / joint.sum((1, 2), keepdims=True)
  return abs(joint - joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)).max()


def test_codes_of_one_step_are_independent_and_others_are_not():
  assert dependence('parallel') < 1e-6
  assert dependence('delay') > 1e-2 and dependence('flatten') > 1e-2


@pytest.mark.parametrize('pattern', PATTERNS)
def test_a_code_depends_on_those_of_earlier_steps_alone(pattern):
  """Changing one code changes the scores of exactly those that come at later steps."""
  spec = TokenSpec(grid=(3,), vocab=(3, 3))
  model = build(pattern, spec=spec)
  due = model.pattern.due().reshape(-1)
  tokens = np.ones((7, 6), np.int32)
  tokens[1:][np.eye(6, dtype=bool)] = 2
  nll = jax.jit(lambda model, tokens: model._nll(tokens, jnp.zeros(7, jnp.int32), None))(
      model, tokens.reshape(7, 3, 2)).reshape(7, 6)
  reads = np.abs(nll[1:] - nll[:1]).T > 1e-6
  others = ~np.eye(6, dtype=bool)
  np.testing.assert_array_equal(reads[others], (due[None] < due[:, None])[others])


def test_guidance_of_one_is_none_and_of_zero_is_unconditional():
  model = build('delay', classes=3)
  label = jnp.array([0, 1, 2, 0])
  plain = sample(model, 4, label=label)
  np.testing.assert_array_equal(sample(model, 4, label=label, guidance=1.0).tokens, plain.tokens)
  np.testing.assert_array_equal(
      sample(model, 4, label=label, guidance=0.0).tokens,
      sample(model, 4, label=jnp.full(4, -1)).tokens)
  assert sample(model, 4, label=label, guidance=2.0).nfe == 2 * plain.nfe == 6


def test_labels_matter_and_samples_do_not_depend_on_their_neighbours():
  model, label = build('delay', classes=3), jnp.arange(21) % 3
  whole = sample(model, 21, label=label).tokens
  single = [generate(model, {'label': label[i:i + 7]}, keys=example_keys(0, jnp.arange(i, i + 7)),
                     settings=DelaySettings()).tokens for i in (0, 7, 14)]
  np.testing.assert_array_equal(np.concatenate(single), whole)
  tokens = jnp.broadcast_to(every()[17], (3, 2, 2))
  found = log_prob(model, {'tokens': tokens, 'label': jnp.arange(3)})
  assert len(set(np.asarray(found).tolist())) == 3


def test_labels_are_dropped_per_example_and_only_in_training(check_dropped):
  seen = []

  class Watched(Delay):
    def _nll(self, tokens, label, keys):
      seen.append(np.asarray(label))
      return jnp.zeros(tokens.shape)

  model = Watched(DelayConfig(classes=4, label_dropout=.5, transformer=TransformerConfig(
      layers=1, width=16, heads=2)), SPEC, rngs=nnx.Rngs(0))
  batch = {'tokens': jnp.zeros((256, 2, 2), jnp.int32), 'label': jnp.arange(256) % 4}
  check_dropped(model, batch, seen)


def test_known_codes_stay_and_early_ones_condition_exactly():
  """Under the delay pattern code 0 of a position comes before code 1 of the position before."""
  model = build('delay')
  known = jnp.broadcast_to(jnp.array([[2, 1], [1, 0]]), (DRAWS, 2, 2))
  first = jnp.broadcast_to(jnp.array([[True, False], [False, False]]), known.shape)
  drawn = sample(model, DRAWS, known=known, known_mask=first)
  assert drawn.exact.all()
  assert (drawn.tokens[:, 0, 0] == 2).all()
  joint = np.exp(np.asarray(log_prob(model, {'tokens': every()}), np.float64))
  expected = np.where(np.asarray(every())[:, 0, 0] == 2, joint, 0)
  expected *= DRAWS / expected.sum()
  seen = expected > 0
  observed = counts(drawn.tokens)
  assert observed[~seen].sum() == 0
  assert stats.chisquare(observed[seen], expected[seen]).pvalue > 1e-3
  # a known code of the last step says nothing to those before: not the exact conditional
  last = jnp.broadcast_to(jnp.array([[False, False], [False, True]]), known.shape)
  drawn = sample(model, 8, known=known[:8], known_mask=last[:8])
  assert not drawn.exact.any() and (drawn.tokens[:, 1, 1] == 0).all()
  everything = sample(model, 8, known=known[:8], known_mask=jnp.ones((8, 2, 2), bool))
  assert everything.exact.all() and (everything.tokens == known[:8]).all()


def test_losses_are_the_likelihood_and_refusals_say_why():
  model = build('delay')
  value, aux = model.loss({'tokens': every()}, step=0, key=jax.random.key(0), train=False)
  np.testing.assert_allclose(
      value, -log_prob(model, {'tokens': every()}).mean() / 4, rtol=1e-5)
  codes = [aux['metrics'][f'bits_code_{d}'] for d in range(2)]
  np.testing.assert_allclose(np.mean(codes), aux['metrics']['bits_per_token'], rtol=1e-5)
  with pytest.raises(ValueError, match='keep: '):
    model.log_prob({'tokens': every(), 'keep': jnp.ones(len(every()), int)})
  with pytest.raises(ValueError, match='needs an entry `label`'):
    generate(build('delay', 2), {'text': jnp.zeros(2)}, keys=example_keys(0, jnp.arange(2)),
             settings=DelaySettings())
  body = TransformerConfig(layers=1, width=32, heads=2)
  for spec, options, message in (
      (TokenSpec(grid=(2,), vocab=(3,)), {}, 'use autoregressive'),
      (SPEC, dict(delays=(0, 1, 2)), 'one delay for each of 2'),
      (SPEC, dict(delays=(1, 2)), 'begin at 0'),
      (SPEC, dict(stride=0), 'stride=0')):
    with pytest.raises(ValueError, match=message):
      DelayConfig(transformer=body, **options).build(spec, rngs=nnx.Rngs(0))
