"""Images in files, ours or not: an .npz as ADM writes it (`arr_0`, labels `arr_1`), or a folder of
PNGs or of a sampling job.

All are read as a stream, so that 50,000 images of 256 pixels need the memory of one batch.
"""

import dataclasses
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from PIL import Image

from smalti.data import images as decoding
from smalti.evaluation.archive import Archive
from smalti.evaluation.files import whole
from smalti.launch import shards
from smalti.launch.history import natural

REMEDY = 'give an .npz with uint8 images in arr_0, or a folder of PNGs of one size'
Kind = Literal['none', 'npz', 'png']
UNFINISHED = 'samples.npy'
LOSSY = ('.jpg', '.jpeg', '.webp')


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Images of one size in a file or folder.

  Attributes:
    path: of the file or folder.
    n: how many.
    shape: (height, width, channels).
    labels: int32[n] of an .npz with `arr_1`; None without.
    source: name and SHA-256 of the content, for manifests.
    files: the PNGs of a folder in natural order, or the parts of a job; () for an .npz.
  """
  path: pathlib.Path
  n: int
  shape: tuple[int, int, int]
  labels: np.ndarray | None
  source: str
  files: tuple[pathlib.Path, ...] = ()

  def batches(self, size: int) -> Iterator[np.ndarray]:
    """uint8[size, H, W, C] in order, the last one shorter.

    Raises:
      ValueError: a damaged file, or a picture of another size.
    """
    if not self.files:
      with _archive(self.path) as archive:
        yield from archive.rows('arr_0', size)
      return
    if self.files[0].suffix == '.npz':
      yield from _regrouped(self.files, size)
      return
    for first in range(0, self.n, size):
      rows = [_picture(path) for path in self.files[first:first + size]]
      for path, row in zip(self.files[first:], rows):
        if row.shape != self.shape:
          raise ValueError(f'{path} is {row.shape}, and the first picture {self.shape}; {REMEDY}.')
      yield np.stack(rows)


def open_gallery(path: pathlib.Path) -> Gallery:
  """Opens an .npz or a folder of PNGs.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: other content, or pictures of a lossy format, which changes every distance.
  """
  if path.is_dir():
    return _job(path) if (path / shards.JOB).exists() else _folder(path)
  with _archive(path) as archive:
    with archive.refusing():
      header = archive.header('arr_0')
      if header.dtype != np.uint8 or len(header.shape) != 4 or header.shape[3] not in (1, 3):
        raise ValueError(f'arr_0 is {header.dtype}{list(header.shape)}, not uint8[n, h, w, 1 or 3]')
      n, height, width, channels = header.shape
      if not n:
        raise ValueError('arr_0 has no images')
      labels = archive.read('arr_1') if 'arr_1' in archive.names else None
      if labels is not None and (labels.shape != (n,) or labels.dtype.kind not in 'iu'):
        raise ValueError(f'arr_1 is {labels.dtype}{list(labels.shape)}, not one label per image')
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  return Gallery(path, n, (height, width, channels),
                 None if labels is None else labels.astype(np.int32), f'{path.name} {digest[:16]}')


def keep(folder: pathlib.Path, kind: Kind, n: int, index: np.ndarray, images: Any) -> None:
  """Writes images by their place among n, some of them twice if need be; then `close`.

  Args:
    kind: 'png' writes samples/000000.png and so on, 'npz' one file, 'none' nothing.
    index: int64[B]; rows with -1 are left out.
    images: uint8[B, H, W, C].
  """
  if kind == 'none':
    return
  rows = index >= 0
  host = np.asarray(images)[rows]
  if kind == 'png':
    (folder / 'samples').mkdir(exist_ok=True)
    for i, image in zip(index[rows], host):
      Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
          folder / 'samples' / f'{i:06d}.png')
    return
  # The header is the same whoever writes it, and nothing is cut: processes share the file, and one
  # that was killed at any byte leaves what the next can go on with.
  header = {'descr': '|u1', 'fortran_order': False, 'shape': (n, *host.shape[1:])}
  descriptor = os.open(folder / UNFINISHED, os.O_RDWR | os.O_CREAT, 0o666)
  with open(descriptor, 'r+b') as file:
    np.lib.format.write_array_header_1_0(file, header)
    start = file.tell()
    for i, image in zip(index[rows], host):
      file.seek(start + int(i) * image.nbytes)
      file.write(image.tobytes())
    file.flush()
    os.fsync(descriptor)


def close(folder: pathlib.Path) -> None:
  """What `keep` wrote as 'npz' becomes samples.npz with arr_0, as a stream."""
  path = folder / UNFINISHED
  if path.exists():
    with whole(folder / 'samples.npz') as file, zipfile.ZipFile(file, 'w') as archive:
      archive.write(path, 'arr_0.npy')
    path.unlink()


def _job(path: pathlib.Path) -> Gallery:
  files = shards.files(path)
  parts = [open_gallery(file) for file in files]
  labels = [p.labels for p in parts]
  text = ''.join(p.source for p in parts).encode()
  return Gallery(path, sum(p.n for p in parts), parts[0].shape,
                 None if labels[0] is None else np.concatenate(labels),
                 f'{path.name} {hashlib.sha256(text).hexdigest()[:16]}', files)


def _regrouped(files: tuple[pathlib.Path, ...], size: int) -> Iterator[np.ndarray]:
  """Batches of one size over files of any."""
  left: list[np.ndarray] = []
  for file in files:
    with _archive(file) as archive:
      for rows in archive.rows('arr_0', size):
        rows, left = np.concatenate([*left, rows]), []
        if len(rows) >= size:
          yield rows[:size]
          rows = rows[size:]
        if len(rows):
          left = [rows]
  if left:
    yield left[0]


def _archive(path: pathlib.Path) -> Archive:
  return Archive(path, 'images', REMEDY)


def _folder(path: pathlib.Path) -> Gallery:
  found = sorted((p for p in path.rglob('*') if p.is_file()), key=lambda p: natural(str(p)))
  files = tuple(p for p in found if p.suffix.lower() == '.png')
  lossy = [p for p in found if p.suffix.lower() in LOSSY]
  if not files:
    said = f', but {len(lossy)} of a lossy format, which changes every distance' if lossy else ''
    raise ValueError(f'{path} holds no PNG{said}; {REMEDY}.')
  digest = hashlib.sha256()
  for file in files:
    digest.update(file.relative_to(path).as_posix().encode())
    digest.update(file.read_bytes())
  height, width, channels = _picture(files[0]).shape
  return Gallery(path, len(files), (height, width, channels), None,
                 f'{path.name} {digest.hexdigest()[:16]}', files)


def _picture(path: pathlib.Path) -> np.ndarray:
  try:
    data = decoding.read_bytes(path)
    with Image.open(path, formats=('PNG',)) as picture:
      channels = 1 if picture.mode in ('1', 'L', 'I;16', 'I') else 3
    return decoding.decode(data, channels)
  except (decoding.Refused, OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f'{path} is no picture ({error}); {REMEDY}.') from error
