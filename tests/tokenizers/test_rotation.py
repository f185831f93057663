"""The rotation trick: value of the code, jacobian lambda R, and what it does where no R exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.rotation import rotate
from smalti.tokenizers.vq import VQConfig


def test_the_jacobian_is_a_rotation_times_the_ratio_of_lengths(key):
  a, b = jax.random.split(key)
  z, q = jax.random.normal(a, (20, 5)), 3 * jax.random.normal(b, (20, 5))
  np.testing.assert_array_equal(rotate(z, q), q)
  jacobian = jax.jit(jax.vmap(jax.jacrev(rotate)))(z, q)
  scale = np.linalg.norm(q, axis=-1) / np.linalg.norm(z, axis=-1)
  turn = jacobian / scale[:, None, None]
  np.testing.assert_allclose(turn @ np.swapaxes(turn, 1, 2), np.tile(np.eye(5), (20, 1, 1)),
                             atol=1e-5)
  np.testing.assert_allclose(np.linalg.det(turn), 1, rtol=1e-5)
  np.testing.assert_allclose(np.einsum('nij,nj->ni', jacobian, z), q, atol=1e-5)


def test_opposite_directions_and_zeros_pass_straight_through_or_stay_finite():
  z, q = jnp.array([[1.0, 2, 0], [0, 0, 0]]), jnp.array([[-2.0, -4, 0], [1, 1, 1]])
  jacobian = jax.jit(jax.vmap(jax.jacrev(rotate)))(z, q)
  np.testing.assert_array_equal(jacobian[0], np.eye(3))
  assert np.all(np.isfinite(jacobian))
  np.testing.assert_array_equal(rotate(z, q), q)


def test_numbers_have_no_rotation():
  with pytest.raises(ValueError, match='dim=2 or more'):
    VQConfig(codes=4, dim=1, estimator='rotation').build(rngs=nnx.Rngs(0))
