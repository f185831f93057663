"""Recurrent binarization against successive approximation, and its prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.recurrent import RecurrentConfig, binarize, sign


def same(x):
  return x


@pytest.mark.parametrize('loops', [1, 3, 5])
def test_identities_make_it_successive_approximation(loops):
  """For |x| <= 2 loop n leaves 2^-n at most, and codes are odd multiples of 2^-n."""
  x = jnp.linspace(-2, 2, 1001)[None, :, None]
  signs, found = binarize(x, same, [same] * loops, [same] * (loops + 1))
  for n, code in enumerate(found):
    assert np.abs(x - code).max() <= 2.0 ** -n
    assert len(np.unique(code)) == 2 ** (n + 1) and set(np.unique(code * 2**n % 2)) == {1.0}
  np.testing.assert_array_equal(found[-1], sum(2.0 ** -i * s for i, s in enumerate(signs)))


def test_gradient_passes_signs_between_minus_one_and_one():
  x = jnp.array([-2.0, -0.5, 0.0, 0.5, 2.0])
  np.testing.assert_array_equal(sign(x), [-1, -1, -1, 1, 1])
  np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(sign(x)))(x), [0, 1, 1, 1, 0])


@pytest.fixture(scope='module')
def prefixed():
  """(module, vectors, its output in training with dropout)."""
  q = RecurrentConfig(dim=6, bits=5, levels=3, hidden=16, dropout=1.0).build(rngs=nnx.Rngs(0))
  z = jax.random.normal(jax.random.key(0), (64, 2, 6))
  return q, z, jax.jit(lambda q, z: q(z, key=jax.random.key(1), train=True))(q, z)


def test_a_prefix_is_what_its_levels_reconstruct(prefixed):
  q, z, out = prefixed
  lookup = jax.jit(lambda q, t, m: q.lookup(t, mask=m))
  assert q.budgets == (1, 2, 3) and q.vocab == (32, 32, 32)
  rest = np.arange(3)
  kept = [np.asarray(lookup(q, out.tokens, np.broadcast_to(rest < k, out.tokens.shape)))
          for k in range(4)]
  other = jnp.where(rest < 2, out.tokens, 31 - out.tokens)
  np.testing.assert_array_equal(
      lookup(q, other, np.broadcast_to(rest < 2, out.tokens.shape)), kept[2])
  assert not kept[0].any()
  for k in (1, 2, 3):
    np.testing.assert_allclose(np.linalg.norm(kept[k], axis=-1), 1, rtol=1e-5)
  np.testing.assert_array_equal(kept[3], jax.jit(lambda q, t: q.lookup(t))(q, out.tokens))
  # training examples were cut to some level each, all of their positions alike
  match = np.stack([np.all(np.asarray(out.vectors) == k, (1, 2)) for k in kept[1:]])
  assert np.all(match.sum(0) == 1) and np.all(match.mean(1) > 0.15)


def test_losses_train_every_level(prefixed):
  q, z, _ = prefixed
  graph, params = nnx.split(q)

  @jax.jit
  @jax.grad
  def slopes(params):
    out = nnx.merge(graph, params)(z)
    return sum(out.losses.values())

  for path, slope in jax.tree_util.tree_leaves_with_path(slopes(params)):
    assert np.any(np.asarray(slope) != 0), jax.tree_util.keystr(path)


def test_training_lowers_the_error_of_every_prefix():
  """200 steps on vectors near a plane: each level is closer than the one before."""
  q = RecurrentConfig(dim=6, bits=4, levels=3, hidden=32).build(rngs=nnx.Rngs(0))
  graph, params = nnx.split(q)
  basis = jax.random.normal(jax.random.key(1), (2, 6))
  z = jax.random.normal(jax.random.key(0), (1, 256, 2)) @ basis

  def loss(params):
    out = nnx.merge(graph, params)(z)
    return sum(out.losses.values()), out.metrics

  @jax.jit
  def train(params):
    def step(_, state):
      params, speed = state
      slopes = jax.grad(loss, has_aux=True)(params)[0]
      speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, slopes)
      return jax.tree.map(lambda p, v: p - 0.3 * v, params, speed), speed
    params = jax.lax.fori_loop(0, 200, step, (params, jax.tree.map(jnp.zeros_like, params)))[0]
    return loss(params)[1]

  left = [float(train(params)[f'relative_commitment_{i}']) for i in range(3)]
  assert left[0] > 1.2 * left[1] > 1.2 * left[2] and left[2] < 0.1, left


@pytest.mark.parametrize('fields', [
    dict(bits=31), dict(levels=0), dict(dropout=1.5), dict(least=9)])
def test_bad_settings_are_refused(fields):
  with pytest.raises(ValueError):
    RecurrentConfig(**fields).build(rngs=nnx.Rngs(0))


def test_dropout_needs_a_key(prefixed):
  with pytest.raises(ValueError, match='pass a key'):
    prefixed[0](jnp.ones((1, 1, 6)), train=True)
