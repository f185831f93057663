"""Data sets of files that a user has: MNIST, and CIFAR-10 as it survived JPEG.

smalti ships none of them and looks in no default place: the folder is `data.folder`, or the
environment variable SMALTI_DATA_DIR. Every file is held to its published SHA-256 before it is used.
The order of examples is that of the files.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import zlib

import numpy as np
import PIL
from tqdm import tqdm

from smalti.data import cache, images
from smalti.data.arrays import ArraysSource
from smalti.data.augment import AugmentConfig
from smalti.data.source import DataConfig, Split

VARIABLE = 'SMALTI_DATA_DIR'

# MNIST (LeCun, Cortes and Burges 1998): rows and SHA-256 of the archives' uncompressed bytes.
MNIST = {
    'train-images-idx3-ubyte':
        (60_000, 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db'),
    'train-labels-idx1-ubyte':
        (60_000, '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5'),
    't10k-images-idx3-ubyte':
        (10_000, '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7'),
    't10k-labels-idx1-ubyte':
        (10_000, 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2'),
}
CIFAR10_JPEG = {
    'train': '2b43dc83781fcacd2d40abb72dc14a5f86104de10897054c8f6b98741ff1c66e',
    'test': '4a8ca229bfa5ff0cd581feee0d4927a98c7c71d9adefdaab837145119148e824',
}


@dataclasses.dataclass(kw_only=True, slots=True)
class MnistConfig(DataConfig):
  """60,000 training and 10,000 test digits, uint8[28, 28, 1]; the test part is 'eval'.

  Attributes:
    folder: where the four .gz archives are, under their own names or in images/ with the prefix
      mnist-; None takes $SMALTI_DATA_DIR.
  """
  folder: str | None = None

  def open(self, split: Split) -> ArraysSource:
    part = {'train': 'train', 'eval': 't10k'}[split]
    image = _idx(self.folder, f'{part}-images-idx3-ubyte', 784).reshape(-1, 28, 28, 1)
    label = _idx(self.folder, f'{part}-labels-idx1-ubyte', 1).astype(np.int32)
    return ArraysSource({'image': image, 'label': label}, tuple('0123456789'))


@dataclasses.dataclass(kw_only=True, slots=True)
class CifarJpegConfig(DataConfig):
  """The 50,000 and 10,000 images of CIFAR-10 after JPEG of quality 75, uint8[32, 32, 3].

  Close to CIFAR-10 (Krizhevsky 2009) and not the same: high frequencies are attenuated, and scores
  are comparable with each other only. Call it cifar10_jpeg. Decoded once, into the user's cache.

  Attributes:
    folder: holds images/cifar10-jpeg-{train,test}.npz; None takes $SMALTI_DATA_DIR.
    augment: what training images go through.
  """
  folder: str | None = None
  augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

  def open(self, split: Split) -> ArraysSource:
    part = {'train': 'train', 'eval': 'test'}[split]
    path = find(self.folder, f'images/cifar10-jpeg-{part}.npz', f'cifar10-jpeg-{part}.npz')
    data = path.read_bytes()
    check(path, hashlib.sha256(data).hexdigest(), CIFAR10_JPEG[part])
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
      entries = {name: file[name] for name in ('data', 'offsets', 'labels', 'class_names')}
    return ArraysSource(
        {'image': _decoded(part, entries['data'], entries['offsets']),
         'label': entries['labels'].astype(np.int32)},
        tuple(str(name) for name in entries['class_names']))


def find(folder: str | None, *names: str) -> pathlib.Path:
  """The first of `names` that exists below `folder`, or below $SMALTI_DATA_DIR where it is None.

  Raises:
    FileNotFoundError: no folder was named, or it has none of the files.
  """
  chosen = folder or os.environ.get(VARIABLE)
  if not chosen:
    raise FileNotFoundError(
        f'{names[0]} is needed and no folder was named; '
        f'set --config.data.folder=DIR or the environment variable {VARIABLE}.')
  for name in names:
    path = pathlib.Path(chosen).expanduser() / name
    if path.is_file():
      return path
  raise FileNotFoundError(
      f'{chosen} has no {" or ".join(names)}; put the file there, or name another folder with '
      f'--config.data.folder=DIR or {VARIABLE}.')


def check(path: pathlib.Path, found: str, expected: str) -> None:
  """Raises ValueError where a file is not the published one."""
  if found != expected:
    raise ValueError(f'{path} is not the published file: its SHA-256 is {found[:16]}..., expected '
                     f'{expected[:16]}...; get it again.')


def _idx(folder: str | None, name: str, width: int) -> np.ndarray:
  """The bytes of an IDX archive after its header; checked uncompressed, however it was packed."""
  path = find(folder, f'images/mnist-{name}.gz', f'{name}.gz')
  rows, expected = MNIST[name]
  header = 16 if width > 1 else 8
  try:
    with gzip.open(path) as file:
      data = file.read(header + rows * width + 1)  # and no more, whatever the archive holds
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f'{path} is damaged ({error}); get it again.') from error
  check(path, hashlib.sha256(data).hexdigest(), expected)
  return np.frombuffer(data, np.uint8, offset=header)


def _decoded(part: str, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
  """uint8[N, 32, 32, 3] of the JPEG streams, from the cache if its SHA-256 is the noted one."""
  path = cache.folder() / 'cifar10_jpeg' / f'{part}-pillow-{PIL.__version__}.npy'
  note = path.with_suffix('.json')
  if path.exists() and note.exists():
    with open(path, 'rb') as file:
      found = hashlib.file_digest(file, 'sha256').hexdigest()
    if json.loads(note.read_bytes()) == found:
      return np.load(path, mmap_mode='r', allow_pickle=False)
  bar = tqdm(zip(offsets[:-1], offsets[1:]), total=len(offsets) - 1, unit='image',
             desc='decode', disable=None, leave=False)
  decoded = np.stack([images.decode(data[start:end].tobytes()) for start, end in bar])
  with cache.replacing(path) as file:
    np.save(file, decoded, allow_pickle=False)
  with cache.replacing(note) as file, open(path, 'rb') as written:
    file.write(json.dumps(hashlib.file_digest(written, 'sha256').hexdigest()).encode('ascii'))
  return decoded
