"""SimVQ: all codes move together, tokens are looked up through the map, nothing is decayed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smalti.launch.experiment import OptimizerConfig
from smalti.launch.optimizer import make
from smalti.tokenizers.simvq import SimVQConfig
from smalti.tokenizers.vq import VQConfig


def build(config):
  return config.build(rngs=nnx.Rngs(0))


def moved(config, z):
  """Which codes a step of plain gradient descent moves, and which were selected."""
  q = build(config)
  before = np.asarray(q.codes())
  loss = lambda q: q(z, key=jax.random.key(0)).losses['codebook']  # noqa: E731
  tokens, gradients = q(z).tokens, jax.jit(nnx.grad(loss))(q)
  nnx.update(q, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(q, nnx.Param), gradients))
  return np.flatnonzero(np.any(np.asarray(q.codes()) != before, -1)), np.unique(tokens)


@pytest.mark.parametrize('bias', [True, False])
def test_one_step_moves_all_codes_and_vq_moves_those_selected(key, bias):
  z = jax.random.normal(key, (1, 6, 4))
  all_codes, selected = moved(SimVQConfig(codes=200, dim=4, bias=bias), z)
  assert len(all_codes) == 200 and len(selected) <= 6
  plain, selected = moved(VQConfig(codes=200, dim=4, update='gradient', init='normal'), z)
  np.testing.assert_array_equal(plain, selected)


def test_tokens_are_looked_up_through_the_map(key):
  """Published code reads the basis: with another map than the identity that is another vector."""
  q = build(SimVQConfig(codes=64, dim=4))
  tokens = q(jax.random.normal(key, (2, 16, 4))).tokens
  a = np.asarray(q.basis[...], np.float64)[tokens[..., 0]]
  want = a @ np.asarray(q.scale[...], np.float64) + np.asarray(q.bias[...], np.float64)
  np.testing.assert_allclose(q.lookup(tokens), want, atol=1e-6)
  assert np.abs(q.lookup(tokens) - a).max() > 0.1


def test_the_draws_have_the_published_scale():
  q = build(SimVQConfig(codes=2000, dim=64))
  np.testing.assert_allclose(np.std(q.basis[...]), 1 / 8, rtol=0.02)
  np.testing.assert_allclose(np.std(q.scale[...]), 1 / 8 / np.sqrt(3), rtol=0.05)
  assert 0.9 / 8 < np.abs(q.scale[...]).max() <= 1 / 8 and np.abs(q.bias[...]).max() <= 1 / 8


def test_the_basis_is_no_parameter_and_the_map_is_not_decayed():
  q = build(SimVQConfig(codes=64, dim=4))
  params = nnx.to_pure_dict(nnx.state(q, nnx.Param))
  assert set(params) == {'scale', 'bias'}
  rule = make(OptimizerConfig(rate=0.1, weight_decay=10.0), None, 10)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = rule.update(zero, rule.init(params), params)
  assert optax.global_norm(updates) == 0


def test_bad_sizes_are_refused():
  with pytest.raises(ValueError, match='codes=1'):
    build(SimVQConfig(codes=1))
