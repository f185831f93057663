"""VQ: moving averages, revival that works, k-means, what each update moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smalti.tokenizers.quantizer import Statistics
from smalti.tokenizers.vq import VQ, VQConfig, kmeans, normalize


def build(**fields):
  return VQConfig(**fields).build(rngs=nnx.Rngs(0))


def numpy_ema(n, m, spare, steps, g, eps, revival):
  """The moving averages with revival, from the equations (arXiv 1711.00937, appendix A.1)."""
  e = m / n[:, None]
  for z in steps:
    k = np.argmin(np.square(z[:, None] - e).sum(-1), 1)
    count, total = np.zeros_like(n), np.zeros_like(m)
    for row, code in zip(z, k):
      count[code] += 1
      total[code] += row
    n, m = g * n + (1 - g) * count, g * m + (1 - g) * total
    e = m / ((n + eps) / (n.sum() + len(n) * eps) * n.sum())[:, None]
    dead, start = n < revival * n.mean(), max(1.0, 2 * revival * n.mean())
    e[dead], m[dead], n[dead] = spare[dead], spare[dead] * start, start
  return n, m, e


@pytest.mark.parametrize('revival', [0.0, 0.3])
def test_moving_averages_are_those_of_the_equations(revival):
  rng = np.random.default_rng(0)
  steps = rng.normal(size=(60, 40, 3)) * [3, 1, 1]
  spare = rng.normal(size=(12, 3))
  q = build(codes=12, dim=3, decay=0.9, revival=revival, init='normal')
  n, m, e = numpy_ema(np.ones(12), np.asarray(q.codebook[...], np.float64), spare, steps, 0.9, 1e-5,
                      revival)

  @jax.jit
  def step(q, z, key):
    statistics = q(z[None], key=key, train=True).statistics
    q.absorb(dataclasses.replace(statistics, spare=jnp.asarray(spare, jnp.float32)))
    return q

  for z in steps:
    q = step(q, jnp.asarray(z, jnp.float32), jax.random.key(0))
  np.testing.assert_allclose(q.count[...], n, rtol=1e-4)
  np.testing.assert_allclose(q.total[...], m, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(q.codebook[...], e, rtol=1e-3, atol=1e-4)


class NoOpRevival(VQ):
  """The published bug: revival resets only e, and e = m / n in the same step erases it."""

  def absorb(self, statistics: Statistics) -> None:
    dead = self.count[...] < self.revival * jnp.mean(self.count[...])
    self.codebook[...] = jnp.where(dead[:, None], statistics.spare, self.codebook[...])
    revival, self.revival = self.revival, 0.0
    VQ.absorb(self, statistics)
    self.revival = revival


def gaussians(quantizer):
  """Specification 2.4: 16 Gaussians in 8-D, 64 codes that start far away, 300 steps of 512.

  Returns the codes used and the mean squared error, both over the last batch before its update.
  """
  centres = 5 * jax.random.normal(jax.random.key(3), (16, 8))
  q = quantizer(VQConfig(codes=64, dim=8, decay=0.9, revival=0.0625), rngs=nnx.Rngs(0))
  start = 50 + jax.random.normal(jax.random.key(4), (64, 8))
  q.codebook[...], q.total[...] = start, start + 0
  structure, state = nnx.split(q)

  def step(state, key):
    pick, noise, draw = jax.random.split(key, 3)
    z = centres[jax.random.randint(pick, (1, 512), 0, 16)]
    z = z + 0.1 * jax.random.normal(noise, z.shape)
    q = nnx.merge(structure, state)
    out = q(z, key=draw, train=True)
    q.absorb(out.statistics)
    error = jnp.mean(jnp.sum(jnp.square(out.vectors - z), -1))
    return nnx.state(q), (out.metrics['usage'] * 64, error)

  keys = jax.random.split(jax.random.key(5), 300)
  _, (used, error) = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))(state, keys)
  return int(jnp.max(used[-20:])), float(jnp.mean(error[-20:]))


def test_revival_brings_every_code_to_the_data():
  used, error = gaussians(VQ)
  assert used == 64 and error < 0.1


def test_the_published_no_op_revival_does_not():
  used, error = gaussians(NoOpRevival)
  assert used < 32 and error > 10


@pytest.mark.parametrize('revival', [0.0, 0.03])
def test_dead_codes_are_counted_whether_or_not_they_are_revived(revival):
  q = build(codes=8, dim=2, update='gradient', revival=revival)
  q.count[...] = jnp.array([100.0, 100, 100, 100, 100, 100, 2, 0.1])
  assert q(jnp.zeros((1, 4, 2))).metrics['dead'] == 2


@pytest.mark.parametrize('update', ['ema', 'gradient'])
def test_revived_rows_survive_the_next_step(update):
  q = build(codes=4, dim=2, update=update, revival=0.2, decay=0.9)
  q.count[...] = jnp.array([400.0, 400, 1, 1])
  spare = jnp.array([[5.0, 5], [6, 6], [7, 7], [8, 8]])
  none = jnp.zeros((4, 2))
  q.absorb(Statistics(jnp.array([400.0, 400, 0, 0]), none, spare))
  np.testing.assert_allclose(q.codebook[...][2:], spare[2:])
  rows = q.codebook[...][2:]
  q.absorb(Statistics(jnp.array([400.0, 400, 0, 0]), none, -spare))
  np.testing.assert_allclose(q.codebook[...][2:], rows, rtol=1e-4)


def test_a_revived_row_is_not_flung_away_by_stale_adam_moments():
  """The docstring's claim: after log(revival) / log(decay) idle steps nothing is left of it."""
  optimizer = optax.adam(1e-2, b1=0.9, b2=0.999)
  row = jnp.zeros(3)
  state = optimizer.init(row)
  for _ in range(20):
    _, state = optimizer.update(jnp.full(3, 10.0), state)
  idle = round(np.log(0.03) / np.log(0.99))
  state = jax.lax.fori_loop(0, idle, lambda _, s: optimizer.update(jnp.zeros(3), s)[1], state)
  drift, after = optimizer.update(jnp.zeros(3), state)
  assert idle == 349 and np.all(np.abs(drift) < 1e-12)
  first, _ = optimizer.update(jnp.full(3, 1e6), state)
  np.testing.assert_array_less(np.abs(first), 1.05 * 0.1 / np.sqrt(0.001) * 1e-2)


