"""Golden sets of the processors (generators.md 10.1), and laws of the one categorical draw."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from smalti.generators import logits as ids
from smalti.generators.autoregressive import AutoregressiveSettings
from smalti.generators.binary import BinarySettings
from smalti.generators.generator import DrawSettings, example_keys

P = np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32)
LOGITS = jnp.log(P)


def kept(logits):
  return np.flatnonzero(np.isfinite(logits)).tolist()


def keys(n, seed=0):
  return example_keys(seed, jnp.arange(n))


@pytest.mark.parametrize('top_p, expected', [(0.75, 3), (0.0, 1), (0.49, 1), (0.51, 2), (0.86, 4),
                                             (0.96, 5), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_has_the_mass(top_p, expected):
  assert kept(ids.process(LOGITS, top_p=top_p)) == list(range(expected))


def test_top_p_equals_the_sorted_definition(key):
  """An id stays if and only if the mass strictly before it is below p."""
  logits = 3 * jax.random.normal(key, (20, 50))
  probability = np.asarray(jax.nn.softmax(logits), np.float64)
  for p in (0.1, 0.5, 0.9, 0.99):
    order = np.argsort(-probability, -1)
    ranked = np.take_along_axis(probability, order, -1)
    before = np.cumsum(ranked, -1) - ranked
    expected = np.take_along_axis(before < p, np.argsort(order, -1), -1)
    np.testing.assert_array_equal(np.isfinite(ids.keep_p(logits, p)), expected)


def test_top_p_keeps_all_ties_at_the_threshold():
  assert kept(ids.keep_p(jnp.zeros(4), 0.4)) == [0, 1, 2, 3]


def test_top_p_separates_probabilities_one_rounding_apart():
  assert kept(ids.keep_p(jnp.array([-3e-7, 0.0, -9e-7]), 0.3)) == [1]
  assert kept(ids.keep_p(jnp.array([-3e-7, 0.0, -9e-7]), 0.6)) == [0, 1]


@pytest.mark.parametrize('mass, expected', [
    (0.0, [1]), (0.3, [1, 2]), (0.5, [0, 1, 2]), (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3, 4])])
def test_typical_ids_need_not_hold_the_mode(mass, expected):
  assert kept(ids.process(LOGITS, typical=mass)) == expected


def test_typical_equals_the_sorted_definition(key):
  logits = 3 * jax.random.normal(key, (20, 50))
  logits = logits.at[:, 7].set(-jnp.inf)
  p = np.asarray(jax.nn.softmax(logits), np.float64)
  log = np.log(np.where(p > 0, p, 1))
  distance = np.where(p > 0, np.abs(-log + (p * log).sum(-1, keepdims=True)), np.inf)
  order = np.argsort(distance, -1)
  ranked = np.take_along_axis(p, order, -1)
  before = np.cumsum(ranked, -1) - ranked
  for mass in (0.2, 0.6, 0.95):
    expected = np.take_along_axis(before < mass, np.argsort(order, -1), -1)
    np.testing.assert_array_equal(np.isfinite(ids.keep_typical(logits, mass)), expected)


def test_repeated_ids_are_less_likely_whatever_their_sign():
  seen = jnp.array([True, True, False, False])
  np.testing.assert_allclose(
      ids.penalize(jnp.array([3.0, -3.0, 3.0, -3.0]), seen, 1.5), [2.0, -4.5, 3.0, -3.0])


def test_min_p():
  assert kept(ids.process(LOGITS, min_p=0.25)) == [0, 1, 2]
  assert kept(ids.process(LOGITS, min_p=1.0)) == [0]
  assert kept(ids.process(LOGITS, min_p=0.0)) == [0, 1, 2, 3, 4]
  assert kept(ids.process(LOGITS, min_p=7.0)) == [0]


def test_top_k_is_by_rank_where_values_are_equal():
  assert kept(ids.keep_k(jnp.array([1.0, 3.0, 2.0, 2.0, 2.0]), 3)) == [1, 2, 3]
  assert kept(ids.keep_k(jnp.zeros(5), 2)) == [0, 1]
  assert kept(ids.keep_k(LOGITS, 9)) == [0, 1, 2, 3, 4]
  assert kept(ids.keep_k(jnp.array([0.0, -jnp.inf, -jnp.inf]), 2)) == [0]
  with pytest.raises(ValueError, match='top_k=0'):
    ids.keep_k(LOGITS, 0)


def test_the_order_of_processors_is_temperature_k_typical_p_min():
  """Temperature first: at 0.1 the mode alone has more than 0.9; k before p: p is of what k left."""
  assert kept(ids.process(LOGITS, temperature=0.1, top_p=0.9)) == [0]
  assert kept(ids.process(LOGITS, top_k=2, top_p=0.7)) == [0]  # 0.5 / 0.7 = 0.71
  assert kept(ids.keep_k(ids.keep_p(LOGITS, 0.7), 2)) == [0, 1]  # what the other order keeps
  assert kept(ids.process(LOGITS, top_p=0.5, min_p=0.25)) == [0]
  # of the two that k leaves the likelier is typical; of those that are typical it is not there
  assert kept(ids.process(LOGITS, top_k=2, typical=0.3)) == [0]
  assert kept(ids.process(LOGITS, typical=0.3, top_p=0.5)) == [1]


def test_temperature_divides_and_zero_is_the_first_largest():
  half = jax.nn.softmax(ids.process(LOGITS, temperature=0.5))
  np.testing.assert_allclose(half, P ** 2 / np.sum(P ** 2), rtol=1e-5)
  tied = jnp.array([[1.0, 5.0, 5.0], [2.0, -jnp.inf, 1.0]])
  assert [kept(row) for row in ids.process(tied, temperature=0.0)] == [[1], [0]]


def test_temperatures_share_one_program_down_to_zero():
  programs = []

  @jax.jit
  def run(t):
    programs.append(t)
    return ids.draw(ids.process(jnp.tile(LOGITS, (64, 1)), temperature=t), keys(64))

  cold = [run(t) for t in (0.0, 1e-30, 1e-3)]
  for drawn in cold:
    np.testing.assert_array_equal(drawn, 0)
  assert len(np.unique(run(1.0))) > 2 and len(programs) == 1


def test_greedy_settings_equal_argmax(key):
  logits = jax.random.normal(key, (32, 100))
  for settings in (dict(top_k=1), dict(temperature=0.0), dict(top_p=0.0), dict(min_p=1.0)):
    np.testing.assert_array_equal(
        ids.draw(ids.process(logits, **settings), keys(32)), jnp.argmax(logits, -1))


@pytest.mark.parametrize('kind, name, value', [
    (DrawSettings, 'temperature', -1.0), (DrawSettings, 'temperature', math.nan),
    (DrawSettings, 'min_p', -0.1), (DrawSettings, 'top_p', 90.0), (DrawSettings, 'typical', 1.5),
    (AutoregressiveSettings, 'top_p', -1.0), (AutoregressiveSettings, 'repetition', 0.0),
    (BinarySettings, 'temperature', -0.5)])
def test_settings_beyond_their_range_are_refused(kind, name, value):
  with pytest.raises(ValueError, match=f'{name}={value} must be'):
    kind(**{name: value})


def test_no_processor_leaves_a_row_empty(key):
  logits = 20 * jax.random.normal(key, (16, 30))
  logits = ids.restrict(logits, jnp.arange(30) < jnp.arange(1, 17)[:, None])
  for t, k, y, p, m in itertools.product(
      (0.0, 1.0), (1, 5, None), (0.0, 0.5, None), (0.0, 0.5, None), (1.0, None)):
    out = ids.process(logits, temperature=t, top_k=k, typical=y, top_p=p, min_p=m)
    assert not np.isnan(out).any() and np.isfinite(out).any(-1).all()
    assert (np.isfinite(out) <= np.isfinite(logits)).all()


def test_guidance_ends_and_constants(key):
  conditional, unconditional = jax.random.normal(key, (2, 3, 10))
  np.testing.assert_allclose(ids.guide(conditional, unconditional, 1.0), conditional, atol=1e-6)
  np.testing.assert_array_equal(ids.guide(conditional, unconditional, 0.0), unconditional)
  raw = jax.nn.softmax(ids.guide(conditional, unconditional, 2.5))
  logs = jax.nn.softmax(ids.guide(
      jax.nn.log_softmax(conditional), jax.nn.log_softmax(unconditional), 2.5))
  np.testing.assert_allclose(raw, logs, atol=1e-6)


def test_a_doubled_batch_is_guided_row_by_row(key):
  conditional, unconditional = jax.random.normal(key, (2, 3, 2, 5))
  both = ids.pair(conditional, unconditional)
  np.testing.assert_array_equal(both[::2], conditional)
  np.testing.assert_array_equal(both[1::2], unconditional)
  np.testing.assert_array_equal(
      ids.guide_pairs(both, 2.5), ids.guide(conditional, unconditional, 2.5))


def test_what_a_string_with_an_end_can_hold():
  """Against the strings that agree with what is visible, one by one."""
  strings = [s for s in itertools.product(range(3), repeat=4)
             if all(b == 2 for a, b in itertools.pairwise(s) if a == 2)]
  for ended in (False, True):
    there = [s for s in strings if not ended or set(s) == {2}]
    for tokens in there:
      for masked in itertools.product((False, True), repeat=4):
        agree = [s for s in there if all(m or a == b for m, a, b in zip(masked, s, tokens))]
        wanted = [[any(s[i] == v for s in agree) for v in range(3)] for i in range(4)]
        found = np.asarray(ids.possible(
            np.array(tokens), np.array(masked), 3, 2, np.array(ended)))
        for i in np.flatnonzero(masked):  # each by itself; what is visible is not drawn
          np.testing.assert_array_equal(found[i], wanted[i], str((tokens, masked, ended)))


draw = jax.jit(ids.draw)


def counts(draws, size):
  return np.bincount(np.asarray(draws).ravel(), minlength=size)


def test_draws_follow_the_distribution():
  """Chi-square of 200,000 draws; against a slightly wrong distribution it must fail."""
  n = 200_000
  drawn = counts(draw(jnp.broadcast_to(LOGITS, (100, n // 100, 5)), keys(100)), 5)
  right = P.astype(np.float64) / P.astype(np.float64).sum()
  assert stats.chisquare(drawn, n * right).pvalue > 1e-3
  wrong = right + np.array([0.01, -0.01, 0, 0, 0])
  assert stats.chisquare(drawn, n * wrong).pvalue < 1e-3


def test_the_tail_is_drawn_as_often_as_it_should_be():
  """1,000 ids of 2e-4 beside one of 0.8, the larger part of a cumulative sum's rounding."""
  size, n = 1001, 40_000
  logits = jnp.log(jnp.full(size, 2e-4).at[0].set(0.8))
  drawn = counts(draw(jnp.broadcast_to(logits, (20, n // 20, size)), keys(20, seed=3)), size)
  parts = [drawn[0], drawn[1:501].sum(), drawn[501:].sum()]
  assert stats.chisquare(parts, n * np.array([0.8, 0.1, 0.1])).pvalue > 1e-3


def test_forbidden_ids_are_never_drawn(key):
  """Every other id has no probability, the last one included; 100,000 draws of 1,024 ids."""
  size = 1024
  logits = ids.restrict(jax.random.normal(key, (16, 64, size)), jnp.arange(size) % 2 == 0)
  for seed in range(100):
    assert not np.any(np.asarray(draw(logits, keys(16, seed))) % 2), seed


def test_the_largest_uniform_draws_an_allowed_id(key, monkeypatch):
  """At u = 1 a cumulative sum that is not monotone would give ids of probability zero."""
  size = 4096
  support = jnp.arange(size) % 64 < 20  # runs of forbidden ids, over which the sum still wavers
  logits = ids.restrict(jax.random.normal(key, (64, size)), support)
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: jnp.zeros(shape))
  assert support[ids.draw(logits, keys(64))].all()
  naive = jnp.cumsum(jax.nn.softmax(logits, -1), -1)  # the control: without the support
  assert not support[jnp.argmax(naive >= jnp.max(naive, -1, keepdims=True), -1)].all()


def test_the_smallest_uniforms_draw_the_tail(monkeypatch):
  """An id of 2.6 / 2^23 of the mass is drawn by three of the 2^23 uniforms."""
  steps = np.arange(6) * 2.0 ** -23
  rare = np.exp(-15.0) / (1 + np.exp(-15.0))
  np.testing.assert_array_equal(steps < rare, [True, True, True, False, False, False])
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: jnp.asarray(steps, jnp.float32))
  logits = jnp.broadcast_to(jnp.array([0.0, -15.0]), (1, 6, 2))
  np.testing.assert_array_equal(ids.draw(logits, keys(1))[0], steps < rare)


@pytest.mark.slow
def test_forbidden_ids_are_never_drawn_in_four_million_draws(key):
  size = 1024
  logits = ids.restrict(jax.random.normal(key, (64, 64, size)), jnp.arange(size) % 2 == 0)
  for seed in range(1000):
    assert not np.any(np.asarray(draw(logits, keys(64, seed))) % 2), seed


def test_an_example_is_drawn_from_its_own_key_alone(key):
  logits = jax.random.normal(key, (8, 3, 40))
  whole = draw(logits, keys(8))
  halves = [draw(logits[i:i + 4], keys(8)[i:i + 4]) for i in (0, 4)]
  np.testing.assert_array_equal(whole, jnp.concatenate(halves))
  order = jnp.array([3, 1, 7, 0, 2, 6, 5, 4])
  np.testing.assert_array_equal(draw(logits[order], keys(8)[order]), whole[order])
