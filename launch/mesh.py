"""Meshes and path rules: which axis of which array lives on which devices.

One table, right-aligned, first match, covers the whole TrainState. A parameter no rule matches and
an axis that does not divide are errors naming the leaf.
"""

import math
import os
import re
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from smalti.launch import state as states

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))

# Path suffix -> mesh axes of the last dimensions; leading ones (stacked layers) are replicated.
# Tables (embeddings, codebooks) are sharded on one axis at most: a gather from a table sharded on
# both makes the partitioner rematerialise it.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r'attention/(query|key|value)/kernel', ('fsdp', 'tensor', None)),      # [c, k, f]
    (r'attention/(key_value|qkv)/kernel', ('fsdp', None, 'tensor', None)),  # [c, 2, k, f]
    (r'attention/out/kernel', ('tensor', None, 'fsdp')),                    # [k, f, c]
    (r'gate_up/kernel', ('fsdp', None, 'tensor')),                          # [c, 2, hidden]
    (r'up/kernel', ('fsdp', 'tensor')),                                     # [c, hidden]
    (r'down/kernel', ('tensor', 'fsdp')),                                   # [hidden, c]
    (r'head/kernel', ('fsdp', 'tensor')),                                   # [c, v]
    (r'components/kernel', ('fsdp', 'tensor', None)),                       # [c, m, r]
    (r'embedding', ('fsdp',)),                                              # [v, c]
    (r'(codebook|vectors|total|count|basis|age|average)', ()),
    (r'kernel', ()),                                                        # convolutions
    (r'(bias|scale)', ()),
)


def make(config: Any, devices: list | None = None) -> jax.sharding.Mesh:
  """The mesh of a `MeshConfig`; sizes that are all given may use fewer devices than there are.

  Raises:
    ValueError: the axes need more devices than there are, or do not divide them.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [getattr(config, axis) for axis in AXES]
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise ValueError(f'mesh={dict(zip(AXES, sizes))} must hold sizes of 1 or more, and -1 once.')
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // math.prod(s for s in sizes if s != -1)
    exact = True
  else:
    exact = jax.process_count() > 1  # every process must take part
  count = math.prod(sizes)
  if not 0 < count <= len(devices) or (exact and count != len(devices)):
    raise ValueError(
        f'mesh={dict(zip(AXES, sizes))} needs {count} devices, and there are '
        f'{len(devices)}; set one axis to -1 to take what is left.')
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES),
                       devices=devices[:count])


def distribute() -> None:
  """Joins the processes of a cluster, where the environment names one (SLURM, or coordinator)."""
  address = os.environ.get('SMALTI_COORDINATOR')
  if address:
    jax.distributed.initialize(
        address, int(os.environ['SMALTI_PROCESSES']), int(os.environ['SMALTI_PROCESS']))
  elif int(os.environ.get('SLURM_NTASKS', '1')) > 1 and 'SLURM_PROCID' in os.environ:
    jax.distributed.initialize()


def deterministic() -> None:
  """Asks XLA for bitwise repeatable GPU kernels; call it before the first computation."""
  flag = '--xla_gpu_deterministic_ops=true'
  if flag not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()


def rule(path: str) -> tuple[str | None, ...] | None:
  """The mesh axes of the last dimensions of the parameter at `path`, or None."""
  for pattern, axes in RULES:
    if re.search(rf'(^|/){pattern}$', path):
      return axes
  return None


def shardings(mesh: jax.sharding.Mesh, abstract: dict) -> dict:
  """The sharding of every leaf of an abstract TrainState.

  A leaf of optimizer or ema takes the sharding of the parameter whose path ends its own and whose
  shape it has; counts, factored moments and everything else are replicated.
  """
  known = {}
  for group in ('params', 'buffers'):
    for path, leaf in states.paths(abstract[group]).items():
      known[path] = leaf.shape, _spec(mesh, path, leaf.shape)

  def sharding(group: str, path: str, shape: tuple[int, ...]) -> NamedSharding:
    parts = path.split('/')
    for start in range(len(parts)):
      match = known.get('/'.join(parts[start:]))
      if match and match[0] == shape:
        return NamedSharding(mesh, match[1])
    return NamedSharding(mesh, P())

  return {
      group: NamedSharding(mesh, P()) if group == 'step' else jax.tree_util.tree_map_with_path(
          lambda path, leaf, group=group: sharding(
              group, '/'.join(entry.key for entry in path), leaf.shape), tree)
      for group, tree in abstract.items()}


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def by_batch(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The first axis split over the batch axes of the mesh."""
  return NamedSharding(mesh, BATCH)


def put(mesh: jax.sharding.Mesh, rows: dict) -> dict:
  """This process's rows as global arrays, split over the batch axes."""
  sharding = by_batch(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, value)
          for name, value in rows.items()}


def batch_devices(mesh: jax.sharding.Mesh) -> int:
  """Over how many devices a batch is split."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def _spec(mesh: jax.sharding.Mesh, path: str, shape: tuple[int, ...]) -> P:
  axes = rule(path)
  if axes is None:
    raise ValueError(f'No sharding rule matches {path} {shape}; add one to launch/mesh.py RULES.')
  axes = (None,) * (len(shape) - len(axes)) + axes
  if len(axes) > len(shape):
    raise ValueError(f'The rule {rule(path)} has more axes than {path} {shape}.')
  for size, axis in zip(shape, axes):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(
          f'{path} {shape}: {size} does not divide over {axis}={mesh.shape[axis]}; '
          f'choose a mesh whose {axis} divides it.')
  return P(*axes)
