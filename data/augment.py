"""Augmentation of image batches, each example by its own position in the stream.

Random numbers are a hash of (seed, position, purpose), not a generator's stream: an example is
treated the same whatever process reads it, at whatever batch size, after whatever restart.
"""

import dataclasses

import numpy as np

FLIP, ROW, COLUMN = range(3)


@dataclasses.dataclass(kw_only=True, slots=True)
class AugmentConfig:
  """What may happen to a training image.

  Attributes:
    flip: mirrors left and right with probability 1/2.
    crop: pixels of mirrored border added on every side before a random crop of the old size.
  """
  flip: bool = False
  crop: int = 0


def apply(config: AugmentConfig, image: np.ndarray, *, seed: int,
          positions: np.ndarray) -> np.ndarray:
  """uint8[B, H, W, C] augmented; row i depends on `seed` and `positions[i]` alone.

  Raises:
    ValueError: a border that is negative, or not smaller than the image.
  """
  b, h, w, _ = image.shape
  if not 0 <= config.crop < min(h, w):
    raise ValueError(f'augment.crop={config.crop} must be within 0..{min(h, w) - 1} for {h}x{w}.')
  if config.crop:
    p = config.crop
    padded = np.pad(image, ((0, 0), (p, p), (p, p), (0, 0)), mode='reflect')
    rows = noise(seed, positions, ROW) % np.uint64(2 * p + 1)
    columns = noise(seed, positions, COLUMN) % np.uint64(2 * p + 1)
    rows = rows.astype(np.int64)[:, None, None] + np.arange(h)[:, None]
    columns = columns.astype(np.int64)[:, None, None] + np.arange(w)
    image = padded[np.arange(b)[:, None, None], rows, columns]
  if config.flip:
    mirrored = noise(seed, positions, FLIP) >> np.uint64(63) == 1
    image = np.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
  return image


def noise(seed: int, positions: np.ndarray, purpose: int) -> np.ndarray:
  """uint64[B] of independent random bits for every (seed, position, purpose).

  SplitMix64 (Steele, Lea and Flood 2014) chained over the three words: the same numbers on every
  platform and NumPy version.
  """
  state = np.zeros(np.shape(positions), np.uint64)
  for word in (seed, purpose, positions):
    state = _mix(state ^ np.asarray(word).astype(np.uint64))
  return state


def _mix(z: np.ndarray) -> np.ndarray:
  with np.errstate(over='ignore'):  # arithmetic modulo 2**64 is meant
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
