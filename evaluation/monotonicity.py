"""Does a measure see what it should? Real images, degraded step by step, against real ones.

Five ladders: Gaussian noise, blur, JPEG, copies of one class, and missing classes. The distance to
the undegraded images (as in Heusel et al. 2017, arXiv 1706.08500, figure 3) has to rise with every
rung; where classes are missing recall of other real images has to fall, and precision to stay.
Distances to other images are kept too: a rung below their sampling error need not show there.
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

OFFSET = 4  # pixels from the corner of an image to that of a JPEG block

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
    fd: Frechet distance to n undegraded images, of which these were made.
    fd_others: to as many other images.
    kd_others: kernel distance to those, over 20 subsets of 1,000.
    precision, recall: against those, of the ladder 'dropped'; None elsewhere.
  """
  ladder: str
  level: float
  fd: float
  fd_others: float
  kd_others: float
  precision: float | None = None
  recall: float | None = None


def climb(extractor: Extractor, others: Images, pool: Images, labels: Int[np.ndarray, '_b'], *,
          n: int = 5000, seed: int = 0) -> list[Rung]:
  """All rungs of all ladders, each of n images of `pool`, which must not be among `others`."""
  real = extractor(others)['features']
  same, other = Moments.of(extractor(pool[:n])['features']), Moments.of(real)
  out = []
  for ladder, levels in LADDERS.items():
    for level in levels:
      rows = extractor(degrade(ladder, level, pool, labels, n=n, seed=seed))['features']
      shares: tuple[float | None, float | None] = None, None
      if ladder == 'dropped':
        found = manifold(real=real, generated=rows)
        shares = found.precision, found.recall
      out.append(Rung(
          ladder, level, frechet_distance(Moments.of(rows), same),
          frechet_distance(Moments.of(rows), other),
          kernel_distance(rows, real, subsets=20).mean, *shares))
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
  """Through JPEG (4:2:0), its blocks four pixels off the corner.

  Images that were JPEG before, as cifar10_jpeg of quality 75, would otherwise be quantized twice on
  one grid: at quality 50, whose steps are twice as large, half a step is rounded to a whole one and
  images come out a third sharper than they were.
  """
  file, (height, width, _) = io.BytesIO(), image.shape
  padded = np.pad(image, ((OFFSET, OFFSET), (OFFSET, OFFSET), (0, 0)), mode='reflect')
  _picture(padded).save(file, 'JPEG', quality=int(quality))
  decoded = np.asarray(Image.open(file)).reshape(padded.shape)
  return decoded[OFFSET:OFFSET + height, OFFSET:OFFSET + width]


def _picture(image: np.ndarray) -> Image.Image:
  return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def verdicts(rungs: list[Rung], *, loss: float = 0.05) -> dict[str, bool]:
  """By ladder and measure: is each rung above the one before?

  `dropped recall` asks for the opposite, and `dropped precision` that no rung is further than
  `loss` from the first. What is asked of a measure is `required`.
  """
  found = {}
  for ladder in LADDERS:
    rows = [rung for rung in rungs if rung.ladder == ladder]
    for measure in ('fd', 'fd_others', 'kd_others'):
      found[f'{ladder} {measure}'] = _rises([getattr(rung, measure) for rung in rows])
  found['dropped recall'] = _rises([-rung.recall for rung in rows])
  found['dropped precision'] = max(abs(r.precision - rows[0].precision) for r in rows) <= loss
  return found


def required(verdict: str) -> bool:
  """Whether a verdict has to hold: those of `fd` and of the shares, not those on other images."""
  return not verdict.endswith('_others')


def _rises(values: list[float]) -> bool:
  return all(low < high for low, high in itertools.pairwise(values))
