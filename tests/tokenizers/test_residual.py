"""Residual quantization: one gradient, all commitments, dropout without traces, beams."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from smalti.tokenizers.bernoulli import BernoulliConfig
from smalti.tokenizers.grouped import GroupedConfig
from smalti.tokenizers.gumbel import GumbelConfig
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.quantizer import absorb, combine, sg
from smalti.tokenizers.residual import Residual, ResidualConfig, beam_search
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.vq import VQ, VQConfig

BOOK = VQConfig(codes=16, dim=4, revival=0)
NORMAL = VQConfig(codes=16, dim=4, revival=0, init='normal')  # `prepare` does nothing


def build(quantizer=BOOK, **fields):
  return ResidualConfig(quantizer=quantizer, **fields).build(rngs=nnx.Rngs(0))


@functools.cache
def prepared(init='data', **fields):
  """A quantizer of 3 levels, other vectors than it was prepared with, and its training output."""
  @jax.jit
  def make(keys):
    book = dataclasses.replace(BOOK, init=init)
    q, z = build(book, levels=3, **fields), jax.random.normal(keys[0], (64, 6, 4))
    q.prepare(z[::-1] + 1e-3, key=keys[1])
    return q, z, q(z, key=keys[2], train=True)

  return make(jax.random.split(jax.random.key(0), 3))


def books(q):
  return [np.asarray(q.levels[i % len(q.levels)].codebook[...], np.float64) for i in range(q.depth)]


def greedy(z, tables):
  """Tokens and residuals after each level, in float64."""
  tokens, rest = [], [np.asarray(z, np.float64)]
  for e in tables:
    tokens.append(np.argmin(np.square(rest[-1][..., None, :] - e).sum(-1), -1))
    rest.append(rest[-1] - e[tokens[-1]])
  return np.stack(tokens, -1), rest[1:]


class TwicePassed(Residual):
  """Language-Codec's bug: every level passes its own gradient to the same vector."""

  def __call__(self, z, **options):
    total = 0.0
    for i in range(self.depth):
      total = total + self._quantize(i, z - sg(total), **options).vectors
    return total


def test_gradient_passes_once_whatever_the_depth():
  config = ResidualConfig(quantizer=BOOK, levels=3)
  z = jax.random.normal(jax.random.key(1), (1, 1, 4))
  multiplicity = lambda f: jnp.trace(jax.jacrev(f)(z)[0, 0, :, 0, 0]) / 4  # noqa: E731
  right, wrong = Residual(config, rngs=nnx.Rngs(0)), TwicePassed(config, rngs=nnx.Rngs(0))
  assert jax.jit(lambda: multiplicity(lambda z: right(z).vectors))() == 1
  assert jax.jit(lambda: multiplicity(wrong))() == 3


def test_every_level_commits_and_the_mean_is_the_cumulative_loss():
  """A residual that is not detached (HiFi-Codec) leaves the gradient of level 0 alone."""
  q, z, out = prepared()
  want_tokens, rest = greedy(z, books(q))
  np.testing.assert_array_equal(out.tokens, want_tokens)
  want = np.mean([np.mean(np.square(r)) for r in rest])  # RQ-VAE, section 3.1
  np.testing.assert_allclose(out.losses['commitment'], want, rtol=1e-5)
  gradient = jax.jit(jax.grad(lambda z: q(z).losses['commitment']))(z)
  np.testing.assert_allclose(gradient, np.mean(rest, 0) * 2 / z.size, atol=1e-7)
  np.testing.assert_allclose(
      [out.metrics[f'relative_commitment_{i}'] for i in range(3)],
      [np.mean(np.square(r)) / np.mean(np.square(z)) for r in rest], rtol=1e-5)


def test_levels_are_prepared_in_turn_on_residuals():
  q, z, _ = prepared()
  z = z[::-1] + 1e-3  # what it was prepared with
  rest = [np.asarray(z), *greedy(z, books(q))[1]]
  for i, (codes, rows) in enumerate(zip(books(q), rest)):
    distance = np.abs(codes[:, None] - rows[i % 2::2].reshape(-1, 4)).max(-1)
    assert np.all(distance.min(1) < 1e-6)  # every code is a row of what its level is given
    assert np.unique(codes.round(5), axis=0).shape == codes.shape  # and of a vector not yet coded
  shared = books(prepared(shared=True)[0])[0]
  near = np.abs(shared[:, None] - np.asarray(z).reshape(-1, 4)).max(-1).min(1) < 1e-6
  assert 0 < near.sum() < 16  # some are vectors, the others residuals


