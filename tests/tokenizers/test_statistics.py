"""Statistics of a batch: both formulations of the sums, spare rows, diversity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smalti.tokenizers.statistics import diversity, segment_count, segment_sums, spare_rows


@pytest.mark.parametrize('rows', [5, 300, 4099])
@pytest.mark.parametrize('method', ['scatter', 'matmul', None])
def test_both_sums_are_those_of_numpy(key, rows, method):
  a, b = jax.random.split(key)
  z, tokens = jax.random.normal(a, (rows, 3)), jax.random.randint(b, (rows,), 0, 2000)
  count, total = segment_sums(z, tokens, 2000, method=method)
  want = np.zeros((2000, 3))
  np.add.at(want, np.asarray(tokens), np.asarray(z, np.float64))
  np.testing.assert_array_equal(count, np.bincount(tokens, minlength=2000))
  np.testing.assert_allclose(total, want, atol=1e-5)
  np.testing.assert_array_equal(segment_count(tokens, 2000), count)


def test_spare_rows_are_drawn_without_replacement(key):
  z = jnp.arange(40.0)[:, None]
  for codes in (1, 39, 40):
    rows = np.asarray(spare_rows(z, codes, key))[:, 0]
    assert len(set(rows)) == codes and set(rows) <= set(range(40))
  other = spare_rows(z, 10, jax.random.key(1))
  assert not np.array_equal(other, spare_rows(z, 10, key))


def test_spare_rows_of_a_small_batch_repeat_with_noise(key):
  z = 100 * jnp.arange(4.0)[:, None]
  rows = np.asarray(spare_rows(z, 64, key))[:, 0]
  assert len(set(rows)) == 64
  near = np.abs(rows[:, None] - np.asarray(z)[:, 0]).min(1)
  assert near.max() < 0.05 * np.std(z)
  assert np.all(np.bincount(np.rint(rows / 100).astype(int)) == 16)


def test_spare_rows_are_of_the_rows_that_count(key):
  z = jnp.arange(40.0)[:, None]
  valid = z[:, 0] % 4 == 1
  for codes in (3, 10):
    rows = np.asarray(spare_rows(z, codes, key, valid))[:, 0]
    assert len(set(rows)) == codes and np.all(rows % 4 == 1)
  rows = np.asarray(spare_rows(z, 30, key, valid))[:, 0]  # more than there are: again, with noise
  assert len(set(rows)) == 30 and np.abs(rows - 1 - 4 * np.rint((rows - 1) / 4)).max() < 0.5


def test_diversity_of_known_counts():
  uniform = diversity(jnp.array([3.0, 3, 0, 3]))
  np.testing.assert_allclose(uniform['perplexity'], 3, rtol=1e-6)
  np.testing.assert_allclose(uniform['usage'], 0.75)
  single = diversity(jnp.array([0.0, 7]))
  np.testing.assert_allclose([single['perplexity'], single['usage']], [1, 0.5], rtol=1e-6)
