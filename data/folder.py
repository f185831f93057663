"""Image files in a folder: surveyed once, split by content, read at one size.

Every file is inspected before the first step (see `inspection`), so that a run reads a fixed list
of images that decode, and what was refused is known by reason. Findings are kept in the user's
cache folder by path, size and time of change; only new files are inspected again.

The class of an image is its first folder level; images beside class folders have none and are
refused, a folder of images alone has no labels. An image is held out if the first 32 bits of the
SHA-256 of its bytes, as a fraction, are below `eval_fraction`: exact duplicates share a side, and
adding files moves none.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Literal

import numpy as np
import PIL
from tqdm import tqdm

from smalti.data import cache, images, inspection
from smalti.data.augment import AugmentConfig
from smalti.data.inspection import Finding
from smalti.data.source import DataConfig, Split

RULES = [1, PIL.__version__, images.PIXELS, images.BYTES]  # findings under others are not reused
TRANSIENT = ('timed out', 'crashed the decoder', 'out of memory', 'unreadable')


@dataclasses.dataclass(kw_only=True, slots=True)
class FolderConfig(DataConfig):
  """The images below `path`: `image: uint8[size, size, channels]`, and `label` by first folder.

  Attributes:
    path: the folder.
    size: shorter side and centre crop, in pixels.
    channels: 1 (grey) or 3 (RGB).
    eval_fraction: share of images held out, by content hash.
    threads: batches decoded at once.
    augment: what training images go through.
  """
  path: str | None = None
  size: int = 256
  channels: Literal[1, 3] = 3
  eval_fraction: float = 0.05
  threads: int = 4
  augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

  def open(self, split: Split) -> 'FolderSource':
    if self.path is None:
      raise ValueError('data.path is not set; name a folder with --config.data.path=DIR.')
    found = survey(self.path, self.size)
    chosen = found.split(split, self.eval_fraction)
    if not chosen:
      raise ValueError(
          f'{self.path} has {len(found.examples)} images and none for {split}; '
          f'`smalti data --path={self.path}` says what was refused.')
    return FolderSource(found, chosen, self.channels, self.threads)


@dataclasses.dataclass(frozen=True)
class Example:
  """A file of the folder: path below it with forward slashes, class ('' for none), finding."""
  path: str
  label: str
  finding: Finding


@dataclasses.dataclass(frozen=True)
class Survey:
  """What is in a folder of images.

  Attributes:
    root: the folder.
    size: the size it was surveyed for.
    examples: images that are used, by path.
    refused: files that are not, by path.
    hidden: number of files and folders passed over because their name begins with a dot, or
      because they are links to folders.
  """
  root: pathlib.Path
  size: int
  examples: tuple[Example, ...]
  refused: tuple[Example, ...]
  hidden: int

  @property
  def classes(self) -> tuple[str, ...]:
    """Names of the labels in order; () for a folder without class folders."""
    return tuple(sorted({e.label for e in self.examples} - {''}))

  @property
  def duplicates(self) -> list[tuple[Example, ...]]:
    """Groups of files with the same bytes."""
    groups = collections.defaultdict(list)
    for example in self.examples:
      groups[example.finding.sha256].append(example)
    return [tuple(group) for group in groups.values() if len(group) > 1]

  def split(self, split: Split, eval_fraction: float) -> list[Example]:
    """The examples of one side, by path; neither is empty if there are two different images.

    Raises:
      ValueError: a fraction outside (0, 1).
    """
    if not 0 < eval_fraction < 1:
      raise ValueError(f'{eval_fraction=} must lie between 0 and 1, such as 0.05.')
    hashes = sorted({e.finding.sha256 for e in self.examples})
    count = sum(int(h[:8], 16) < eval_fraction * 2**32 for h in hashes)
    if len(hashes) > 1:
      count = min(max(count, 1), len(hashes) - 1)
    held_out = set(hashes[:count])
    return [e for e in self.examples if (e.finding.sha256 in held_out) == (split == 'eval')]


class FolderSource:
  """Decodes the chosen images of a survey when they are read."""

  def __init__(self, found: Survey, chosen: list[Example], channels: int, threads: int):
    self.root, self.size, self.channels, self.threads = found.root, found.size, channels, threads
    self.classes = found.classes
    self.paths = [e.path for e in chosen]
    self.content = hashlib.sha256(
        ''.join(f'{e.finding.sha256} {e.label}\n' for e in chosen).encode()).hexdigest()[:16]
    self.labels = np.array([self.classes.index(e.label) for e in chosen], np.int32) if (
        self.classes) else None

  def __len__(self) -> int:
    return len(self.paths)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    batch = {'image': np.stack([self._image(self.paths[i]) for i in indices])}
    if self.labels is not None:
      batch['label'] = self.labels[indices]
    return batch

  def _image(self, path: str) -> np.ndarray:
    try:
      data = images.read_bytes(self.root / path)
      return images.fit(images.decode(data, self.channels), self.size)
    except images.Refused as refusal:
      raise ValueError(
          f'{self.root / path} was a good image when the run began and is not now ({refusal}); '
          'the same command again surveys the folder anew.') from refusal


def survey(path: str | os.PathLike, size: int) -> Survey:
  """Inspects every file below `path`; never fails because of one of them.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: a size below 1.
  """
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    raise FileNotFoundError(f'{path} is not a folder; name one that holds image files.')
  if size < 1:
    raise ValueError(f'{size=} must be 1 or more pixels.')
  paths, closed, hidden = _scan(root)
  examples: list[Example] = []
  refused: list[Example] = []
  for path, finding in zip(paths, _findings(root, paths)):
    label = path.split('/')[0] if '/' in path else ''
    if finding.reason is None:
      try:
        images.check_elongation(finding.height, finding.width, size)
      except images.Refused as refusal:
        finding = dataclasses.replace(finding, reason=refusal.reason, detail=str(refusal))
    (examples if finding.reason is None else refused).append(Example(path, label, finding))
  if any(e.label for e in examples):
    outside = Finding(reason='outside class folders')
    refused += [Example(e.path, '', outside) for e in examples if not e.label]
    examples = [e for e in examples if e.label]
  refused += [Example(path, '', Finding(reason='unreadable')) for path in closed]
  return Survey(root, size, tuple(examples), tuple(sorted(refused, key=lambda e: e.path)), hidden)


def _scan(root: pathlib.Path) -> tuple[list[str], list[str], int]:
  """Paths of all files in order, folders that cannot be listed, and how much was passed over."""
  paths, closed, hidden = [], [], 0

  def note(error: OSError) -> None:
    closed.append(pathlib.Path(error.filename).relative_to(root).as_posix())

  for folder, folders, files in os.walk(root, onerror=note):
    seen = [f for f in folders if not f.startswith('.')
            and not os.path.islink(os.path.join(folder, f))]
    kept = [f for f in files if not f.startswith('.')]
    hidden += len(folders) - len(seen) + len(files) - len(kept)
    folders[:] = seen  # os.walk goes on into these
    below = pathlib.Path(folder).relative_to(root)
    paths += [(below / f).as_posix() for f in kept]
  return sorted(paths), closed, hidden


def _findings(root: pathlib.Path, paths: list[str]) -> list[Finding]:
  """Findings of `paths`, from the cache where size and time of change are those of last time."""
  name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
  store = cache.folder() / 'folders' / f'{name}.json'
  known = _load(store)
  marks = {path: _mark(root / path) for path in paths}
  todo = [p for p in paths if marks[p] is None or known.get(p, [None])[0] != marks[p]]
  inspected = inspection.inspect_all([str(root / p) for p in todo])
  bar = tqdm(inspected, total=len(todo), unit='file', desc='inspect', disable=None, leave=False)
  fresh = dict(zip(todo, bar))
  found = {p: fresh[p] if p in fresh else Finding(**known[p][1]) for p in paths}
  if fresh or known.keys() - marks.keys():
    lasting = {p: [marks[p], dataclasses.asdict(f)] for p, f in found.items()
               if marks[p] and f.reason not in TRANSIENT}
    with cache.replacing(store) as file:
      file.write(json.dumps({'rules': RULES, 'files': lasting}).encode('ascii'))
  return [found[p] for p in paths]


def _load(store: pathlib.Path) -> dict[str, list]:
  """Cached findings; none where there are none, or of other rules, or damaged."""
  try:
    item = json.loads(store.read_bytes())
  except (FileNotFoundError, ValueError):
    return {}
  return item['files'] if isinstance(item, dict) and item.get('rules') == RULES else {}


def _mark(path: pathlib.Path) -> list[int] | None:
  try:
    status = path.stat()
  except OSError:
    return None
  return [status.st_size, status.st_mtime_ns]
