"""Kernel distance (KID with Inception features): an unbiased MMD^2 with a cubic kernel.

Binkowski et al. 2018, arXiv 1801.01401, section 4: k(a, b) = (a . b / D + 1)^3. Its expectation for
equal distributions is 0 at any number of samples, so slightly negative values are correct. As
torch-fidelity does by default: mean and deviation over 100 subsets of 1,000 rows of each set, drawn
without replacement by NumPy's RandomState(2020). That code multiplies in float32, we in float64.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped

Rows = Shaped[np.ndarray, '_n c']


@dataclasses.dataclass(frozen=True)
class KernelDistance:
  """Mean and standard deviation (of the population) over subsets.

  Attributes:
    subsets: how many.
    size: rows of each set in a subset: 1,000, or all where there are fewer.
  """
  mean: float
  deviation: float
  subsets: int
  size: int


def kernel_distance(generated: Rows, reference: Rows, *, subsets: int = 100, size: int = 1000,
                    seed: int = 2020) -> KernelDistance:
  """Mean of `mmd` over random subsets.

  Raises:
    ValueError: fewer than 2 rows of either.
  """
  size = min(size, len(generated), len(reference))
  if size < 2:
    raise ValueError(f'{len(generated)} and {len(reference)} rows have no kernel distance; '
                     'give 2 or more of each.')
  random = np.random.RandomState(seed)
  found = np.empty(subsets)
  for i in range(subsets):
    x = generated[random.choice(len(generated), size, replace=False)]
    y = reference[random.choice(len(reference), size, replace=False)]
    found[i] = mmd(x, y)
  return KernelDistance(float(found.mean()), float(found.std()), subsets, size)


def mmd(x: Shaped[np.ndarray, 'm c'], y: Shaped[np.ndarray, 'm c']) -> float:
  """Unbiased MMD^2 of two sets of m rows:
  (sum_{i != j} k(x_i, x_j) + sum_{i != j} k(y_i, y_j)) / (m (m - 1)) - 2 mean_ij k(x_i, y_j)."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  m = len(x)
  xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
  within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
  return float(within / (m * (m - 1)) - 2 * xy.mean())


def _kernel(a: Float[np.ndarray, 'm c'], b: Float[np.ndarray, 'm c']
            ) -> Float[np.ndarray, 'm m']:
  k = a @ b.T
  k /= a.shape[1]
  k += 1
  return k * k * k
