"""What training hides: counts, and weights that make every choice an estimate of the bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smalti.generators import masking


def hidden(ratio, counts, n=16, size=20_000):
  """How many of n tokens are hidden, and the weights, at evenly spaced u."""
  u = (jnp.arange(size) + .5) / size
  masked, weight = masking.by_ratio(
      jax.random.key(0), u, jnp.ones((size, n), bool), ratio, counts)
  return np.asarray(masked.sum(1)), np.asarray(weight), np.asarray(masked)


@pytest.mark.parametrize('counts', ['ceil', 'round', 'bernoulli'])
@pytest.mark.parametrize('ratio', ['cosine', 'arccos', 'linear'])
def test_weights_are_one_over_the_count_and_its_chance(ratio, counts):
  count, weight, masked = hidden(ratio, counts)
  assert count.min() == (0 if counts == 'bernoulli' else 1) and count.max() == 16
  share = np.bincount(count, minlength=17) / len(count)
  for m in range(1, 17):
    assert np.ptp(weight[count == m]) < 1e-6
    chance = 1 / (m * weight[count == m][0])
    np.testing.assert_allclose(chance, share[m], atol=4 * np.sqrt(share[m] / len(count)))
  assert np.all(weight[count == 0] == 0)
  np.testing.assert_allclose(masked.mean(0), masked.mean(), atol=.02)  # no position is preferred


def test_independent_masks_of_a_linear_ratio_have_every_count_alike():
  count, weight, _ = hidden('linear', 'bernoulli', n=64)
  some = count > 0
  np.testing.assert_allclose(weight[some], 65 / count[some], rtol=1e-4)


def test_counts_round_as_published():
  """ceil(gamma n) of MaskGIT; round(gamma n), one or more, of TiTok."""
  u = (np.arange(20_000) + .5) / 20_000
  np.testing.assert_array_equal(
      hidden('cosine', 'ceil')[0], np.ceil(np.float32(np.cos(np.pi / 2 * u)) * np.float32(16)))
  wanted = np.maximum(np.round(np.arccos(u) * 2 / np.pi * 16), 1)
  assert np.mean(hidden('arccos', 'round')[0] == wanted) > .999  # float32 at the borders
