"""What statistics need of one set of images, generated or real: streamed, resumable, mergeable.

An `Accumulator` takes the outputs of an extractor in batches and keeps moments, sums and at most
`keep` rows, never all features. Rows are absorbed in blocks of `BLOCK` in the order in which they
arrive, so batch sizes, padding, and a kill with a resume do not change the last bit; parts of
several processes merge to 1e-10. `finish` counts: exactly the n images asked for, each once.

A finished `Summary` is also the form of reference files. `mu`, `sigma`, `mu_s`, `sigma_s` are the
keys of ADM, clean-fid and pytorch-fid, whose tools read them.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from smalti.evaluation.archive import Archive, write
from smalti.evaluation.entropy import CONSECUTIVE, Splits
from smalti.evaluation.features import Extractor, Images, identity
from smalti.evaluation.frechet import Moments
from smalti.evaluation.manifold import neighbours

FORMAT = 1
OUTPUTS = ('features', 'logits', 'spatial')  # what an extractor may give
BLOCK = 1024  # rows absorbed at once
ORDER = 2020  # seed of the order whose beginning is kept and whose parts are the shuffled splits


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
  """Of n images.

  Attributes:
    n: how many; 0 where the file of another project does not say.
    extractor: identity, 'name:sha256:resize'.
    source: fingerprint of the images, or the name and hash of the file they came from.
    moments: of 'features'.
    spatial: of 'spatial'; None without.
    features: float32 rows of a fixed subset of the images, in the order of the images; for kernel
      distance, precision and recall. No rows where a file holds none.
    shuffled, consecutive: sums for both schemes of the Inception score; None without 'logits'.
    verified: False where a file does not say which extractor and resize made it.
  """
  n: int
  extractor: str
  source: str
  moments: Moments
  spatial: Moments | None
  features: Float[np.ndarray, 'm c']
  shuffled: Splits | None
  consecutive: Splits | None
  verified: bool = True

  def neighbours(self, k: int) -> Float[np.ndarray, 'm k']:
    """Of the kept rows, see `manifold.neighbours`; kept, since a reference serves many times."""
    if k not in self._neighbours:
      self._neighbours[k] = neighbours(self.features, k)
    return self._neighbours[k]

  @functools.cached_property
  def _neighbours(self) -> dict[int, np.ndarray]:
    return {}

  def save(self, path: str | os.PathLike) -> None:
    """Writes an .npz under its final name only once it is complete."""
    name, sha256, resize = self.extractor.rsplit(':', 2)
    arrays: dict[str, Any] = {
        'format': FORMAT, 'kind': 'summary', 'n': self.n, 'extractor': name,
        'extractor_sha256': sha256, 'resize_mode': resize, 'dataset_fingerprint': self.source,
        'verified': self.verified, 'mu': self.moments.mean, 'sigma': self.moments.covariance,
        'feats': self.features}
    if self.spatial is not None:
      arrays |= {'mu_s': self.spatial.mean, 'sigma_s': self.spatial.covariance}
    write(path, arrays | _split_arrays(
        {'shuffled': self.shuffled, 'consecutive': self.consecutive}))

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Summary':
    """Reads `save`, the same numbers bit for bit. Raises ValueError in one line for anything else;
    `evaluation.reference.load` reads the files of other projects too."""
    with Archive(path, 'summary of images', 'make it again') as archive, archive.refusing():
      fields = _fields(archive, 'summary')
      n, features = int(fields['n']), fields['feats']
      extractor = ':'.join(
          str(fields[name]) for name in ('extractor', 'extractor_sha256', 'resize_mode'))
      moments = Moments.given(n, fields['mu'], fields['sigma'], extractor)
      _check(features, 'feats', np.float32, (None, moments.dim))
      return cls(
          n, extractor, str(fields['dataset_fingerprint']), moments,
          Moments.given(n, fields['mu_s'], fields['sigma_s'], extractor) if 'mu_s' in fields
          else None, features, _splits(fields, 'shuffled'), _splits(fields, 'consecutive'),
          bool(fields['verified']))


class Accumulator:
  """Collects a `Summary` of images 0..n-1 from the outputs of an extractor.

  Attributes:
    count: images counted so far.
  """

  def __init__(self, extractor: str, n: int, *, keep: int = 10_000, splits: int = 10,
               source: str = ''):
    """
    Args:
      extractor: its `identity`.
      n: images wanted in all, over all processes.
      keep: rows of features to keep, of min(n, keep) images that n alone decides.
      splits: of the shuffled Inception score.
      source: fingerprint of the images, or of what draws them.
    """
    if n < 1 or keep < 0 or splits < 1:
      raise ValueError(f'{n=} and {splits=} must be 1 or more, and {keep=} 0 or more.')
    if extractor.count(':') < 2:
      raise ValueError(f'{extractor=} must be name:sha256:resize; see features.identity.')
    self.definition = {'extractor': extractor, 'n': n, 'keep': keep, 'splits': splits,
                       'source': source}
    self.extractor, self.n, self.source = extractor, n, source
    self.splits = min(splits, n)
    order = np.random.RandomState(ORDER).permutation(n)
    self._place = np.empty(n, np.int64)
    self._place[order] = np.arange(n)
    self._subset = np.sort(order[:keep])
    self._bounds = np.array([i * n // self.splits for i in range(1, self.splits)], np.int64)
    self.count = 0
    self._seen = np.zeros(n, bool)
    self._waiting: list[dict[str, np.ndarray]] = []  # rows of less than a block
    self._moments: Moments | None = None
    self._spatial: Moments | None = None
    self._kept: np.ndarray | None = None
    self._sums: dict[str, Splits] = {}

  def add(self, outputs: Mapping[str, Any], index: Int[np.ndarray, '_b']) -> None:
    """Counts the rows of a batch.

    Args:
      outputs: of the extractor; the same names in every batch.
      index: of each row's image among all; a row with index < 0 or >= n is padding.

    Raises:
      ValueError: an image was counted before, a feature is not finite, or outputs changed.
    """
    index = np.asarray(index)
    valid = (index >= 0) & (index < self.n)
    rows = {name: np.asarray(values, np.float32) for name, values in outputs.items()}
    for name, values in rows.items():
      if values.ndim != 2 or len(values) != len(index):
        raise ValueError(f'{name} of shape {values.shape} must be [{len(index)}, dimensions].')
    rows = {name: values[valid] for name, values in rows.items()} | {'index': index[valid]}
    index = rows['index'] = rows['index'].astype(np.int64)
    twice = index[self._seen[index]]
    if not len(twice):
      values, times = np.unique(index, return_counts=True)
      twice = values[times > 1]
    if len(twice):
      raise ValueError(f'Image {twice[0]} was counted before; every image counts once.')
    for name, values in rows.items():
      if not np.isfinite(values).all():
        bad = index[~np.isfinite(values).all(1)][0]
        raise ValueError(f'The {name} of image {bad} are not finite; look at the image.')
    self._start({name: rows[name].shape[1] for name in outputs})
    self._seen[index] = True
    self.count += len(index)
    self._waiting.append(rows)
    while sum(len(rows['index']) for rows in self._waiting) >= BLOCK:
      self._absorb(BLOCK)

  def merge(self, other: 'Accumulator') -> None:
    """Adds the part of another process; in the order of processes the result repeats exactly."""
    if other.definition != self.definition:
      raise ValueError(f'Parts of {_differing(self.definition, other.definition)} do not merge; '
                       'give every process the same arguments.')
    if (twice := self._seen & other._seen).any():
      raise ValueError(f'Image {twice.argmax()} was counted by two parts; every image counts once.')
    self._absorb(BLOCK)
    if other._moments is not None:
      self._start(other._dims())
      self._moments = self._moments.merge(other._moments)
      if self._spatial is not None:
        self._spatial = self._spatial.merge(other._spatial)
      self._sums = {name: sums.merge(other._sums[name]) for name, sums in self._sums.items()}
      theirs = other._seen[self._subset]
      self._kept[theirs] = other._kept[theirs]
    self._waiting += other._waiting
    self._absorb(BLOCK)
    self._seen |= other._seen
    self.count += other.count

  def finish(self) -> Summary:
    """The summary. Raises ValueError unless exactly images 0..n-1 were counted."""
    if self.count != self.n:
      missing = np.flatnonzero(~self._seen)
      raise ValueError(f'{self.count} of n={self.n} images were counted; image {missing[0]} is '
                       f'the first of {len(missing)} that are missing.')
    self._absorb(BLOCK)
    return Summary(
        self.n, self.extractor, self.source, self._moments, self._spatial, self._kept,
        self._sums.get('shuffled'), self._sums.get('consecutive'))

  def save(self, path: str | os.PathLike, cursor: int) -> None:
    """Writes everything counted, under its final name only once it is complete.

    Args:
      cursor: where the caller goes on, such as the next batch; `resume` returns it.
    """
    arrays: dict[str, Any] = {
        'format': FORMAT, 'kind': 'accumulator', 'cursor': cursor, **self.definition,
        'seen': np.packbits(self._seen)}
    if self._moments is not None:
      arrays |= _moment_arrays('moments', self._moments) | {'kept': self._kept}
      arrays |= {f'dim_{name}': dim for name, dim in self._dims().items()}
      arrays |= {f'waiting_{name}': values for name, values in self._joined().items()}
    if self._spatial is not None:
      arrays |= _moment_arrays('spatial', self._spatial)
    write(path, arrays | _split_arrays(self._sums))

  @classmethod
  def resume(cls, path: str | os.PathLike, extractor: str, n: int, *, keep: int = 10_000,
             splits: int = 10, source: str = '') -> tuple['Accumulator', int]:
    """Reads `save`: (the accumulator, cursor). What a killed `save` left beside it is removed.

    Raises:
      ValueError: the file is damaged, or was begun with other arguments.
    """
    path = Path(path)
    for part in path.parent.glob(f'.{path.name}.*.part'):
      part.unlink(missing_ok=True)
    found = cls(extractor, n, keep=keep, splits=splits, source=source)
    with Archive(path, 'unfinished statistics', 'delete it to begin again') as archive:
      fields = _fields(archive, 'accumulator')
      with archive.refusing():
        begun = {name: fields[name].item() for name in found.definition}
      if begun != found.definition:
        raise ValueError(f'{path} was begun with {_differing(begun, found.definition)}; delete it, '
                         'or go on with the same.')
      with archive.refusing():
        found._restore(fields)
        return found, int(fields['cursor'])

  def _restore(self, fields: Mapping[str, np.ndarray]) -> None:
    _check(fields['seen'], 'seen', np.uint8, (-(-self.n // 8),))
    self._seen = np.unpackbits(fields['seen'], count=self.n).astype(bool)
    self.count = int(self._seen.sum())
    if 'kept' not in fields:
      return
    self._start({name: int(fields[f'dim_{name}']) for name in OUTPUTS if f'dim_{name}' in fields})
    _check(fields['kept'], 'kept', np.float32, self._kept.shape)
    self._kept = fields['kept']
    self._moments = self._moments.merge(_moments(fields, 'moments', self.extractor))
    if self._spatial is not None:
      self._spatial = self._spatial.merge(_moments(fields, 'spatial', self.extractor))
    self._sums = {name: sums.merge(_splits(fields, name)) for name, sums in self._sums.items()}
    if 'waiting_index' in fields:
      index = fields['waiting_index']
      _check(index, 'waiting_index', np.int64, (None,))
      for name, dim in self._dims().items():
        _check(fields[f'waiting_{name}'], name, np.float32, (len(index), dim))
      self._waiting = [{name: fields[f'waiting_{name}'] for name in (*self._dims(), 'index')}]

  def _start(self, dims: dict[str, int]) -> None:
    """Makes room at the first row; later rows must be alike."""
    if self._moments is None:
      if 'features' not in dims:
        raise ValueError(f'The extractor gave {sorted(dims)}, and no features.')
      self._moments = Moments.empty(dims['features'], self.extractor)
      self._kept = np.zeros((len(self._subset), dims['features']), np.float32)
      if 'spatial' in dims:
        self._spatial = Moments.empty(dims['spatial'], self.extractor)
      if 'logits' in dims:
        runs = -(-self.n // CONSECUTIVE)
        self._sums = {'shuffled': Splits.empty(self.splits, dims['logits']),
                      'consecutive': Splits.empty(runs, dims['logits'])}
    elif dims != self._dims():
      raise ValueError(f'Outputs of dimensions {dims} follow others of {self._dims()}; '
                       'use one extractor.')

  def _dims(self) -> dict[str, int]:
    dims = {'features': self._moments.dim}
    if self._sums:
      dims['logits'] = self._sums['shuffled'].probabilities.shape[1]
    return dims | ({} if self._spatial is None else {'spatial': self._spatial.dim})

  def _joined(self) -> dict[str, np.ndarray]:
    if len(self._waiting) < 2:
      return self._waiting[0] if self._waiting else {}
    return {name: np.concatenate([rows[name] for rows in self._waiting])
            for name in self._waiting[0]}

  def _absorb(self, count: int) -> None:
    """Moves the first `count` waiting rows, or all of fewer, into the sums."""
    if not self._waiting:
      return
    rows = self._joined()
    rest = {name: values[count:] for name, values in rows.items()}
    rows = {name: values[:count] for name, values in rows.items()}
    index = rows['index']
    self._waiting = [rest] if len(rest['index']) else []
    self._moments = self._moments.add(rows['features'])
    if self._spatial is not None:
      self._spatial = self._spatial.add(rows['spatial'])
    if self._sums:
      split = {'shuffled': np.searchsorted(self._bounds, self._place[index], 'right'),
               'consecutive': index // CONSECUTIVE}
      self._sums = {name: self._sums[name].add(rows['logits'], split[name]) for name in split}
    kept = self._place[index] < len(self._subset)
    self._kept[np.searchsorted(self._subset, index[kept])] = rows['features'][kept]


def summarize(extractor: Extractor, batches: Iterable[Images], n: int, *, keep: int = 10_000,
              splits: int = 10, source: str = '') -> Summary:
  """The summary of the first n images of `batches` of uint8 images, in their order.

  A batch shorter than the first is filled up, so that a compiled extractor keeps its shape.

  Args:
    source: where none is given, the first 16 digits of the SHA-256 of the images.

  Raises:
    ValueError: the batches hold fewer than n images.
  """
  total = Accumulator(identity(extractor), n, keep=keep, splits=splits, source=source)
  digest, start, size = hashlib.sha256(), 0, 0
  for batch in batches:
    size, count = size or len(batch), min(len(batch), n - start)
    digest.update(np.ascontiguousarray(batch[:count]))
    if len(batch) < size:
      batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), 0)])
    index = np.arange(start, start + len(batch))
    total.add(extractor(batch), np.where(index < start + count, index, -1))
    start += count
    if start == n:
      break
  summary = total.finish()
  return summary if source else dataclasses.replace(summary, source=digest.hexdigest()[:16])


def _fields(archive: Archive, kind: str) -> dict[str, np.ndarray]:
  with archive.refusing():
    fields = {name: archive.read(name) for name in archive.names}
    if str(fields['kind']) != kind:
      raise ValueError(f'it is of kind {str(fields["kind"])[:40]!r}, not {kind!r}')
    if int(fields['format']) != FORMAT:
      raise ValueError(f'format {int(fields["format"])}, this version reads {FORMAT}')
  return fields


def _check(array: Shaped[np.ndarray, '...'], name: str, dtype: type,
           shape: tuple[int | None, ...]) -> None:
  """Raises ValueError for another type or shape (None is any length), or a non-finite value."""
  if array.dtype != dtype or len(array.shape) != len(shape) or any(
      want is not None and want != found for want, found in zip(shape, array.shape)):
    raise ValueError(f'{name} is {array.dtype}{array.shape}, not {np.dtype(dtype)}{shape}')
  if not np.isfinite(array).all():
    raise ValueError(f'{name} is not finite')


def _moment_arrays(name: str, moments: Moments) -> dict[str, Any]:
  return {f'{name}_n': moments.n, f'{name}_mean': moments.mean, f'{name}_scatter': moments.scatter}


def _moments(fields: Mapping[str, np.ndarray], name: str, extractor: str) -> Moments:
  n, mean, scatter = (fields[f'{name}_{part}'] for part in ('n', 'mean', 'scatter'))
  _check(mean, 'mean', np.float64, (None,))
  _check(scatter, 'scatter', np.float64, (len(mean), len(mean)))
  return Moments(int(n), mean, scatter, extractor)


def _split_arrays(sums: Mapping[str, Splits | None]) -> dict[str, Any]:
  return {f'{name}_{field}': value for name, splits in sums.items() if splits is not None
          for field, value in vars(splits).items()}


def _splits(fields: Mapping[str, np.ndarray], name: str) -> Splits | None:
  if f'{name}_count' not in fields:
    return None
  count, probabilities, inner = (
      fields[f'{name}_{field.name}'] for field in dataclasses.fields(Splits))
  _check(probabilities, 'probabilities', np.float64, (len(count), None))
  _check(inner, 'inner', np.float64, (len(count),))
  _check(count, 'count', np.int64, (len(count),))
  return Splits(count, probabilities, inner)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
  return ', '.join(f'{name}={a[name]!r} (now {b[name]!r})' for name in a if a[name] != b[name])
