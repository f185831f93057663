"""Codes from sums of their vectors: what greedy quantization returns, and what it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smalti.generators import sums

# Share of positions, mean over Gaussian books of c=8, V=16, D=4 and its deviation between books:
# of codes that are the greedy codes of N(0, 1), and of codes drawn uniformly.
RATES = {1.: ((.8104, .0761), (.8789, .0236)), .5: ((.0569, .0204), (.1299, .0383)),
         .25: ((.0002, .0005), (.0015, .0026))}
ONE_SET = {1.: .806, .5: .040, .25: 0.}  # published for one set of books, codes of N(0, 1)


@pytest.mark.parametrize('ratio', RATES)
def test_change_rate_of_gaussian_codebooks(ratio):
  """Sums of codes are not quantized into the same codes unless the levels decay fast."""
  number = 16
  vectors = jnp.asarray(np.random.default_rng(0).normal(size=(number, 4, 16, 8)), jnp.float32)
  vectors *= ratio ** jnp.arange(4)[:, None, None]
  z = jax.random.normal(jax.random.key(0), (number, 1, 2000, 8))
  codes = jax.vmap(sums.requantise)(vectors, z)
  drawn = jax.random.randint(jax.random.key(1), codes.shape, 0, 16)
  for tokens, (mean, deviation) in zip((codes, drawn), RATES[ratio]):
    rates = jax.vmap(sums.change_rate)(vectors, tokens)
    assert abs(np.mean(rates) - mean) < 4 * deviation / number ** .5
    if tokens is codes:
      assert abs(mean - ONE_SET[ratio]) < 2 * deviation
      assert abs(np.mean(rates) - ONE_SET[ratio]) < 2 * deviation


def test_requantising_around_a_known_code_makes_up_for_it():
  vectors = jnp.array([[[0.], [4.]], [[0.], [2.]], [[0.], [1.]]])
  z = jnp.array([[[5.]]])
  free = sums.requantise(vectors, z)
  np.testing.assert_array_equal(free[0, 0], (1, 0, 1))
  known = jnp.array([[[0, 1, 0]]])
  held = sums.requantise(vectors, jnp.array([[[3.2]]]), None, jnp.array([[3]]), known,
                           jnp.array([[[False, True, False]]]))
  np.testing.assert_array_equal(held[0, 0], (1, 1, 0))
  np.testing.assert_array_equal(
      sums.requantise(vectors, jnp.array([[[3.2]]]))[0, 0], (1, 0, 0))
