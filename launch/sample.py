"""Draws samples: `smalti sample --workdir=GENERATOR --n=64 [--settings.guidance=2]`.

Writes `samples/NAME.png` (a grid), `NAME.npz` (`arr_0` uint8 images, `arr_1` labels, `tokens`) and
`NAME.json` (all that is needed to draw them again).
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import smalti
from smalti.generators.generator import example_keys, generate
from smalti.launch import cli, pictures, run as runs, state as states
from smalti.launch.progress import say, track
from smalti.launch.serialization import to_json
from smalti.networks.pixels import to_uint8
from smalti.tokenizers.tokenizer import decode


@dataclasses.dataclass
class Samples:
  """Drawn: tokens int32[n, N, D], images uint8[n, H, W, C], labels int32[n] or None."""
  tokens: np.ndarray
  images: np.ndarray
  labels: np.ndarray | None
  nfe: int


def draw(generator: runs.Loaded, tokenizer: runs.Loaded, *, n: int, seed: int, settings: Any,
         labels: np.ndarray | None = None, batch_size: int = 64) -> Samples:
  """Draws `n` examples; example i depends on (seed, i) and its label alone.

  Args:
    labels: int32[n]; None takes the classes in turn, where the generator has any.
    batch_size: examples per call; the last batch is padded and cut.
  """
  classes = getattr(generator.config, 'classes', 0)
  if labels is None and classes:
    labels = np.arange(n, dtype=np.int32) % classes
  root = states.stream(seed, 'sample')
  batch_size = min(batch_size, n)
  parts, nfe = [], 0
  for first in track(range(0, n, batch_size), -(-n // batch_size), 'batch'):
    index = np.minimum(np.arange(first, first + batch_size), n - 1)
    condition = None if labels is None else {'label': jnp.asarray(labels[index])}
    keys = example_keys(root, jnp.asarray(index))
    sample = generate(generator.model, condition, keys=keys, settings=settings)
    drawn = to_uint8(decode(tokenizer.model, sample.tokens, keys=keys))
    parts.append(jax.device_get((sample.tokens, drawn)))
    nfe = int(sample.nfe)
  tokens, images = (np.concatenate(part)[:n] for part in zip(*parts))
  return Samples(tokens, images, labels, nfe)


def resolve_settings(generator: runs.Loaded, overrides: dict[str, str]) -> Any:
  """The run's sampling settings, or the generator's own, with the overrides of the command line."""
  settings = generator.experiment.settings if generator.experiment else None
  return cli.apply_settings(settings or generator.model.settings(), overrides)


def record(generator: runs.Loaded, settings: Any, *, n: int, seed: int, nfe: int) -> dict:
  """All that is needed to draw the same samples again."""
  return {
      'format': runs.FORMAT, 'version': smalti.__version__, 'generator': str(generator.path),
      'step': generator.step, 'weights': generator.weights, 'fingerprint': generator.fingerprint,
      'settings': to_json(settings), 'n': n, 'seed': seed, 'nfe': nfe}


def write(folder: pathlib.Path, name: str, samples: Samples, item: dict, *, columns: int) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {'arr_0': samples.images, 'tokens': samples.tokens}
  if samples.labels is not None:
    arrays['arr_1'] = samples.labels
  np.savez(folder / f'{name}.npz', **arrays)
  pictures.save_grid(folder / f'{name}.png', samples.images[:columns * columns], columns=columns)
  runs.write_json(folder / f'{name}.json', item)


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run folder of a generator.', flag_values=values)
  flags.DEFINE_integer('n', 64, 'How many examples.', flag_values=values)
  flags.DEFINE_integer('seed', 0, 'The seed; example i depends on (seed, i).', flag_values=values)
  flags.DEFINE_integer('batch_size', 64, 'Examples per call.', flag_values=values)
  flags.DEFINE_list('labels', None, 'Labels, taken in turn; default all classes.',
                    flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Where the tokenizer was moved to.', flag_values=values)
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'Averaged or last weights.',
                    flag_values=values)
  flags.DEFINE_string('name', None, 'Name of the files; default from seed and settings.',
                      flag_values=values)
  cli.define_settings(values)


def main(values: Any) -> int:
  if values.workdir is None:
    raise ValueError('sample needs --workdir=DIR, the run of a generator.')
  if values.n < 1 or values.batch_size < 1:
    raise ValueError(f'n={values.n} and batch_size={values.batch_size} must be 1 or more.')
  generator = runs.load(values.workdir, weights=values.weights)
  if not hasattr(generator.model, 'sample'):
    raise ValueError(f'{values.workdir} is a tokenizer; sample from a generator trained on it.')
  tokenizer = runs.load_tokenizer(generator, values.tokenizer)
  settings = resolve_settings(generator, values.settings)
  labels = _labels(values.labels, values.n, getattr(generator.config, 'classes', 0))
  samples = draw(generator, tokenizer, n=values.n, seed=values.seed, settings=settings,
                 labels=labels, batch_size=values.batch_size)
  item = record(generator, settings, n=values.n, seed=values.seed, nfe=samples.nfe)
  digest = hashlib.sha256(json.dumps(item['settings'], sort_keys=True).encode()).hexdigest()[:8]
  name = values.name or f'step{generator.step}_seed{values.seed}_{digest}'
  folder = runs.split_reference(values.workdir)[0] / 'samples'
  columns = max(1, min(round(values.n**0.5), 16))
  write(folder, name, samples, item, columns=columns)
  say(f'{values.n} samples, {samples.nfe} passes each: {folder / name}.png')
  return 0


def _labels(texts: list[str] | None, n: int, classes: int) -> np.ndarray | None:
  if texts is None:
    return None
  labels = [int(text) if text.strip().isdigit() else -1 for text in texts]
  if not classes:
    raise ValueError('This generator has no classes; leave out --labels.')
  if any(not 0 <= label < classes for label in labels):
    raise ValueError(f'labels={",".join(texts)} must be integers in 0..{classes - 1}.')
  return np.resize(np.array(labels, np.int32), n)


if __name__ == '__main__':
  cli.run('sample')
