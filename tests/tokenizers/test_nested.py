"""Nested codes: the law of the drawn prefix lengths."""

import jax
import numpy as np
import pytest
from scipy import stats

from smalti.tokenizers.nested import SCHEDULES, budgets, draw_budget

DRAWS = 100_000


def law(length, schedule):
  """P(k) by counting, for every k of `budgets`."""
  ks = budgets(length, schedule)
  if schedule == 'uniform_power':
    rounded = [min(k for k in ks if k >= n) for n in range(1, length + 1)]
    return np.array([rounded.count(k) / length for k in ks])
  return np.full(len(ks), 1 / len(ks))


@pytest.mark.parametrize('length', [256, 12])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_budgets_follow_their_law(schedule, length):
  draws = np.asarray(draw_budget(jax.random.key(3), DRAWS, length, schedule))
  assert draws.dtype == np.int32
  ks, p = np.array(budgets(length, schedule)), law(length, schedule)
  counts = np.array([np.sum(draws == k) for k in ks])
  assert counts.sum() == DRAWS  # nothing else was drawn
  assert stats.chisquare(counts, DRAWS * p).pvalue > 1e-3


@pytest.mark.parametrize('schedule,full,mean', [
    ('uniform', 1 / 256, 128.5), ('power', 1 / 9, 56.78), ('uniform_power', 1 / 2, 170.67)])
def test_published_probability_of_all_and_mean(schedule, full, mean):
  p, ks = law(256, schedule), np.array(budgets(256, schedule))
  assert p[-1] == pytest.approx(full) and p @ ks == pytest.approx(mean, abs=5e-3)
  draws = np.asarray(draw_budget(jax.random.key(4), DRAWS, 256, schedule))
  assert np.mean(draws) == pytest.approx(mean, abs=4 * np.sqrt(p @ ks**2 / DRAWS))
  assert np.mean(draws == 256) == pytest.approx(full, abs=4 * np.sqrt(full / DRAWS))


def test_budgets_start_at_the_least():
  assert budgets(8, 'uniform', 3) == (3, 4, 5, 6, 7, 8)
  assert budgets(8, 'power', 3) == (4, 8) and budgets(12, 'power') == (1, 2, 4, 8, 12)
  draws = draw_budget(jax.random.key(5), 1000, 8, 'uniform', 3)
  assert set(np.asarray(draws).tolist()) == {3, 4, 5, 6, 7, 8}


def test_what_cannot_be_drawn_is_refused():
  with pytest.raises(ValueError, match='one of uniform, power, uniform_power'):
    budgets(8, 'pow2')
  with pytest.raises(ValueError, match=r'in 1\.\.8'):
    budgets(8, 'uniform', 9)
