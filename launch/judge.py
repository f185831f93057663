"""Judge: real images, an extractor and its untrained twin, which samples are compared with.

Beside every score stands the same score of held-out real images (what cannot be beaten honestly)
and the same distance on features of the untrained twin (what sees no content). The real images are
passed once through both networks; what statistics need of them stays in a folder.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from smalti.evaluation import features, measures, reference as reference_files
from smalti.evaluation.files import whole
from smalti.evaluation.manifest import seal
from smalti.evaluation.measures import Measured
from smalti.evaluation.subset import subset
from smalti.evaluation.summary import Accumulator, Summary
from smalti.launch import extractors, serialization
from smalti.launch.progress import say, track

BATCH = 256  # real images per call of an extractor
FIT = 20_000  # training images that an extractor is fitted on, at most
BYTES = 1 << 29  # of real images in memory at once, at most


class Accumulation:
  """What is kept of a stream of images by both networks.

  Attributes:
    agreeing, asked: how many samples the extractor's own classes put where they were asked for.
    nfe: passes of the generator per sample; None for images from elsewhere.
  """

  def __init__(self, judge: 'Judge', n: int, source: str = ''):
    self._judge, self.n = judge, n
    self.parts = [Accumulator(features.identity(x), n, source=source) for x in judge.networks]
    self.agreeing, self.asked = 0, 0
    self.nfe: int | None = None

  def add(self, images: Any, index: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Counts images uint8[B, H, W, C], which may be split over devices; index < 0 is padding."""
    for i, (network, part) in enumerate(zip(self._judge.networks, self.parts)):
      outputs = network(images)
      part.add(outputs, index)
      if i == 0 and labels is not None and self._judge.accuracy is not None:
        rows = (index >= 0) & (index < self.n)
        self.agreeing += int((outputs['logits'].argmax(-1) == labels)[rows].sum())
        self.asked += int(rows.sum())

  def save(self, folder: pathlib.Path, cursor: int) -> None:
    """Writes all parts, then the note that makes them count; what was there before goes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(self.parts):
      part.save(folder / f'part{i}-{cursor}.npz', cursor)
    note = {'cursor': cursor, 'agreeing': self.agreeing, 'asked': self.asked,
            'nfe': self.nfe}
    with whole(folder / 'cursor.json') as file:
      file.write(json.dumps(note).encode())
    for path in folder.glob('part*.npz'):
      if not path.stem.endswith(f'-{cursor}'):
        path.unlink()

  def resume(self, folder: pathlib.Path) -> int:
    """Continues what `save` wrote and returns its cursor; 0 where nothing was."""
    if not (folder / 'cursor.json').exists():
      return 0
    note = json.loads((folder / 'cursor.json').read_text(encoding='utf-8'))
    cursor = note['cursor']
    self.parts = [
        Accumulator.resume(folder / f'part{i}-{cursor}.npz', features.identity(network), self.n,
                           source=part.source)[0]
        for i, (network, part) in enumerate(zip(self._judge.networks, self.parts))]
    self.agreeing, self.asked, self.nfe = note['agreeing'], note['asked'], note['nfe']
    return cursor

  def merge(self, other: 'Accumulation') -> None:
    """Adds what another process counted."""
    for mine, theirs in zip(self.parts, other.parts):
      mine.merge(theirs)
    self.agreeing, self.asked = self.agreeing + other.agreeing, self.asked + other.asked
    self.nfe = other.nfe if self.nfe is None else self.nfe

  def finish(self) -> list[Summary]:
    """Raises ValueError unless exactly n images were counted."""
    return [part.finish() for part in self.parts]


@dataclasses.dataclass
class Judge:
  """What samples are compared with.

  Attributes:
    networks: the extractor, and its untrained twin.
    reference: summaries of the real training images, by network.
    held_out: the same of real held-out images, which give the floor; None for a file of statistics.
    shape: of the images.
    accuracy: of the extractor's logits on real held-out images, where they are over the labels of
      the data; None where they are not.
    folder: where floors are kept; None keeps none.
  """
  networks: list[Any]
  reference: list[Summary]
  held_out: list[Summary] | None
  shape: tuple[int, int, int]
  accuracy: float | None = None
  folder: pathlib.Path | None = None

  @property
  def extractor(self) -> Any:
    return self.networks[0]

  @property
  def definition(self) -> dict[str, Any]:
    """What decides the numbers, for names of cells and for manifests."""
    return {
        'extractor': features.identity(self.extractor),
        'reference': self.reference[0].source, 'reference_samples': self.reference[0].n,
        'held_out': self.held_out and self.held_out[0].source,
        'held_out_samples': self.held_out and self.held_out[0].n}

  def measure(self, summaries: list[Summary]) -> list[Measured]:
    """All measures of the extractor, each with its floor and the control's value beside."""
    found = measures.compare(summaries[0], self.reference[0])
    if self.held_out is None:
      return found
    control = _by_measure(measures.compare(summaries[1], self.reference[1]))
    floor, control_floor = self.floors
    out = []
    for row in found:
      kind = _measure(row)
      beside = {'floor': floor.get(kind), 'floor_samples': self.held_out[0].n,
                'untrained': control.get(kind), 'untrained_floor': control_floor.get(kind)}
      out.append(dataclasses.replace(row, beside={
          **row.beside, **{k: v for k, v in beside.items() if v is not None}}))
    return out

  @functools.cached_property
  def floors(self) -> list[dict[str, float]]:
    """Measures of real held-out images, by network; kept beside the summaries they are of."""
    key = seal([self.definition, features.identity(self.networks[1])])[:16]
    path = self.folder and self.folder / f'floors-{key}.json'
    if path and path.exists():
      return json.loads(path.read_text(encoding='utf-8'))
    found = [_by_measure(measures.compare(*pair)) for pair in zip(self.held_out, self.reference)]
    if path and jax.process_index() == 0:
      with whole(path) as file:
        file.write(json.dumps(found).encode())
    return found


