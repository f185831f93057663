"""Bernoulli codes: drawn bits, the gradient of their probabilities, keys per example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers import tokenizer as jitted
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.bernoulli import BernoulliConfig

call = jax.jit(lambda q, z, key, train: q(z, key=key, train=train), static_argnames='train')


def plain(bits=4, **options):
  """A quantizer whose two maps are the identity: z are log odds, vectors are codes."""
  q = BernoulliConfig(bits=bits, dim=bits, **options).build(rngs=nnx.Rngs(0))
  q.reduce.kernel[...] = q.expand.kernel[...] = jnp.eye(bits)
  return q


def test_bits_are_drawn_in_training_and_rounded_in_evaluation():
  q = plain()
  z = jnp.broadcast_to(jnp.array([-2.0, 0.0, 0.5, 3.0]), (10, 2000, 4))
  y = jax.nn.sigmoid(z[0, 0])
  drawn = call(q, z, jax.random.key(0), True).tokens
  error = jnp.abs(jnp.mean(drawn, (0, 1)) - y) / jnp.sqrt(y * (1 - y) / 20_000)
  assert error.max() < 4
  for key in (None, jax.random.key(1)):
    tokens = call(q, z, key, False).tokens
    assert tokens.shape == z.shape and tokens[0, 0].tolist() == [0, 0, 1, 1]  # 1/2 is not above it


@pytest.mark.parametrize('signed', [False, True])
def test_gradient_is_that_of_the_probability(signed):
  q = plain(signed=signed)
  z = jnp.array([[[-1.0, 0.3, 2.0, 0.0]]])
  y = jax.nn.sigmoid(z[0, 0])
  jacobian = jax.jit(jax.jacrev(
      lambda z: q(z, key=jax.random.key(0), train=True).vectors))(z)[0, 0, :, 0, 0]
  np.testing.assert_allclose(jacobian, jnp.diag(y * (1 - y)) * (2 if signed else 1), rtol=1e-5)


def test_codes_are_sums_of_learned_vectors():
  for signed in (False, True):
    q = BernoulliConfig(bits=3, dim=5, signed=signed).build(rngs=nnx.Rngs(0))
    rows = np.asarray(q.expand.kernel[...])
    vectors = q.lookup(jnp.array([[[1, 0, 1], [0, 0, 0]]], jnp.int32))[0]
    want = np.array([[1, -1, 1], [-1, -1, -1]] if signed else [[1, 0, 1], [0, 0, 0]]) @ rows
    np.testing.assert_allclose(vectors, want, rtol=1e-5, atol=1e-6)


def test_code_term_pushes_bits_to_the_nearer_side():
  """The published code takes a second sigmoid: then 10 costs 0.197, and every bit is pushed up."""
  q = plain(bits=1)
  term = jax.jit(jax.value_and_grad(lambda z: q(z).losses['code']))
  for z, value in ((0.0, 0.25), (10.0, 4.54e-5), (-10.0, 4.54e-5), (2.0, 0.105)):
    got, slope = term(jnp.full((1, 1, 1), z))
    np.testing.assert_allclose(got, value, rtol=2e-3)
    assert np.sign(slope) == -np.sign(z)


def test_certainty_is_logged():
  q = plain(bits=2)
  z = jnp.array([[[0.0, 0.0], [40.0, -40.0]]])
  assert float(call(q, z, None, False).metrics['certainty']) == 0.25


def test_a_key_per_example_draws_alike_in_any_batch():
  q = plain(stochastic=True)
  z = jnp.zeros((6, 9, 4))
  keys = jax.random.split(jax.random.key(0), 6)
  tokens = call(q, z, keys, False).tokens
  np.testing.assert_array_equal(call(q, z[:2], keys[4:], False).tokens, tokens[4:])
  assert len({t.tobytes() for t in np.asarray(tokens)}) == 6


@pytest.mark.parametrize('train,stochastic', [(True, False), (False, True)])
def test_draws_need_a_key(train, stochastic):
  with pytest.raises(ValueError, match='pass a key'):
    plain(stochastic=stochastic)(jnp.zeros((1, 1, 4)), train=train)


def test_encode_draws_from_keys_where_evaluation_is_stochastic():
  t = AutoencoderConfig(
      image_size=(8, 8), channels=1, width=8, multipliers=(1,), patch=4,
      quantizer=BernoulliConfig(bits=16, dim=8, stochastic=True)).build(rngs=nnx.Rngs(0))
  x = jnp.zeros((2, 8, 8, 1))
  first, again, other = (
      jitted.encode(t, x, keys=jax.random.split(jax.random.key(i), 2)) for i in (0, 0, 1))
  assert t.spec.vocab == (2,) * 16 and t.spec.grid == (2, 2)
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other) and np.any(first[0] != first[1])


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match='must be positive'):
    BernoulliConfig(bits=0).build(rngs=nnx.Rngs(0))
