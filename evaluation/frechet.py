"""Frechet distance between Gaussians fitted to features, from streamed float64 moments.

Heusel et al. 2017, arXiv 1706.08500, equation 6:
FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), with unbiased covariances S.
Everything here is NumPy in float64 on the host: float32 sums of squares lose the covariance of
features with an offset. A distance is called FID only with the FID Inception network; the name of
any other is `fd_<extractor>_<hash>` (see `evaluation/features.py`).
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float, Shaped

ROUNDING = 1e-3  # a self-distance may come out this far below zero, per unit of total variance


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Count, mean and centred scatter of features, which merge exactly over any partition.

  Attributes:
    n: rows seen; 0 for the moments of a file that does not say.
    mean: float64[D].
    scatter: float64[D, D], the sum of outer products of centred rows (M2).
    extractor: identity of what made the features; moments of two extractors do not mix.
  """
  n: int
  mean: Float[np.ndarray, 'c']
  scatter: Float[np.ndarray, 'c c']
  extractor: str = ''

  @classmethod
  def empty(cls, dim: int, extractor: str = '') -> 'Moments':
    return cls(0, np.zeros(dim), np.zeros((dim, dim)), extractor)

  @classmethod
  def of(cls, features: Float[np.ndarray, 'b c'], extractor: str = '') -> 'Moments':
    """The moments of one array of features. Raises ValueError for a non-finite feature."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2:
      raise ValueError(f'Features of shape {x.shape} must be [rows, dimensions].')
    if not len(x):
      return cls.empty(x.shape[1], extractor)
    if not np.isfinite(x).all():
      bad = int(np.flatnonzero(~np.isfinite(x).all(1))[0])
      raise ValueError(f'Feature row {bad} is not finite; look at the sample it came from.')
    mean = x.mean(0)
    x = x - mean
    return cls(len(x), mean, x.T @ x, extractor)

  @classmethod
  def given(cls, n: int, mean: Shaped[np.ndarray, '...'], covariance: Shaped[np.ndarray, '...'],
            extractor: str = '') -> 'Moments':
    """Those of a file, whose covariance stays the same bit for bit; n = 0 where it is not said.

    Raises ValueError for what cannot be a mean and a covariance.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    dim = mean.size
    if mean.shape != (dim,) or covariance.shape != (dim, dim) or not dim:
      raise ValueError(f'a mean of shape {mean.shape} and a covariance of {covariance.shape}')
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
      raise ValueError('moments that are not finite')
    if np.abs(covariance - covariance.T).max() > 1e-6 * abs(np.trace(covariance)) / dim:
      raise ValueError('an asymmetric covariance')
    moments = cls(n, mean, covariance * max(n - 1, 0), extractor)
    moments.__dict__['covariance'] = covariance  # (n - 1) / (n - 1) would cost the last bit
    return moments

  def add(self, features: Float[np.ndarray, 'b c'],
          valid: Bool[np.ndarray, 'b'] | None = None) -> 'Moments':
    """Moments with more rows; rows where `valid` is False (padding of a batch) do not count."""
    features = np.asarray(features)
    rows = features if valid is None else features[np.asarray(valid, bool)]
    return self.merge(Moments.of(rows, self.extractor))

  def merge(self, other: 'Moments') -> 'Moments':
    """Moments of both sets of rows (Chan et al. 1979). Raises ValueError for unlike features."""
    _same_features(self, other)
    n = self.n + other.n
    if not self.n or not other.n:
      return self if self.n else other
    delta = other.mean - self.mean
    return Moments(
        n, self.mean + delta * (other.n / n),
        self.scatter + other.scatter + np.outer(delta, delta) * (self.n * other.n / n),
        self.extractor)

  @property
  def dim(self) -> int:
    return len(self.mean)

  @functools.cached_property
  def covariance(self) -> Float[np.ndarray, 'c c']:
    """Unbiased, divided by n - 1."""
    if self.n < 2:
      raise ValueError(f'A covariance needs 2 or more rows, got n={self.n}.')
    return self.scatter / (self.n - 1)

  @functools.cached_property
  def root(self) -> Float[np.ndarray, 'c c']:
    """The symmetric square root of the covariance; kept, since a reference serves many times."""
    values, vectors = np.linalg.eigh(self.covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
  """FD between two sets of features; pass the reference as `b`, whose root is kept.

  The trace term is the sum of the roots of the eigenvalues of S2^(1/2) S1 S2^(1/2), which is
  symmetric, so that nothing complex arises. Small negative results are rounding, left as they are.

  Raises:
    ValueError: other extractors or dimensions, fewer than 2 rows, or a clearly negative result.
  """
  _same_features(a, b)
  values = np.linalg.eigvalsh(b.root @ a.covariance @ b.root)
  return _distance(a, b, np.sqrt(np.maximum(values, 0)).sum())


def frechet_distance_low_rank(x: Float[np.ndarray, 'm c'], y: Float[np.ndarray, 'n c']) -> float:
  """FD from the features themselves, for fewer rows than dimensions: an m x n SVD.

  With centred rows a = x / sqrt(m - 1) and b = y / sqrt(n - 1) the trace term is the nuclear norm
  of a b^T.
  """
  a, b = Moments.of(x), Moments.of(y)
  left = (np.asarray(x, np.float64) - a.mean) / np.sqrt(a.n - 1)
  right = (np.asarray(y, np.float64) - b.mean) / np.sqrt(b.n - 1)
  return _distance(a, b, np.linalg.svd(left @ right.T, compute_uv=False).sum())


def _distance(a: Moments, b: Moments, trace_of_root: float) -> float:
  variance = float(np.trace(a.covariance) + np.trace(b.covariance))
  value = float(np.sum((a.mean - b.mean) ** 2) + variance - 2 * trace_of_root)
  if not np.isfinite(value) or value < -ROUNDING * max(1.0, variance):
    raise ValueError(f'A Frechet distance of {value} is not rounding; check both covariances.')
  return value


def _same_features(a: Moments, b: Moments) -> None:
  if a.dim != b.dim:
    raise ValueError(f'Features of {a.dim} and {b.dim} dimensions do not compare.')
  if a.extractor != b.extractor:
    raise ValueError(
        f'Features of {a.extractor!r} and {b.extractor!r} do not compare; use one extractor.')
