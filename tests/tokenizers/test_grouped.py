"""Grouped quantization: product codes, group-residual codes and their order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.grouped import GroupedConfig
from smalti.tokenizers.quantizer import absorb
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.vq import VQConfig

BOOK = VQConfig(codes=8, dim=3, revival=0, init='normal')
HIFI = ResidualConfig(quantizer=BOOK, levels=2, dropout=1.0)


@functools.cache
def output(config):
  q = {'product': GroupedConfig(quantizer=BOOK, groups=3),
       'shared': GroupedConfig(quantizer=BOOK, groups=3, shared=True),
       'grvq': GroupedConfig(quantizer=HIFI)}[config].build(rngs=nnx.Rngs(0))
  z = jax.random.normal(jax.random.key(1), (16, 5, q.dim))
  return q, z, jax.jit(lambda q, z: q(z, key=jax.random.key(2), train=True))(q, z)


@pytest.mark.parametrize('kind', ['product', 'shared'])
def test_product_codes_are_those_of_the_groups(kind):
  q, z, out = output(kind)
  tables = [np.asarray(q.parts[g % len(q.parts)].codes()) for g in range(3)]
  loss = []
  for g, e in enumerate(tables):
    part = np.asarray(z)[..., 3 * g:3 * g + 3]
    tokens = np.argmin(np.square(part[..., None, :] - e).sum(-1), -1)
    np.testing.assert_array_equal(out.tokens[..., g], tokens)
    np.testing.assert_array_equal(out.vectors[..., 3 * g:3 * g + 3], e[tokens])
    np.testing.assert_allclose(out.metrics[f'usage_{g}'], np.unique(tokens).size / 8)
    loss.append(np.square(part - e[tokens]).mean())
  np.testing.assert_allclose(out.losses['commitment'], np.mean(loss), rtol=1e-5)
  np.testing.assert_allclose(
      out.metrics['relative_commitment'], np.mean(loss) / np.square(z).mean(), rtol=1e-5)
  assert (q.vocab, q.order, q.budgets) == ((8, 8, 8), 'raster', ())
  assert set(out.statistics['parts']) == ({'0'} if kind == 'shared' else {'0', '1', '2'})
  assert sum(float(s.count.sum()) for s in out.statistics['parts'].values()) == 16 * 5 * 3


def test_codes_go_by_stages():
  """[s0g0, s0g1, s1g0, s1g1], the order of AcademiCodec."""
  q, _, out = output('grvq')
  assert (q.vocab, q.order, q.budgets) == ((8,) * 4, 'depth', (2, 4))
  e = [[np.asarray(level.codes()) for level in part.levels] for part in q.parts]  # [group][stage]
  t = np.asarray(out.tokens)
  want = np.concatenate([e[0][0][t[..., 0]] + e[0][1][t[..., 2]],
                         e[1][0][t[..., 1]] + e[1][1][t[..., 3]]], -1)
  np.testing.assert_array_equal(q.lookup(out.tokens), want)
  first = q.lookup(out.tokens, mask=jnp.arange(4) < 2 + jnp.zeros_like(t))
  np.testing.assert_array_equal(
      first, np.concatenate([e[0][0][t[..., 0]], e[1][0][t[..., 1]]], -1))
  assert {f'usage_{i}' for i in range(4)} <= set(out.metrics)
  np.testing.assert_allclose(out.metrics['usage_1'], np.unique(t[..., 1]).size / 8)
  # dropout takes whole stages: both groups of an example hold as many levels
  one = np.all(out.vectors == first, (1, 2))
  two = np.all(out.vectors == want, (1, 2))
  assert np.all(one ^ two) and 0 < one.sum() < 16


def test_a_shared_quantizer_learns_from_all_groups():
  config = GroupedConfig(quantizer=VQConfig(codes=8, dim=3, revival=0), shared=True)

  @jax.jit
  def step(keys):
    q = config.build(rngs=nnx.Rngs(0))
    z = jax.random.normal(keys[0], (4, 5, 6)) + jnp.repeat(jnp.array([-9.0, 9]), 3)
    q.prepare(z, key=keys[1])
    codes, statistics = q.parts[0].codes(), q(z, train=True).statistics
    absorb(q, statistics)
    return codes, q.parts[0].codes(), statistics['parts']['0'].count

  codes, moved, count = step(jax.random.split(jax.random.key(3)))
  assert set(np.sign(codes).mean(1)) == {-1, 1}  # codes for either group
  assert count.sum() == 40 and np.all((np.abs(codes - moved).max(1) > 0) | (count == 1))


def test_what_cannot_be_grouped_is_refused():
  with pytest.raises(ValueError, match='groups=0'):
    GroupedConfig(quantizer=BOOK, groups=0).build(rngs=nnx.Rngs(0))
