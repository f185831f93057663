"""Clustering re-initialisation: idle codes go to their nearest vectors, used ones stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.clustering import ClusteringConfig
from smalti.tokenizers.vq import VQConfig


def build(**fields):
  config = VQConfig(codes=8, dim=2, update='gradient', revival=0.0, init='uniform',
                    clustering=ClusteringConfig(), **fields)
  return config.build(rngs=nnx.Rngs(0))


def test_steps_are_those_of_the_published_rule():
  """Three steps against the formula of bytedance/1d-tokenizer, written in float64."""
  rng = np.random.default_rng(0)
  q, p = build(), np.zeros(8)
  e = np.asarray(q.codebook[...], np.float64)
  step = jax.jit(lambda q, z: q(z[None], key=jax.random.key(0), train=True).statistics)
  pulls = []
  for _ in range(3):
    z = rng.normal(size=(30, 2)).astype(np.float32)
    d = np.square(z[:, None] - e).sum(-1)
    p = 0.99 * p + 0.01 * np.bincount(d.argmin(1), minlength=8) / 30
    a = np.exp(-p * 8 * 10 / (1 - 0.99) - 1e-3)[:, None]
    pulls.append(a)
    e = (1 - a) * e + a * z[d.argmin(0)]
    q.absorb(step(q, jnp.asarray(z)))
    np.testing.assert_allclose(q.codebook[...], e, rtol=1e-4, atol=1e-6)
  assert np.max(pulls) > 0.99 and np.min(pulls) < 1e-9  # some moved, some did not


def test_vectors_that_do_not_count_are_no_anchors():
  z = jnp.array([[[0.0, 0], [1, 1], [2, 2], [3, 3]]])
  q = build()
  anchors = q(z, train=True, valid=jnp.array([[False, True, False, True]])).statistics.spare
  np.testing.assert_array_equal(np.unique(anchors), [1])  # of the two, nearest to codes about 0


@pytest.mark.parametrize('fields', [dict(update='ema', revival=0.0), dict(update='gradient')])
def test_it_does_not_go_with_revival_or_averages(fields):
  with pytest.raises(ValueError, match='update=gradient and revival=0'):
    VQConfig(codes=8, dim=2, clustering=ClusteringConfig(), **fields).build(rngs=nnx.Rngs(0))