def _by_measure(rows: list[Measured]) -> dict[str, float]:
  return {_measure(row): row.value for row in rows}


def _measure(row: Measured) -> str:
  """'fd' of 'fd_mlp64_1a2b3c4d' and of 'fid': what the control is compared by."""
  kind = row.name.split('_')[0]
  return measures.PROXIES.get(kind, kind)


def open_judge(data: Any, folder: pathlib.Path, *, n: int, extractor: str | None = None,
               reference: pathlib.Path | None = None, weights: str | None = None) -> Judge:
  """The judge for the images of a data config.

  Args:
    folder: where summaries of real images are kept.
    n: how many samples will be compared; the floor is of as many held-out images, or all.
    extractor: a name or file, see `launch/extractors.py`; None takes the one for such images.
    reference: a file of statistics to compare with, instead of the training images.
    weights: the file of the extractor 'inception'; None takes the environment's.
  """
  source, held = data.open('train'), data.open('eval')
  network = open_extractor(data, folder, extractor, weights)
  networks = [network, network.random(0)]
  real = [_summaries(networks, source, data, 'train', len(source), folder),
          _summaries(networks, held, data, 'eval', min(n, len(held)), folder)]
  if reference is not None:
    real[0][0] = _read(reference, network)
  return Judge(networks, real[0], real[1], _shape(source),
               _accuracy(network, held, min(n, len(held))), folder)


def open_extractor(data: Any, folder: pathlib.Path, extractor: str | None = None,
                   weights: str | None = None) -> Any:
  """The extractor of `open_judge`, and no real images but those it may have to be fitted on."""
  shape = _shape(data.open('train'))
  chosen = extractor or extractors.default_for(shape)
  if chosen is None:
    return _fitted(data, shape, folder)
  return extractors.load(chosen, shape=shape, weights=weights)


def judge_of_file(reference: pathlib.Path, extractor: str | None, shape: tuple[int, int, int],
                  weights: str | None = None) -> Judge:
  """The judge of a file of statistics alone: without real images there is no floor."""
  chosen = extractor or extractors.default_for(shape)
  if chosen is None:
    raise ValueError(f'No extractor is known for images of {shape}; name one with --extractor.')
  network = extractors.load(chosen, shape=shape, weights=weights)
  return Judge([network], [_read(reference, network)], None, shape)


def _read(path: pathlib.Path, network: Any) -> Summary:
  summary = reference_files.load(path, network)
  if not summary.verified:
    say(f'{path} does not say its extractor and resizing: scores are marked unverified_reference')
  if summary.source:
    return summary
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return dataclasses.replace(summary, source=f'{path.name} sha256:{digest[:16]}')


def _shape(source: Any) -> tuple[int, int, int]:
  row = source.read(np.arange(1))
  if 'image' not in row:
    raise ValueError(f'{type(source).__name__} holds no images to compare with; name data that '
                     'has with --data=CONFIG.')
  return row['image'].shape[1:]


