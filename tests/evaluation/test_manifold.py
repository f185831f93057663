"""Precision, recall, density, coverage: golden values, the definitions in full, bounded memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from smalti.evaluation.manifold import manifold, neighbours

REAL = np.array([[0.], [1.], [2.], [3.], [10.]])
FAKE = np.array([[.5], [2.5], [20.], [9.]])


def by_definition(real, generated, k, density_k):
  distance = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))  # noqa: E731
  radius = lambda x, k: np.sort(distance(x, x), 1)[:, k]  # noqa: E731  column 0 is the point itself
  d, ball = distance(real, generated), radius(real, density_k)
  return ((d <= radius(real, k)[:, None]).any(0).mean(),
          (d <= radius(generated, k)).any(1).mean(),
          (d < ball[:, None]).sum(0).mean() / density_k,  # prdc 0.2: the border does not belong
          (d.min(1) < ball).mean())


def test_golden_on_a_line():
  np.testing.assert_array_equal(neighbours(REAL, 1)[:, 0], [1, 1, 1, 1, 49])
  np.testing.assert_array_equal(neighbours(FAKE, 1)[:, 0], [4, 4, 121, 42.25])
  found = manifold(real=REAL, generated=FAKE, k=1, density_k=2)
  assert (found.precision, found.recall) == (0.75, 1.0)
  assert (found.real, found.generated) == (5, 4)


def test_which_is_which():
  rng = np.random.default_rng(0)
  generated, real = .1 * rng.normal(size=(200, 16)), 3 * rng.normal(size=(200, 16))
  found = manifold(real=real, generated=generated)
  assert found.precision > .8 and found.recall < .3
  other = manifold(real=generated, generated=real)
  assert (other.precision, other.recall) == (found.recall, found.precision)
  with pytest.raises(TypeError):
    manifold(real, generated)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(7, 40), st.integers(7, 40), st.integers(1, 5),
       st.integers(1, 6), st.integers(1, 50))
def test_blocks_give_the_definition(seed, m, n, k, density_k, block):
  rng = np.random.default_rng(seed)
  real = rng.normal(size=(m, 6)).astype(np.float32)
  generated = (rng.normal(size=(n, 6)) + rng.normal()).astype(np.float32)
  found = manifold(real=real, generated=generated, k=k, density_k=density_k, block=block)
  expected = by_definition(real.astype(float), generated.astype(float), k, density_k)
  assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(
      expected, abs=1e-12)


def test_equal_distributions_and_dropped_modes():
  rng = np.random.default_rng(0)
  modes = 20 * rng.normal(size=(5, 8))
  draw = lambda n, kinds: modes[np.arange(n) % kinds] + rng.normal(size=(n, 8))  # noqa: E731
  real = draw(1000, 5)
  same, dropped = (manifold(real=real, generated=draw(1000, kinds)) for kinds in (5, 3))
  assert same.density == pytest.approx(1, abs=.1) and same.coverage > .9
  assert dropped.recall == pytest.approx(same.recall * .6, abs=.05)
  assert dropped.coverage < .7
  assert dropped.precision == pytest.approx(same.precision, abs=.05)


def test_an_offset_of_all_features_changes_nothing():
  rng = np.random.default_rng(0)
  real, generated = rng.normal(size=(300, 8)), rng.normal(size=(200, 8))
  near = manifold(real=real, generated=generated)
  assert manifold(real=real + 1e6, generated=generated + 1e6) == near


def test_duplicates_have_balls_without_extent():
  real = np.repeat(np.arange(3.0)[:, None], 4, 0)  # 3 others of every point lie upon it
  found = manifold(real=real, generated=np.array([[0.], [.5], [1.], [7.]]), k=3, density_k=3)
  assert found.precision == .5
  assert found.density == found.coverage == 0


def test_too_few_points(unchecked):
  with pytest.raises(ValueError, match='k=5 neighbours of 5 points'):
    manifold(real=REAL, generated=FAKE, k=1)
  with pytest.raises(ValueError, match='equal dimensions'):
    manifold(real=REAL, generated=np.zeros((9, 2)))


@pytest.mark.slow
def test_memory_is_that_of_blocks():
  """10,000 x 20,000 distances in float64 would be 1.5 GiB."""
  rng = np.random.default_rng(0)
  real, generated = (rng.normal(size=(n, 8)).astype(np.float32) for n in (10_000, 20_000))
  tracemalloc.start()
  manifold(real=real, generated=generated)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 200 * 2**20
