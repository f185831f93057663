"""Sharding: the same numbers on any mesh, arrays born in place, errors that name the leaf."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smalti.generators.autoregressive import AutoregressiveConfig
from smalti.launch import mesh as meshes, run as runs, state as states
from smalti.launch.experiment import MeshConfig
from smalti.launch.job import unoptimized
from smalti.launch.step import train_step
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.vq import VQConfig

SPEC = TokenSpec(grid=(4,), vocab=(16,))
MESHES = {'data': (8, 1, 1), 'fsdp': (1, 8, 1), 'tensor': (1, 1, 8), 'mixed': (2, 2, 2)}


def generator():
  return AutoregressiveConfig(classes=3, label_dropout=0.0, transformer=TransformerConfig(
      layers=2, width=64, heads=8, hidden=64))


def tokenizer():
  # no revival: which rows revive is a random draw, which the pinned test below covers
  return AutoencoderConfig(image_size=(8, 8), channels=1, width=8, multipliers=(1, 2), blocks=1,
                           quantizer=VQConfig(codes=16, dim=8))


def batches(count):
  rng = np.random.default_rng(0)
  for _ in range(count):
    yield {'tokens': rng.integers(0, 16, (16, 4, 1), np.int32),
           'label': rng.integers(0, 3, 16).astype(np.int32),
           'image': rng.integers(0, 256, (16, 8, 8, 1), np.uint8)}


def train(config, shape, steps=3, accumulate=1):
  devices = jax.devices()[:int(np.prod(shape))]
  mesh = meshes.make(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]), devices)
  build = functools.partial(runs.build, config, SPEC)
  structure = states.structure(lambda: build(nnx.Rngs(0)))
  # Adam divides tiny gradients by their size, which would magnify rounding; SGD compares gradients
  optimizer = optax.sgd(0.1)
  init = functools.partial(states.init, build, optimizer, ema=True)
  shardings = meshes.shardings(mesh, jax.eval_shape(init, jax.random.key(0)))
  with jax.set_mesh(mesh):
    state = jax.jit(init, out_shardings=shardings, compiler_options=unoptimized())(
        jax.random.key(0))
    start = jax.device_get(state)
    programs, losses = [], []

    def one(*arguments):
      programs.append(config)
      return train_step(*arguments, structure=structure, optimizer=optimizer, ema=0.9,
                        accumulate=accumulate)

    step = jax.jit(one, out_shardings=(shardings, meshes.replicated(mesh)))
    for batch in batches(steps):
      state, metrics = step(state, meshes.put(mesh, batch), jax.random.key(1))
      losses.append(float(metrics['loss']))
  assert len(programs) == 1
  return start, losses, state


@pytest.mark.parametrize('config', [generator(), tokenizer()], ids=['generator', 'tokenizer'])
@pytest.mark.parametrize('name', [
    'mixed', *(pytest.param(name, marks=pytest.mark.slow) for name in ('data', 'fsdp', 'tensor'))])
def test_loss_and_state_do_not_depend_on_the_mesh(config, name):
  shape = MESHES[name]
  alone = _alone(type(config))
  start, losses, state = train(config, shape)
  jax.tree.map(_born_equal, alone[0], start)
  np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
  for path, leaf in states.paths(state['buffers']).items():  # codebook statistics too
    np.testing.assert_allclose(
        leaf, states.paths(alone[2]['buffers'])[path], rtol=1e-4, atol=1e-5, err_msg=path)


def _born_equal(alone, start):
  """The same bits are drawn; what compilers make of them for parts may round the other way."""
  if np.issubdtype(alone.dtype, np.floating):
    np.testing.assert_array_max_ulp(alone, start, maxulp=1)
  else:
    np.testing.assert_array_equal(alone, start)


@functools.cache
def _alone(kind):
  return train(generator() if kind is AutoregressiveConfig else tokenizer(), (1, 1, 1))


def test_micro_batches_give_the_step_of_the_whole_batch():
  whole, parts = train(generator(), (1, 1, 1), 1), train(generator(), (1, 1, 1), 1, accumulate=4)
  np.testing.assert_allclose(parts[1], whole[1], rtol=1e-5)
  for path, leaf in states.paths(parts[2]['params']).items():
    np.testing.assert_allclose(
        leaf, states.paths(whole[2]['params'])[path], rtol=1e-5, atol=1e-7, err_msg=path)


def test_micro_batches_give_the_codebook_of_the_whole_batch(monkeypatch):
  from smalti.tokenizers import quantizer
  pinned = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)

  def with_spare(module, statistics, absorb=quantizer.absorb):
    absorb(module, jax.tree.map(
        lambda s: dataclasses.replace(s, spare=jnp.asarray(pinned)), statistics,
        is_leaf=lambda s: isinstance(s, quantizer.Statistics)))

  monkeypatch.setattr('smalti.launch.step.absorb', with_spare)
  whole, parts = train(tokenizer(), (1, 1, 1), 1), train(tokenizer(), (1, 1, 1), 1, accumulate=4)
  for group in ('params', 'buffers'):
    for path, leaf in states.paths(parts[2][group]).items():
      np.testing.assert_allclose(
          leaf, states.paths(whole[2][group])[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_parameters_and_moments_are_split_over_fsdp_and_tensor():
  mesh = meshes.make(MeshConfig(data=1, fsdp=4, tensor=2))
  build = functools.partial(runs.build, generator(), SPEC)
  optimizer = optax.adamw(1e-3)
  init = functools.partial(states.init, build, optimizer, ema=True)
  abstract = jax.eval_shape(init, jax.random.key(0))
  shardings = meshes.shardings(mesh, abstract)
  for group in ('params', 'ema', 'optimizer'):
    leaves = {p: s for p, s in states.paths(shardings[group]).items()
              if p.endswith('attention/query/kernel')}
    assert len(leaves) == (2 if group == 'optimizer' else 1)
    for sharding in leaves.values():
      assert sharding.spec == jax.P(None, 'fsdp', 'tensor', None)
  assert shardings['step'].spec == jax.P()


def test_errors_name_the_leaf_and_the_mesh():
  with pytest.raises(ValueError, match='needs 12 devices, and there are 8'):
    meshes.make(MeshConfig(data=3, fsdp=2, tensor=2))
  with pytest.raises(ValueError, match='needs 6 devices, and there are 8'):
    meshes.make(MeshConfig(data=-1, fsdp=3, tensor=1))
  mesh = meshes.make(MeshConfig(data=1, fsdp=8, tensor=1))
  with pytest.raises(ValueError, match='No sharding rule matches odd/wheel'):
    meshes.shardings(mesh, {'params': {'odd': {'wheel': jnp.zeros(3)}}, 'buffers': {}})
  with pytest.raises(ValueError, match='gate_up/kernel.*12 does not divide over fsdp=8'):
    meshes.shardings(
        mesh, {'params': {'gate_up': {'kernel': jnp.zeros((12, 2, 8))}}, 'buffers': {}})
