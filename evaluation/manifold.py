"""Precision, recall, density and coverage: are samples among real data, and the reverse?

Kynkaanniemi et al. 2019, arXiv 1904.06991, section 3: the manifold of a set is the union of balls
around its points, each reaching its k-th neighbour within the set, itself not counted (k = 3).
Precision is the share of generated points in a real ball, recall that of real points in a generated
ball; the border belongs to a ball. Density and coverage: Naeem et al. 2020, arXiv 2002.09797,
equations 3 and 4, with k = 5; as in their package, borders do not belong to the balls there.

All four depend on how many points there are of each kind. Distances are computed in blocks: 50,000
by 10,000 of them are never held at once.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped

BLOCK = 2048  # a block of distances is at most BLOCK x BLOCK float64: 32 MiB


@dataclasses.dataclass(frozen=True)
class Manifold:
  """Shares in 0..1, but for density, whose mean over equal sets is 1.

  Attributes:
    real, generated: how many points.
    k, density_k: neighbours that a ball reaches, for precision and recall, and for the others.
  """
  precision: float
  recall: float
  density: float
  coverage: float
  real: int
  generated: int
  k: int
  density_k: int


def manifold(*, real: Shaped[np.ndarray, '_m c'], generated: Shaped[np.ndarray, '_n c'],
             k: int = 3, density_k: int = 5, block: int = BLOCK,
             around_real: Float[np.ndarray, '_m _k'] | None = None) -> Manifold:
  """All four measures in one pass over the distances.

  Args:
    around_real: `neighbours` of the real points, at least max(k, density_k) of each; None computes
      them.

  Raises:
    ValueError: too few points to have neighbours, or points of unlike dimensions.
  """
  if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
    raise ValueError(f'Points of shapes {real.shape} and {generated.shape} must be [rows, '
                     'dimensions], of equal dimensions.')
  # digits that all points share are lost to the squares; a point, so that a grid stays a grid
  center = real[:1].astype(np.float64)
  if around_real is None:
    around_real = neighbours(real, max(k, density_k), block=block, center=center)
  radius = around_real[:, k - 1]
  reach = around_real[:, density_k - 1]
  around_generated = neighbours(generated, k, block=block, center=center)[:, k - 1]
  inside, balls = np.zeros(len(generated), bool), np.zeros(len(generated), np.int64)
  covered, found = np.full(len(real), np.inf), np.zeros(len(real), bool)
  for i, u in _blocks(real, block, center):
    for j, v in _blocks(generated, block, center):
      d = _distances(u, v)
      inside[j] |= (d <= radius[i, None]).any(0)
      balls[j] += (d < reach[i, None]).sum(0)
      found[i] |= (d <= around_generated[j]).any(1)
      covered[i] = np.minimum(covered[i], d.min(1))
  return Manifold(
      float(inside.mean()), float(found.mean()), float(balls.mean() / density_k),
      float((covered < reach).mean()), len(real), len(generated), k, density_k)


def neighbours(points: Shaped[np.ndarray, 'n c'], k: int, *, block: int = BLOCK,
               center: Float[np.ndarray, '1 c'] | None = None) -> Float[np.ndarray, 'n k']:
  """Squared distances of every point to its k nearest others, ascending."""
  if not 1 <= k < len(points):
    raise ValueError(f'{k=} neighbours of {len(points)} points; give more points than {k}.')
  center = points[:1].astype(np.float64) if center is None else center
  out = np.empty((len(points), k))
  for i, u in _blocks(points, block, center):
    nearest = np.full((len(u), k), np.inf)
    for j, v in _blocks(points, block, center):
      d = _distances(u, v)
      if i == j:
        np.fill_diagonal(d, np.inf)  # a point is not its own neighbour
      both = np.concatenate([nearest, d], 1)
      nearest = np.partition(both, k - 1, 1)[:, :k]
    out[i] = np.sort(nearest, 1)
  return out


def _blocks(points: np.ndarray, block: int, center: np.ndarray):
  """(where, those points less `center` in float64)."""
  for start in range(0, len(points), block):
    where = slice(start, min(start + block, len(points)))
    yield where, points[where].astype(np.float64) - center


def _distances(u: Float[np.ndarray, 'm c'], v: Float[np.ndarray, 'n c']
               ) -> Float[np.ndarray, 'm n']:
  """Squared, through |u|^2 - 2 u v + |v|^2."""
  d = u @ v.T
  d *= -2
  d += np.square(u).sum(1)[:, None]
  d += np.square(v).sum(1)
  return np.maximum(d, 0, out=d)