def test_a_gradient_moves_only_the_codes_in_use_and_the_average_follows_its_vectors(key):
  z = jax.random.normal(key, (1, 6, 3))
  q = build(codes=16, dim=3, update='gradient', init='normal')
  gradient = jax.grad(lambda p: _losses(q, p, z)['codebook'])(q.codebook[...])
  moved = np.any(np.asarray(gradient) != 0, 1)
  np.testing.assert_array_equal(np.nonzero(moved)[0], np.unique(q(z).tokens))
  commitment = jax.grad(lambda p: _losses(q, p, z)['commitment'])(q.codebook[...])
  assert not np.any(commitment)
  assert 'codebook' not in build(codes=16, dim=3)(z).losses


def _losses(q, codebook, z):
  structure, state = nnx.split(q)
  return nnx.merge(structure, {**state, 'codebook': nnx.Param(codebook)})(z).losses


def test_losses_are_unweighted_means(key):
  z = jax.random.normal(key, (2, 6, 3))
  q = build(codes=16, dim=3, update='gradient', init='normal')
  out = q(z)
  want = np.mean(np.square(np.asarray(z) - np.asarray(q.lookup(out.tokens))))
  for loss in out.losses.values():
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_kmeans_is_that_of_scikit_learn():
  from sklearn.cluster import KMeans
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(6, 4)) * 4
  z = (centres[rng.integers(0, 6, 600)] + rng.normal(size=(600, 4))).astype(np.float32)
  start = z[:6]
  want = KMeans(6, init=start, n_init=1, max_iter=30, algorithm='lloyd').fit(z)
  np.testing.assert_allclose(
      kmeans(jnp.asarray(z), jnp.asarray(start), 30), want.cluster_centers_, atol=1e-3)


def test_kmeans_keeps_centres_without_rows():
  z, codes = jnp.array([[0.0], [1], [2]]), jnp.array([[1.0], [100]])
  np.testing.assert_allclose(kmeans(z, codes, 5), [[1], [100]])


@pytest.mark.parametrize('init', ['data', 'kmeans'])
@pytest.mark.parametrize('update', ['ema', 'gradient'])
def test_prepare_starts_from_the_batch(key, init, update):
  z = 7 + jax.random.normal(key, (4, 32, 3))
  q = build(codes=16, dim=3, init=init, update=update)
  before = float(q(z).losses['commitment'])
  q.prepare(z, key=jax.random.key(1))
  assert float(q(z).losses['commitment']) < 0.05 * before
  if init == 'data':
    rows = {tuple(r) for r in np.asarray(z).reshape(-1, 3)}
    assert {tuple(r) for r in np.asarray(q.codebook[...])} <= rows
  if update == 'ema':  # e = m / n holds from the start
    np.testing.assert_allclose(q.total[...] / q.count[...][:, None], q.codebook[...], rtol=1e-6)


@pytest.mark.parametrize('init', ['uniform', 'normal'])
def test_other_initialisations_ignore_the_batch(key, init):
  q = build(codes=16, dim=3, init=init)
  codes = q.codebook[...]
  q.prepare(jax.random.normal(key, (1, 8, 3)), key=key)
  np.testing.assert_array_equal(q.codebook[...], codes)
  assert (np.abs(codes).max() <= 1 / 16) == (init == 'uniform')


def test_cosine_compares_directions(key):
  z = jax.random.normal(key, (2, 20, 5))
  q = build(codes=16, dim=5, cosine=True, init='normal')
  scale = jnp.exp(jax.random.normal(jax.random.key(1), (2, 20, 1)))
  out = q(z)
  np.testing.assert_array_equal(out.tokens, q(scale * z).tokens)
  cosine = np.asarray(normalize(z)) @ np.asarray(normalize(q.codebook[...])).T
  np.testing.assert_array_equal(out.tokens[..., 0], np.argmax(cosine, -1))
  np.testing.assert_allclose(jnp.linalg.norm(q.lookup(out.tokens), axis=-1), 1, rtol=1e-6)


def test_normalisation_has_a_finite_gradient_at_zero():
  gradient = jax.grad(lambda x: jnp.sum(normalize(x)))(jnp.zeros((2, 3)))
  assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize('fields,message', [
    (dict(codes=1), 'codes=1'), (dict(decay=1.0), 'decay=1.0'), (dict(revival=1.5), 'revival=1.5')])
def test_bad_settings_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    build(**fields)


def test_training_with_revival_needs_a_key():
  with pytest.raises(ValueError, match='pass a key'):
    build(codes=4, dim=2)(jnp.zeros((1, 2, 2)), train=True)
