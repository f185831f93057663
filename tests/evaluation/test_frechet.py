"""Frechet distance: analytic values, invariances, and moments over any partition."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from smalti.evaluation.frechet import Moments, frechet_distance, frechet_distance_low_rank


def gaussian(mean, covariance, n=5):
  return Moments(n, np.array(mean, float), np.array(covariance, float) * (n - 1))


def test_diagonal_golden():
  a = gaussian((0, 0, 0), np.diag((4, 1, .25)))
  b = gaussian((1, -2, .5), np.diag((1, 9, .25)))
  assert frechet_distance(a, b) == pytest.approx(10.25, abs=1e-12)


def test_two_by_two_golden():
  a, b = gaussian((0, 0), [[2, 1], [1, 2]]), gaussian((0, 0), [[3, -1], [-1, 1]])
  assert frechet_distance(a, b) == pytest.approx(1.3972795044568622, abs=1e-12)


@pytest.mark.parametrize('scale', [0.25, 1.0, 3.0])
def test_isotropic_scale_and_shift(scale):
  shift = np.arange(7.0)
  a, b = gaussian(np.zeros(7), np.eye(7)), gaussian(shift, np.eye(7) * scale ** 2)
  expected = 7 * (scale - 1) ** 2 + (shift ** 2).sum()
  assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_invariances(seed, dim):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(40, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)
  y = rng.normal(size=(30, dim)) @ rng.normal(size=(dim, dim))
  distance = lambda x, y: frechet_distance(Moments.of(x), Moments.of(y))  # noqa: E731
  value = distance(x, y)
  rotation, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
  assert distance(x @ rotation, y @ rotation) == pytest.approx(value, rel=1e-8, abs=1e-9)
  assert distance(x + 3, y + 3) == pytest.approx(value, rel=1e-8, abs=1e-9)
  assert distance(y, x) == pytest.approx(value, rel=1e-8, abs=1e-9)
  assert distance(5 * x, 5 * y) == pytest.approx(25 * value, rel=1e-8, abs=1e-9)


def test_fewer_rows_than_dimensions():
  """D = 256, N = 200: the value that eigh, eigvals, sqrtm and the nuclear norm agree on."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(200, 256)), rng.normal(size=(200, 256))
  full = frechet_distance(Moments.of(x), Moments.of(y))
  a, b = Moments.of(x).covariance, Moments.of(y).covariance
  roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
  plain = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * roots
  assert full == pytest.approx(plain, rel=1e-6)
  assert full == pytest.approx(frechet_distance_low_rank(x, y), rel=1e-6)


def test_rank_deficient_forms_agree():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(50, 96))
  y = rng.normal(size=(40, 96)) * 1.5 + .3
  full = frechet_distance(Moments.of(x), Moments.of(y))
  assert full == pytest.approx(frechet_distance_low_rank(x, y), rel=1e-6)
  itself = frechet_distance(Moments.of(x), Moments.of(x))  # rounding, reported as it is
  assert abs(itself) < 1e-3


def test_agrees_with_the_matrix_square_root():
  linalg = pytest.importorskip('scipy.linalg')
  rng = np.random.default_rng(1)
  a = Moments.of(rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)))
  b = Moments.of(rng.normal(size=(300, 12)))
  root = linalg.sqrtm(a.covariance @ b.covariance).real
  expected = (((a.mean - b.mean) ** 2).sum()
              + np.trace(a.covariance + b.covariance - 2 * root))
  assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_a_negative_distance_is_refused():
  indefinite = gaussian((0, 0), np.diag((1.0, -5.0)))
  with pytest.raises(ValueError, match='not rounding'):
    frechet_distance(indefinite, gaussian((0, 0), np.eye(2)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 13), min_size=1, max_size=8))
