"""Augmentation of image batches, each example by its own position in the stream.

Random numbers are a hash of (seed, position, purpose), not a generator's stream: an example is
treated the same whatever process reads it, at whatever batch size, after whatever restart.
"""

import dataclasses

import numpy as np

from smalti.data.noise import noise

FLIP, ROW, COLUMN = range(1, 4)  # purposes; 0 is the order of examples


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
  _, h, w, _ = image.shape
  if not 0 <= config.crop < min(h, w):
    raise ValueError(f'augment.crop={config.crop} must be within 0..{min(h, w) - 1} for {h}x{w}.')
  if config.crop:
    p = config.crop
    padded = np.pad(image, ((0, 0), (p, p), (p, p), (0, 0)), mode='reflect')
    rows = noise(seed, ROW, positions) % np.uint64(2 * p + 1)
    columns = noise(seed, COLUMN, positions) % np.uint64(2 * p + 1)
    image = np.stack([padded[i, r:r + h, c:c + w] for i, (r, c) in enumerate(zip(rows, columns))])
  if config.flip:
    mirrored = noise(seed, FLIP, positions) >> np.uint64(63) == 1
    source, image = image, image.copy()
    for i in np.flatnonzero(mirrored):
      for c in range(image.shape[3]):  # by channel: numpy is 4 times slower at reversing triples
        image[i, :, :, c] = source[i, :, ::-1, c]
  return image
