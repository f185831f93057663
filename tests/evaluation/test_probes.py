"""Probes: accuracies known by construction, choices made without the test split, votes by hand."""

import math

import numpy as np
import pytest

from smalti.evaluation import probes
from smalti.evaluation.probes import Split


def split(n, seed, classes=4, dim=6, signal=0.0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, n)
  centers = np.random.default_rng(99).standard_normal((classes, dim))
  features = signal * centers[labels] + rng.standard_normal((n, dim))
  return Split(features.astype(np.float32), labels)


def one_hot(n, classes=7):
  labels = np.arange(n) % classes
  return Split(np.eye(classes)[labels], labels)


def test_features_that_are_the_labels_are_read_without_error():
  found = probes.probe(one_hot(140), one_hot(70), one_hot(70), subsets=2)
  for accuracy in (found.logreg, found.sgd, found.neighbours):
    assert (accuracy.top1, accuracy.top5, accuracy.per_class, accuracy.n) == (1, 1, 1, 70)
  assert [few.shots for few in found.few] == [1, 5, 10]
  assert all((few.mean, few.deviation, few.subsets) == (1, 0, 2) for few in found.few)
  assert found.validation == 1 and (found.dim, found.train) == (7, 140) and found.converged


def test_features_without_labels_give_chance():
  found = probes.probe(split(400, 0), split(400, 1), split(4000, 2), subsets=2)
  for accuracy in (found.logreg, found.sgd, found.neighbours):
    assert abs(accuracy.top1 - 1 / 4) < 3 * math.sqrt(3 / 16 / 4000)
    assert accuracy.top5 is None  # of four classes


