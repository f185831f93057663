"""Masked-channel residual quantization: encoding sees what training saw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.partitioned import PartitionedConfig, channel_masks
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.vq import VQConfig

BOOK = VQConfig(codes=16, dim=8, revival=0, init='normal')


def build(**fields):
  return PartitionedConfig(**{'quantizer': BOOK, 'levels': 4, **fields}).build(rngs=nnx.Rngs(0))


@functools.cache
def output():
  q, z = build(), jax.random.normal(jax.random.key(1), (300, 1, 8))
  run = jax.jit(lambda z, key, train: q(z, key=key, train=train), static_argnums=2)
  return q, z, run(z, jax.random.key(2), True), run(z, None, False)


def test_masks_are_the_published_thirds():
  masks = channel_masks(128, 3)
  assert masks.sum(1).tolist() == [42, 43, 43] and np.all(masks.sum(0) == 1)
  assert np.all(np.diff(np.argmax(masks, 0)) >= 0)


def numpy_tokens(z, tables, split):
  """MCRVQ from its description: arXiv 2402.12208, section 3.2."""
  thirds = np.array_split(np.arange(z.shape[-1]), [2, 5])
  total, tokens = np.zeros_like(z), []
  for i, e in enumerate(tables):
    seen = z - total
    if i < split:
      seen = np.zeros_like(z)
      seen[..., thirds[i]] = z[..., thirds[i]]
    tokens.append(np.argmin(np.square(seen[..., None, :] - e).sum(-1), -1))
    total = total + e[tokens[-1]]
  return np.stack(tokens, -1), total


def test_encoding_sees_the_masks_of_training():
  q, z, out, encoded = output()
  tables = [np.asarray(level.codes(), np.float64) for level in q.levels]
  tokens, total = numpy_tokens(np.asarray(z, np.float64), tables, 3)
  np.testing.assert_array_equal(out.tokens, tokens)
  np.testing.assert_array_equal(encoded.tokens, tokens)
  np.testing.assert_allclose(encoded.vectors, total, atol=1e-5)
  # the published `encode` has residuals from the first level on
  assert np.mean(numpy_tokens(np.asarray(z, np.float64), tables, 0)[0] != tokens) > 0.3


def test_the_first_levels_are_never_dropped():
  q, _, out, _ = output()
  assert q.budgets == (3, 4) and q.vocab == (16,) * 4
  counts = [float(out.statistics['levels'][str(i)].count.sum()) for i in range(4)]
  assert counts[:3] == [300] * 3 and 110 < counts[3] < 190


def test_gradient_passes_once():
  q = build()
  jacobian = jax.jit(jax.jacrev(lambda z: q(z).vectors[0, 0]))(jnp.ones((1, 1, 8)))
  np.testing.assert_array_equal(jacobian[:, 0, 0], np.eye(8))


def test_bounded_parts_have_the_whole_range():
  q = build(quantizer=FSQConfig(levels=(5, 5, 7, 7)), split=2, levels=3, dropout=0)
  z = jax.random.normal(jax.random.key(4), (4, 4, 4))
  out = jax.jit(lambda z: q(z))(z)
  error = np.abs(q.levels[0].bound(z) - out.vectors).max((0, 1))
  assert np.all(error <= 1.02 * np.array([1 / 4, 1 / 4, 1 / 6, 1 / 6]) ** 2)


@pytest.mark.parametrize('fields,message', [
    (dict(split=6), r'in 1\.\.levels=4'), (dict(levels=12, split=9), 'at most the 8 channels')])
def test_what_cannot_be_split_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    build(**fields)
