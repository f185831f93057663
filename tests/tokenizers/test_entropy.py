"""Entropy terms against dense float64 NumPy, chunked against whole, bits against tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smalti.tokenizers.entropy import bit_entropy_terms, entropy_terms


def dense(logits):
  """((sample, average), their gradients by the logits), written from the definition."""
  logits = logits - logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  p, n = np.exp(log_p), len(logits)
  each, mean = -(p * log_p).sum(-1), p.mean(0)
  log_q = np.log(np.maximum(mean, 1e-300))
  terms = each.mean(), -(mean * log_q).sum()
  return terms, (-p * (log_p + each[:, None]) / n,
                 -p * (log_q - (p * log_q).sum(-1, keepdims=True)) / n)


def patterns(bits):
  return np.array([[1.0 if k >> i & 1 else -1.0 for i in range(bits)] for k in range(2**bits)])


@pytest.mark.parametrize('kind', ['distance', 'product'])
def test_chunked_terms_and_gradients_are_the_dense_ones(kind):
  rng = np.random.default_rng(0)
  z, codes = rng.normal(size=(21, 3)), rng.normal(size=(12, 3))
  tau = 0.3
  scores = 2 * z @ codes.T - (codes**2).sum(-1) if kind == 'distance' else z @ codes.T
  terms, (by_sample, by_average) = dense(scores / tau)
  weight = (2 if kind == 'distance' else 1) * codes / tau
  by_logits = 0.7 * by_sample - 1.3 * by_average
  by_codes = by_logits.T @ z / tau * (2 if kind == 'distance' else 1)
  if kind == 'distance':
    by_codes -= 2 * by_logits.sum(0)[:, None] * codes / tau

  def loss(z, codes):
    sample, average = entropy_terms(z, codes, logits=kind, temperature=tau, rows=8)  # 21 = 8+8+5
    return 0.7 * sample - 1.3 * average, (sample, average)

  (_, got), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
      jnp.float32(z), jnp.float32(codes))
  np.testing.assert_allclose(got, terms, rtol=1e-5)
  np.testing.assert_allclose(gradients[0], by_logits @ weight, atol=1e-6)
  np.testing.assert_allclose(gradients[1], by_codes, atol=1e-6)


def test_bits_factorise():
  """Spec of LFQ: logits 2 z.c / tau over 2^n codes; `sample` is exact, `average` an upper bound."""
  z = np.random.default_rng(1).normal(size=(29, 6)) * 0.1 + 0.05
  tau = 0.2
  terms, (by_sample, by_average) = dense(2 * z @ patterns(6).T / tau)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(z):
    each = [bit_entropy_terms(4 * z / tau, group=g, rows=8) for g in (1, 3, 6)]
    return each[-1][0] - each[-1][1], each

  (_, each), gradient = loss(jnp.float32(z))
  samples, averages = zip(*each)
  np.testing.assert_allclose(samples, [terms[0]] * 3, rtol=1e-5)
  assert averages[0] > averages[1] > averages[2]
  np.testing.assert_allclose(averages[2], terms[1], rtol=1e-5)
  np.testing.assert_allclose(gradient, (by_sample - by_average) @ patterns(6) * 2 / tau, atol=1e-6)


def test_bits_are_a_table_at_half_the_temperature():
  z = jax.random.normal(jax.random.key(0), (40, 4)) * 0.02
  table = jax.jit(lambda z: entropy_terms(
      z, jnp.float32(patterns(4)), logits='product', temperature=0.005))(z)
  bits = jax.jit(lambda z: bit_entropy_terms(400 * z, group=4))(z)
  np.testing.assert_allclose(bits, table, rtol=1e-4)


def test_terms_are_finite_where_probabilities_underflow():
  """Distances of thousands over a temperature of 0.01: most codes have probability 0."""
  z = 1e3 * jax.random.normal(jax.random.key(0), (16, 4))
  codes = jax.random.normal(jax.random.key(1), (32, 4))

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def loss(z, codes):
    return sum(entropy_terms(z, codes)) + sum(bit_entropy_terms(400 * z, group=2))

  value, gradients = loss(z, codes)
  assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradients)


def test_extremes():
  """Certain and spread: 0 and log K. Certain and collapsed: 0 and 0. Undecided: log K twice."""
  codes = 10 * jnp.eye(4)
  terms, bit_terms = jax.jit(entropy_terms), jax.jit(functools.partial(bit_entropy_terms, group=3))
  np.testing.assert_allclose(terms(codes, codes), (0, np.log(4)), atol=1e-6)
  np.testing.assert_allclose(terms(codes[jnp.ones(4, int)], codes), (0, 0), atol=1e-6)
  np.testing.assert_allclose(terms(jnp.zeros((4, 4)), codes), [np.log(4)] * 2, rtol=1e-6)
  np.testing.assert_allclose(bit_terms(jnp.zeros((5, 6))), [6 * np.log(2)] * 2, rtol=1e-6)


def test_memory_does_not_grow_with_rows_times_codes():
  """The backward pass included: 64 MiB of scores, each step a few chunks of 4 MiB."""
  z, codes = jnp.zeros((4096, 8)), jnp.zeros((4096, 8))
  loss = jax.grad(lambda z, c: sum(entropy_terms(z, c)), (0, 1))
  memory = jax.jit(loss).lower(z, codes).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 32 * 2**20
  assert jax.eval_shape(loss, z, codes)[1].shape == codes.shape


def test_average_is_that_of_the_global_batch():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  z = jax.random.normal(jax.random.key(0), (8, 16, 4))
  codes = jax.random.normal(jax.random.key(1), (32, 4))

  @jax.jit
  def both(z):
    return *entropy_terms(z, codes, rows=32), *bit_entropy_terms(z, group=2, rows=32)

  np.testing.assert_allclose(
      both(z), both(jax.device_put(z, NamedSharding(mesh, PartitionSpec('data')))), rtol=1e-5)


def test_exact_bits_never_hold_vectors_times_codes():
  """18 bits of 4096 vectors: 4 GiB of logits as published, here 2^18 means and two halves."""
  s = jnp.zeros((4096, 18))
  loss = jax.grad(lambda s: sum(bit_entropy_terms(s, group=18)))
  memory = jax.jit(loss).lower(s).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 32 * 2**20


@pytest.mark.parametrize('bits,group', [(10, 3), (24, 24), (4, 0)])
def test_bad_groups_are_refused(bits, group):
  with pytest.raises(ValueError, match='must divide'):
    bit_entropy_terms(jnp.zeros((2, bits)), group=group)
