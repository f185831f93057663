"""The training step: two players, accumulation, the guard, averaged weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smalti.launch import optimizer as optimizers, state as states
from smalti.launch.experiment import OptimizerConfig
from smalti.launch.step import guarded, train_step

sg = jax.lax.stop_gradient


class Bilinear(nnx.Module):
  """min_x max_y x y, each player's term with the other's parameter stopped."""

  def __init__(self, rngs=None):
    self.generator = nnx.Param(jnp.array(1.0))
    self.discriminator = nnx.Param(jnp.array(0.0))

  def loss(self, batch, *, step, key, train):
    x, y = self.generator[...], self.discriminator[...]
    value = x * sg(y) - sg(x) * y
    return value, {'metrics': {}, 'weight': 1.0, 'statistics': None}


class Line(nnx.Module):
  """Least squares whose loss counts only the rows with weight, so that micro-batches differ."""

  def __init__(self, rngs=None):
    self.kernel = nnx.Param(jnp.array([0.3, -0.2, 0.1]))

  def loss(self, batch, *, step, key, train):
    error = batch['x'] @ self.kernel[...] - batch['y']
    weight = jnp.sum(batch['w'])
    value = jnp.sum(batch['w'] * error**2) / weight
    return value, {'metrics': {'error': value}, 'weight': weight, 'statistics': None}


class Strata(nnx.Module):
  """The gradient counts the examples in each of 16 ranges of times."""

  def __init__(self, rngs=None):
    self.kernel = nnx.Param(jnp.zeros(16))

  def loss(self, batch, *, step, key, train):
    value = jnp.mean(self.kernel[(16 * batch['strata']).astype(jnp.int32)])
    return value, {'metrics': {}, 'weight': 1.0, 'statistics': None}


def start(model, optimizer, ema=None, **options):
  structure = states.Structure.of(model)
  state = states.init(lambda rngs: model, optimizer, jax.random.key(0), ema=ema is not None)
  step = jax.jit(functools.partial(
      train_step, structure=structure, optimizer=optimizer, ema=ema, **options))
  return state, step


@pytest.mark.parametrize('accumulate', [1, 4, 16])
def test_micro_batches_share_the_times_of_their_batch(accumulate):
  state, step = start(Strata(), optax.sgd(1.0), accumulate=accumulate)
  even = 0
  for seed in range(50):
    found, _ = step(state, {'x': jnp.zeros(16)}, jax.random.key(seed))
    even += bool(jnp.allclose(found['params']['kernel'], -1 / 16))
  assert even >= 48  # a time may round into the next range


def test_two_players_follow_the_orbit_of_simultaneous_gradient_descent(key):
  rate = 0.1
  optimizer = optax.partition(
      {'model': optax.sgd(rate), 'discriminator': optax.sgd(rate)}, optimizers._labels)
  state, step = start(Bilinear(), optimizer)
  for _ in range(50):
    state, _ = step(state, {'x': jnp.zeros(1)}, key)
  # (x, y) turns by atan(rate) and grows by sqrt(1 + rate^2) each step
  radius, angle = (1 + rate**2) ** 25, 50 * np.arctan(rate)
  np.testing.assert_allclose(state['params']['generator'], radius * np.cos(angle), rtol=1e-4)
  np.testing.assert_allclose(state['params']['discriminator'], radius * np.sin(angle), rtol=1e-4)


def test_a_late_player_starts_with_the_update_of_a_fresh_adam(key):
  config = OptimizerConfig(rate=0.01, warmup=0, clip=None, schedule='constant', weight_decay=0.0)
  late = OptimizerConfig(rate=0.01, warmup=0, clip=None, schedule='constant', start=20)
  state, step = start(Bilinear(), optimizers.make(config, late, 100))
  for _ in range(20):
    state, _ = step(state, {'x': jnp.zeros(1)}, key)
  assert float(state['params']['discriminator']) == 0.0
  state, _ = step(state, {'x': jnp.zeros(1)}, key)
  # Adam's first update is rate * sign(gradient), whatever the gradient's size
  np.testing.assert_allclose(abs(state['params']['discriminator']), 0.01, rtol=1e-3)


def test_what_is_fixed_is_not_moved_and_has_no_moments():
  config = OptimizerConfig(rate=0.1, warmup=0, schedule='constant', weight_decay=0.5)
  params = {'encoder': {'kernel': jnp.ones(2)}, 'encoder2': {'kernel': jnp.ones(2)},
            'discriminator': {'kernel': jnp.ones(2)}}
  rule = optimizers.make(config, config, 10, ('encoder', 'discriminator/kernel'))
  state = rule.init(params)
  assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * 2
  updates, _ = rule.update(jax.tree.map(jnp.ones_like, params), state, params)
  assert not updates['encoder']['kernel'].any()
  assert not updates['discriminator']['kernel'].any() and updates['encoder2']['kernel'].all()
  with pytest.raises(ValueError, match='fixed=nothing .* encoder, encoder2'):
    optimizers.make(config, None, 10, ('nothing',)).init(params)


@pytest.mark.parametrize('accumulate', [2, 4])
def test_accumulation_forms_the_weighted_mean(key, accumulate):
  rng = np.random.default_rng(0)
  batch = {'x': rng.normal(size=(16, 3)), 'y': rng.normal(size=16), 'w': rng.integers(0, 5, 16)}
  batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
  optimizer = optax.sgd(0.1)
  state, one = start(Line(), optimizer)
  _, many = start(Line(), optimizer, accumulate=accumulate)
  (a, metrics), (b, others) = one(state, batch, key), many(state, batch, key)
  np.testing.assert_allclose(a['params']['kernel'], b['params']['kernel'], rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], others['loss'], rtol=1e-5)
  # the mean of means, which this is not, differs
  parts = [one(state, {k: v[i::accumulate] for k, v in batch.items()}, key)[1]['loss']
           for i in range(accumulate)]
  assert abs(np.mean(parts) - metrics['loss']) > 1e-3


@pytest.mark.parametrize('poison', ['x', 'y'])
def test_a_step_that_is_not_finite_returns_the_state_unchanged(key, poison):
  batch = {'x': jnp.ones((4, 3)), 'y': jnp.ones(4), 'w': jnp.ones(4)}
  state, step = start(Line(), optax.adam(0.1), ema=0.9)
  state, metrics = step(state, batch, key)
  assert bool(metrics['finite'].all())
  bad = {**batch, poison: batch[poison].at[(0,) * batch[poison].ndim].set(jnp.inf)}
  after, metrics = step(state, bad, key)
  jax.tree.map(np.testing.assert_array_equal, state, after)
  names = guarded({'loss': 0, 'error': 0}, state['params'], None)
  assert len(names) == len(metrics['finite'])
  flagged = [n for n, fine in zip(names, metrics['finite']) if not fine]
  assert 'loss term loss' in flagged and 'gradient kernel' in flagged


def test_averaged_weights_warm_up_and_then_decay(key):
  batch = {'x': jnp.ones((4, 3)), 'y': jnp.zeros(4), 'w': jnp.ones(4)}
  state, step = start(Line(), optax.sgd(0.05), ema=0.9)
  average = np.asarray(state['ema']['kernel'])
  for n in range(5):
    state, _ = step(state, batch, key)
    decay = min(0.9, (1 + n) / (10 + n))
    average = decay * average + (1 - decay) * np.asarray(state['params']['kernel'])
  np.testing.assert_allclose(state['ema']['kernel'], average, rtol=1e-5)


def test_the_first_step_of_a_warm_up_moves_and_the_last_reaches_the_peak():
  config = OptimizerConfig(rate=1.0, warmup=4, schedule='cosine', final=0.1)
  rate = optimizers.schedule(config, 104)
  np.testing.assert_allclose([rate(i) for i in range(4)], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  np.testing.assert_allclose([rate(54), rate(104)], [0.55, 0.1], rtol=1e-5)


def test_weight_decay_spares_biases_scales_and_codebooks():
  tree = {'a': {'kernel': 1, 'bias': 1, 'scale': 1}, 'embedding': 1, 'codebook': 1}
  assert optimizers._decayed(jax.tree_util.tree_map(jnp.asarray, tree)) == {
      'a': {'kernel': True, 'bias': False, 'scale': False}, 'embedding': True, 'codebook': False}


def test_gradients_are_clipped_each_and_then_as_a_whole():
  params = {'kernel': jnp.zeros(2)}
  gradients = {'kernel': jnp.array([30.0, -4.0])}
  for config, want in [
      (OptimizerConfig(clip=None, clip_each=None), [30, -4]),
      (OptimizerConfig(clip=None, clip_each=5.0), [5, -4]),
      (OptimizerConfig(clip=1.0, clip_each=3.0), [0.5**0.5, -(0.5**0.5)])]:
    config.betas, config.epsilon, config.warmup = (0.0, 0.0), 1e6, 0
    rule = optimizers.make(dataclasses.replace(config, rate=1e6), None, 10)
    # without moments and with a huge epsilon, Adam's update is the clipped gradient itself
    updates, _ = rule.update(gradients, rule.init(params), params)
    np.testing.assert_allclose(-updates['kernel'], want, rtol=1e-3)


def test_structure_round_trips_lists_of_more_than_ten_modules():
  class Deep(nnx.Module):
    def __init__(self, rngs):
      self.blocks = nnx.List([nnx.Linear(1, i + 1, rngs=rngs) for i in range(12)])

  model = Deep(nnx.Rngs(0))
  structure = states.Structure.of(model)
  again = structure.merge(*structure.split(model))
  for block, other in zip(model.blocks, again.blocks):
    np.testing.assert_array_equal(block.kernel[...], other.kernel[...])
