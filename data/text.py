"""Characters of a text file as tokens, read by ranges: a file of any size takes no memory.

An alphabet of single bytes, or all 256. The file is one stream; training sees windows of it that
begin `stride` characters apart, the held-out part is cut into windows that do not overlap. text8,
the first 10^8 characters of a cleaned Wikipedia dump, is split 90 : 5 : 5 in the literature (MD4,
arXiv 2406.04329), its alphabet the letters and then the space.
"""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np

from smalti.data.source import DataConfig, Split
from smalti.tokenizers.spec import TokenSpec

TEXT8 = 'abcdefghijklmnopqrstuvwxyz '
CHUNK = 1 << 24  # bytes looked at together


@dataclasses.dataclass(kw_only=True, slots=True)
class TextConfig(DataConfig):
  """Windows of one text file: `tokens: int32[length, 1]`, places in `alphabet`.

  Attributes:
    path: the file.
    length: characters of an example.
    alphabet: the characters in the order of their ids, all of them ASCII; None takes bytes.
    stride: characters from the start of a training window to the next; None is `length`. Each
      start costs 8 bytes of memory, for the order of an epoch.
    train, eval: where each part begins and ends, as shares of the file.
  """
  path: str | None = None
  length: int = 256
  alphabet: str | None = None
  stride: int | None = None
  train: tuple[float, float] = (0.0, 0.95)
  eval: tuple[float, float] = (0.95, 1.0)

  def open(self, split: Split) -> 'TextSource':
    if self.path is None:
      raise ValueError('data.path is not set; name a text file with --config.data.path=FILE.')
    parts = {'train': self.train, 'eval': self.eval}
    for name, (start, stop) in parts.items():
      if not 0 <= start < stop <= 1:
        raise ValueError(f'data.{name}={(start, stop)} must be an increasing pair within 0..1.')
    if max(self.train[0], self.eval[0]) < min(self.train[1], self.eval[1]):
      raise ValueError(f'data.train={self.train} and data.eval={self.eval} overlap: what is held '
                       'out must not be trained on.')
    stride = (self.stride or self.length) if split == 'train' else self.length
    return TextSource(self.path, length=self.length, alphabet=self.alphabet, stride=stride,
                      part=parts[split])


class TextSource:
  """A part of a text file, every character of it checked once.

  Attributes:
    spec: one row of `length` characters.
    fingerprint: of the alphabet and the spec, as a tokenizer has one.

  Raises:
    FileNotFoundError: no file is there.
    ValueError: a character outside the alphabet, or a part too short for one window.
  """

  def __init__(self, path: str | os.PathLike, *, length: int, alphabet: str | None = None,
               stride: int | None = None, part: tuple[float, float] = (0.0, 1.0)):
    self.path, self.stride = pathlib.Path(path).expanduser(), stride or length
    self.classes: tuple[str, ...] = ()
    if length < 1 or self.stride < 1:
      raise ValueError(f'{length=} and {stride=} must be 1 character or more.')
    if alphabet is not None and (
        not alphabet.isascii() or len(alphabet) < 2 or len(set(alphabet)) < len(alphabet)):
      raise ValueError(f'{alphabet=} must be two or more different ASCII characters; leave it at '
                       'none to read bytes, of any encoding.')
    if not self.path.is_file():
      raise FileNotFoundError(f'{self.path} is not a file; name a text file with '
                              '--config.data.path=FILE.')
    self.alphabet = alphabet
    size = self.path.stat().st_size
    self.start, stop = (round(share * size) for share in part)
    self._length = max(0, (stop - self.start - length) // self.stride + 1)
    if not self._length:
      raise ValueError(f'{self.path} has {stop - self.start:,} of {size:,} characters in this part '
                       f'and one window has {length}; take a longer file or a larger share.')
    self.spec = TokenSpec(grid=(length,), vocab=(256 if alphabet is None else len(alphabet),))
    self.fingerprint = hashlib.sha256(
        f'{alphabet!r} {self.spec.to_json()}'.encode()).hexdigest()[:16]
    self._bytes = np.memmap(self.path, np.uint8, 'r')
    self._ids = np.arange(256)
    if alphabet is not None:
      self._ids = np.full(256, -1)
      self._ids[list(alphabet.encode())] = np.arange(len(alphabet))
      self._check(stop)

  def __len__(self) -> int:
    return self._length

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The windows at `indices`: tokens as int32[B, length, 1]."""
    first = self.start + np.asarray(indices, np.int64) * self.stride
    rows = self._bytes[first[:, None] + np.arange(self.spec.length)]
    return {'tokens': self._ids[rows].astype(np.int32)[..., None]}

  def decode(self, tokens: np.ndarray) -> list[str]:
    """The text of token arrays [B, N, 1]; bytes that are no UTF-8 become the replacement mark."""
    rows = np.asarray(tokens).reshape(len(tokens), -1)
    if self.alphabet is None:
      return [bytes(row.astype(np.uint8)).decode('utf-8', 'replace') for row in rows]
    return [''.join(self.alphabet[i] for i in row) for row in rows]

  def _check(self, stop: int) -> None:
    """Refuses the first character outside the alphabet, with its place."""
    known = self._ids >= 0
    for first in range(self.start, stop, CHUNK):
      chunk = self._bytes[first:min(first + CHUNK, stop)]
      strange = ~known[chunk]
      if strange.any():
        place = int(np.argmax(strange))
        raise ValueError(
            f'{self.path} has {bytes(chunk[place:place + 1])!r} at byte {first + place:,}, which '
            f'is not in the alphabet {self.alphabet!r}; clean the file, or set alphabet to none.')