def test_shared_statistics_are_those_of_all_depths_in_any_order():
  q, z, out = prepared(shared=True)
  tokens, rest = greedy(z, books(q))  # of one codebook, as it was before the step
  np.testing.assert_array_equal(out.tokens, tokens)
  got = out.statistics['levels']['0']
  np.testing.assert_array_equal(got.count, np.bincount(tokens.reshape(-1), minlength=16))
  total = np.zeros((16, 4))
  for i, r in enumerate([np.asarray(z), *rest[:2]]):
    np.add.at(total, tokens[..., i], r)
  np.testing.assert_allclose(got.total, total, atol=1e-4)
  single, moved = build(levels=1, shared=True), []
  for order in itertools.permutations(range(3)):
    graph, state = nnx.split(q)
    fresh, statistics = nnx.merge(graph, jax.tree.map(jnp.copy, state)), None
    for i in order:
      single.levels[0].codebook[...] = fresh.levels[0].codebook[...]
      part = single(jnp.asarray([z, *rest[:2]][i], jnp.float32), train=True).statistics
      statistics = combine(statistics, part)
    absorb(fresh, statistics)
    moved.append(books(fresh)[0])
  np.testing.assert_allclose(moved, np.broadcast_to(moved[0], (6, 16, 4)), atol=1e-6)
  assert np.abs(moved[0] - books(q)[0]).max() > 1e-3


def kept(q, out):
  """How many levels each example's vectors hold, by comparing them with every prefix."""
  @jax.jit
  def matches(q, out):
    sums = jnp.stack([q.lookup(out.tokens, jnp.arange(3) < k + jnp.zeros_like(out.tokens))
                      for k in (1, 2, 3)])
    return jnp.all(sums == out.vectors, (2, 3))

  equal = np.asarray(matches(q, out))
  assert np.all(equal.sum(0) == 1)
  return 1 + equal.argmax(0)


def test_dropped_levels_leave_no_trace():
  q, z, out = prepared(init='normal', dropout=0.5)
  np.testing.assert_array_equal(out.tokens, greedy(z, books(q))[0])  # tokens are whole
  keep, tokens = kept(q, out), np.asarray(out.tokens)
  rest = [np.asarray(z), *greedy(z, books(q))[1]]
  loss = 0.0
  for i in range(3):
    part = out.statistics['levels'][str(i)]
    some = keep > i
    np.testing.assert_array_equal(part.count, np.bincount(tokens[some, :, i].ravel(), minlength=16))
    total = np.zeros((16, 4))
    np.add.at(total, tokens[some, :, i], rest[i][some])
    np.testing.assert_allclose(part.total, total, atol=1e-4)
    loss += np.square(rest[i + 1][some]).sum() / z.size / 3
  np.testing.assert_allclose(out.losses['commitment'], loss, rtol=1e-5)
  assert len(set(keep)) == 3 and q.budgets == (1, 2, 3)
  assert kept(q, jax.jit(lambda q, z: q(z))(q, z)).min() == 3  # evaluation drops nothing


def test_every_level_is_trained():
  """An exclusive upper bound leaves the last codebook without any vectors."""
  q = build(levels=4, dropout=0.5)
  out = jax.jit(lambda z, key: q(z, key=key, train=True))(
      jax.random.normal(jax.random.key(2), (4000, 1, 4)), jax.random.key(3))
  counts = np.array([jnp.sum(out.statistics['levels'][str(i)].count) for i in range(4)])
  exactly = -np.diff(counts, append=0)
  want = 4000 * (np.full(4, 0.5 / 4) + np.array([0, 0, 0, 0.5]))
  assert stats.chisquare(exactly, want).pvalue > 1e-3


@pytest.mark.parametrize('depth', [1, 4])
def test_bounded_levels_are_scaled_to_what_was_left(depth):
  q = build(FSQConfig(levels=(8, 5, 3)), levels=depth)
  z = 3 * jax.random.normal(jax.random.key(4), (16, 16, 3))
  out = jax.jit(lambda z: q(z))(z)
  error = np.abs(np.asarray(q.levels[0].bound(z)) - out.vectors).max((0, 1))
  step = np.array([1 / 7, 1 / 4, 1 / 2])
  assert np.all(error <= 1.02 * step ** depth) and np.all(error > 0.4 * step ** depth)
  assert out.statistics is None and q.vocab == (120,) * depth and q.factors == (8, 5, 3)


