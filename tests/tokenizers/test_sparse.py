"""k-sparse codes: which codes, in which order, and what a prefix of them is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.sparse import SparseConfig


def build(**fields):
  return SparseConfig(**fields).build(rngs=nnx.Rngs(0))


def test_the_most_similar_codes_are_added_without_weights(key):
  z = jax.random.normal(key, (2, 20, 5)) * jnp.exp(jax.random.normal(key, (2, 20, 1)))
  q = build(codes=30, dim=5, active=3)
  out = q(z)
  codes = np.asarray(q.codes(), np.float64)
  cosine = np.asarray(z) @ codes.T / np.linalg.norm(codes, axis=-1)
  want = np.argsort(-cosine, -1)[..., :3]
  np.testing.assert_array_equal(out.tokens, want)
  np.testing.assert_allclose(out.vectors, codes[want].sum(-2), atol=1e-6)
  assert q.vocab == (30, 30, 30) and q.order == 'depth'


def test_a_prefix_is_a_sum_of_fewer_codes_and_the_rest_does_not_matter(key):
  q = build(codes=30, dim=5, active=4)
  tokens = q(jax.random.normal(key, (2, 9, 5))).tokens
  mask = jnp.arange(4) < jnp.array([1, 3])[:, None, None]
  mask = jnp.broadcast_to(mask, tokens.shape)
  got = q.lookup(tokens, mask=mask)
  np.testing.assert_allclose(got[0], q.codes()[tokens[0, :, 0]], atol=1e-7)
  np.testing.assert_allclose(got[1], q.codes()[tokens[1, :, :3]].sum(-2), atol=1e-6)
  np.testing.assert_array_equal(got, q.lookup(jnp.where(mask, tokens, 29 - tokens), mask=mask))


def test_the_first_batch_starts_the_codes_near_the_vectors(key):
  q = build(codes=64, dim=5, active=4)
  z = 3 + 0.1 * jax.random.normal(key, (1, 200, 5))
  q.prepare(z, key=key)
  assert q(z).metrics['relative_commitment'] < 0.01


@pytest.mark.parametrize('fields', [dict(active=0), dict(active=9, codes=8)])
def test_bad_settings_are_refused(fields):
  with pytest.raises(ValueError, match='active='):
    build(**fields)
