"""Does a measure see what it should? Real images, degraded step by step, against other real ones.

Five ladders: Gaussian noise, blur, JPEG, copies of one class, and missing classes. A distance has
to rise with every rung; where classes are missing recall has to fall, and precision to stay.
"""

import dataclasses
import io
import itertools

import numpy as np
from jaxtyping import Int, Shaped
from PIL import Image, ImageFilter

from smalti.evaluation.features import Extractor
from smalti.evaluation.frechet import Moments, frechet_distance
from smalti.evaluation.kernel import kernel_distance
from smalti.evaluation.manifold import manifold

Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8

LADDERS: dict[str, tuple[float, ...]] = {
    'noise': (0, 5, 15, 40),       # standard deviation, of 255
    'blur': (0, 0.5, 1, 2),        # standard deviation in pixels
    'jpeg': (95, 50, 20, 5),       # quality
    'copies': (0, 0.1, 0.3, 0.6),  # share of the images that becomes copies of one class
    'dropped': (0, 1, 3, 5),       # classes that are missing
}


@dataclasses.dataclass(frozen=True)
class Rung:
  """One degraded set against the reference.

  Attributes:
    ladder, level: of `LADDERS`.
    fd, kd: Frechet and kernel distance (of 20 subsets of 1,000).
    precision, recall: of the ladder 'dropped'; None elsewhere.
  """
  ladder: str
  level: float
  fd: float
  kd: float
  precision: float | None = None
  recall: float | None = None


def climb(extractor: Extractor, reference: Images, pool: Images, labels: Int[np.ndarray, '_b'], *,
          n: int = 5000, seed: int = 0) -> list[Rung]:
  """All rungs of all ladders, each of n images of `pool`, which must not be in `reference`."""
  real = extractor(reference)['features']
  moments = Moments.of(real)
  out = []
  for ladder, levels in LADDERS.items():
    for level in levels:
      rows = extractor(degrade(ladder, level, pool, labels, n=n, seed=seed))['features']
      shares = manifold(real=real, generated=rows) if ladder == 'dropped' else None
      out.append(Rung(
          ladder, level, frechet_distance(Moments.of(rows), moments),
          kernel_distance(rows, real, subsets=20).mean,
          shares and shares.precision, shares and shares.recall))
  return out


def degrade(ladder: str, level: float, pool: Images, labels: Int[np.ndarray, '_b'], *, n: int,
            seed: int = 0) -> Images:
  """n images of `pool`, the first ones where no class is missing, at one level of one ladder.

  Raises:
    ValueError: an unknown ladder, or fewer than n images of the classes that are left.
  """
  if ladder not in LADDERS:
    raise ValueError(f'{ladder=} must be one of {", ".join(LADDERS)}.')
  classes = np.unique(labels)
  left = np.isin(labels, classes[int(level):]) if ladder == 'dropped' else np.ones(len(pool), bool)
  if left.sum() < n:
    raise ValueError(f'{left.sum()} images are left of {len(pool)}, and {n=} are asked for.')
  images = pool[np.flatnonzero(left)[:n]]
  rng = np.random.default_rng(seed)
  if ladder == 'noise':
    noisy = images + level * rng.standard_normal(images.shape, np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
  if ladder == 'copies':
    one = np.flatnonzero(labels[:n] == classes[0])
    replaced = rng.permutation(n)[:round(level * n)]
    images[replaced] = pool[rng.choice(one, len(replaced))]
  if ladder in ('blur', 'jpeg'):
    change = blurred if ladder == 'blur' else compressed
    return np.stack([change(image, level) for image in images])
  return images


def blurred(image: Shaped[np.ndarray, 'h w c'], radius: float) -> Shaped[np.ndarray, 'h w c']:
  """Pillow's Gaussian blur, which is three box blurs."""
  return np.asarray(_picture(image).filter(ImageFilter.GaussianBlur(radius))).reshape(image.shape)


def compressed(image: Shaped[np.ndarray, 'h w c'], quality: float) -> Shaped[np.ndarray, 'h w c']:
  """Through JPEG, with the chroma subsampling that Pillow has by default (4:2:0)."""
  file = io.BytesIO()
  _picture(image).save(file, 'JPEG', quality=int(quality))
  return np.asarray(Image.open(file)).reshape(image.shape)


def _picture(image: np.ndarray) -> Image.Image:
  return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def verdicts(rungs: list[Rung], *, loss: float = 0.05) -> dict[str, bool]:
  """By ladder and measure: does each rung rise above the one before?

  `dropped recall` asks for the opposite, and `dropped precision` that no rung is further than
  `loss` from the first.
  """
  found = {}
  for ladder in LADDERS:
    rows = [rung for rung in rungs if rung.ladder == ladder]
    found[f'{ladder} fd'] = _rises([rung.fd for rung in rows])
    found[f'{ladder} kd'] = _rises([rung.kd for rung in rows])
  found['dropped recall'] = _rises([-rung.recall for rung in rows])
  found['dropped precision'] = max(abs(r.precision - rows[0].precision) for r in rows) <= loss
  return found


def _rises(values: list[float]) -> bool:
  return all(low < high for low, high in itertools.pairwise(values))
