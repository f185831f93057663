"""Images of a factor lattice: every image is rendered from its factors, which come beside it.

Two procedural data sets for measures of disentanglement, with the lattices of published ones whose
files are not redistributed here. They need no download and no random number; they are new images,
so scores on them do not compare with published scores on the originals.

`shapes2d`: the lattice of dSprites (Matthey et al. 2017), 3 shapes x 6 scales x 40 orientations x
32 x 32 positions = 737,280 binary images. `shapes3d_like`: that of Shapes3D (Kim and Mnih 2018,
arXiv 1802.05983), 10 floor hues x 10 wall hues x 10 object hues x 8 scales x 4 shapes x 15
orientations = 480,000 images of an object in the corner of a room.
"""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Bool, Int, UInt8

from smalti.data.noise import noise
from smalti.data.raycast import Scene
from smalti.data.source import DataConfig, Split

EVAL = 10_000  # held out of the lattice: the number InfoMEC is measured on (arXiv 2305.18378)
SPLIT = 1      # purpose of noise


@dataclasses.dataclass(frozen=True)
class Lattice:
  """All combinations of factors; the index is a mixed radix number, the last factor fastest."""
  names: tuple[str, ...]
  sizes: tuple[int, ...]

  def __len__(self) -> int:
    return math.prod(self.sizes)

  def factors(self, index: Int[np.ndarray, 'b']) -> Int[np.ndarray, 'b f']:
    """int32 digits of the index."""
    return np.stack(np.unravel_index(index, self.sizes), -1).astype(np.int32)

  def index(self, factors: Int[np.ndarray, 'b f']) -> Int[np.ndarray, 'b']:
    """The inverse of `factors`, int64. Raises ValueError for a digit outside its factor."""
    return np.ravel_multi_index(tuple(np.moveaxis(np.asarray(factors), -1, 0)), self.sizes)


SHAPES2D = Lattice(('shape', 'scale', 'orientation', 'x', 'y'), (3, 6, 40, 32, 32))
SHAPES3D = Lattice(('floor_hue', 'wall_hue', 'object_hue', 'scale', 'shape', 'orientation'),
                   (10, 10, 10, 8, 4, 15))


@dataclasses.dataclass(kw_only=True, slots=True)
class Shapes2DConfig(DataConfig):
  """`shapes2d`: square, ellipse or heart, uint8[64, 64, 1] of 0 and 255; `factors` int32[5].

  Attributes:
    duplicate: orientations linspace(0, 2 pi, 40) as in dSprites, where the last repeats the first;
      False spaces 40 different ones evenly. Symmetries of square and ellipse stay either way.
  """
  duplicate: bool = True

  def open(self, split: Split) -> 'FactorSource':
    return FactorSource(SHAPES2D, functools.partial(sprites, duplicate=self.duplicate), split)


@dataclasses.dataclass(kw_only=True, slots=True)
class Shapes3DLikeConfig(DataConfig):
  """`shapes3d_like`: cube, cylinder, sphere or capsule in a room, uint8[size, size, 3].

  Attributes:
    size: pixels of the square, 64 as in Shapes3D; smaller ones are for small machines.
  """
  size: int = 64

  def open(self, split: Split) -> 'FactorSource':
    return FactorSource(SHAPES3D, Scene.of(self.size).render, split)


class FactorSource:
  """Renders what is read. 10,000 points of the lattice, chosen by a hash, are the 'eval' split."""

  classes: tuple[str, ...] = ()

  def __init__(self, lattice: Lattice, render, split: Split):
    self.lattice, self.render = lattice, render
    order = np.argsort(noise(SPLIT, np.arange(len(lattice))))
    self.rows = order[:EVAL] if split == 'eval' else order[EVAL:]  # any part is a fair draw

  def __len__(self) -> int:
    return len(self.rows)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    factors = self.lattice.factors(self.rows[np.asarray(indices)])
    return {'image': self.render(factors), 'factors': factors}


# --- shapes2d --------------------------------------------------------------------------------

RADIUS = 16.25  # pixels, of the circle around the largest sprite: it never leaves the image
WINDOW = 33     # pixels; a position moves the window by one pixel, 0 to 31


def sprites(factors: Int[np.ndarray, 'b 5'], *, duplicate: bool = True
            ) -> UInt8[np.ndarray, 'b 64 64 1']:
  """Images of `SHAPES2D` factors; y counts upwards."""
  shape, scale, orientation, x, y = np.moveaxis(np.asarray(factors), -1, 0)
  image = np.zeros((len(factors), 64, 64), np.uint8)
  windows = np.lib.stride_tricks.sliding_window_view(
      image, (WINDOW, WINDOW), axis=(1, 2), writeable=True)
  windows[np.arange(len(image)), 31 - y, x] = sheet(duplicate)[shape, scale, orientation]
  return image[..., None]


@functools.cache
def sheet(duplicate: bool) -> UInt8[np.ndarray, '3 6 40 33 33']:
  """Every sprite in the middle of its window."""
  period = 39 if duplicate else 40  # the last of 40 closed steps is exactly the first
  angle = 2 * math.pi * (np.arange(40) % period) / period
  scale = RADIUS * np.linspace(0.5, 1, 6)[:, None, None, None]
  right, down = np.meshgrid(*[np.arange(WINDOW) - WINDOW // 2] * 2)
  cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
  x, y = (cos * right - sin * down) / scale, (-sin * right - cos * down) / scale
  inside = np.stack([square(x, y), ellipse(x, y), heart(x, y)])
  return np.where(inside, np.uint8(255), np.uint8(0))


def square(x: np.ndarray, y: np.ndarray) -> Bool[np.ndarray, '*b']:
  """Corners on the unit circle."""
  return np.maximum(abs(x), abs(y)) <= math.sqrt(0.5)


def ellipse(x: np.ndarray, y: np.ndarray) -> Bool[np.ndarray, '*b']:
  """Twice as long as wide, the ends on the unit circle."""
  return x**2 + (2 * y)**2 <= 1


def heart(x: np.ndarray, y: np.ndarray) -> Bool[np.ndarray, '*b']:
  """(x^2 + y^2 - 1)^3 <= x^2 y^3, moved and shrunk into the unit circle."""
  x, y = x / 0.748, y / 0.748 + 0.12
  return (x**2 + y**2 - 1)**3 <= x**2 * y**3
