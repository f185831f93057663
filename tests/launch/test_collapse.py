"""The collapse monitor: silent on healthy runs, and quick on codebooks that are lost."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smalti.data.digits import DigitsConfig
from smalti.launch import state as states
from smalti.launch.collapse import NORMS, PATIENCE, Monitor
from smalti.launch.job import monitor
from smalti.launch.step import train_step
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.binary import LFQConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.simvq import SimVQConfig
from smalti.tokenizers.vq import VQConfig


def alarms(series, vocab=(1024,), vectors=4096, scales=(), name='perplexity'):
  """(step, alarm) of a series of one metric."""
  monitor = Monitor(vocab, vectors, scales)
  return [(i, alarm) for i, value in enumerate(series) for alarm in monitor.see({name: value})]


def test_half_the_bits_are_the_limit():
  assert not alarms([33.0] * 200)
  (step, alarm), = alarms([31.0] * 200)
  assert step == PATIENCE - 1 and alarm.limit == 32 and 'revival' in alarm.remedy
  assert '31' in str(alarm) and 'below 32' in str(alarm)


def test_a_batch_shows_no_more_codes_than_it_has_vectors():
  assert not alarms([20.0] * 100, vocab=(2**18,), vectors=256)
  assert alarms([20.0] * 100, vocab=(2**18,), vectors=1024)


def test_a_coarse_scale_shows_no_more_codes_than_it_has_vectors():
  healthy = [63.0] * 100  # of 64 images, one vector each
  assert not alarms(healthy, (4096,), 64 * 21, scales=(64, 256, 1024), name='perplexity_0')
  (_, alarm), = alarms([7.9] * 100, (4096,), 64 * 21, scales=(64, 256, 1024), name='perplexity_0')
  assert alarm.limit == 8
  (_, alarm), = alarms([31.0] * 100, (4096,), 64 * 21, scales=(64, 256, 1024), name='perplexity_2')
  assert alarm.limit == 32


def test_one_bit_of_many_that_never_changes_is_told():
  (_, alarm), = alarms([1 / 64] * 100, vocab=(2,) * 64, name='dead_bits')
  assert 'entropy' in alarm.remedy and 'above 0' in str(alarm)
  assert not alarms([1 / 64, 0.0] * 100, vocab=(2,) * 64, name='dead_bits')
  assert not alarms(0.9 ** np.arange(100), vocab=(2,) * 64, name='dead_bits')  # it mends


def test_norms_are_watched_per_level():
  (_, alarm), = alarms([NORMS * 1.01] * 100, vocab=(32, 32), name='ratio_1')
  assert alarm.metric == 'ratio_1' and 'commitment' in alarm.remedy and 'above' in str(alarm)
  assert not alarms([NORMS * 0.99] * 100, vocab=(32, 32), name='ratio_1')


def test_what_recovers_is_left_alone():
  rising = 4 * 1.02 ** np.arange(150)  # crosses 32 at step 105
  assert not alarms(rising)
  assert alarms(4 * 1.001 ** np.arange(150))  # 3% from half to half of 32 steps


def test_an_alarm_is_said_once_and_again_after_it_ended():
  low, high = [10.0] * 100, [500.0] * 5
  assert [step for step, _ in alarms(low + high + low)] == [PATIENCE - 1, 105 + PATIENCE - 1]


def test_a_short_dip_is_none():
  series = np.full(300, 500.0)
  series[100:100 + PATIENCE - 1] = 2.0
  assert not alarms(series)


def test_bits_that_never_change_are_dead_codes():
  entropy = 0.08  # bits of a bit that is set once in a hundred
  assert alarms([2 ** entropy] * 50, vocab=(2,) * 10)
  assert not alarms([2 ** 0.9] * 50, vocab=(2,) * 10)


def test_other_metrics_are_not_watched():
  assert not alarms([0.0] * 100, name='loss')


# On real runs.

FAMILIES = {
    'vq': (VQConfig(codes=64, dim=8), LossWeights()),
    'simvq': (SimVQConfig(codes=64, dim=8), LossWeights()),
    'fsq': (FSQConfig(levels=(7, 5, 5)), LossWeights()),
    'lfq': (LFQConfig(bits=6), LossWeights(entropy=0.02)),
    'residual': (ResidualConfig(quantizer=VQConfig(codes=16, dim=8), levels=2), LossWeights()),
}


class Run:
  """A small tokenizer of digits, step by step, watched."""

  def __init__(self, family):
    quantizer, weights = FAMILIES[family]
    config = AutoencoderConfig(image_size=(8, 8), channels=1, width=16, multipliers=(1,), blocks=0,
                               patch=2, quantizer=quantizer, weights=weights)
    self.build = lambda rngs: config.build(rngs=rngs)
    self.structure = states.structure(lambda: self.build(nnx.Rngs(0)))
    self.optimizer = optax.adamw(2e-3)
    self.step = jax.jit(lambda state, batch, key: train_step(
        state, batch, key, structure=self.structure, optimizer=self.optimizer))
    self.images = DigitsConfig().open('train').read(np.arange(1437))['image']

  def start(self, seed):
    state = states.init(self.build, self.optimizer, jax.random.key(seed), ema=False)
    model = self.structure.merge(state['params'], state['buffers'])
    model.prepare({'image': jnp.asarray(self.images[:64])}, key=jax.random.key(seed))
    params, buffers = self.structure.split(model)
    self.monitor = monitor(model, 64)
    return {**state, 'params': params, 'buffers': buffers}

  def go(self, state, steps, seed, frozen=False):
    """(state, steps at which alarms came)."""
    params, buffers = state['params'], state['buffers']
    rows, found = np.random.default_rng(seed), []
    for i in range(steps):
      batch = {'image': jnp.asarray(self.images[rows.integers(0, 1437, 64)])}
      state, metrics = self.step(state, batch, jax.random.key(seed))
      if frozen:
        state = {**state, 'buffers': buffers}
        if 'quantizer' in params:
          state['params'] = {**state['params'], 'quantizer': params['quantizer']}
      found += [i for _ in self.monitor.see(jax.device_get(metrics))]
    return state, found


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_healthy_runs_are_silent_and_an_injected_collapse_is_not(family):
  run = Run(family)
  for seed in (0, 1):
    state, found = run.go(run.start(seed), 200, seed)
    assert not found, (family, seed, found, run.monitor.raised)
    output = state['params']['encoder']['output']
    large = jax.tree.map(lambda leaf: 100 * leaf, output)
    state['params'] = {**state['params'], 'encoder': {**state['params']['encoder'],
                                                      'output': large}}
    _, found = run.go(state, 50, seed, frozen=True)
    print(f'{family} seed {seed}: alarm {found[:1]} steps after the collapse,',
          next(iter(run.monitor.raised.values()), None))
    assert found and found[0] < 50


def test_the_limits_are_those_of_the_text():
  """81% at r = 10; saturated FSQ of five levels is below half its bits."""
  assert math.isclose((1 - 1 / NORMS) ** 2, 0.81)
  assert 2 ** 4 < math.sqrt(5 ** 4)
