"""Inception score: golden values, both schemes against the definition, sums over any partition."""

import numpy as np
import pytest

from smalti.evaluation.entropy import Splits, inception_score


def score(logits, split=None, splits=1):
  split = np.zeros(len(logits), int) if split is None else split
  return inception_score(Splits.empty(splits, logits.shape[1]).add(logits, split))


def by_definition(logits, split):
  """exp(mean_i sum_c p (log p - log mean p)) of every split, in a loop."""
  found = []
  for s in np.unique(split):
    x = logits[split == s].astype(np.float64)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    found.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
  return np.mean(found), np.std(found)


@pytest.mark.parametrize(('probabilities', 'expected'), [
    (np.eye(10), 10.0),
    (np.full((7, 4), 0.25), 1.0),
    (np.array([[.9, .1], [.1, .9]]), 1.4449348111684153),
])
def test_golden(probabilities, expected):
  with np.errstate(divide='ignore'):
    logits = np.log(probabilities)  # -inf among them: 0 log 0 is 0
  assert score(logits)[0] == pytest.approx(expected, abs=1e-12)
  assert score(np.maximum(logits, -1e4) + 123)[0] == pytest.approx(expected, abs=1e-12)


def test_sums_give_the_definition():
  rng = np.random.default_rng(0)
  logits = (3 * rng.normal(size=(300, 12))).astype(np.float32)
  split = rng.integers(0, 7, 300)
  assert score(logits, split, 7) == pytest.approx(by_definition(logits, split), rel=1e-12)
  # a short last split has equal weight, and an empty one none
  split = np.arange(300) // 128
  assert score(logits, split, 9) == pytest.approx(by_definition(logits, split), rel=1e-12)


def test_sums_merge():
  rng = np.random.default_rng(1)
  logits, split = rng.normal(size=(50, 5)), rng.integers(0, 3, 50)
  parts = Splits.empty(3, 5)
  for rows in (slice(0, 1), slice(1, 1), slice(1, 33), slice(33, 50)):
    parts = parts.merge(Splits.empty(3, 5).add(logits[rows], split[rows]))
  assert inception_score(parts) == pytest.approx(score(logits, split, 3), rel=1e-13)
  with pytest.raises(ValueError, match='do not merge'):
    parts.merge(Splits.empty(3, 6))
  with pytest.raises(ValueError, match='no samples'):
    inception_score(Splits.empty(3, 6))


def test_samples_sorted_by_class_score_low_without_a_shuffle():
  logits = 50 * np.eye(10)[np.arange(1000) // 100]
  sorted_runs, order = np.arange(1000) // 100, np.random.RandomState(2020).permutation(1000)
  shuffled = np.empty(1000, int)
  shuffled[order] = np.arange(1000) // 100
  assert score(logits, sorted_runs, 10)[0] == pytest.approx(1, abs=1e-9)
  assert score(logits, shuffled, 10)[0] > 9
