"""One portable file from a run: `smalti export --workdir=RUN --out=FILE.safetensors`.

The file holds the leaves used (averaged weights and codebooks); its metadata holds the component's
config, spec and fingerprint. It serves wherever a tokenizer is named.
"""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

import smalti
from smalti.evaluation.files import whole
from smalti.generators.generator import GeneratorConfig
from smalti.launch import cli, run as runs, serialization, state as states
from smalti.launch.progress import say
from smalti.networks.model import ModelConfig
from smalti.tokenizers.spec import TokenSpec


def save(loaded: runs.Loaded, path: pathlib.Path) -> None:
  """Writes the leaves of a loaded model, `params/...` and `buffers/...`, with its config.

  One model makes one file, bit for bit.
  """
  structure = states.Structure.of(loaded.model)
  params, buffers = structure.split(loaded.model)
  leaves = {k: np.asarray(v) for k, v in states.paths(
      {'params': params, 'buffers': buffers}).items()}
  metadata = {
      'format': str(runs.FORMAT), 'version': smalti.__version__,
      'config': json.dumps(loaded.stored), 'spec': loaded.spec.to_json() if loaded.spec else '',
      'fingerprint': loaded.fingerprint, 'step': str(loaded.step), 'weights': loaded.weights}
  if isinstance(loaded.config, GeneratorConfig):  # whose fingerprint is that of its tokenizer
    metadata['leaves'] = runs.fingerprint(loaded.stored, loaded.spec, params, buffers)
  with whole(path) as file:
    file.write(_ordered(serialize(leaves, metadata)))


def _ordered(data: bytes) -> bytes:
  """The same file with its header sorted: safetensors writes another order every time."""
  start = 8 + int.from_bytes(data[:8], 'little')
  header = json.dumps(json.loads(data[8:start]), sort_keys=True).encode()
  header += b' ' * (-len(header) % 8)
  return len(header).to_bytes(8, 'little') + header + data[start:]


def load(path: pathlib.Path) -> runs.Loaded:
  """Reads what `save` wrote and checks every leaf against the config, and the fingerprint.

  Raises:
    ValueError: damaged, of another format, or not a file of smalti.
  """
  try:
    with safe_open(path, 'numpy') as file:
      metadata = file.metadata() or {}
      leaves = {name: file.get_tensor(name) for name in file.keys()}
  except (SafetensorError, OSError) as error:
    raise ValueError(f'{path} cannot be read ({error}); export it again.') from error
  if 'config' not in metadata:
    raise ValueError(f'{path} is not a file of smalti: it holds no config; export one with '
                     'smalti export.')
  runs.check_format({**metadata, 'format': _number(metadata.get('format'))}, path)
  try:
    stored, step = json.loads(metadata['config']), int(metadata['step'])
    spec = TokenSpec.from_json(metadata['spec']) if metadata['spec'] else None
    fingerprint, weights = metadata['fingerprint'], metadata['weights']
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path}: its metadata cannot be read ({error}); export it again.') from error
  config = serialization.from_json(stored, ModelConfig).released()
  shape = nnx.eval_shape(lambda: runs.build(config, spec, nnx.Rngs(0)))
  structure = states.Structure.of(shape)
  target = dict(zip(('params', 'buffers'), structure.split(shape)))
  expected = states.paths(target)
  for name in expected.keys() ^ leaves.keys():
    raise ValueError(f'{path}: leaf {name} is missing or unknown; export it again.')
  for name, leaf in expected.items():
    if leaves[name].shape != leaf.shape or leaves[name].dtype != leaf.dtype:
      raise ValueError(f'{path}: {name} is {leaves[name].dtype}{leaves[name].shape}, its config '
                       f'says {leaf.dtype}{leaf.shape}; export it again.')
  tree = states.from_dict(target, _nested(leaves))
  model = structure.merge(tree['params'], tree['buffers'])
  found = runs.fingerprint(stored, spec, tree['params'], tree['buffers'])
  mark = metadata.get('leaves') if isinstance(config, GeneratorConfig) else fingerprint
  if mark is None:
    raise ValueError(f'{path} does not say which leaves it was written with, as generators do now; '
                     'export it again.')
  if found != mark:
    raise ValueError(f'{path} is damaged: its leaves have fingerprint {found}, and it was written '
                     f'with {mark}; export it again.')
  return runs.Loaded(model, config, stored, spec, fingerprint, None, step, path, weights)


def _number(text: str | None) -> int | str | None:
  return int(text) if text is not None and text.isdecimal() else text


def _nested(leaves: dict[str, np.ndarray]) -> dict:
  tree: dict = {}
  for path, leaf in leaves.items():
    node = tree
    *parents, name = path.split('/')
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = jnp.asarray(leaf)
  return tree


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run, or RUN@STEP.', flag_values=values)
  flags.DEFINE_string('out', None, 'The file, ending in .safetensors.', flag_values=values)
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'Averaged or last weights.',
                    flag_values=values)


def main(values: Any) -> int:
  if values.workdir is None or not (values.out or '').endswith('.safetensors'):
    raise ValueError('export needs --workdir=RUN and --out=FILE.safetensors.')
  loaded = runs.load(values.workdir, weights=values.weights)
  save(loaded, pathlib.Path(values.out))
  say(f'{type(loaded.config).__name__}, step {loaded.step}, {loaded.weights} weights, '
      f'fingerprint {loaded.fingerprint}: {values.out}')
  return 0


if __name__ == '__main__':
  cli.run('export')
