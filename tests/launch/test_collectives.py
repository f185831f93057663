"""What a step moves between devices: the counter on known programs, and the layout of the rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smalti.generators.autoregressive import AutoregressiveConfig
from smalti.launch.collectives import collective_bytes, init_memory, measure
from smalti.launch.experiment import MeshConfig
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec


def compiled(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


def test_counts_an_all_reduce_and_multiplies_it_in_loops():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P('data'))
  x = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=sharding)
  everywhere = jax.sharding.NamedSharding(mesh, jax.P())

  def once(x):
    return jax.lax.with_sharding_constraint(jnp.sum(x, 0), everywhere)

  def five_times(x):
    return jax.lax.scan(lambda c, _: (once(x * (1 + jnp.mean(c))), None), jnp.ones(256),
                        None, length=5)[0]

  assert collective_bytes(compiled(once, x)) == {'all-reduce': 256 * 4}
  assert collective_bytes(compiled(five_times, x))['all-reduce'] >= 5 * 256 * 4


CONFIG = AutoregressiveConfig(transformer=TransformerConfig(layers=4, width=128, heads=8))
SPEC = TokenSpec(grid=(64,), vocab=(512,))
BATCH = {'tokens': np.zeros((16, 64, 1), np.int32)}


@pytest.mark.slow
@pytest.mark.parametrize('mesh, ideal', [
    (MeshConfig(), lambda p: p),
    (MeshConfig(data=1, fsdp=8), lambda p: 3 * p),
    (MeshConfig(data=1, tensor=8), lambda p: 16 * 64 * 128 * 4 * 4 * 6)], ids=str)
def test_a_step_moves_little_more_than_it_must(mesh, ideal):
  row = measure(CONFIG, SPEC, mesh, BATCH, 8)
  moved = sum(row['collectives'].values())
  assert moved <= 1.25 * ideal(row['parameter_bytes']), row


@pytest.mark.slow
def test_a_large_model_is_born_sharded():
  from smalti.configs import imagenet256_llamagen
  config = imagenet256_llamagen.get_config('B')
  memory = init_memory(config.model, config.published.spec, 8)
  assert memory['parameters'] >= 100e6
  assert memory['output_bytes'] + memory['temporary_bytes'] <= 1.5 / 8 * memory['state_bytes']
