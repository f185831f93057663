"""Arrays in .npz files that anybody may have written: read whole within bounds, or as a stream.

`np.load` allocates what a header claims before it has read a byte, reads a member whole, and fails
with nine types of errors. Here a header must agree with the length of its member, no object arrays
are read, a checksum covers every byte, and what goes wrong is one line. The reference files of
ADM hold gigabytes of images in `arr_0`; `rows` reads them from inside the zip, block by block.
"""

import contextlib
import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Shaped

from smalti.evaluation.files import whole

LARGEST = 1 << 31  # bytes of an array that is read whole: 50,000 features of 2,048 are 400 million
CHUNK = 1 << 20
BROKEN = (KeyError, ValueError, TypeError, EOFError, OSError, RuntimeError, OverflowError,
          SyntaxError, zipfile.BadZipFile, zlib.error, struct.error)


class Header(NamedTuple):
  """Of one member: what its array is like."""
  shape: tuple[int, ...]
  fortran: bool
  dtype: np.dtype

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Archive:
  """An open .npz; a context manager.

  Attributes:
    path: of the file.
    names: of its arrays.

  Every method raises ValueError, in one line with `path` and `remedy`, for a file that is damaged
  or holds something else.
  """

  def __init__(self, path: str | os.PathLike, what: str, remedy: str):
    self.path, self._what, self._remedy = Path(path), what, remedy
    if not self.path.is_file():
      raise FileNotFoundError(f'{path} is no file; {remedy}.')
    with self.refusing():
      self._zip = zipfile.ZipFile(self.path)
      self.names = tuple(name.removesuffix('.npy') for name in self._zip.namelist())

  def header(self, name: str) -> Header:
    with self._open(name) as (_, header):
      return header

  def read(self, name: str, largest: int = LARGEST) -> Shaped[np.ndarray, '...']:
    """One array, whole, of `largest` bytes or fewer."""
    with self._open(name) as (file, header):
      if header.bytes > largest:
        raise ValueError(f'{name} has {header.bytes} bytes, more than {largest}')
      shape = header.shape[::-1] if header.fortran else header.shape
      array = np.empty(shape, header.dtype)
      _fill(file, array)
      return array.T if header.fortran else array

  def rows(self, name: str, block: int) -> Iterator[Shaped[np.ndarray, '_b ...']]:
    """An array in blocks of rows, the last one shorter: memory of one block."""
    with self._zip_open(name) as file:
      with self.refusing():
        header = self._header(name, file)
        if header.fortran or not header.shape:
          raise ValueError(f'{name} of shape {header.shape} is not stored by rows')
      for start in range(0, header.shape[0], block):
        with self.refusing():
          array = np.empty((min(block, header.shape[0] - start), *header.shape[1:]), header.dtype)
          _fill(file, array)
        yield array

  @contextlib.contextmanager
  def refusing(self) -> Iterator[None]:
    """Turns errors of the block, which is about the content of this file, into the one line."""
    try:
      yield
    except BROKEN as error:
      said = ' '.join(str(error).split())[:160] or type(error).__name__
      if said.startswith(str(self.path)):  # said already
        raise
      if isinstance(error, KeyError):
        said = f'it has no {said}'
      raise ValueError(f'{self.path} holds no {self._what} ({said}); {self._remedy}.') from error

  def __enter__(self) -> 'Archive':
    return self

  def __exit__(self, *exception: object) -> None:
    self._zip.close()

  @contextlib.contextmanager
  def _open(self, name: str) -> Iterator[tuple[BinaryIO, Header]]:
    with self.refusing(), self._zip_open(name) as file:
      yield file, self._header(name, file)

  def _zip_open(self, name: str):
    with self.refusing():
      if name not in self.names:
        raise ValueError(f'it has no {name}, only {", ".join(self.names)[:80]}')
      return self._zip.open(f'{name}.npy')

  def _header(self, name: str, file: BinaryIO) -> Header:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # a damaged header looks like one of Python 2
      version = np.lib.format.read_magic(file)
      if version not in ((1, 0), (2, 0)):
        raise ValueError(f'{name} is of .npy version {version}, not 1.0 or 2.0')
      reader = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                else np.lib.format.read_array_header_2_0)
      header = Header(*reader(file))
    if header.dtype.hasobject or header.dtype.itemsize == 0:
      raise ValueError(f'{name} holds {header.dtype}, which is no plain data')
    length = self._zip.getinfo(f'{name}.npy').file_size - file.tell()
    if min(header.shape, default=0) < 0 or header.bytes != length:
      raise ValueError(f'{name} says {header.dtype}{header.shape} of {length} bytes')
    return header


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray | str | int | float | bool]
          ) -> None:
  """An .npz of `arrays` under its final name only once it is complete."""
  with whole(path) as file:
    members: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(file, **members)


def _fill(file: BinaryIO, array: np.ndarray) -> None:
  view = memoryview(array.reshape(-1).view(np.uint8)) if array.size else memoryview(b'')
  start = 0
  while start < len(view):
    data = file.read(min(CHUNK, len(view) - start))
    if not data:
      raise EOFError(f'it ends {len(view) - start} bytes early')
    view[start:start + len(data)] = data
    start += len(data)
