"""Draws samples: `smalti sample --workdir=GENERATOR --n=64 [--settings.guidance=2]`.

Writes `samples/NAME.png` (a grid), `NAME.npz` (`arr_0` uint8 images, `arr_1` labels, `tokens`) and
`NAME.json` (all that is needed to draw them again). With --out=DIR it is a job in parts, for many
thousands: see `launch/shards.py`.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import smalti
from smalti.data.images import Refused, read_bytes
from smalti.data.utf8 import to_bytes
from smalti.generators.generator import example_keys, fold
from smalti.launch import cli, mesh as meshes, pictures, run as runs, state as states, trees
from smalti.launch.experiment import MeshConfig
from smalti.launch.progress import say, track
from smalti.launch.serialization import to_json
from smalti.networks.pixels import to_uint8

TEXT = 'text', 'text_mask'
DECODE = 2**31 - 1  # folded into an example's key, beyond all that generators fold into it


@dataclasses.dataclass
class Samples:
  """Drawn: tokens int32[n, N, D], images uint8[n, H, W, C], labels int32[n] or None."""
  tokens: np.ndarray
  images: np.ndarray
  labels: np.ndarray | None
  nfe: int
  texts: dict[str, np.ndarray] | None = None  # what they were asked for, see `captions`


@dataclasses.dataclass
class Batch:
  """One batch of samples, still on the devices.

  Attributes:
    index: int64[B] of the examples; -1 for rows that only fill the batch.
    tokens, images: int32[B, N, D] and uint8[B, H, W, C], split over the local devices.
    labels: int32[B] or None.
    nfe: passes of the network per example.
  """
  index: np.ndarray
  tokens: jax.Array
  images: jax.Array
  labels: np.ndarray | None
  nfe: int


class Sampler:
  """Draws examples by global index, in batches of one shape, on all devices of this process.

  Example i depends on (seed, i) and its label alone: neither on the batch size nor on the number of
  devices or processes. `programs` counts what was compiled: one per kind of generator, batch size
  and static settings.
  """

  def __init__(self, batch_size: int = 64, devices: list[jax.Device] | None = None):
    """
    Args:
      batch_size: rows of a call, rounded up to a multiple of the devices.
      devices: None takes all of this process.
    """
    self.mesh = meshes.make(MeshConfig(), devices or jax.local_devices())
    each = meshes.batch_devices(self.mesh)
    self.batch_size = -(-batch_size // each) * each
    self.programs = 0

    def program(generator, tokenizer, condition, keys, settings):
      self.programs += 1  # while it is traced
      sample = generator.sample(condition, keys=keys, settings=settings)
      keep = getattr(settings, 'keep', None)
      keep = None if keep is None else jnp.full(len(keys), keep, jnp.int32)
      images = to_uint8(tokenizer.decode(sample.tokens, keep=keep, keys=fold(keys, DECODE)))
      return sample.tokens, images, jnp.asarray(sample.nfe)

    self._program = jax.jit(program)
    self._keys = jax.jit(example_keys)

  def place(self, loaded: runs.Loaded) -> runs.Loaded:
    """The model on every device of this process."""
    if self.mesh.size == 1:
      return loaded
    return dataclasses.replace(
        loaded, model=jax.device_put(loaded.model, meshes.replicated(self.mesh)))

  def batches(self, generator: runs.Loaded, tokenizer: runs.Loaded, *, n: int, seed: int,
              settings: Any, labels: np.ndarray | None = None, start: int = 0, every: int = 1,
              texts: dict[str, np.ndarray] | None = None) -> Iterator[Batch]:
    """Batches of the examples 0..n-1; the models must have been placed.

    Args:
      labels: int32[n]; None takes the classes in turn, where the generator has any.
      start: the first batch.
      every: takes batches start, start + every, ... for processes that share the work.
      texts: `text` and `text_mask`, n rows each; None takes `captions(generator, n)`.
    """
    labels = in_turn(generator, n) if labels is None else labels
    texts = captions(generator, n) if texts is None else texts
    root = states.stream(seed, 'sample')
    sharding = meshes.by_batch(self.mesh)
    for first in range(start * self.batch_size, n, every * self.batch_size):
      index = np.arange(first, first + self.batch_size)
      inside = np.minimum(index, n - 1)
      chosen = None if labels is None else labels[inside]
      rows = {} if texts is None else {name: texts[name][inside] for name in TEXT}
      rows |= {} if chosen is None else {'label': chosen}
      condition = jax.device_put(rows, sharding) or None
      keys = self._keys(root, jax.device_put(inside.astype(np.int32), sharding))
      tokens, images, nfe = self._program(
          generator.model, tokenizer.model, condition, keys, settings)
      yield Batch(np.where(index < n, index, -1), tokens, images, chosen, int(nfe))


def in_turn(generator: runs.Loaded, n: int) -> np.ndarray | None:
  """Labels int32[n], every class in turn, so that any stretch is balanced; None without classes."""
  classes = getattr(generator.config, 'classes', 0)
  return np.arange(n, dtype=np.int32) % classes if classes else None


def captions(generator: runs.Loaded, n: int, given: list[str] | None = None
             ) -> dict[str, np.ndarray] | None:
  """`text` and `text_mask` of n examples; None of a generator that reads no text.

  Args:
    given: what to read, in turn; None takes those of the held-out examples of the generator's
      data, and where they have them `claims`, to be judged by.

  Raises:
    ValueError: texts for a generator that reads none, or features; or none, and no data.
  """
  text = getattr(generator.config, 'text', None)
  if given is not None:
    if text is None or text.encoder is None:
      raise ValueError('This generator reads no text; leave out --text.' if text is None else
                       'This generator reads features of a frozen encoder, not text; leave out '
                       '--text, and the held-out ones of its data are taken.')
    rows = dict(zip(TEXT, to_bytes(given, text.length)))
    return {name: np.resize(row, (n, *row.shape[1:])) for name, row in rows.items()}
  if text is None:
    return None
  if generator.experiment is None:
    raise ValueError(f'{generator.path} is an exported file without data; say --text=....')
  source = generator.experiment.data.open('eval')
  index, parts = np.arange(min(n, len(source))), []
  for first in range(0, len(index), 256):
    rows = source.read(index[first:first + 256])
    if missing := [name for name in TEXT if name not in rows]:
      raise ValueError(f'{type(generator.experiment.data).__name__} holds no {missing[0]}; say '
                       '--text=....')
    parts.append({name: rows[name] for name in (*TEXT, 'claims') if name in rows})
  place = np.arange(n) % len(source)
  return {name: np.concatenate([part[name] for part in parts])[place] for name in parts[0]}


def draw(generator: runs.Loaded, tokenizer: runs.Loaded, *, n: int, seed: int, settings: Any,
         labels: np.ndarray | None = None, batch_size: int = 64,
         texts: dict[str, np.ndarray] | None = None) -> Samples:
  """Draws `n` examples; example i depends on (seed, i) and its label alone.

  Args:
    labels: int32[n]; None takes the classes in turn, where the generator has any.
    batch_size: examples per call; the last batch is padded and cut.
    texts: `text` and `text_mask`, n rows each; None takes `captions(generator, n)`.
  """
  labels = in_turn(generator, n) if labels is None else labels
  texts = captions(generator, n) if texts is None else texts
  sampler = Sampler(min(batch_size, n))
  batches = sampler.batches(sampler.place(generator), sampler.place(tokenizer), n=n, seed=seed,
                            settings=settings, labels=labels, texts=texts)
  parts, nfe = [], 0
  for batch in track(batches, -(-n // sampler.batch_size), 'batch'):
    parts.append(jax.device_get((batch.tokens, batch.images)))
    nfe = batch.nfe
  tokens, images = (np.concatenate(part)[:n] for part in zip(*parts))
  return Samples(tokens, images, labels, nfe, texts)


def resolve_settings(generator: runs.Loaded | runs.Outline, overrides: dict[str, str]) -> Any:
  """The run's sampling settings, or the generator's own, with the overrides of the command line."""
  settings = generator.experiment.settings if generator.experiment else None
  return trees.apply_settings(settings or generator.model.settings(), overrides)


def record(generator: runs.Loaded, settings: Any, *, n: int, seed: int) -> dict:
  """All that is needed to draw the same samples again."""
  return {
      'format': runs.FORMAT, 'version': smalti.__version__, 'generator': str(generator.path),
      'step': generator.step, 'weights': generator.weights, 'checkpoint': generator.identity,
      'fingerprint': generator.fingerprint,
      'settings': to_json(settings), 'n': n, 'seed': seed}


def write(folder: pathlib.Path, name: str, samples: Samples, item: dict, *, columns: int) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {'arr_0': samples.images, 'tokens': samples.tokens}
  if samples.labels is not None:
    arrays['arr_1'] = samples.labels
  arrays.update(samples.texts or {})
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
  flags.DEFINE_multi_string('text', None, 'What a sample should show, for a generator of text; '
                            'several are taken in turn; default the held-out captions of its data.',
                            flag_values=values)
  flags.DEFINE_string('captions', None, 'A file of such texts, one a line.', flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Where the tokenizer was moved to.', flag_values=values)
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'Averaged or last weights.',
                    flag_values=values)
  flags.DEFINE_string('name', None, 'Name of the files; default from seed and settings.',
                      flag_values=values)
  flags.DEFINE_string('out', None, 'The folder of a job in parts, which goes on where it stopped.',
                      flag_values=values)
  flags.DEFINE_integer('part', 1024, 'Examples per part of a job.', flag_values=values,
                       lower_bound=1)
  flags.DEFINE_integer('worker', 0, 'Which part of the job is done here.', flag_values=values)
  flags.DEFINE_integer('num_workers', 1, 'Into how many parts it is split.', flag_values=values)
  cli.define_settings(values)


def main(values: Any) -> int:
  if values.workdir is None:
    raise ValueError('sample needs --workdir=DIR, the run of a generator.')
  if values.n < 1 or values.batch_size < 1:
    raise ValueError(f'n={values.n} and batch_size={values.batch_size} must be 1 or more.')
  generator = runs.load(values.workdir, weights=values.weights)
  if not hasattr(generator.model, 'sample'):
    raise ValueError(f'{values.workdir} is a {runs.kind(generator.model)}; sample from '
                     'a generator trained on a tokenizer.')
  tokenizer = runs.load_tokenizer(generator, values.tokenizer)
  settings = resolve_settings(generator, values.settings)
  labels = _labels(values.labels, values.n, getattr(generator.config, 'classes', 0))
  given = _given(values.text, values.captions)
  texts = captions(generator, values.n, given)
  if not 0 <= values.worker < values.num_workers:
    raise ValueError(f'worker={values.worker} must be in 0..{values.num_workers - 1}.')
  if values.out is not None:
    from smalti.launch import shards
    shards.run(generator, tokenizer, pathlib.Path(values.out),
               record(generator, settings, n=values.n, seed=values.seed), settings=settings,
               labels=labels, texts=texts, batch_size=values.batch_size, size=values.part,
               worker=values.worker, workers=values.num_workers)
    return 0
  samples = draw(generator, tokenizer, n=values.n, seed=values.seed, settings=settings,
                 labels=labels, batch_size=values.batch_size, texts=texts)
  item = {**record(generator, settings, n=values.n, seed=values.seed), 'nfe': samples.nfe}
  item |= {} if given is None else {'texts': given}
  chosen = item['settings'] if given is None else [item['settings'], given]
  digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
  name = values.name or f'step{generator.step}_seed{values.seed}_{digest}'
  folder = runs.split_reference(values.workdir)[0] / 'samples'
  columns = max(1, min(round(values.n**0.5), 16))
  write(folder, name, samples, item, columns=columns)
  say(f'{values.n} samples, {samples.nfe} passes each: {folder / name}.png')
  return 0


def _labels(texts: list[str] | None, n: int, classes: int) -> np.ndarray | None:
  if texts is None:
    return None
  labels = [int(text) if text.strip().isdecimal() else -1 for text in texts]
  if not classes:
    raise ValueError('This generator has no classes; leave out --labels.')
  if not labels or any(not 0 <= label < classes for label in labels):
    raise ValueError(f'labels={",".join(texts)} must be integers in 0..{classes - 1}.')
  return np.resize(np.array(labels, np.int32), n)


def _given(texts: list[str] | None, path: str | None) -> list[str] | None:
  """The texts of the command line, or of a file."""
  if path is None:
    return texts
  if texts is not None:
    raise ValueError('--text and --captions say the same; give one of them.')
  try:
    data = read_bytes(path)
  except Refused as refusal:
    raise ValueError(f'{path} is no file of captions ({refusal}); write one a line.') from refusal
  lines = [line for line in data.decode(errors='replace').splitlines() if line.strip()]
  if not lines:
    raise ValueError(f'{path} has no line of text; write one caption a line.')
  return lines


if __name__ == '__main__':
  cli.run('sample')