def _fitted(data: Any, shape: tuple[int, int, int], folder: pathlib.Path) -> Any:
  """An extractor fitted on the training images, for data that no shipped network fits."""
  train, held_out = data.open('train'), data.open('eval')
  size = int(np.prod(shape))
  most = max(2, min(FIT, BYTES // size))
  if len(train.classes) < 2 or size > 4096:
    images = train.read(subset(len(train), most))['image']
    return features.Principal.fit(images, min(64, len(images) - 1, size))
  key = seal({'data': serialization.to_json(data), 'of': len(train), **_content(train, held_out),
              **({'rows': 'random'} if most < len(train) else {})})[:16]
  path = folder / f'fitted-{key}.npz'
  if not path.exists():
    rows, tests = (source.read(subset(len(source), most)) for source in (train, held_out))
    features.Classifier.fit('mlp64', (rows['image'], rows['label']),
                            (tests['image'], tests['label'])).save(path)
  return features.Classifier.load(path)


def _summaries(networks: list[Any], source: Any, data: Any, split: str, n: int,
               folder: pathlib.Path) -> list[Summary]:
  """Both networks' summaries of n real images, from `folder` where they are there."""
  key = seal({'data': serialization.to_json(data), 'split': split, 'n': n, 'of': len(source),
              **_content(source),
              'networks': [features.identity(x) for x in networks],
              **({'rows': 'random'} if n < len(source) else {})})[:16]
  paths = [folder / f'{split}-{key}-{i}.npz' for i in range(len(networks))]
  if all(path.exists() for path in paths):
    return [Summary.load(path) for path in paths]
  digest = hashlib.sha256()
  parts = [Accumulator(features.identity(x), n) for x in networks]
  for index, images in track(_real(source, n), -(-n // BATCH), 'batch'):
    digest.update(np.ascontiguousarray(images).tobytes())
    for network, part in zip(networks, parts):
      part.add(network(_filled(images)), index)
  mark = f'{type(data).__name__.removesuffix("Config")} {split} {digest.hexdigest()[:16]}'
  found = [dataclasses.replace(part.finish(), source=mark) for part in parts]
  if jax.process_index() == 0:
    for path, summary in zip(paths, found):
      summary.save(path)
  say(f'{n} real images ({split}) through {networks[0].name} and its untrained twin')
  return found


def _content(*sources: Any) -> dict[str, str]:
  """The content of data that its config does not decide: files change below one path."""
  found = [source.content for source in sources if hasattr(source, 'content')]
  return {'content': ' '.join(found)} if found else {}


def _accuracy(network: Any, source: Any, n: int) -> float | None:
  """Of the logits on real images, where they are over the labels of the data."""
  if not classifies(network, source):
    return None
  right, chosen = 0, subset(len(source), n)
  for first in range(0, n, BATCH):
    rows = source.read(chosen[first:first + BATCH])
    right += agreeing(network, rows['image'], rows['label'])
  return right / n


def classifies(network: Any, source: Any) -> bool:
  """Whether the network has logits over the labels of the data."""
  return len(source.classes) > 1 and tuple(getattr(network, 'classes', ())) == tuple(source.classes)


def agreeing(network: Any, images: np.ndarray, labels: np.ndarray) -> int:
  """How many images the network's logits put into their class."""
  parts = (slice(i, i + BATCH) for i in range(0, len(images), BATCH))
  return sum(int((network(_filled(images[rows]))['logits'][:len(labels[rows])].argmax(-1)
                  == labels[rows]).sum()) for rows in parts)


def _real(source: Any, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  chosen = subset(len(source), n)
  for first in range(0, n, BATCH):
    index = np.full(BATCH, -1)
    count = min(BATCH, n - first)
    index[:count] = np.arange(first, first + count)
    yield index, source.read(chosen[first:first + BATCH])['image']


def _filled(images: np.ndarray) -> np.ndarray:
  """A batch of `BATCH` rows, so that a network compiles once."""
  if len(images) == BATCH:
    return images
  return np.concatenate([images, np.repeat(images[-1:], BATCH - len(images), 0)])


def accumulate(judge: Judge, batches: Iterable[np.ndarray], n: int, source: str,
               labels: np.ndarray | None = None) -> Accumulation:
  """Accumulates images that come as host arrays of at most `BATCH` rows."""
  accumulation = Accumulation(judge, n, source)
  first = 0
  for images in track(batches, -(-n // BATCH), 'batch'):
    index = np.full(BATCH, -1)
    index[:len(images)] = np.arange(first, first + len(images))
    inside = np.minimum(np.maximum(index, 0), n - 1)
    accumulation.add(_filled(images), index, None if labels is None else labels[inside])
    first += len(images)
  return accumulation


def references(folder: str | os.PathLike) -> pathlib.Path:
  """Where a run or a sweep keeps summaries of real images."""
  return pathlib.Path(folder) / 'references'
