"""LFQ and BSQ against enumeration and the numbers of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.binary import BSQConfig, LFQConfig, bit_use, code_use, pack
from smalti.tokenizers.entropy import entropy_terms
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.vq import normalize

BOTH = pytest.mark.parametrize('config', [LFQConfig, BSQConfig])

quantize = jax.jit(lambda q, z: q(z))


def build(config, **fields):
  return config(**fields).build(rngs=nnx.Rngs(0))


@BOTH
def test_codes_are_little_endian_and_zero_is_minus(config):
  q = build(config, bits=4)
  z = jnp.array([[[1.0, -1, -1, -1], [-1, -1, -1, 1], [0, 0, 0, 0], [1, 0, 2, -3]]])
  out = quantize(q, z)
  assert out.tokens[0, :, 0].tolist() == [1, 8, 0, 5]
  scale = 1.0 if config is LFQConfig else 0.5
  np.testing.assert_array_equal(out.vectors[0, 3], scale * jnp.array([1.0, -1, 1, -1]))


@BOTH
@pytest.mark.parametrize('bits,groups', [(10, 1), (10, 5), (18, 2), (30, 1), (36, 2), (36, 36)])
def test_packing_is_a_bijection(config, bits, groups):
  """All codes up to 2^16, else 100,000 random ones; 36 bits never meet in one integer."""
  q = build(config, bits=bits, groups=groups)
  assert q.vocab == (2 ** (bits // groups),) * groups
  TokenSpec(grid=(4,), vocab=q.vocab, factors=q.factors)
  rng = np.random.default_rng(0)
  if bits <= 16 and groups == 1:
    tokens = np.arange(2**bits)[None, :, None]
  else:
    tokens = rng.integers(0, q.vocab[0], (1, 100_000, groups))
  tokens[0, :2] = [[0], [q.vocab[0] - 1]]
  vectors = q.lookup(jnp.int32(tokens))
  assert set(np.unique(np.sign(vectors))) == {-1, 1} and len(np.unique(np.abs(vectors))) == 1
  np.testing.assert_array_equal(pack(vectors > 0, groups), tokens)


def test_groups_are_the_bits_view_of_one_code():
  """Decoding from ids of groups: the published code for it crashes. Vectors do not know groups."""
  z = jax.random.normal(jax.random.key(0), (2, 5, 12))
  whole, groups, bits = (
      quantize(build(BSQConfig, bits=12, groups=g), z) for g in (1, 3, 12))
  np.testing.assert_array_equal(groups.vectors, whole.vectors)
  np.testing.assert_array_equal(
      build(BSQConfig, bits=12, groups=3).lookup(groups.tokens), whole.vectors)
  spec = TokenSpec(grid=(5,), vocab=(4096,), factors=(2,) * 12)
  np.testing.assert_array_equal(spec.to('bits', whole.tokens), bits.tokens)
  np.testing.assert_array_equal(bits.tokens, z > 0)
  assert groups.losses['entropy'] == whole.losses['entropy']


def test_bsq_is_on_the_sphere_within_its_bound():
  for bits, bound in ((18, 1.236), (36, 1.291)):  # sqrt(2 - 2 / sqrt(n))
    q = build(BSQConfig, bits=bits, groups=2)
    spikes = jnp.eye(bits)[None]  # the vectors farthest from all codes
    z = jnp.concatenate([1e-3 + spikes, jax.random.normal(jax.random.key(0), (1, 500, bits))], 1)
    out = quantize(q, z)
    np.testing.assert_allclose(jnp.linalg.norm(out.vectors, axis=-1), 1, rtol=1e-6)
    errors = jnp.linalg.norm(normalize(z) - out.vectors, axis=-1)
    assert bound - 0.01 < errors.max() < bound + 0.001
  assert np.all(np.isfinite(jax.grad(lambda z: jnp.sum(q(z).vectors))(jnp.zeros((1, 1, bits)))))


@pytest.mark.parametrize('config,scores', [
    (LFQConfig(bits=6, temperature=0.3, entropy_group=6), lambda z, c: (z, 2 * c / 0.3)),
    (BSQConfig(bits=6, inverse_temperature=3.0, entropy_group=6),
     lambda z, c: (normalize(z), 6 * c))])
def test_entropy_is_that_of_the_softmax_over_all_codes(config, scores):
  q = config.build(rngs=nnx.Rngs(0))
  z = 0.3 * jax.random.normal(jax.random.key(0), (2, 20, 6)) + 0.1
  codes = q.lookup(jnp.arange(64, dtype=jnp.int32)[None, :, None])[0]
  x, columns = scores(z, codes)
  sample, average = jax.jit(lambda x, c: entropy_terms(
      x, c, logits='product', temperature=1.0))(x, columns)
  out = quantize(q, z)
  t = getattr(config, 'inverse_temperature', 1.0)
  np.testing.assert_allclose(out.losses['entropy'], (sample - average) / t, atol=1e-5)
  np.testing.assert_allclose(out.metrics['sample_entropy'], sample, rtol=1e-5)


def test_entropy_is_alive_only_near_zero_at_the_published_temperature():
  """tau = 0.01: sigmoid(400 z) has decided from |z| = 0.02 on."""
  q = build(LFQConfig, bits=1, average=0.0)
  slope = jax.jit(jax.grad(lambda z: q(z).losses['entropy']))
  near, far = (abs(float(slope(jnp.full((1, 1, 1), x))[0, 0, 0])) for x in (0.005, 0.05))
  assert near > 10 and far < 1e-3


def test_entropy_falls_by_training_the_logits():
  """The term alone moves four bits that all say 1 apart: from one code to nearly all 16."""
  q = build(BSQConfig, bits=4, entropy_group=4, sample=0.0)
  z = 0.3 + 0.5 * jax.random.normal(jax.random.key(0), (1, 64, 4))

  @jax.jit
  def descend(z):
    step = lambda _, z: z - 100 * jax.grad(lambda z: q(z).losses['entropy'])(z)  # noqa: E731
    return jax.lax.fori_loop(0, 100, step, z)

  before, after = (quantize(q, x).metrics for x in (z, descend(z)))
  assert after['average_entropy'] > before['average_entropy']
  assert after['average_entropy'] > 0.999 * 4 * np.log(2)


def test_default_entropy_groups():
  groups = {n: build(LFQConfig, bits=n, groups=2).entropy_group for n in (10, 14, 16, 18, 36)}
  assert groups == {10: 10, 14: 14, 16: 8, 18: 9, 36: 9}
  assert build(BSQConfig, bits=18).entropy_group == 1


def test_dead_bits_and_bit_entropy():
  bits = np.zeros((2, 500, 4), bool)
  bits[..., 1] = True
  bits[:, ::2, 2] = True
  bits[0, :5, 3] = True  # 0.005 of them
  use = bit_use(jnp.asarray(bits))
  assert use['dead_bits'] == 0.75
  rare = -(0.005 * np.log2(0.005) + 0.995 * np.log2(0.995))
  np.testing.assert_allclose(use['bit_entropy'], (1 + rare) / 4, rtol=1e-5)


def test_use_is_the_mean_over_groups_and_listed():
  tokens = jnp.array([[[0, 3], [1, 3], [0, 3], [1, 3]]], jnp.int32)
  use = code_use(tokens, (4, 4))
  assert use['usage_0'] == 0.5 and use['usage_1'] == 0.25 and use['usage'] == 0.375
  np.testing.assert_allclose([use['perplexity_0'], use['perplexity_1']], [2, 1], rtol=1e-6)
  assert set(code_use(tokens % 2, (2, 2))) == {'perplexity', 'usage'}
  assert code_use(tokens, (2**30,) * 2) == {}


@pytest.mark.parametrize('config,fields,message', [
    (LFQConfig, dict(bits=18, groups=4), 'must divide bits=18'),
    (BSQConfig, dict(bits=36), 'at most 30 bits'),
    (LFQConfig, dict(temperature=0.0), 'positive'),
    (BSQConfig, dict(inverse_temperature=-1.0), 'positive'),
    (LFQConfig, dict(bits=18, entropy_group=4), 'must divide 18 bits')])
def test_bad_settings_are_refused(config, fields, message):
  with pytest.raises(ValueError, match=message):
    build(config, **fields)
