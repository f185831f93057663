"""What a tokenizer's bits buy elsewhere: JPEG, principal components and k-means of patches.

Every method gives a curve of `Point`s: bits per image against the errors of uint8 images, to set a
tokenizer's `spec.bits` and reconstruction beside. All three are entropy-coded, and get for nothing
what a decoder may know beforehand: JPEG its headers and tables, the others what was fitted on
training images. Images that were JPEG before flatter JPEG from their own quality on.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from smalti.evaluation import reconstruction
from smalti.evaluation.reconstruction import Reconstruction
from smalti.evaluation.subset import subset

Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8

QUALITIES = (1, 3, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)
LOW = (3, 5, 10, 20, 30, 50, 70)  # of shrunken images, which are for few bits
STEPS = (2048, 1024, 512, 256, 128, 64, 32, 16, 8)  # grey levels of an orthonormal coefficient
CODES = (16, 64, 256, 1024)
COMPONENTS = 256
WHOLE = 4096  # values of an image whose principal components take seconds
FITTED = 50_000  # rows that are fitted, at most
BATCH = 64  # images in work at once


@dataclasses.dataclass(frozen=True)
class Point:
  """One setting of one method, over all images.

  Attributes:
    curve: the method with its patch side, or its subsampling and what images were shrunk by, such
      as 'kmeans_4', 'jpeg_420' and 'jpeg_420_by2'.
    setting: quality, quantization step or number of codes: what moves along the curve.
    bits: per image, after entropy coding: of JPEG the scan, of the others ideal codes for the
      frequencies of the training images.
    fixed_bits: of k-means, positions * log2 K, as TokenSpec.bits; None of the others.
    error: of the reconstructions.
  """
  curve: str
  setting: float
  bits: float
  fixed_bits: float | None
  error: Reconstruction


@dataclasses.dataclass(frozen=True)
class AtBits:
  """A curve read at a number of bits: linear in log2 bits between its two nearest points."""
  curve: str
  bits: float
  psnr: float
  ssim: float
  l1: float


@dataclasses.dataclass(frozen=True)
class Baselines:
  """All curves, and where they cross the asked bits; curves that do not reach them are left out."""
  train: int
  images: int
  points: tuple[Point, ...]
  at: tuple[AtBits, ...]


def baselines(train: Images, images: Images, *, bits: float | None = None,
              sides: Sequence[int] = (4, 8)) -> Baselines:
  """Every method of this module: JPEG as it fits the channels, the others per patch side.

  JPEG alone does not go down to the bits of most tokenizers, so images are also shrunk by 2 and 4
  as far as 8 pixels remain. K-means takes the numbers of codes that have ten training patches each.

  Args:
    bits: per image, of the tokenizer to compare with.
    sides: of the patches; they must divide the images. Principal components are of whole images
      too where those have no more than 4,096 values.
  """
  points = []
  for sampling in ('444', '420') if images.shape[-1] == 3 else ('grey',):
    points += jpeg(images, sampling=sampling)
    for shrink in (2, 4):
      if min(images.shape[1:3]) >= 8 * shrink:
        points += jpeg(images, sampling=sampling, shrink=shrink, qualities=LOW)
  if images[0].size <= WHOLE:
    points += pca(train, images)
  for side in sides:
    patches = train[..., 0].size // side ** 2
    points += pca(train, images, side=side)
    points += kmeans(train, images, side=side, codes=[k for k in CODES if 10 * k <= patches])
  curves = dict.fromkeys(point.curve for point in points)
  found = [at_bits([p for p in points if p.curve == curve], bits) for curve in curves] \
      if bits else []
  return Baselines(len(train), len(images), tuple(points), tuple(x for x in found if x is not None))


def at_bits(points: Sequence[Point], bits: float) -> AtBits | None:
  """One curve at `bits` per image (k-means by its fixed ones); None beyond its ends."""
  rate = lambda p: p.bits if p.fixed_bits is None else p.fixed_bits  # noqa: E731
  known = sorted((p for p in points if p.error.psnr is not None and rate(p)), key=rate)
  if not known or not rate(known[0]) <= bits <= rate(known[-1]):
    return None
  place = np.log2([rate(p) for p in known])
  psnr, ssim, l1 = (
      float(np.interp(math.log2(bits), place, [getattr(p.error, name) for p in known]))
      for name in ('psnr', 'ssim', 'l1'))
  return AtBits(known[0].curve, bits, psnr, ssim, l1)


def jpeg(images: Images, *, sampling: str = '420', shrink: int = 1,
         qualities: Sequence[int] = QUALITIES) -> list[Point]:
  """Baseline JPEG with the standard Huffman tables, over qualities.

  The bits are those of the entropy-coded scan alone, without headers, tables and the zero bytes
  stuffed after 0xFF; up to seven bits of padding at its end are counted.

  Args:
    sampling: '444' or '420' of colour images, 'grey' of images with one channel.
    shrink: images are averaged over squares of so many pixels, and enlarged bicubically after.

  Raises:
    ValueError: another sampling, or channels that it does not fit.
  """
  modes = {'444': (3, 0), '420': (3, 2), 'grey': (1, -1)}
  if sampling not in modes or images.shape[-1] != modes[sampling][0]:
    raise ValueError(f'{sampling=} of images with {images.shape[-1]} channels; '
                     "JPEG takes '444' or '420' of 3 channels and 'grey' of 1.")
  name, points = f'jpeg_{sampling}' + (f'_by{shrink}' if shrink > 1 else ''), []
  for quality in qualities:
    bits, errors = 0, []
    for part in _batches(images):
      streams = [_jpeg(image, shrink, quality, modes[sampling][1]) for image in part]
      bits += sum(scan_bits(stream) for stream in streams)
      size = part.shape[2], part.shape[1]
      decoded = [np.asarray(Image.open(io.BytesIO(stream)).resize(size, Image.Resampling.BICUBIC))
                 for stream in streams]
      errors.append(reconstruction.measure(part, np.stack(decoded).reshape(part.shape)))
    points.append(Point(name, quality, bits / len(images), None, reconstruction.summarize(errors)))
  return points


def scan_bits(stream: bytes) -> int:
  """Bits of the entropy-coded data of a baseline JPEG with one scan.

  Raises ValueError for a stream of other segments.
  """
  place = 2
  while stream[place:place + 1] == b'\xff' and stream[place + 1:place + 2] != b'\xda':
    place += 2 + int.from_bytes(stream[place + 2:place + 4])
  if stream[:2] != b'\xff\xd8' or stream[place:place + 2] != b'\xff\xda' \
      or stream[-2:] != b'\xff\xd9':
    raise ValueError(f'A stream of {len(stream)} bytes is no JPEG with one scan; save it as one.')
  data = stream[place + 2 + int.from_bytes(stream[place + 2:place + 4]):-2]
  return 8 * (len(data) - data.count(b'\xff\x00'))


def pca(train: Images, images: Images, *, side: int | None = None,
        steps: Sequence[float] = STEPS, components: int = COMPONENTS) -> list[Point]:
  """Principal components of patches, each rounded to multiples of a step, the same for all.

  That is reverse water-filling: a component below the step has one level and costs nothing. Levels
  are those that training images reach.

  Args:
    side: of square patches, a divisor of both sides of the images; None takes whole images.
    steps: of quantization, in grey levels.
    components: how many are kept at most; they bound what small steps can reach.
  """
  rows = _sample(_patches(train, side))
  model = PCA(min(components, *rows.shape), random_state=0).fit(rows)
  known, points = model.transform(rows), []
  for step in steps:
    levels = np.rint(known / step).astype(np.int64)
    low, high = levels.min(0), levels.max(0)
    costs = [_costs(column, vocab) for column, vocab in zip((levels - low).T, high - low + 1)]

    def code(x: np.ndarray, step=step, low=low, high=high) -> np.ndarray:
      return np.clip(np.rint(model.transform(x) / step), low, high).astype(np.int64) - low

    def cost(tokens: np.ndarray, costs=costs) -> float:
      return sum(float(bits[column].sum()) for bits, column in zip(costs, tokens.T))

    def decode(tokens: np.ndarray, step=step, low=low) -> np.ndarray:
      return model.inverse_transform((tokens + low) * step)

    points.append(_point(f'pca_{side or "whole"}', step, code, cost, decode, images, side))
  return points


def kmeans(train: Images, images: Images, *, side: int, codes: Sequence[int] = CODES
           ) -> list[Point]:
  """Every patch by the nearest of K mean patches: positions * log2 K bits and less.

  By mini-batches: on patches of CIFAR-10 within 0.1 dB of twenty rounds of Lloyd's algorithm.

  Raises:
    ValueError: fewer patches than codes, or a side that does not divide the images.
  """
  rows, points = _sample(_patches(train, side)), []
  if max(codes, default=0) > len(rows):
    raise ValueError(f'{max(codes)} codes of {len(rows)} training patches; give more images or '
                     'fewer codes.')
  positions = images[0].size // rows.shape[1]
  for k in codes:
    model = MiniBatchKMeans(k, random_state=0, n_init=1, batch_size=4096).fit(rows)
    bits = _costs(model.predict(rows), k)
    point = _point(f'kmeans_{side}', k, model.predict,
                   lambda tokens, bits=bits: float(bits[tokens].sum()),
                   lambda tokens, model=model: model.cluster_centers_[tokens], images, side)
    points.append(dataclasses.replace(point, fixed_bits=positions * math.log2(k)))
  return points


def _point(curve: str, setting: float, code: Callable, cost: Callable, decode: Callable,
           images: Images, side: int | None) -> Point:
  """Codes all images patch by patch; `cost` is the bits of some codes."""
  bits, errors = 0., []
  for part in _batches(images):
    tokens = code(_patches(part, side))
    bits += cost(tokens)
    decoded = np.clip(np.rint(decode(tokens)), 0, 255).astype(np.uint8)
    errors.append(reconstruction.measure(part, _assembled(decoded, part.shape, side)))
  return Point(curve, setting, bits / len(images), None, reconstruction.summarize(errors))


def _costs(tokens: Int[np.ndarray, 'r'], vocab: int) -> Float[np.ndarray, 'v']:
  """-log2 p of every symbol, from add-one smoothed frequencies."""
  counts = np.bincount(tokens, minlength=vocab) + 1
  return np.log2(counts.sum() / counts)


def _patches(images: Images, side: int | None) -> Float[np.ndarray, 'r p']:
  """Square patches as float32 rows, image by image."""
  b, h, w, c = images.shape
  rows, columns = (h, w) if side is None else (side, side)
  if h % rows or w % columns:
    raise ValueError(f'{side=} must divide the sides of images of {h}x{w}.')
  grid = images.reshape(b, h // rows, rows, w // columns, columns, c).transpose(0, 1, 3, 2, 4, 5)
  return grid.reshape(-1, rows * columns * c).astype(np.float32)


def _assembled(rows: np.ndarray, shape: tuple[int, ...], side: int | None) -> Images:
  """The inverse of `_patches`."""
  b, h, w, c = shape
  high, wide = (h, w) if side is None else (side, side)
  grid = rows.reshape(b, h // high, w // wide, high, wide, c).transpose(0, 1, 3, 2, 4, 5)
  return grid.reshape(shape)


def _sample(rows: Float[np.ndarray, 'r p']) -> Float[np.ndarray, 's p']:
  return rows if len(rows) <= FITTED else rows[subset(len(rows), FITTED)]


def _batches(images: Images) -> Iterator[Images]:
  for i in range(0, len(images), BATCH):
    yield images[i:i + BATCH]


def _jpeg(image: np.ndarray, shrink: int, quality: int, subsampling: int) -> bytes:
  file = io.BytesIO()
  Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).reduce(shrink).save(
      file, 'JPEG', quality=quality, subsampling=subsampling, optimize=False)
  return file.getvalue()
