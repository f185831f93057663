"""Caption agreement: does a sample show what its caption says?

For canvases of 2 x 2 digits with captions of a grammar (`data/captions.py`). A judge of single
digits reads the quadrants of an image, its pixels say which half has more ink, and every claim of
the caption holds or does not. Beside the share of claims that hold stand what no model can beat
honestly (real images of held-out digits, which the judge misreads at times) and what one that does
not read reaches: the claims held against other captions' samples, and against other captions' real
images (chance).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Shaped

Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8
Claims = Int[np.ndarray, '_b 9']
Judge = Callable[[Images], np.ndarray]

# the columns of `judged`, by what they are about
KINDS = {'corner': (0, 1, 2, 3), 'count': (4,), 'sum': (5,), 'parity': (6,), 'brighter': (7,)}


@dataclasses.dataclass(frozen=True)
class CaptionAgreement:
  """Shares in 0..1 of the claims that are made; None where none is.

  Attributes:
    agreement: of samples, with the claims they were asked for; `whole`: of captions all of whose
      claims hold.
    per_kind: `agreement` by what a claim is about.
    shuffled, shuffled_whole: of samples with the claims of all other captions.
    chance, chance_whole: of real images with the claims of all other captions.
    real, real_whole: of real images with their own claims, by the same judge.
    samples, held_out: how many images of each there were.
  """
  agreement: float
  whole: float
  per_kind: dict[str, float | None]
  shuffled: float
  shuffled_whole: float
  chance: float
  chance_whole: float
  real: float
  real_whole: float
  samples: int
  held_out: int


def caption_agreement(samples: tuple[Images, Claims], held_out: tuple[Images, Claims], judge: Judge
                      ) -> CaptionAgreement:
  """Holds the claims of captions against samples, and against real images.

  Args:
    samples, held_out: images of 2 x 2 digits and the claims of their captions.
    judge: the digits 0..9 of images of single ones.

  Raises:
    ValueError: fewer than two of either, or images whose sides are odd.
  """
  if min(len(samples[0]), len(held_out[0])) < 2:
    raise ValueError(f'{len(samples[0])} samples and {len(held_out[0])} real images; agreement by '
                     'chance needs two or more of each.')
  found, real = (read(images, judge) for images, _ in (samples, held_out))
  kept = judged(samples[1], found)
  per_kind = {kind: _share(kept[:, list(columns)]) if (kept[:, list(columns)] >= 0).any() else None
              for kind, columns in KINDS.items()}
  own = judged(held_out[1], real)
  shuffled, shuffled_whole = _others(samples[1], found)
  chance, chance_whole = _others(held_out[1], real)
  return CaptionAgreement(
      _share(kept), _whole(kept), per_kind, shuffled, shuffled_whole, chance, chance_whole,
      _share(own), _whole(own), len(found), len(real))


def read(images: Images, judge: Judge) -> Int[np.ndarray, '_b 5']:
  """What an image shows: the digits of its quadrants, and 0 or 1 for the half with more ink.

  -1 where both halves have the same.
  """
  height, width = images.shape[1:3]
  if height % 2 or width % 2:
    raise ValueError(f'Images of {height} x {width} have no quadrants; give even sides.')
  rows, columns = slice(0, height // 2), slice(0, width // 2)
  below, right = slice(height // 2, None), slice(width // 2, None)
  digits = [judge(images[:, y, x]) for y in (rows, below) for x in (columns, right)]
  ink = [images[:, :, x].astype(np.int64).sum((1, 2, 3)) for x in (columns, right)]
  half = np.where(ink[0] == ink[1], -1, ink[1] > ink[0])
  return np.stack([*digits, half], 1).astype(np.int32)


def judged(claims: Claims, shown: Int[np.ndarray, '_b 5']) -> Int[np.ndarray, '_b 8']:
  """1 where a claim holds of what is shown, 0 where it does not, -1 where none is made.

  Of `claims` (the digit of each corner, a digit and how many there are of it, the sum, its
  remainder by 2, the half with more ink) the fifth column is no claim of its own.
  """
  digits = shown[:, :4]
  count = (digits == claims[:, 4:5]).sum(1)
  total = digits.sum(1)
  truth = np.stack([*digits.T, count, total, total % 2, shown[:, 4]], 1)
  said = np.concatenate([claims[:, :4], claims[:, 5:]], 1)
  return np.where(said < 0, -1, said == truth).astype(np.int32)


def _share(kept: Int[np.ndarray, '_b _k']) -> float:
  """Of the claims that are made."""
  return float((kept == 1).sum() / max((kept >= 0).sum(), 1))


def _whole(kept: Int[np.ndarray, '_b _k']) -> float:
  """Of the captions."""
  return float((kept != 0).all(1).mean())


def _others(claims: Claims, shown: Int[np.ndarray, '_b 5']) -> tuple[float, float]:
  """`_share` and `_whole` over all pairs of a caption and an image that is not its own."""
  held = made = whole = 0
  for i, row in enumerate(claims):
    kept = judged(np.broadcast_to(row, claims.shape), shown)
    kept = np.delete(kept, i, 0)
    held, made = held + int((kept == 1).sum()), made + int((kept >= 0).sum())
    whole += int((kept != 0).all(1).sum())
  n = len(claims)
  return float(held / max(made, 1)), float(whole / (n * (n - 1)))