def test_two_gaussians_reach_the_error_of_bayes():
  def draw(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    means = np.array([3.0, 0]) * (2 * labels[:, None] - 1)
    return Split(means + rng.standard_normal((n, 2)), labels)

  train, validation, test = draw(4000, 0), draw(4000, 1), draw(40_000, 2)
  bayes = (1 + math.erf(3 / math.sqrt(2))) / 2
  assert bayes == pytest.approx(0.9986501)
  error = 3 * math.sqrt(bayes * (1 - bayes) / 40_000)
  direct = probes.measure(np.stack([-test.features[:, 0], test.features[:, 0]], 1), test.labels)
  assert abs(direct.top1 - bayes) < error
  model, _ = probes.fit(train, validation)
  assert abs(probes.measure(model(test.features), test.labels).top1 - bayes) < error
  assert abs(model.weights[1, 1]) < 0.1 * model.weights[0, 1]  # only the first axis matters


def test_the_penalty_and_the_scale_are_chosen_without_the_test_split():
  train, validation = split(60, 0, dim=40, signal=0.4), split(300, 1, dim=40, signal=0.4)
  model, score = probes.fit(train, validation)
  alone = {c: probes.fit(train, validation, (c,))[1] for c in probes.PENALTIES}
  assert score == pytest.approx(max(alone.values()), abs=0.02)
  assert score == probes.measure(model(validation.features), validation.labels).top1
  assert 1e-6 < model.penalty < 1e2  # neither no features nor all their noise
  np.testing.assert_allclose(model.scale.mean, train.features.mean(0), rtol=1e-5)
  np.testing.assert_allclose(model.scale.deviation, train.features.std(0), rtol=1e-5)
  scaled = probes.fit(Split(train.features * 100 - 7, train.labels),
                      Split(validation.features * 100 - 7, validation.labels))[1]
  assert scaled == pytest.approx(score, abs=0.01)  # units mean nothing


def test_constant_features_and_absent_classes_are_no_trouble():
  rows = np.concatenate([np.eye(3)[[0, 1] * 10], np.ones((20, 1))], 1)
  train = Split(rows, np.array([0, 2] * 10))
  test = Split(np.concatenate([np.eye(3), np.full((3, 1), 5.0)], 1), np.array([0, 2, 1]))
  model, _ = probes.fit(train, train)
  assert model(test.features).argmax(1).tolist()[:2] == [0, 2]
  with pytest.raises(ValueError, match='the one class'):
    probes.fit(Split(np.eye(2), np.zeros(2, int)), test)
  with pytest.raises(ValueError, match='one label per row'):
    Split(np.eye(2), np.zeros(3, int))


def test_descent_agrees_with_the_exact_solution():
  train, test = split(3000, 0, signal=0.7), split(3000, 1, signal=0.7)
  model = probes.descend(train)
  exact, _ = probes.fit(train, test)
  found, best = (probes.measure(m(test.features), test.labels).top1 for m in (model, exact))
  assert abs(found - best) < 0.015
  # standardised by running moments of the batches: all rows at once here
  np.testing.assert_allclose(model.scale.mean, train.features.mean(0), atol=1e-3)
  np.testing.assert_allclose(model.scale.deviation, train.features.std(0), rtol=1e-3)
  assert np.array_equal(probes.descend(train).weights, model.weights)


def test_descent_agrees_with_pytorch():
  """BatchNorm1d(affine=False, eps=1e-6), Linear, SGD(momentum=0.9), cosine: 2.15.0, same start."""
  features = np.sin(np.arange(30, dtype=np.float32) ** 2).reshape(10, 3)
  model = probes.descend(Split(features, np.arange(10) % 2), epochs=12)
  np.testing.assert_allclose(model(features[:3]), [
      [0.03790717, -0.02599143], [-0.01461099, 0.01409899], [-0.01606144, 0.00698153]], atol=1e-6)


def test_votes_by_hand():
  train = Split(np.array([[2.0, 0], [0, 3], [1, 1]]), np.array([0, 1, 1]))
  scores = probes.vote(train, np.array([[5.0, 0], [1, 2]]), k=2, temperature=0.5)
  e = lambda s: math.exp(s / 0.5)  # noqa: E731
  near = e(2 / math.sqrt(5)) + e(3 / math.sqrt(10))  # the second sees both of class 1
  np.testing.assert_allclose(scores, [[e(1), e(1 / math.sqrt(2))], [0, near]], rtol=1e-12)


def test_accuracies_by_hand():
  scores = np.array([[3, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [9, 0, 0, 0, 0, 0.]])
  found = probes.measure(scores, np.array([1, 0, 0]))
  assert (found.top1, found.top5, found.n) == (1 / 3, 2 / 3, 3)
  assert found.per_class == pytest.approx((0 + 1 / 2) / 2)


def test_few_labels_are_worse_and_vary():
  train, validation, test = (split(n, i, signal=1.0) for i, n in enumerate((800, 300, 1000)))
  one, ten = (probes.few(train, validation, test, k) for k in (1, 10))
  assert one.mean < ten.mean < probes.probe(train, validation, test, shots=()).logreg.top1
  assert one.deviation > ten.deviation > 0


def test_the_cell_with_the_signal_is_chosen():
  cells = {cell: (split(300, 0, signal=signal), split(300, 1, signal=signal))
           for cell, signal in {(1, 0.0): 0.2, (2, 0.0): 1.5, (2, 0.5): 0.6}.items()}
  found = probes.choose(cells)
  assert list(found) == [(2, 0.0), (2, 0.5), (1, 0.0)]


def test_pools_are_means_of_parts():
  x = np.arange(2 * 12 * 2, dtype=np.float32).reshape(2, 12, 2)
  np.testing.assert_allclose(probes.pool(x, (3, 4), 1), x.mean(1))
  grid = x.reshape(2, 3, 4, 2)
  parts = [grid[:, r, c].mean((1, 2)) for r in (slice(0, 2), slice(2, 3))
           for c in (slice(0, 2), slice(2, 4))]
  np.testing.assert_allclose(probes.pool(x, (3, 4), 2), np.concatenate(parts, 1))
  np.testing.assert_allclose(probes.pool(x, (12,), 12), x.reshape(2, -1))
  with pytest.raises(ValueError, match='within 1..3'):
    probes.pool(x, (3, 4), 4)


def test_a_bag_counts_codes_per_depth():
  tokens = np.array([[[0, 2], [0, 1], [1, 2]], [[2, 0], [2, 0], [2, 0]]])
  np.testing.assert_allclose(
      probes.bag(tokens, (3, 3)),
      [[2 / 3, 1 / 3, 0, 0, 1 / 3, 2 / 3], [0, 0, 1, 1, 0, 0]], rtol=1e-6)
