"""What a step moves between devices, beside the ideal: `python -m smalti.launch.collectives`.

FLOPs split evenly over devices in a bad layout too; the waste shows only in the collectives. They
are read from the text of the compiled program, loops times their trip counts. Use simulated devices
(XLA_FLAGS=--xla_force_host_platform_device_count=8); bytes are meaningful there, time is not.
"""

import collections
import functools
import math
import re
import sys
from typing import Any

import jax
import numpy as np
from flax import nnx

from smalti.launch import (
  mesh as meshes,
  optimizer as optimizers,
  provenance,
  run as runs,
  state as states,
  trees,
)
from smalti.launch.experiment import MeshConfig, OptimizerConfig
from smalti.launch.step import train_step

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
SIZES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
         'u64': 8, 'f64': 8}


def collective_bytes(text: str) -> dict[str, int]:
  """Result bytes per device of every kind of collective in one run of a compiled program."""
  bodies = _computations(text)
  entry = next(name for name in bodies if name.startswith('ENTRY '))
  return dict(_count(bodies, entry))


def _computations(text: str) -> dict[str, list[str]]:
  bodies: dict[str, list[str]] = {}
  name = None
  for line in text.splitlines():
    if line and not line[0].isspace() and line.rstrip().endswith('{'):
      name = ('ENTRY ' if line.startswith('ENTRY') else '') + re.sub(
          r'^ENTRY ', '', line).split()[0].lstrip('%')
      bodies[name] = []
    elif name is not None:
      bodies[name].append(line)
  return bodies


def _count(bodies: dict[str, list[str]], name: str) -> collections.Counter[str]:
  total: collections.Counter[str] = collections.Counter()
  for line in bodies.get(name, ()):
    match = re.match(r'\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z-]+)\(', line)
    if not match:
      continue
    shapes, operation = match.groups()
    kind = operation.removesuffix('-start')
    if kind in KINDS:
      total[kind] += _bytes(shapes)
    called = re.findall(r'(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)',
                        line)
    branches = re.search(r'branch_computations=\{([^}]*)\}', line)
    if branches:
      # a conditional runs one branch; the larger is what a step costs
      counts = [_count(bodies, b.strip().lstrip('%')) for b in branches.group(1).split(',')]
      heaviest: collections.Counter[str] = max(counts, key=lambda count: sum(count.values()))
      total += heaviest
    trips = re.search(r'known_trip_count[^0-9]*(\d+)', line)
    for child in called:
      part = _count(bodies, child)
      times = int(trips.group(1)) if trips and operation == 'while' else 1
      total += collections.Counter({k: v * times for k, v in part.items()})
  return total


def _bytes(shapes: str) -> int:
  return sum(SIZES.get(kind, 4) * math.prod(int(d) for d in dims.split(',') if d)
             for kind, dims in re.findall(r'([a-z]+\d*)\[([\d,]*)\]', shapes))


def measure(config: Any, spec: Any, mesh_config: MeshConfig, batch: dict[str, np.ndarray],
            devices: int) -> dict[str, Any]:
  """Collectives, memory and arguments per device of the training step of `config` on a mesh."""
  mesh = meshes.make(mesh_config, jax.devices()[:devices])
  build = functools.partial(runs.build, config, spec)
  structure = states.structure(lambda: build(nnx.Rngs(0)))
  optimizer = optimizers.make(OptimizerConfig(), None, 1000)
  init = functools.partial(states.init, build, optimizer, ema=False)
  abstract = jax.eval_shape(init, jax.random.key(0))
  shardings = meshes.shardings(mesh, abstract)
  placed = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
  step = functools.partial(train_step, structure=structure, optimizer=optimizer)
  with jax.set_mesh(mesh):
    compiled = jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(mesh))).lower(
            placed, meshes.put(mesh, batch),
            jax.device_put(jax.random.key(0), meshes.replicated(mesh))).compile()
  memory = compiled.memory_analysis()
  return {
      'devices': devices, 'parameter_bytes': 4 * states.count(abstract['params']),
      'collectives': collective_bytes(compiled.as_text()),
      'temporary_bytes': memory.temp_size_in_bytes,
      'argument_bytes': memory.argument_size_in_bytes}


def init_memory(config: Any, spec: Any, fsdp: int) -> dict[str, float]:
  """Bytes per device of the sharded init of a model with AdamW and averaged weights."""
  mesh = meshes.make(MeshConfig(data=1, fsdp=fsdp, tensor=1), jax.devices()[:fsdp])
  build = functools.partial(runs.build, config, spec)
  optimizer = optimizers.make(OptimizerConfig(), None, 1000)
  init = functools.partial(states.init, build, optimizer, ema=True)
  abstract = jax.eval_shape(init, jax.random.key(0))
  compiled = jax.jit(init, out_shardings=meshes.shardings(mesh, abstract)).lower(
      jax.random.key(0)).compile({'xla_backend_optimization_level': 0})
  memory = compiled.memory_analysis()
  return {'parameters': states.count(abstract['params']),
          'state_bytes': sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)),
          'output_bytes': memory.output_size_in_bytes,
          'temporary_bytes': memory.temp_size_in_bytes}


def main(out: str) -> None:
  """The 4 x 256 model of specs on every mesh, and the sharded init of LlamaGen-B."""
  from smalti.generators.autoregressive import AutoregressiveConfig
  from smalti.networks.transformer import TransformerConfig
  from smalti.tokenizers.spec import TokenSpec
  spec = TokenSpec(grid=(128,), vocab=(1024,))
  config = AutoregressiveConfig(transformer=TransformerConfig(layers=4, width=256, heads=8))
  batch = {'tokens': np.zeros((16, 128, 1), np.int32)}
  rows = {}
  for name, mesh, devices in (
      ('1', MeshConfig(), 1), ('8 data', MeshConfig(), 8),
      ('8 fsdp', MeshConfig(data=1, fsdp=8), 8),
      ('8 tensor', MeshConfig(data=1, tensor=8), 8),
      ('2 x 2 x 2', MeshConfig(data=2, fsdp=2, tensor=2), 8)):
    row = rows[name] = measure(config, spec, mesh, batch, devices)
    size, layers = row['parameter_bytes'], 4
    # attention and MLP each reduce once forward, once recomputed (remat) and once backward
    activation = 16 * 128 * 256 * 4 * layers * 6
    row['ideal'] = {'8 data': {'all-reduce': size},
                    '8 fsdp': {'all-gather': 2 * size, 'reduce-scatter': size},
                    '8 tensor': {'all-reduce': activation}}.get(name, {})
    shown = '  '.join(f'{k} {v / 2**20:.1f}' for k, v in sorted(row['collectives'].items()))
    ideal = '  '.join(f'{k} {v / 2**20:.1f}' for k, v in sorted(row['ideal'].items()))
    print(f'{name:10} MiB moved: {shown or "none"}   ideal: {ideal or "none"}   '
          f'temporary {row["temporary_bytes"] / 2**20:.1f} MiB', flush=True)
  published = trees.load_config('imagenet256_llamagen:B')
  memory = init_memory(published.model, published.published.spec, 8)
  memory['ratio'] = (memory['output_bytes'] + memory['temporary_bytes']) / (
      memory['state_bytes'] / 8)
  print(f'init of {memory["parameters"]:,} parameters on fsdp=8: output + temporary are '
        f'{memory["ratio"]:.3f} of an eighth of the state')
  provenance.record(out, 'python -m smalti.launch.collectives', {'step': rows, 'init': memory})


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else 'docs/results/sharding.json')
