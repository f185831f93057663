"""Reference files: what generated images are compared with, ours and those of other projects.

  ours         `Summary.save`
  ADM          mu, sigma, mu_s, sigma_s over a whole data set and arr_0, 10,000 uint8 images of it,
               whose features serve precision and recall; a batch of samples holds arr_0 alone
  clean-fid    mu, sigma, in NAME_MODE_SPLIT_SIZE.npz; feats in ..._kid.npz
  pytorch-fid  mu, sigma; TTUR's files are the same

Files of others do not say which network and which resize made their numbers: a summary of them is
not `verified`, and every score made with it says so. Statistics of images that are in the file are
computed here, with the extractor given, and are verified.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smalti.evaluation.archive import Archive
from smalti.evaluation.features import Extractor, Images, identity
from smalti.evaluation.frechet import Moments
from smalti.evaluation.subset import subset
from smalti.evaluation.summary import Summary, summarize

IMAGE = 1 << 26  # bytes of one image, at most: 4096 x 4096 in colour are 50 million
# clean-fid says its resize in the name of a file; ours are those of `evaluation.resize`
MODES = {'clean': 'clean', 'legacy_pytorch': 'legacy_pytorch', 'legacy_tensorflow': 'tf1'}


def load(path: str | os.PathLike, extractor: Extractor, *, batch_size: int = 64,
         keep: int = 10_000) -> Summary:
  """The summary in a reference file, for comparison with features of `extractor`.

  Args:
    batch_size: of the images that a file holds, at the extractor.
    keep: rows of features to keep of those images.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or made with another extractor or resize, or its dimensions differ.
  """
  path = Path(path)
  with Archive(path, 'reference statistics', 'give an .npz of this project, ADM, clean-fid or '
               'pytorch-fid') as archive:
    if 'kind' in archive.names:
      summary = Summary.load(path)
    else:
      summary = _foreign(archive, extractor, batch_size, keep)
  _check(path, summary, extractor)
  return summary


def images(path: str | os.PathLike, batch_size: int) -> Iterator[Images]:
  """Batches of `arr_0`, uint8[n, h, w, c], read as a stream from inside the zip."""
  with Archive(path, 'images', 'give an .npz with arr_0 of uint8[n, h, w, c]') as archive:
    count_images(archive)
    yield from archive.rows('arr_0', batch_size)


def count_images(archive: Archive) -> int:
  """How many images `arr_0` holds. Raises ValueError where it holds none."""
  with archive.refusing():
    header = archive.header('arr_0')
    if header.dtype != np.uint8 or len(header.shape) != 4 or not header.shape[0]:
      raise ValueError(f'arr_0 is {header.dtype}{header.shape}')
    if header.bytes // header.shape[0] > IMAGE:
      raise ValueError(f'an image of {header.shape[1:]} is larger than {IMAGE} bytes')
  return header.shape[0]


def _foreign(archive: Archive, extractor: Extractor, batch_size: int, keep: int) -> Summary:
  """A file of another project; what it does not say is taken to be as `extractor`."""
  path, names, found = archive.path, archive.names, None
  mode = re.search('_(clean|legacy_pytorch|legacy_tensorflow)_', path.name)
  if mode and MODES[mode[1]] != extractor.resize:
    raise ValueError(f'{path} was made with resize {MODES[mode[1]]!r} by its name, not '
                     f'{extractor.resize!r}; use a reference of the same resize.')
  if 'arr_0' in names:
    found = summarize(extractor, images(path, batch_size), count_images(archive), keep=keep)
  source = f'{path.name} sha256:{_sha256(path)[:16]}'
  if 'mu' not in names and found is not None:
    return dataclasses.replace(found, source=source)
  rows = np.zeros((0, extractor.dim), np.float32) if found is None else found.features
  with archive.refusing():
    if 'mu' in names:
      n, spatial = 0, None
      moments = Moments.given(n, archive.read('mu'), archive.read('sigma'), identity(extractor))
      if 'mu_s' in names:
        spatial = Moments.given(
            n, archive.read('mu_s'), archive.read('sigma_s'), identity(extractor))
    else:
      rows = np.asarray(archive.read('feats'), np.float32)
      moments, spatial = Moments.of(rows, identity(extractor)), None
      n, rows = len(rows), rows[subset(len(rows), keep)]
  return Summary(n, identity(extractor), source, moments, spatial, rows, None, None, False)


def _check(path: Path, summary: Summary, extractor: Extractor) -> None:
  if summary.moments.dim != extractor.dim:
    raise ValueError(f'{path} has {summary.moments.dim} dimensions, and {extractor.name} '
                     f'{extractor.dim}; use a reference of this extractor.')
  theirs, ours = summary.extractor.rsplit(':', 2), identity(extractor).rsplit(':', 2)
  for what, a, b in zip(('extractor', 'hash', 'resize'), theirs, ours):
    if a != b:
      raise ValueError(f'{path} was made with {what} {a[:16]!r}, not {b[:16]!r}; '
                       'make the reference again with this one.')


def _sha256(path: Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
