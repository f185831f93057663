"""FSQ against golden values of the specification (3.4, T3) and against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.scalar import FSQConfig


def build(*levels):
  return FSQConfig(levels=levels).build(rngs=nnx.Rngs(0))


@pytest.mark.parametrize('z,token', [
    ((0.0, 0.0, 0.0, 0.0), 500), ((10.0,) * 4, 999), ((-10.0,) * 4, 0),
    ((0.3, -0.7, 1.1, -2.0), 173)])
def test_golden_tokens_of_8_5_5_5(z, token):
  out = build(8, 5, 5, 5)(jnp.array(z)[None, None])
  assert int(out.tokens[0, 0, 0]) == token


def test_golden_digits():
  out = build(8, 5, 5, 5)(jnp.array([[[0.3, -0.7, 1.1, -2.0]]]))
  np.testing.assert_allclose(out.vectors[0, 0] * jnp.array([4, 2, 2, 2]), [1, -1, 2, -2])


@pytest.mark.parametrize('levels', [(3,), (4, 3), (8, 5, 5, 5), (7, 5, 5, 5, 5), (16, 26, 14)])
def test_every_code_is_reached_and_is_its_own_token(levels):
  q = build(*levels)
  tokens = jnp.arange(q.vocab[0], dtype=jnp.int32)[None, :, None]
  vectors = q.lookup(tokens)
  np.testing.assert_array_equal(q.round(vectors).tokens, tokens)
  assert len(np.unique(np.asarray(vectors[0]), axis=0)) == q.vocab[0]
  # tanh reaches every level: the preimage of each is wide
  line = jnp.linspace(-9, 9, 2001)[None, :, None] * jnp.ones(len(levels))
  for channel, count in enumerate(levels):
    assert len(np.unique(q(line).vectors[0, :, channel])) == count


def test_table_1_of_the_paper():
  table = {(8, 6, 5): 240, (8, 5, 5, 5): 1000, (7, 5, 5, 5, 5): 4375, (8, 8, 8, 6, 5): 15360,
           (8, 8, 8, 5, 5, 5): 64000}
  for levels, vocab in table.items():
    assert build(*levels).vocab == (vocab,) and build(*levels).factors == levels


def test_bound_is_zero_at_zero():
  for count in range(3, 17):
    assert abs(float(build(count).bound(jnp.zeros((1, 1, 1)))[0, 0, 0])) < 1e-6


@pytest.mark.parametrize('levels', [(5, 7), (8, 4), (3, 16)])
def test_one_step_holds_the_rounding_error(levels):
  """`step ** i` of Residual: what is left after level 0 is within one step of the full range."""
  q = build(*levels)
  z = 3 * jax.random.normal(jax.random.key(0), (1, 4000, 2))
  bounded = q.bound(z)
  left = (bounded - q.round(bounded).vectors) / jnp.array(q.step)
  assert np.abs(left).max() <= 1 + 1e-2  # 1e-3 of the range lies outside, times L - 1


def test_the_digits_view_is_the_levels():
  from smalti.tokenizers.spec import TokenSpec
  q = build(8, 5, 3)
  spec = TokenSpec(grid=(50,), vocab=q.vocab, factors=q.factors)
  z = jax.random.normal(jax.random.key(0), (2, 50, 3))
  out = q(z)
  digits = spec.to('factors', out.tokens)
  half = jnp.array([4, 2, 1])
  np.testing.assert_array_equal((digits - half) / half, out.vectors)


def test_more_than_1000_levels_stay_in_range():
  tokens = build(1024).round(jnp.array([[[-2.0], [2.0]]])).tokens
  assert tokens.tolist() == [[[0], [1023]]]
  q = build(2001)
  assert int(q(jnp.full((1, 1, 1), 50.0)).tokens[0, 0, 0]) == 2000


def test_saturation_is_reported():
  q = build(5, 5)
  assert float(q(jnp.full((1, 4, 2), 10.0)).metrics['saturation']) == 1
  assert float(q(jnp.zeros((1, 4, 2))).metrics['saturation']) == 0


@pytest.mark.parametrize('levels,message', [
    ((2, 5), 'tokenizers.binary'), ((), 'levels'), ((2000,) * 3, 'below 2\\*\\*31')])
def test_bad_levels_are_refused(levels, message):
  with pytest.raises(ValueError, match=message):
    build(*levels)
