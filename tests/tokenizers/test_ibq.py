"""IBQ: the chosen code's value, the softmax's gradient, without N x K numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers import ibq
from smalti.tokenizers.ibq import IBQConfig, softmax_gradient


def build(**fields):
  return IBQConfig(**fields).build(rngs=nnx.Rngs(0))


@pytest.mark.parametrize('rows', [20, 8])
def test_the_gradient_in_chunks_is_that_of_the_softmax(key, rows, monkeypatch):
  monkeypatch.setattr(ibq, 'chunk_rows', lambda n, k: rows)
  a, b, c = jax.random.split(key, 3)
  z, codes, g = (jax.random.normal(k, s) for k, s in ((a, (20, 3)), (b, (9, 3)), (c, (20, 3))))

  def dense(z, codes):
    return jax.nn.softmax(z @ codes.T, -1) @ jax.lax.stop_gradient(codes)

  value, pull = jax.jit(lambda z, codes: jax.vjp(softmax_gradient, z, codes))(z, codes)
  want = jax.jit(lambda z, codes: jax.vjp(dense, z, codes)[1](g))(z, codes)
  assert not np.any(value)
  for got, expected in zip(pull(g), want, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_losses_and_gradients_are_those_of_the_paper(key):
  """The published formulas, with dense one-hot rows."""
  z = jax.random.normal(key, (2, 7, 4))
  q = build(codes=12, dim=4)
  target = jax.random.normal(jax.random.key(1), z.shape)
  sg = jax.lax.stop_gradient

  def published(z, c):
    logits = z @ c.T
    p = jax.nn.softmax(logits, -1)
    hard = jax.nn.one_hot(jnp.argmax(logits, -1), 12)
    soft, chosen = (hard + p - sg(p)) @ c, hard @ c
    loss = jnp.mean((soft - z)**2) + jnp.mean((sg(chosen) - z)**2)
    return loss + 0.25 * jnp.mean((chosen - sg(z))**2) + jnp.mean(jnp.abs(soft - target))

  def ours(z, c):
    out = nnx.merge(structure, {'codebook': nnx.Param(c)})(z)
    return (out.losses['codebook'] + out.losses['commitment']
            + jnp.mean(jnp.abs(out.vectors - target)))

  structure, _ = nnx.split(q)
  want = jax.jit(jax.value_and_grad(published, (0, 1)))(z, q.codes())
  got = jax.jit(jax.value_and_grad(ours, (0, 1)))(z, q.codes())
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_every_code_gets_a_gradient_from_the_output_alone(key):
  z = jax.random.normal(key, (1, 5, 4))
  q = build(codes=300, dim=4)
  gradient = jax.jit(nnx.grad(lambda q: jnp.sum(jnp.square(q(z).vectors - z))))(q)
  rows = np.any(np.asarray(gradient['codebook'][...]) != 0, -1)
  assert rows.all() and len(np.unique(q(z).tokens)) <= 5


def test_the_product_decides_not_the_distance():
  q = build(codes=3, dim=2, entropy=None)
  q.codebook[...] = jnp.array([[1.0, 0], [9, 1], [9, 1]])
  out = q(jnp.array([[[1.0, 0], [-1, 0]]]))
  np.testing.assert_array_equal(out.tokens[..., 0], [[1, 0]])  # among equals the lowest
  assert 'entropy' not in out.losses
  np.testing.assert_allclose(
      out.metrics['chosen_length'], (1 + 82**0.5) / 2 / ((1 + 2 * 82**0.5) / 3), rtol=1e-6)


def test_memory_does_not_grow_with_rows_times_codes():
  """Forward, backward and entropy term over 64 MiB of scores."""
  graph, state = nnx.split(nnx.eval_shape(lambda: build(codes=4096, dim=8)))

  def loss(state, z):
    out = nnx.merge(graph, state)(z)
    return jnp.sum(out.vectors**2) + sum(out.losses.values())

  z = jax.ShapeDtypeStruct((1, 4096, 8), jnp.float32)
  memory = jax.jit(jax.grad(loss, (0, 1))).lower(state, z).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 32 * 2**20


def test_bad_sizes_are_refused():
  with pytest.raises(ValueError, match='dim=0'):
    build(dim=0)
