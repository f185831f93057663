"""Gumbel-softmax: draws of the softmax, soft gradients, a temperature that follows the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers import gumbel
from smalti.tokenizers.gumbel import GumbelConfig


def build(**fields):
  return GumbelConfig(**fields).build(rngs=nnx.Rngs(0))


def test_training_draws_from_the_softmax_and_evaluation_takes_its_peak(key):
  q = build(codes=4, dim=3)
  z = jnp.tile(jnp.array([1.0, -2, 0.5]), (1, 20000, 1))
  counts = np.bincount(q(z, key=key, train=True).tokens.reshape(-1), minlength=4)
  p = np.exp(np.asarray(q.soft_assign(z[:, :1])[0, 0], np.float64))
  assert np.sum((counts - 20000 * p)**2 / (20000 * p)) < 20  # 3 degrees, 2e-4
  assert np.unique(q(z).tokens) == p.argmax()
  with pytest.raises(ValueError, match='pass a key'):
    q(z, train=True)


def test_gradients_are_those_of_the_soft_draw_and_do_not_depend_on_chunks(key, monkeypatch):
  q = build(codes=9, dim=3, start=0.7)
  z = jax.random.normal(key, (2, 10, 3))
  target = jax.random.normal(jax.random.key(1), z.shape)

  def loss(q, z):
    out = q(z, key=key, train=True)
    return jnp.mean(jnp.square(out.vectors - target)) + out.losses['entropy'], out.tokens

  grad = lambda: jax.jit(nnx.grad(lambda q, z: loss(q, z), argnums=(0, 1), has_aux=True))(q, z)  # noqa: E731,E501
  whole, tokens = grad()
  monkeypatch.setattr(gumbel, 'chunk_rows', lambda n, k: 8)
  parts, same = grad()
  np.testing.assert_array_equal(tokens, same)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)

  def dense(scores, codes):  # the chain rule through the value, as the published formula has it
    noise = jax.vmap(lambda i: jax.random.gumbel(
        jax.random.fold_in(key, i), (9,), mode='high'))(jnp.arange(20))
    soft = jax.nn.softmax((scores + noise.reshape(2, 10, 9)) / 0.7, -1) @ codes
    hard = q.lookup(tokens)
    log_p = jax.nn.log_softmax(scores, -1)
    value = jax.lax.stop_gradient(hard - soft) + soft
    return jnp.mean(jnp.square(value - target)) + jnp.mean(
        jnp.log(9.0) + jnp.sum(jnp.exp(log_p) * log_p, -1))

  by_scores, by_codes = jax.jit(jax.grad(dense, (0, 1)))(q.scores(z), q.codes())
  np.testing.assert_allclose(whole[0]['codebook'][...], by_codes, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(whole[1], by_scores @ q.scores.kernel[...].T, rtol=1e-4, atol=1e-6)


def test_the_divergence_is_that_from_uniform():
  q = build(codes=8, dim=2)
  q.scores.kernel[...] *= 0
  assert abs(q(jnp.ones((1, 3, 2))).losses['entropy']) < 1e-6
  q.scores.bias[...] = jnp.array([50.0] + [0] * 7)
  np.testing.assert_allclose(q(jnp.ones((1, 3, 2))).losses['entropy'], np.log(8), rtol=1e-5)


def test_the_temperature_falls_as_a_cosine_with_the_steps_that_had_vectors(key):
  q = build(codes=8, dim=2, start=1.0, end=0.25, steps=4)
  statistics = q(jnp.ones((1, 3, 2)), key=key, train=True).statistics
  found = [float(q.temperature())]
  for _ in range(5):
    q.absorb(statistics)
    q.absorb(jax.tree.map(jnp.zeros_like, statistics))
    found.append(float(q.temperature()))
  want = 0.25 + 0.75 * (1 + np.cos(np.pi * np.array([0, 0.25, 0.5, 0.75, 1, 1]))) / 2
  np.testing.assert_allclose(found, want, rtol=1e-6)


def test_memory_does_not_grow_with_rows_times_codes():
  graph, state = nnx.split(nnx.eval_shape(lambda: build(codes=4096, dim=8)))

  def loss(state, z, key):
    out = nnx.merge(graph, state)(z, key=key, train=True)
    return jnp.sum(out.vectors**2) + out.losses['entropy']

  z, key = jax.ShapeDtypeStruct((1, 16384, 8), jnp.float32), jax.random.key(0)
  memory = jax.jit(jax.grad(loss)).lower(state, z, key).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 64 * 2**20  # all scores are 256 MiB


@pytest.mark.parametrize('fields', [dict(end=0.0), dict(steps=0), dict(codes=1)])
def test_bad_settings_are_refused(fields):
  with pytest.raises(ValueError):
    build(**fields)
