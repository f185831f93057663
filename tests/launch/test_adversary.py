"""Adversaries in training: what the tokenizer feels, what is saved, averaged, exported, resumed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors import safe_open

from smalti.launch import export, optimizer as optimizers, run as runs, state as states
from smalti.launch.experiment import MeshConfig, OptimizerConfig
from smalti.launch.job import Job, _discriminator
from smalti.launch.step import eval_step, train_step
from smalti.launch.train import train
from smalti.networks.discriminator import PatchDiscriminatorConfig
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.vq import VQConfig

TINY = AutoencoderConfig(image_size=(8, 8), channels=1, width=8, multipliers=(1,), patch=2,
                         blocks=1, quantizer=VQConfig(codes=8, dim=4))


def against(**fields):
  return dataclasses.replace(TINY, adversary=AdversaryConfig(**{**dict(
      discriminator=PatchDiscriminatorConfig(width=8, layers=1), lecam=0.01), **fields}))


def digits(model, **changes):
  from smalti.configs.digits_vq import get_config
  return dataclasses.replace(get_config('debug'), model=model, mesh=MeshConfig(data=1), **changes)


def images(n, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, (n, 8, 8, 1)).astype(np.float32)


def follow(model, steps, discriminator=None):
  """The state before and after each of some steps, and the metrics of the last."""
  build = functools.partial(runs.build, model, None)
  # not Adam's epsilon: it would make updates of gradients that are nothing but rounding
  rule = optimizers.make(OptimizerConfig(warmup=0, epsilon=1e-3), discriminator, 100)
  state = jax.jit(functools.partial(states.init, build, rule, ema=True))(jax.random.key(0))
  step = jax.jit(functools.partial(
      train_step, structure=states.structure(lambda: build(nnx.Rngs(0))), optimizer=rule, ema=0.9))
  found = [state]
  for i in range(steps):
    state, metrics = step(state, {'image': images(8, i)}, jax.random.key(1))
    assert bool(metrics['finite'].all())
    found.append(state)
  return found, metrics


def play(steps, weight=0.0, start=2):
  """A run whose adversary starts late and weighs nothing."""
  experiment = digits(against(weight=weight, adaptive=True, start=start),
                      discriminator=OptimizerConfig(
                          rate=0.01, warmup=0, clip=None, schedule='constant'))
  options = _discriminator(experiment)
  assert options.start == start and experiment.discriminator.start == 0
  return follow(experiment.model, steps, options)


@pytest.fixture(scope='module')
def played():
  return play(5)


def compare(discriminated, alone, equal):
  for want, state in zip(alone, discriminated, strict=True):
    for group in ('params', 'ema', 'buffers'):
      assert 'discriminator' not in want[group]
      jax.tree.map(equal, want[group], states.released(state[group]))


def test_with_weight_zero_the_tokenizer_follows_the_run_without_an_adversary(played):
  found, metrics = played
  assert metrics['adversary/discriminator'] > 0 and metrics['adversary/weight'] == 0
  # two programs, which a compiler may round each its own way
  compare(found, follow(TINY, 5)[0],
          functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7))
  assert 'discriminator' not in found[-1]['ema']
  np.testing.assert_array_equal(found[-1]['buffers']['discriminator']['lecam']['count'], 3)


@pytest.mark.slow
def test_with_weight_zero_it_is_the_same_run_bitwise():
  with jax.disable_jit():  # each operation by itself: what is compared is ours, not a compiler's
    alone, discriminated = follow(TINY, 3)[0], play(3, start=1)[0]
    compare(discriminated, alone, np.testing.assert_array_equal)
    with pytest.raises(AssertionError):
      compare(play(3, weight=1e-3, start=1)[0], alone, np.testing.assert_array_equal)


def test_a_late_discriminator_begins_with_the_update_of_a_fresh_adam(played):
  found, _ = played
  kernels = [state['params']['discriminator']['network']['output']['kernel'] for state in found]
  np.testing.assert_array_equal(kernels[0], kernels[2])
  moved = np.abs(kernels[3] - kernels[2])
  np.testing.assert_allclose(moved[moved > 0], 0.01, rtol=1e-2)
  assert (moved > 0).mean() > 0.9


def test_the_discriminators_optimizer_begins_with_its_adversary():
  with pytest.raises(ValueError, match='start=5 is not the first step of the adversary .2.'):
    _discriminator(digits(against(start=2), discriminator=OptimizerConfig(start=5)))
  with pytest.raises(ValueError, match='its model none; give the model an adversary'):
    _discriminator(digits(TINY, discriminator=OptimizerConfig()))
  experiment = digits(against(start=2))
  assert _discriminator(experiment) == dataclasses.replace(experiment.optimizer, start=2)
  assert _discriminator(digits(TINY)) is None


class Asking(nnx.Module):
  """A loss that asks a frozen network of its batch."""

  def __init__(self):
    self.kernel = nnx.Param(jnp.array(2.0))

  def loss(self, batch, *, step, key, train):
    value = jnp.mean(batch['judge'](batch['x'])) * self.kernel[...]
    return value, {'metrics': {}, 'weight': 1.0, 'statistics': None}


def test_frozen_networks_reach_the_loss_whole_with_micro_batches():
  judge, x = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), np.float32(np.arange(12)).reshape(4, 3)
  rule, structure = optax.sgd(0.1), states.Structure.of(Asking())
  state = states.init(lambda rngs: Asking(), rule, jax.random.key(0), ema=False)
  step = jax.jit(functools.partial(
      train_step, structure=structure, optimizer=rule, accumulate=2))
  after, metrics = step(state, {'x': x}, jax.random.key(0), {'judge': judge})
  want = float(jnp.mean(judge(x)))
  np.testing.assert_allclose(metrics['loss'], 2 * want, rtol=1e-5)
  np.testing.assert_allclose(after['params']['kernel'], 2 - 0.1 * want, rtol=1e-5)
  _, held_out = eval_step(state['params'], state['buffers'], {'x': x}, jax.random.key(0),
                          {'judge': judge}, structure=structure)
  np.testing.assert_allclose(held_out['loss'], 2 * want, rtol=1e-5)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('adversary') / 'run'
  train(digits(against(start=1), steps=3), workdir)
  return workdir


def test_the_released_tokenizer_has_no_discriminator(run, tmp_path):
  loaded = runs.load(run)
  assert loaded.config == TINY and loaded.weights == 'ema' and loaded.model.discriminator is None
  raw, whole = runs.load(run, weights='raw'), runs.load(run, whole=True)
  assert raw.model.discriminator is None and raw.fingerprint != loaded.fingerprint
  assert whole.model.discriminator is not None and whole.fingerprint == loaded.fingerprint
  assert float(whole.model.discriminator.lecam.count[...]) == 2
  path = tmp_path / 'tokenizer.safetensors'
  export.save(loaded, path)
  with safe_open(path, 'numpy') as file:
    assert not [name for name in file.keys() if 'discriminator' in name]
  again = runs.load(path)
  assert again.fingerprint == loaded.fingerprint and again.model.discriminator is None
  x = images(2)
  tokens = loaded.model.encode(x)
  np.testing.assert_array_equal(again.model.encode(x), tokens)
  np.testing.assert_array_equal(again.model.decode(tokens), whole.model.decode(tokens))


def test_a_new_run_from_it_takes_the_discriminator_along(run, tmp_path, capsys):
  job = Job(digits(against(weight=0.5)), tmp_path / 'next', str(run))
  job.close()
  said = capsys.readouterr()
  assert 'copied discriminator/network/output/kernel' in said.out + said.err
  assert 'copied discriminator/lecam/average' in said.out + said.err
  assert 'missing' not in said.out + said.err
  assert 'discriminator' in job.state['params'] and 'discriminator' not in job.state['ema']


def test_held_out_metrics_are_those_of_the_last_discriminator_and_the_averaged_tokenizer(run):
  import json
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  names = {name for row in rows for name in row}
  assert {'adversary/generator', 'adversary/discriminator', 'adversary/real', 'adversary/fake',
          'adversary/weight', 'adversary/lecam', 'eval/adversary/real',
          'eval/adversary/fake'} <= names
  first = next(row for row in rows if row['step'] == 1)
  assert first['adversary/weight'] == 0
