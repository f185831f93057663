"""Kernel distance: the golden value, the definition in loops, and no bias."""

import numpy as np
import pytest

from smalti.evaluation.kernel import kernel_distance, mmd


def test_golden():
  x, y = np.array([[0., 0.], [1., 1.]]), np.array([[1., 0.], [0., 1.]])
  assert mmd(x, y) == -2.375
  whole = kernel_distance(x, y, subsets=3)
  assert (whole.mean, whole.deviation, whole.subsets, whole.size) == (-2.375, 0, 3, 2)


def test_the_definition_in_loops():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)) + 1
  k = lambda a, b: (a @ b / 4 + 1) ** 3  # noqa: E731
  pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
  within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 72
  across = np.mean([k(a, b) for a in x for b in y])
  assert mmd(x, y) == pytest.approx(within - 2 * across, rel=1e-12)


def test_no_bias_at_any_size():
  rng = np.random.default_rng(0)
  found = np.array([mmd(rng.normal(size=(15, 8)), rng.normal(size=(15, 8))) for _ in range(200)])
  assert abs(found.mean()) < 3 * found.std() / np.sqrt(200)
  assert found.min() < 0


def test_subsets_are_drawn_as_published():
  """RandomState(2020), one draw without replacement of each set in turn, for every subset."""
  rng = np.random.default_rng(0)
  x, y = (rng.normal(size=(n, 3)).astype(np.float32) for n in (40, 30))
  random, expected = np.random.RandomState(2020), []
  for _ in range(5):
    first = random.choice(40, 20, replace=False)
    expected.append(mmd(x[first], y[random.choice(30, 20, replace=False)]))
  found = kernel_distance(x, y, subsets=5, size=20)
  assert (found.mean, found.deviation) == (np.mean(expected), np.std(expected))
  assert kernel_distance(x, y, subsets=5, size=1000).size == 30
  with pytest.raises(ValueError, match='2 or more'):
    kernel_distance(x[:1], y)
