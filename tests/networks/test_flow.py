"""Laws of the flow decoder's network: zero at the start, streams apart, what reads what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks.flow import FlowTransformer, lean
from smalti.networks.layers import LayerNorm, deviation, grid_sinusoid
from smalti.networks.transformer import Transformer

CONFIG = dataclasses.replace(lean(2, 16, head=8), hidden=40, remat=False)
GRID, FEATURES, REGISTERS = (2, 3), 5, 4


def network():
  return FlowTransformer(CONFIG, grid=GRID, features=FEATURES, registers=REGISTERS,
                         rngs=nnx.Rngs(0))


@functools.cache
def trained():
  """A network whose zero kernels are not, as after training."""
  model = network()
  for i, linear in enumerate((model.transformer.blocks.modulation, model.transformer.modulation,
                              model.head)):
    linear.kernel[...] = 0.3 * jax.random.normal(jax.random.key(i), linear.kernel.shape)
  return nnx.split(model)


def inputs():
  keys = jax.random.split(jax.random.key(7), 3)
  return (jax.random.normal(keys[0], (2, 6, FEATURES)),
          jax.random.normal(keys[1], (2, REGISTERS, 16)), jax.random.uniform(keys[2], (2,)))


@jax.jit
def run(state, x, registers, t):
  return nnx.merge(trained()[0], state)(x, registers, t)


def test_the_velocity_is_zero_at_initialisation():
  x, registers, t = inputs()
  assert not np.any(network()(x, registers, t))


def test_patches_depend_on_noise_registers_time_and_place():
  state, (x, registers, t) = trained()[1], inputs()
  y = run(state, x, registers, t)
  assert y.shape == x.shape and y.dtype == jnp.float32
  for changed in (run(state, x.at[:, 1].add(1.0), registers, t),
                  run(state, x, registers.at[:, 3].multiply(-1.0), t),
                  run(state, x, registers, t / 2)):
    assert np.all(np.abs(changed - y).max(-1) > 1e-4)  # at every patch of every example
  swapped = run(state, x[:, ::-1], registers, t)[:, ::-1]
  assert np.abs(swapped - y).max() > 1e-3  # places matter
  # registers carry their own places: as they come, they are a set
  np.testing.assert_allclose(run(state, x, registers[:, ::-1], t), y, atol=1e-4)


def test_patches_and_registers_are_modulated_apart():
  config = dataclasses.replace(CONFIG, axes=0, modulated=True, streams=(3, 2))
  apart = Transformer(config, rngs=nnx.Rngs(0))
  one = Transformer(dataclasses.replace(config, streams=()), rngs=nnx.Rngs(0))
  assert apart.blocks.modulation.kernel.shape == (2, 16, 2 * 6 * 16)
  first = 0.3 * jax.random.normal(jax.random.key(1), (2, 16, 6 * 16))
  one.blocks.modulation.kernel[...] = first
  x, vector = jax.random.normal(jax.random.key(2), (2, 5, 16)), jnp.ones((2, 16))
  forward = jax.jit(lambda model: model(x, modulation=vector))
  # the same for both streams is one for all
  apart.blocks.modulation.kernel[...] = jnp.concatenate([first, first], -1)
  np.testing.assert_allclose(forward(apart), forward(one), atol=1e-5)
  # gates of zero leave the second stream as it came, which the first one's do not touch
  apart.blocks.modulation.kernel[...] = jnp.concatenate([first, 0 * first], -1)
  y = forward(apart)
  np.testing.assert_allclose(y[:, 3:], LayerNorm()(x[:, 3:]), atol=1e-5)
  assert np.abs(y[:, :3] - LayerNorm()(x[:, :3])).max() > 1e-2


def test_streams_without_modulation_are_refused():
  with pytest.raises(ValueError, match='set modulated=True'):
    Transformer(dataclasses.replace(CONFIG, streams=(3, 2)), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='multiple of 4'):
    FlowTransformer(dataclasses.replace(CONFIG, width=18), grid=GRID, features=1, registers=1,
                    rngs=nnx.Rngs(0))


def test_norm_is_without_parameters_and_in_float32():
  x = 100 + jax.random.normal(jax.random.key(0), (4, 64))
  y = LayerNorm()(x)
  np.testing.assert_allclose(jnp.mean(y, -1), 0, atol=1e-5)
  np.testing.assert_allclose(jnp.std(y, -1), 1, atol=1e-4)
  assert LayerNorm()(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(network(), nnx.Param))}
  assert names == {'kernel', 'bias'}


def test_kernels_start_with_the_deviation_of_their_matrix():
  blocks = network().transformer.blocks
  for kernel, inputs, outputs in ((blocks.gate_up.kernel, 16, 40),
                                  (blocks.attention.key_value.kernel, 16, 16)):
    assert np.std(kernel[...]) == pytest.approx(deviation(inputs, outputs), rel=0.1)


def test_places_of_a_grid_are_its_rows_and_columns():
  table = grid_sinusoid((3, 4), 8)
  assert table.shape == (12, 8)
  rows, columns = table.reshape(3, 4, 8)[..., :4], table.reshape(3, 4, 8)[..., 4:]
  np.testing.assert_array_equal(rows, np.broadcast_to(rows[:, :1], rows.shape))
  np.testing.assert_array_equal(columns, np.broadcast_to(columns[:1], columns.shape))
  np.testing.assert_allclose(rows[2, 0], [np.sin(2), np.sin(.02), np.cos(2), np.cos(.02)],
                             rtol=1e-6)
  assert len(np.unique(table, axis=0)) == 12
