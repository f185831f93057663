"""FSQ against golden values of the specification (3.4, T3) and against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig, NoiseConfig


def build(*levels, **options):
  return FSQConfig(levels=levels, **options).build(rngs=nnx.Rngs(0))


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


def test_symmetric_levels_follow_the_published_formula():
  """2 / (L - 1) floor((L - 1) (tanh z + 1) / 2 + 1/2) - 1, from -1 to 1 for every count."""
  levels = np.array((2, 3, 4, 8))
  q = build(2, 3, 4, 8, symmetric=True)
  z = np.linspace(-4, 4, 801)[:, None] * np.ones(4)
  z[::100] = 0
  want = 2 / (levels - 1) * np.floor((levels - 1) * (np.tanh(z) + 1) / 2 + 0.5) - 1
  out = q(jnp.float32(z[None]))
  np.testing.assert_allclose(out.vectors[0], want, atol=1e-6)
  assert [len(np.unique(c)) for c in np.asarray(out.vectors[0]).T] == [2, 3, 4, 8]
  np.testing.assert_array_equal(out.vectors.max((0, 1)), np.ones(4))
  tokens = jnp.arange(192, dtype=jnp.int32)[None, :, None]
  np.testing.assert_array_equal(q.round(q.lookup(tokens)).tokens, tokens)


def test_noise_is_added_when_the_tokens_are_known():
  """Peers derive tokens from the noisy vectors. Rates are of examples, and of their codes."""
  noise = NoiseConfig(drop=0.3, corrupt=0.4, gate=0.5)
  q, clean = build(8, 5, 5, 5, noise=noise), build(8, 5, 5, 5)
  z = jax.random.normal(jax.random.key(0), (1000, 16, 4))
  run = jax.jit(lambda q, z, train: q(z, key=jax.random.key(1), train=train), static_argnums=2)
  out, want = run(q, z, True), run(clean, z, True)
  np.testing.assert_array_equal(out.tokens, want.tokens)
  assert out.metrics.keys() == want.metrics.keys()
  np.testing.assert_array_equal(run(q, z, False).vectors, want.vectors)
  differ = np.any(np.asarray(out.vectors != want.vectors), -1)
  unrounded = np.all(np.isclose(out.vectors, clean.bound(z), atol=1e-6), -1)
  passed = np.mean(unrounded, 1) > 0.3
  corrupted = differ & ~unrounded
  assert abs(passed.mean() - 0.3) < 0.06 and abs(corrupted.any(1).mean() - 0.5) < 0.06
  assert abs(corrupted[corrupted.any(1)].mean() - 0.4) < 0.03
  # what replaced them are codes, and no gradient reaches the encoder through them
  np.testing.assert_array_equal(
      q.round(out.vectors).vectors[corrupted], out.vectors[corrupted])
  reached = jax.jit(jax.grad(
      lambda z: jnp.sum(q(z, key=jax.random.key(1), train=True).vectors)))(z)
  np.testing.assert_array_equal(np.all(np.asarray(reached) == 0, -1)[differ], corrupted[differ])
  with pytest.raises(ValueError, match='pass a key'):
    q(z, train=True)


def test_noise_has_no_place_in_residual_levels():
  config = FSQConfig(levels=(5, 5), noise=NoiseConfig(drop=0.1))
  with pytest.raises(ValueError, match='noise'):
    ResidualConfig(quantizer=config, levels=2).build(rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='probabilities'):
    NoiseConfig(gate=1.5)


@pytest.mark.parametrize('levels,message', [
    ((2, 5), 'tokenizers.binary'), ((), 'levels'), ((2000,) * 3, 'below 2\\*\\*31')])
def test_bad_levels_are_refused(levels, message):
  with pytest.raises(ValueError, match=message):
    build(*levels)
