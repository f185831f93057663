"""Sinkhorn in the log domain, in chunks: the plan of the float64 iteration, and balanced codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.sinkhorn import Balance, SinkhornConfig
from smalti.tokenizers.vq import VQConfig


def reference(z, codes, epsilon, iterations):
  """Q of the published iteration in float64 (arXiv 2110.05789), from its definition."""
  d = np.square(z[:, None].astype(np.float64) - codes).sum(-1)
  middle = (d.max() + d.min()) / 2
  plan = np.exp((middle - d) / (d.max() - middle + 1e-5) / epsilon)
  for _ in range(iterations):
    plan /= plan.sum(0) * plan.shape[1]
    plan /= plan.sum(1, keepdims=True) * plan.shape[0]
  return plan, d


def data(seed):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(n, 8)).astype(np.float32) for n in (256, 16))


@pytest.mark.parametrize('epsilon,iterations', [(0.003, 100), (0.05, 3)])
def test_the_plan_is_that_of_the_published_iteration(epsilon, iterations):
  z, codes = data(0)
  plan, _ = reference(z, codes, epsilon, iterations)

  @jax.jit
  def both(z, codes):
    balance = Balance(z, codes, epsilon, rows=96)  # 256 = 96 + 96 + 64
    return balance.plan(iterations), balance.tokens(iterations)

  got, tokens = both(z, codes)
  np.testing.assert_allclose(got, plan, atol=1e-6)
  np.testing.assert_array_equal(tokens, plan.argmax(1))


def test_codes_are_balanced_and_nearest_codes_are_not():
  choose = jax.jit(lambda z, c: SinkhornConfig().choose(z, c, key=None, valid=None))
  for seed in range(3):
    z, codes = data(seed)
    counts = np.bincount(choose(z, codes), minlength=16)
    nearest = np.bincount(reference(z, codes, 1.0, 0)[1].argmin(1), minlength=16)
    assert np.all(np.abs(counts - 16) <= 4) and np.abs(nearest - 16).max() > 12


def test_vectors_that_do_not_count_take_no_share():
  z, codes = data(1)
  valid = np.arange(256) % 3 > 0
  other = np.where(valid[:, None], z, 100)
  choose = jax.jit(lambda z, v: SinkhornConfig(iterations=30).choose(z, codes, key=None, valid=v))
  np.testing.assert_array_equal(
      choose(z, valid)[valid], SinkhornConfig(iterations=30).choose(z[valid], codes, key=None,
                                                                    valid=None))
  np.testing.assert_array_equal(choose(z, valid)[valid], choose(other, valid)[valid])


def test_training_is_balanced_then_annealed_and_evaluation_takes_the_nearest():
  z, codes = data(2)
  config = VQConfig(codes=16, dim=8, assignment=SinkhornConfig(iterations=50, steps=4))
  q = config.build(rngs=nnx.Rngs(0))
  q.codebook[...] = codes
  z = jnp.asarray(z)[None]
  nearest = q(z).tokens
  step = jax.jit(lambda q, key: q(z, key=key, train=True))
  first = step(q, jax.random.key(0))
  same = [np.mean(first.tokens == nearest)]
  np.testing.assert_allclose(first.metrics['agreement'], same[0], atol=1e-6)
  assert np.abs(first.statistics.count - 16).max() <= 4
  zero = jax.tree.map(jnp.zeros_like, first.statistics)
  for age in range(1, 5):
    q.absorb(first.statistics)
    assert q.age[...] == age
    q.absorb(zero)  # a step without vectors is none
    q.codebook[...] = codes
    same.append(np.mean(step(q, jax.random.key(age)).tokens == nearest))
  assert same[0] < same[2] < same[4] == 1 and q.age[...] == 4


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match='epsilon=0'):
    SinkhornConfig(epsilon=0.0)
  with pytest.raises(ValueError, match='probability=2'):
    SinkhornConfig(probability=2.0)