def test_beams_are_never_worse_and_wide_ones_find_the_best():
  tables = [jax.random.normal(jax.random.key(i), (4, 3)) / (i + 1) for i in range(3)]
  z = jax.random.normal(jax.random.key(9), (2, 750, 3))
  sums = np.sum([np.asarray(t)[list(c)] for t, c in zip(
      tables, zip(*itertools.product(range(4), repeat=3)))], 0)
  best = np.square(np.asarray(z)[..., None, :] - sums).sum(-1).min(-1)
  errors = {}
  for beam in (1, 2, 16):
    q = build(VQConfig(codes=4, dim=3), levels=3, beam=beam)
    for level, table in zip(q.levels, tables):
      level.codebook[...] = table
    out = jax.jit(lambda q, z: q(z))(q, z)
    np.testing.assert_array_equal(jax.jit(lambda q, t: q.lookup(t))(q, out.tokens), out.vectors)
    errors[beam] = np.square(np.asarray(z - out.vectors)).sum(-1)
    if beam == 2:  # in chunks as at once
      found = jax.jit(beam_search, static_argnums=2)(z.reshape(-1, 3), tables, 2)
      error = np.square(np.asarray(z.reshape(-1, 3) - q.lookup(found[:, None])[:, 0])).sum(-1)
      np.testing.assert_array_equal(errors[2], np.minimum(errors[1], error.reshape(2, 750)))
  assert np.all(errors[2] <= errors[1]) and np.all(errors[16] <= errors[1])
  assert errors[1].mean() > errors[2].mean() > errors[16].mean()
  np.testing.assert_allclose(errors[16], best, rtol=1e-5, atol=1e-6)
  assert errors[1].mean() > 1.05 * best.mean()


def test_codes_beyond_a_prefix_are_ignored():
  q, z, out = prepared()
  mask = jnp.arange(3) < jnp.arange(1, 4).repeat(22)[:64, None, None] + jnp.zeros_like(out.tokens)
  other = jnp.where(mask, out.tokens, (out.tokens + 7) % 16)
  np.testing.assert_array_equal(q.lookup(other, mask), q.lookup(out.tokens, mask))
  assert np.abs(q.lookup(other) - q.lookup(out.tokens)).max() > 0


def test_error_falls_with_every_level_after_training():
  key = jax.random.key(5)
  centres = 2 * jax.random.normal(key, (8, 4))
  q = build(dataclasses.replace(NORMAL, decay=0.9), levels=3, dropout=0.5)
  draw = lambda i: (centres[jax.random.randint(jax.random.fold_in(key, i), (64, 4), 0, 8)]  # noqa: E731
                    + jax.random.normal(jax.random.fold_in(key, i + 5000), (64, 4, 4)))

  @jax.jit
  def train(q):
    def step(i, state):
      q = nnx.merge(graph, state)
      absorb(q, q(draw(i), key=jax.random.fold_in(key, i), train=True).statistics)
      return nnx.state(q)
    graph, state = nnx.split(q)
    q = nnx.merge(graph, jax.lax.fori_loop(0, 200, step, state))
    return q(draw(1000)).metrics

  metrics = train(q)
  error = [float(metrics[f'relative_commitment_{i}']) for i in range(3)]
  assert all(b < 0.75 * a for a, b in zip(error, error[1:])), error
  assert min(float(metrics[f'usage_{i}']) for i in range(3)) > 0.8
  assert metrics['relative_commitment'] == metrics['relative_commitment_2']


class Whole(VQ):
  """A quantizer that counts every vector."""

  def __call__(self, z, *, key=None, train=False):
    return super().__call__(z, key=key, train=train)


class WholeConfig(VQConfig):
  def build(self, *, rngs):
    return Whole(self, rngs=rngs)


@pytest.mark.parametrize('fields,message', [
    (dict(levels=0), 'must be 1 or more'),
    (dict(dropout=1.5), 'fraction of the examples'),
    (dict(levels=4, least=5), r'in 1\.\.4'),
    (dict(quantizer=ProjectedConfig(quantizer=BOOK, dim=8)), 'put a projection outside'),
    (dict(quantizer=GroupedConfig(quantizer=GumbelConfig())), 'learns from the image alone'),
    (dict(quantizer=BernoulliConfig(bits=4)), 'learns from the image alone'),
    (dict(quantizer=GroupedConfig(quantizer=FSQConfig(levels=(5, 5)))), 'hides a bounded'),
    (dict(quantizer=FSQConfig(levels=(5, 2), symmetric=True)), '3 or more levels per channel'),
    (dict(quantizer=ResidualConfig(quantizer=BOOK)), 'cannot be nested'),
    (dict(quantizer=WholeConfig(), dropout=0.5), 'cannot leave examples out'),
    (dict(quantizer=FSQConfig(levels=(5, 5)), beam=2), 'searches a codebook')])
def test_what_cannot_be_a_level_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    build(**{'levels': 2, **fields})


def test_dropout_needs_a_key():
  with pytest.raises(ValueError, match='pass a key'):
    build(levels=2, dropout=1.0)(jnp.zeros((2, 2, 4)), train=True)