def test_any_partition_gives_the_moments_of_the_whole(seed, sizes):
  rng = np.random.default_rng(seed)
  rows = rng.normal(size=(sum(sizes), 5)) + 100  # an offset, where sums of squares lose digits
  streamed, start = Moments.empty(5), 0
  for size in sizes:  # sizes 0 and 1 among them
    streamed = streamed.add(rows[start:start + size])
    start += size
  assert streamed.n == len(rows)
  if len(rows) > 1:
    np.testing.assert_allclose(streamed.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        streamed.covariance, np.cov(rows.T), rtol=1e-10, atol=1e-12 * rows.var(0).max())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.tuples(*[st.integers(0, 9)] * 3))
def test_merge_is_associative_and_commutative(seed, sizes):
  rng = np.random.default_rng(seed)
  a, b, c = (Moments.of(rng.normal(size=(n, 4)) + 10) for n in sizes)
  left, right, other = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a)
  for one in (right, other):
    assert left.n == one.n
    np.testing.assert_allclose(left.mean, one.mean, rtol=1e-12)
    np.testing.assert_allclose(left.scatter, one.scatter, rtol=1e-10, atol=1e-10)


def test_padding_rows_do_not_count():
  rows = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
  padded = np.concatenate([rows, np.full((6, 3), np.nan, np.float32)])
  moments = Moments.empty(3).add(padded, np.arange(16) < 10)
  assert moments.n == 10
  np.testing.assert_array_equal(moments.scatter, Moments.of(rows).scatter)


def test_float32_features_with_an_offset_keep_their_covariance():
  rng = np.random.default_rng(0)
  rows = (100 + rng.normal(size=(2000, 8))).astype(np.float32)
  moments = Moments.empty(8)
  for batch in np.array_split(rows, 13):
    moments = moments.add(batch)
  np.testing.assert_allclose(moments.covariance, np.cov(rows.T.astype(np.float64)), atol=1e-10)


def test_sample_size_bias_is_the_predicted_one():
  # Chong and Forsyth 2020, arXiv 1911.07023: d / n + d (d + 1) / (4 n) for the unit Gaussian
  rng, d, n = np.random.default_rng(0), 16, 1000
  exact = gaussian(np.zeros(d), np.eye(d))
  measured = [frechet_distance(Moments.of(rng.normal(size=(n, d))), exact) for _ in range(40)]
  assert np.mean(measured) == pytest.approx(d / n + d * (d + 1) / (4 * n), rel=0.05)


def test_given_moments_keep_their_covariance_bit_for_bit():
  rng = np.random.default_rng(0)
  covariance = np.cov(rng.normal(size=(50, 4)).T)
  for n in (0, 50):  # 0: a file that does not say
    moments = Moments.given(n, np.arange(4.0), covariance, 'pixels:abc:none')
    np.testing.assert_array_equal(moments.covariance, covariance)
  np.testing.assert_allclose(moments.scatter, covariance * 49)
  with pytest.raises(ValueError, match='asymmetric'):
    Moments.given(3, np.zeros(2), np.array([[1., 2.], [0., 1.]]))
  with pytest.raises(ValueError, match='not finite'):
    Moments.given(3, np.zeros(2), np.diag([1., np.nan]))
  with pytest.raises(ValueError, match='shape'):
    Moments.given(3, np.zeros(3), np.eye(2))


def test_what_is_refused():
  rng = np.random.default_rng(0)
  moments = Moments.of(rng.normal(size=(9, 4)), 'pixels:abc:none')
  with pytest.raises(ValueError, match='do not compare'):
    frechet_distance(moments, Moments.of(rng.normal(size=(9, 4)), 'other'))
  with pytest.raises(ValueError, match='dimensions'):
    moments.merge(Moments.empty(5, 'pixels:abc:none'))
  with pytest.raises(ValueError, match='2 or more rows'):
    frechet_distance(Moments.of(np.ones((1, 4)), moments.extractor), moments)
  with pytest.raises(ValueError, match='not finite'):
    Moments.of(np.array([[0., 1.], [np.inf, 0.]]))
