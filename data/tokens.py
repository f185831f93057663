"""Stored tokens: a data set after a tokenizer, as plain .npy files that can be checked.

A folder holds `index.json` and one `SHARD.KEY.npy` per shard and batch entry (`tokens`, `label`,
`keep`, `index`, ...), read by memory map and never unpickled. Tokens take the smallest unsigned
integer that holds the vocabulary. The index is written last and by replacement, so a folder
without one was never finished; it has the tokenizer's spec and fingerprint and the SHA-256 of
every file, all of which are checked when the folder is opened.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

import smalti
from smalti.data import cache
from smalti.data.source import DataConfig, Split
from smalti.tokenizers.spec import TokenSpec

FORMAT = 1
INDEX, PARTIAL = 'index.json', 'partial.json'
_KEY = re.compile(r'[a-z][a-z_]{0,39}')


@dataclasses.dataclass(kw_only=True, slots=True)
class TokensConfig(DataConfig):
  """The tokens that `smalti tokenize --out=PATH` wrote: PATH/train and PATH/eval."""
  path: str | None = None

  def open(self, split: Split) -> 'TokensSource':
    if self.path is None:
      raise ValueError('data.path is not set; name a token folder with --config.data.path=DIR.')
    folder = pathlib.Path(self.path).expanduser()
    if not (folder / split).is_dir() and (folder / INDEX).exists():
      if split == 'train':
        return TokensSource(folder)
      raise FileNotFoundError(
          f'{folder} holds one part and no {split} folder; `smalti tokenize` writes train and eval '
          'side by side: name the folder above them.')
    return TokensSource(folder / split)


class TokensSource:
  """A token folder opened for reading, every file of it verified.

  Attributes:
    spec, fingerprint, tokenizer: of the tokenizer that made the tokens, and where it was.
    classes: names of the labels.

  Raises:
    FileNotFoundError: no finished token folder is there.
    ValueError: an unknown format, a missing or damaged file, or tokens outside the vocabulary.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    item = _read_index(self.folder)
    try:
      self.spec = TokenSpec.from_json(item['spec'])
      self.fingerprint, self.tokenizer = item['fingerprint'], item['tokenizer']
      self.classes, self._length = tuple(item['classes']), int(item['count'])
      keys, shards = item['keys'], item['shards']
      rows = [int(shard['rows']) for shard in shards]
      self._arrays = {key: [self._open(i, key, keys[key], shard['rows'], shard['sha256'][key])
                            for i, shard in enumerate(shards)] for key in keys}
    except (KeyError, TypeError) as error:
      raise ValueError(f'{self.folder / INDEX} is not an index of tokens ({error!r}); '
                       'tokenize again.') from error
    if not rows or sum(rows) != self._length or 'tokens' not in keys:
      raise ValueError(f'{self.folder / INDEX} contradicts itself: {sum(rows)} rows in shards, '
                       f'{self._length} in all, keys {", ".join(keys)}; tokenize again.')
    self._ends = np.cumsum(rows)
    for i, tokens in enumerate(self._arrays['tokens']):
      _check_tokens(self.spec, tokens, self.folder / _file(i, 'tokens'))

  def __len__(self) -> int:
    return self._length

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The stored entries at `indices`; tokens as int32[B, N, D]."""
    indices = np.asarray(indices)
    shard = np.searchsorted(self._ends, indices, side='right')
    batch = {}
    for key, arrays in self._arrays.items():
      out = np.empty((len(indices), *arrays[0].shape[1:]), arrays[0].dtype)
      for i in np.unique(shard):
        chosen = shard == i
        start = self._ends[i] - len(arrays[i])
        out[chosen] = arrays[i][indices[chosen] - start]
      batch[key] = out.astype(np.int32) if key == 'tokens' else out
    return batch

  def _open(self, number: int, key: str, kind: dict, rows: int, sha256: str) -> np.ndarray:
    if not _KEY.fullmatch(key):  # it becomes part of a file's name
      raise ValueError(f'{self.folder / INDEX} names an entry {key!r}; names are lower-case words.')
    path = self.folder / _file(number, key)
    if not path.is_file():
      raise ValueError(f'{path} is missing; restore it from a copy or tokenize again.')
    with open(path, 'rb') as file:
      found = hashlib.file_digest(file, 'sha256').hexdigest()
    if found != sha256:
      raise ValueError(
          f'{path} is damaged ({os.path.getsize(path):,} bytes with SHA-256 {found[:16]}, and not '
          f'{sha256[:16]} as in the index); restore it from a copy or tokenize again.')
    array = np.load(path, mmap_mode='r', allow_pickle=False)
    if array.shape != (rows, *kind['shape']) or array.dtype.str != kind['dtype']:
      raise ValueError(f'{path} holds {array.dtype.str}{array.shape}, the index says '
                       f'{kind["dtype"]}{(rows, *kind["shape"])}; tokenize again.')
    return array


class TokenWriter:
  """Writes a token folder shard by shard; the same rows always make the same bytes.

  Args:
    folder: made if need be; refused if it holds finished tokens.
    spec: JSON of the TokenSpec.
    fingerprint: of the tokenizer.
    tokenizer: where the tokenizer is, for verbs that need it again.
    classes: names of the labels.
    data: JSON-able description of the data set, compared when a write is continued.
    shard_size: rows per shard.
    resume: keeps the whole shards of an unfinished write with the same arguments; `count` says
      from which row on the caller must add. A folder that is already finished has all of them.

  Attributes:
    count: rows that are safely on disk.
    complete: whether the index was written.
  """

  def __init__(self, folder: str | os.PathLike, spec: str, fingerprint: str, *,
               tokenizer: str | None = None, classes: tuple[str, ...] = (),
               data: Any = None, shard_size: int = 65536, resume: bool = False):
    if shard_size < 1:
      raise ValueError(f'{shard_size=} must be 1 or more rows.')
    self.folder, self.spec = pathlib.Path(folder), TokenSpec.from_json(spec)
    self.shard_size, self.complete = shard_size, False
    self._item: dict[str, Any] = {
        'format': FORMAT, 'version': smalti.__version__, 'spec': json.loads(self.spec.to_json()),
        'fingerprint': fingerprint, 'tokenizer': tokenizer, 'classes': list(classes),
        'data': data, 'shard_size': shard_size, 'count': 0, 'keys': {}, 'shards': []}
    self._waiting: list[dict[str, np.ndarray]] = []
    self.folder.mkdir(parents=True, exist_ok=True)
    finished = (self.folder / INDEX).exists()
    if finished and not (resume and self._same(_read_json(self.folder / INDEX))):
      raise ValueError(f'{self.folder} holds finished tokens already; remove the folder or name '
                       'another one with --out.')
    if finished:
      self._item, self.complete = _read_json(self.folder / INDEX), True
    elif resume and (self.folder / PARTIAL).exists():
      found = _read_json(self.folder / PARTIAL)
      self._item = found if self._same(found) else self._item

  @property
  def count(self) -> int:
    return self._item['count']

  def add(self, batch: dict[str, np.ndarray]) -> None:
    """Appends rows; every batch has the same entries, among them `tokens: int[B, N, D]`.

    Raises:
      ValueError: tokens outside the spec, rows of unequal number, or other entries than before.
    """
    if self.complete:
      raise ValueError(f'{self.folder} is finished; nothing can be added to it.')
    batch = {key: np.asarray(value) for key, value in batch.items()}
    kinds: dict[str, dict[str, Any]] = {
        key: {'shape': list(value.shape[1:]), 'dtype': self._dtype(key, value)}
        for key, value in sorted(batch.items())}
    if len({len(value) for value in batch.values()}) != 1 or 'tokens' not in batch:
      shapes = {key: value.shape for key, value in batch.items()}
      raise ValueError(f'A batch needs tokens and as many rows of everything else, got {shapes}.')
    _check_tokens(self.spec, batch['tokens'], 'The batch')
    if self._item['keys'] and kinds != self._item['keys']:
      raise ValueError(f'Every batch needs the entries of the first, {self._item["keys"]}; '
                       f'this one has {kinds}.')
    self._item['keys'] = kinds
    self._waiting.append({k: v.astype(kinds[k]['dtype']) for k, v in batch.items()})
    while sum(len(rows['tokens']) for rows in self._waiting) >= self.shard_size:
      self._flush(self.shard_size)

  def close(self) -> None:
    """Writes the last shard and the index; from here on the folder is a data set.

    Raises:
      ValueError: nothing was ever added.
    """
    if self.complete:
      return
    if self._waiting:
      self._flush(self.shard_size)
    if not self._item['shards']:
      raise ValueError(f'No rows were added to {self.folder}; there is nothing to finish.')
    self._write(INDEX)
    (self.folder / PARTIAL).unlink(missing_ok=True)
    self.complete = True

  def _flush(self, size: int) -> None:
    whole = {key: np.concatenate([rows[key] for rows in self._waiting])
             for key in self._item['keys']}
    number, digests = len(self._item['shards']), {}
    for key, array in whole.items():
      path = self.folder / _file(number, key)
      with cache.replacing(path) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array[:size]), allow_pickle=False)
      digests[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = len(whole['tokens'][:size])
    self._item['shards'].append({'rows': rows, 'sha256': digests})
    self._item['count'] += rows
    rest = {key: array[size:] for key, array in whole.items()}
    self._waiting = [rest] if len(rest['tokens']) else []
    self._write(PARTIAL)

  def _write(self, name: str) -> None:
    with cache.replacing(self.folder / name) as file:
      file.write((json.dumps(self._item, indent=1, sort_keys=True) + '\n').encode('ascii'))

  def _same(self, found: dict) -> bool:
    fixed = ('format', 'spec', 'fingerprint', 'classes', 'data', 'shard_size')
    return all(found.get(name) == self._item[name] for name in fixed)

  def _dtype(self, key: str, value: np.ndarray) -> str:
    if not _KEY.fullmatch(key) or value.dtype.kind not in 'biuf':
      raise ValueError(f'Entry {key!r} of {value.dtype} cannot be stored; names are lower-case '
                       'words and values booleans, integers or floats.')
    dtype = np.min_scalar_type(max(self.spec.vocab) - 1) if key == 'tokens' else value.dtype
    return dtype.newbyteorder('<').str


def _file(number: int, key: str) -> str:
  return f'{number:05}.{key}.npy'


def _read_json(path: pathlib.Path) -> dict:
  try:
    item = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); restore it or tokenize again.') from error
  if not isinstance(item, dict):
    raise ValueError(f'{path} is damaged (no JSON object); restore it or tokenize again.')
  return item


def _read_index(folder: pathlib.Path) -> dict:
  path = folder / INDEX
  if not path.exists():
    state = 'was not finished: run the same command again' if (folder / PARTIAL).exists() else (
        'holds no tokens: write them with `smalti tokenize --workdir=TOKENIZER --out=DIR`')
    raise FileNotFoundError(f'{folder} {state}.')
  item = _read_json(path)
  if item.get('format') != FORMAT:
    raise ValueError(
        f'{path} has format {item.get("format")}, written by smalti {item.get("version", "?")}; '
        f'smalti {smalti.__version__} reads format {FORMAT}: use the version that wrote it.')
  return item


def _check_tokens(spec: TokenSpec, tokens: np.ndarray, name: Any) -> None:
  if tokens.shape[1:] != (spec.length, spec.depth) or tokens.dtype.kind not in 'iu':
    raise ValueError(f'{name} holds tokens {tokens.dtype}{tokens.shape}; the spec needs integers '
                     f'[B, {spec.length}, {spec.depth}].')
  if len(tokens) and (int(tokens.min()) < 0 or (tokens.max((0, 1)) >= np.array(spec.vocab)).any()):
    raise ValueError(f'{name} holds tokens outside vocab={spec.vocab} '
                     f'({int(tokens.min())} to {int(tokens.max())}); tokenize again.')
