"""Latent perturbation: how many tokens change, into what, and that the losses do not see it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.perturbation import PerturbationConfig
from smalti.tokenizers.search import nearest, neighbours
from smalti.tokenizers.vq import VQConfig


def test_some_tokens_of_some_images_become_a_near_code(key):
  z, codes = jax.random.normal(key, (200, 50, 3)), jax.random.normal(jax.random.key(1), (30, 3))
  tokens = nearest(z, codes)
  got = PerturbationConfig(alpha=0.5, beta=0.3, delta=4).disturb(tokens, z, codes, key)
  changed = np.asarray(got != tokens)
  images = changed.any(1)
  assert 40 < images.sum() < 80  # 60 of 200, 6.5 deviations of 6.5
  np.testing.assert_allclose(changed[images].mean(), 0.5 * 3 / 4, atol=0.04)  # one is its own
  order = np.argsort(np.square(np.asarray(z)[:, :, None] - np.asarray(codes)).sum(-1), -1)
  rank = np.argmax(order == np.asarray(got)[..., None], -1)
  assert rank.max() == 3
  np.testing.assert_allclose(np.bincount(rank[changed])[1:] / changed.sum(), 1 / 3, atol=0.04)


def test_losses_and_statistics_are_those_without_it(key):
  z = jax.random.normal(key, (20, 10, 3))
  plain, other = (
      VQConfig(codes=16, dim=3, init='normal', revival=0.0, perturbation=p).build(rngs=nnx.Rngs(0))
      for p in (None, PerturbationConfig(beta=0.5)))
  a, b = plain(z, key=key, train=True), other(z, key=key, train=True)
  np.testing.assert_array_equal(plain(z).tokens, other(z, key=key).tokens)
  assert np.mean(a.tokens == b.tokens) < 0.9
  np.testing.assert_array_equal(other.lookup(b.tokens), b.vectors)
  for x, y in zip(jax.tree.leaves((a.losses, a.metrics, a.statistics)),
                  jax.tree.leaves((b.losses, b.metrics, b.statistics)), strict=True):
    np.testing.assert_array_equal(x, y)


def test_neighbours_are_sorted_with_ties_to_the_lowest():
  codes = jnp.array([[2.0], [1], [-1], [1], [5]])
  np.testing.assert_array_equal(neighbours(jnp.array([[1.0], [0]]), codes, 4),
                                [[1, 3, 0, 2], [1, 2, 3, 0]])


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match='delta=0'):
    PerturbationConfig(delta=0)
