"""Stochastic assignment draws from the softmax over distances, whatever the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers import assignment
from smalti.tokenizers.assignment import StochasticConfig
from smalti.tokenizers.search import distance_scores, nearest
from smalti.tokenizers.vq import VQConfig


def draw(config, z, codes, key):
  return config.choose(z, codes, key=key, valid=None)


def test_codes_are_drawn_from_the_softmax(key):
  codes = jnp.array([[0.0, 0], [1, 0], [0, 1.5], [9, 9]])
  z = jnp.tile(jnp.array([[0.4, 0.3]]), (20000, 1))
  counts = np.bincount(draw(StochasticConfig(temperature=0.7), z, codes, key), minlength=4)
  p = np.exp(-np.square(np.asarray(z[0] - codes, np.float64)).sum(-1) / 0.7)
  p /= p.sum()
  expected = 20000 * p[:3]
  assert counts[3] == 0 and np.sum((counts[:3] - expected)**2 / expected) < 16  # 2 degrees, 3e-4


def test_draws_do_not_depend_on_chunks_and_cold_ones_are_the_nearest(key, monkeypatch):
  z, codes = jax.random.normal(key, (50, 3)), jax.random.normal(jax.random.key(1), (40, 3))
  whole = draw(StochasticConfig(), z, codes, key)
  np.testing.assert_array_equal(
      draw(StochasticConfig(temperature=1e-6), z, codes, key), nearest(z, codes))
  monkeypatch.setattr(assignment, 'chunk_rows', lambda n, k: 16)
  np.testing.assert_array_equal(draw(StochasticConfig(), z, codes, key), whole)
  assert np.mean(whole == nearest(z, codes)) < 0.9


@pytest.mark.parametrize('uniform', [0.0, 1 - 2**-23])
def test_the_ends_of_the_unit_interval_draw_a_code_that_can_be(key, uniform, monkeypatch):
  """There a cumulative sum that is not monotone would give codes of probability zero."""
  near = jnp.arange(4096) % 64 < 20  # runs of far codes, over which the sum still wavers
  codes = jnp.where(near[:, None], jax.random.normal(key, (4096, 3)), 1e3)
  z = jax.random.normal(jax.random.key(1), (64, 3))
  p = jax.nn.softmax(distance_scores(z, codes) / 0.5)
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: jnp.full(shape, uniform))
  assert near[draw(StochasticConfig(), z, codes, key)].all()
  up_to = jnp.cumsum(p, -1)  # the control: a count of what lies below
  top = up_to[:, -1:] * (1 - 2**-23)
  assert not p[:, ~near].any() and not near[jnp.sum(up_to <= top, -1)].all()


def test_only_training_draws(key):
  q = VQConfig(codes=16, dim=3, init='normal', assignment=StochasticConfig()).build(
      rngs=nnx.Rngs(0))
  z = jax.random.normal(key, (2, 40, 3))
  out = q(z, key=key, train=True)
  agreement = np.mean(out.tokens == q(z).tokens)
  np.testing.assert_allclose(out.metrics['agreement'], agreement, rtol=1e-6)
  assert agreement < 0.9 and 'agreement' not in q(z).metrics
  np.testing.assert_array_equal(q.lookup(out.tokens), out.vectors)
  with pytest.raises(ValueError, match='pass a key'):
    q(z, train=True)


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match='temperature=0'):
    StochasticConfig(temperature=0.0)
