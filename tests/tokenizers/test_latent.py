"""Latent quantization by hand: whose values, which loss moves which of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.latent import LatentConfig


def build(**options):
  return LatentConfig(**{**dict(latents=3, codes=5), **options}).build(rngs=nnx.Rngs(0))


def column(*values):
  return jnp.array(values, jnp.float32)[None, :, None]


def test_values_start_evenly_spaced_and_the_nearest_is_taken():
  q = build()
  np.testing.assert_allclose(q.values(3), np.tile([-0.5, -0.25, 0, 0.25, 0.5], (3, 1)))
  out = q(column(-7.0, 0.12, 0.13))
  assert out.tokens[0, :, 0].tolist() == [0, 2, 3]
  np.testing.assert_allclose(out.vectors[0, :, 0], [-0.5, 0, 0.25])
  assert q.order == 'set' and q.vocab == (5,) and q.dim == 1


def test_a_tie_goes_to_the_lower_value():
  assert build(codes=2)(column(0.0, 0.0, 0.0)).tokens[0, :, 0].tolist() == [0, 0, 0]


def test_every_latent_has_values_of_its_own():
  q = build()
  tokens = jnp.full((1, 3, 1), 4)
  q.codebook[...] = q.codebook[...].at[1, 4].set(9.0)
  np.testing.assert_allclose(q.lookup(tokens)[0, :, 0], [0.5, 9, 0.5])
  assert q.codebook.shape == (3, 5)


def test_shared_values_are_those_of_all_latents():
  q = build(shared=True)
  q.codebook[...] = q.codebook[...].at[0, 4].set(9.0)
  np.testing.assert_allclose(q.lookup(jnp.full((1, 3, 1), 4))[0, :, 0], [9, 9, 9])
  assert q.codebook.shape == (1, 5)


def test_fewer_positions_are_the_first_latents_and_more_are_refused():
  q = build()
  q.codebook[...] = q.codebook[...] + jnp.arange(3.0)[:, None]
  np.testing.assert_allclose(q.lookup(jnp.full((1, 2, 1), 4))[0, :, 0], [0.5, 1.5])
  with pytest.raises(ValueError, match='latents=3'):
    q.lookup(jnp.zeros((1, 4, 1), jnp.int32))


@pytest.mark.parametrize('shared', [False, True])
def test_the_codebook_loss_moves_the_values_that_were_taken(shared):
  q = build(shared=shared)
  z = column(0.1, 0.6, 0.1)
  graph, params = nnx.split(q)

  def loss(params, name):
    return nnx.merge(graph, params)(z, train=True).losses[name]

  gradient = np.asarray(jax.grad(loss)(params, 'codebook')['codebook'][...])
  want = np.zeros((3, 5))
  want[0, 2] = want[2, 2] = 2 * (0 - 0.1) / 3  # the mean over three latents of (q - z)^2
  want[1, 4] = 2 * (0.5 - 0.6) / 3
  np.testing.assert_allclose(gradient, want.sum(0, keepdims=True) if shared else want, atol=1e-7)
  # and neither the commitment nor what is decoded moves any
  assert not np.any(jax.grad(loss)(params, 'commitment')['codebook'][...])
  decoded = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(z).vectors ** 2))(params)
  assert not np.any(decoded['codebook'][...])


def test_the_commitment_moves_latents_towards_their_values():
  q, z = build(), column(0.1, 0.6, -0.3)
  gradient = jax.grad(lambda z: q(z).losses['commitment'])(z)
  np.testing.assert_allclose(gradient[0, :, 0], 2 * np.array([0.1, 0.1, -0.05]) / 3, atol=1e-7)


def test_gradient_descent_finds_the_centres_of_clusters():
  q = build(latents=1, codes=3)
  rng = np.random.default_rng(0)
  centres = np.array([-0.8, 0.1, 0.9])
  z = jnp.array(rng.choice(centres, (600, 1, 1)) + 0.03 * rng.normal(size=(600, 1, 1)), jnp.float32)
  graph, params = nnx.split(q)
  step = jax.jit(jax.grad(lambda p: nnx.merge(graph, p)(z, train=True).losses['codebook']))
  for _ in range(60):
    params = jax.tree.map(lambda p, g: p - 0.5 * g, params, step(params))
  np.testing.assert_allclose(
      nnx.merge(graph, params).values(1)[0], centres, atol=0.01)


@pytest.mark.parametrize('options', [dict(latents=0), dict(codes=1)])
def test_what_is_refused(options):
  with pytest.raises(ValueError, match='latents='):
    build(**options)
