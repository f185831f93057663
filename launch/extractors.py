"""Extractors by name: what `--extractor` may say, and which one images get that name none.

  cifar10, mnist     networks trained here, in docs/results/extractors, held to their SHA-256
  inception[:MODE]   the FID network, with weights that a user has; see `evaluation/resize.py`
  pixels             the pixels themselves
  FILE.safetensors   a classifier of one's own, written by `smalti export`

`python -m smalti.launch.extractors --workdir=RUN --out=FILE.safetensors` writes such a file from a
run, and beside it a card: accuracy and floors on the run's data, and how it came to be.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from smalti.evaluation import features, frechet
from smalti.evaluation.network import Network
from smalti.launch import cli, export, provenance, run as runs, state as states
from smalti.launch.progress import say
from smalti.networks.classifier import Classifier

FOLDER = provenance.ROOT / 'docs' / 'results' / 'extractors'
OURS = 'inception', 'pixels'


@dataclasses.dataclass(frozen=True)
class Packaged:
  """A file of `FOLDER` that scores may be named after: its hash, and what its logits are of."""
  sha256: str
  classes: tuple[str, ...]


PACKAGED = {
    'cifar10': Packaged(
        '433e2195c2afdbe32c31ded38500ff9dabe3dac24118350a8d862741e1d5e69a',
        ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')),
    'mnist': Packaged(
        'dc8d91f6654269bd7b1b6bf4e215d1507101ba9c17866b6741acc62f0fb9b0ea', tuple('0123456789')),
}


def load(reference: str | os.PathLike, *, shape: tuple[int, int, int] | None = None,
         weights: str | os.PathLike | None = None) -> features.Extractor:
  """The extractor of a name or a file.

  Args:
    shape: of the images, (height, width, channels), which 'pixels' needs.
    weights: the file of 'inception'; None takes the environment's.

  Raises:
    ValueError: an unknown name, a file of another hash or kind.
    FileNotFoundError: no such file, or a packaged network that is not beside the package.
  """
  name, _, mode = str(reference).partition(':')
  if name == 'inception':
    from smalti.evaluation import inception
    return inception.load(weights, resize=mode or 'tf1')
  if name == 'pixels':
    if shape is None:
      raise ValueError("'pixels' needs the shape of the images; give shape=(h, w, channels).")
    return features.Pixels(shape)
  if name in PACKAGED:
    path = FOLDER / f'{name}.safetensors'
    if not path.is_file():
      raise FileNotFoundError(
          f'The extractor {name!r} is not beside the package (docs/results/extractors/'
          f'{path.name} of the repository); copy it there, or name a file with --extractor=FILE.')
    return _network(path, PACKAGED[name])
  path = pathlib.Path(reference)
  if path.suffix != '.safetensors':
    raise ValueError(f'{reference} is no extractor; known are {", ".join((*PACKAGED, *OURS))}, and '
                     'classifiers exported to FILE.safetensors.')
  if not path.is_file():
    raise FileNotFoundError(f'No extractor at {path}; export one with smalti export.')
  return _network(path)


def default_for(shape: tuple[int, ...]) -> str | None:
  """The name of the extractor for images of a shape (height, width, channels); None has none.

  28 x 28 grey images get 'mnist', colour images of 32 x 32 and more 'cifar10', if their files are
  here. Who gets None fits an extractor of its own, whose scores then say so by their names.
  """
  height, width, channels = shape
  name = ('mnist' if shape == (28, 28, 1) else
          'cifar10' if channels == 3 and min(height, width) >= 32 else None)
  return name if name and (FOLDER / f'{name}.safetensors').is_file() else None


def _network(path: pathlib.Path, packaged: Packaged | None = None) -> Network:
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  if packaged and digest != packaged.sha256:
    raise ValueError(f'{path} has SHA-256 {digest[:16]}..., expected {packaged.sha256[:16]}...: '
                     'scores would not compare; get the file of this version.')
  loaded = export.load(path)
  config: Any = loaded.config
  if not isinstance(loaded.model, Classifier):
    raise ValueError(f'{path} is a {runs.kind(loaded.model)}; an extractor is a classifier.')
  return Network(f'{re.sub("[^0-9A-Za-z]", "", path.stem)}net', config, loaded.model, digest,
                 packaged.classes if packaged else ())


def card(network: Network, loaded: runs.Loaded) -> dict[str, Any]:
  """What a reader of its scores wants to know: accuracy, and what real images differ by.

  The distances between real images are between halves of the training split (the even and the odd
  places of it in a fixed order), and from the training to the held-out split; beside them those of
  the untrained twin.
  """
  splits = {name: loaded.experiment.data.open(name) for name in ('train', 'eval')}
  images = {name: source.read(np.arange(len(source)))['image'] for name, source in splits.items()}
  labels = splits['eval'].read(np.arange(len(splits['eval'])))['label']
  logits = network(images['eval'])['logits']
  order = np.random.default_rng(0).permutation(len(images['train']))
  floors = {}
  for which in (network, network.random(0)):
    half, other, held_out = (features.moments(which, x) for x in (
        images['train'][order[::2]], images['train'][order[1::2]], images['eval']))
    floors[features.score_name(which)] = {
        'half_to_half': frechet.frechet_distance(half, other),
        'held_out_to_train': frechet.frechet_distance(held_out, half.merge(other)),
        'half': half.n, 'train': half.n + other.n, 'held_out': held_out.n}
  return {
      'name': features.score_name(network), 'sha256': network.sha256, 'dim': network.dim,
      'parameters': states.count(states.Structure.of(network.model).split(network.model)),
      'accuracy': float((logits.argmax(1) == labels).mean()), 'held_out': len(labels),
      'floors': floors}


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run of a classifier.', flag_values=values)
  flags.DEFINE_string('out', None, 'The file, ending in .safetensors.', flag_values=values)


def main(values: Any) -> int:
  if values.workdir is None or not (values.out or '').endswith('.safetensors'):
    raise ValueError('extractors needs --workdir=RUN and --out=FILE.safetensors.')
  loaded = runs.load(values.workdir)
  if not isinstance(loaded.model, Classifier):
    raise ValueError(f'{values.workdir} is a {runs.kind(loaded.model)}; an extractor is a '
                     'classifier.')
  path = pathlib.Path(values.out)
  export.save(loaded, path)
  found = card(_network(path), loaded)
  experiment = loaded.experiment
  provenance.record(
      path.with_suffix('.json'), None, found, libraries=('safetensors', 'pillow'),
      trained={'data': type(experiment.data).__name__.removesuffix('Config'),
               'config': loaded.stored, 'steps': loaded.step, 'batch_size': experiment.batch_size,
               'weights': loaded.weights, 'seconds': _seconds(loaded.path)})
  say(f'{found["name"]}: accuracy {found["accuracy"]:.4f} on {found["held_out"]} held-out images, '
      f'SHA-256 {found["sha256"]}: {path}')
  return 0


def _seconds(workdir: pathlib.Path) -> float:
  """Wall time of the steps and their compilation, from the run's log."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  rows = [row for row in rows if 'seconds/step' in row]
  total, last = 0.0, 0
  for row in rows:
    total += row['seconds/step'] * (row['step'] - last) + row.get('seconds/compile', 0)
    last = row['step']
  return round(total, 1)


if __name__ == '__main__':
  cli.run('extractors')
