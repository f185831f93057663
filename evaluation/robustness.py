"""How a tokenizer bears wrong tokens, and whether its own images keep their tokens.

`perturb` is the latent perturbation of RobustTok (arXiv 2503.08354) at evaluation: each token is,
with probability alpha, replaced by a uniform pick among its delta nearest codes. The Frechet
distance of images decoded so (their pFID) follows generation quality better than that of clean
reconstructions, because a generator's tokens are slightly wrong too. The published code ranks codes
by distance to the latent; tokens alone are known here, so it is by distance to the token's own
code. Both count the nearest code itself as one of delta: a share alpha / delta changes nothing.

`recode` decodes and encodes again: a tokenizer that is stable on its own images keeps every token.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from smalti.evaluation import reconstruction
from smalti.evaluation.reconstruction import Reconstruction
from smalti.tokenizers.spec import TokenSpec

Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8
Tokens = Int[np.ndarray, '_b _n _d']
# uint8 images to tokens, and back; the second argument is the place of the first among all, for
# tokenizers that draw: an example has the same noise in every batch and round.
Encode = Callable[[np.ndarray, int], np.ndarray]
Decode = Callable[[np.ndarray, int], np.ndarray]

ALPHA, DELTA = .1, 100  # README of lxa9867/ImageFolder, the code of RobustTok
BLOCK = 1 << 24  # distances in work at once


@dataclasses.dataclass(frozen=True)
class Perturbed:
  """Reconstructions from clean and from perturbed tokens.

  Attributes:
    alpha: probability that a token is drawn anew.
    delta: it is drawn from so many nearest codes; None where from the whole alphabet.
    changed: share of tokens that became another one.
    clean: errors without perturbation.
    perturbed: errors with it.
    psnr_drop: clean.psnr - perturbed.psnr in dB; None where either is.
  """
  alpha: float
  delta: int | None
  changed: float
  clean: Reconstruction
  perturbed: Reconstruction
  psnr_drop: float | None


@dataclasses.dataclass(frozen=True)
class Recoded:
  """Tokens and images after 1, 2, ... rounds of decode, uint8, encode.

  Attributes:
    images: how many.
    unchanged: share of tokens equal to those of the round before; 1 is a fixed point.
    kept: share of tokens equal to those of the original images.
    psnr: against the original images, of the reconstruction (first) and of every later round.
    drift: psnr[0] - psnr[-1] in dB; None where either is None (exact reconstructions).
  """
  images: int
  unchanged: tuple[float, ...]
  kept: tuple[float, ...]
  psnr: tuple[float | None, ...]
  drift: float | None


def perturb(spec: TokenSpec, tokens: Tokens, *, alpha: float = ALPHA,
            near: Sequence[Int[np.ndarray, '_v _near']] | None = None, seed: int = 0,
            start: int = 0) -> Tokens:
  """Tokens of which a share alpha is drawn anew; an EOS and what follows it stay.

  The draw of row i depends on `seed` and `start + i` only, whatever the batch.

  Args:
    alpha: probability in [0, 1].
    near: `nearest` of the codes, one table per depth; None draws from the whole alphabet.

  Raises:
    ValueError: alpha out of range, or tables of other alphabets.
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f'{alpha=} is a probability; give one in [0, 1].')
  if near is not None and [len(table) for table in near] != [*spec.vocab]:
    raise ValueError(f'Tables of {[len(table) for table in near]} codes do not fit '
                     f'vocab={spec.vocab}; give `nearest` of the codes of every depth.')
  out = np.array(tokens, np.int32)
  draws = np.zeros((len(out), 2, spec.length, spec.depth))
  for i in range(len(out)):
    draws[i] = np.random.default_rng((seed, start + i)).random(draws[i].shape)
  hit = (draws[:, 0] < alpha) & np.asarray(spec.valid(out))
  if spec.eos is not None:
    hit &= out != spec.eos
  for depth, vocab in enumerate(spec.vocab):
    where = hit[:, :, depth]
    old, draw = out[:, :, depth][where], draws[:, 1, :, depth][where]
    if near is None:
      new = draw * (vocab - (spec.eos is not None))  # an EOS would end the string
    else:
      new = near[depth][old, (draw * near[depth].shape[1]).astype(int)]
    out[:, :, depth][where] = new.astype(np.int32)
  return out


def nearest(codes: Float[np.ndarray, 'v c'], delta: int = DELTA) -> Int[np.ndarray, 'v near']:
  """The `delta` codes nearest to every code, itself first; the whole alphabet where it is smaller.

  By Euclidean distance: give unit vectors for a codebook that compares directions.

  Raises ValueError for a delta below 1.
  """
  if delta < 1:
    raise ValueError(f'{delta=} nearest codes; give 1 or more.')
  codes, count = np.asarray(codes, np.float64), min(delta, len(codes))
  squares, out = np.square(codes).sum(1), np.zeros((len(codes), count), np.int32)
  step = max(1, BLOCK // len(codes))
  for i in range(0, len(codes), step):
    rows = np.arange(i, min(i + step, len(codes)))
    distances = squares - 2 * codes[rows] @ codes.T  # and |row|^2, the same along a row
    distances[rows - i, rows] = -np.inf  # rounding must not put a twin before it
    picked = np.sort(np.argpartition(distances, count - 1, 1)[:, :count], 1)
    order = np.argsort(np.take_along_axis(distances, picked, 1), 1, kind='stable')
    out[rows] = np.take_along_axis(picked, order, 1)
  return out


def perturbed(encode: Encode, decode: Decode, spec: TokenSpec, images: Images, *,
              alpha: float = ALPHA, delta: int = DELTA,
              codes: Sequence[Float[np.ndarray, '_v _c']] | None = None, seed: int = 0,
              batch: int = 256) -> Perturbed:
  """Reconstruction errors with and without `perturb`.

  Args:
    codes: the vectors of every code, one array [V, C] per depth; tokens then move to one of the
      `delta` nearest codes. None draws from the whole alphabet.
  """
  near = None if codes is None else [nearest(table, delta) for table in codes]
  clean, noisy, changed, total = [], [], 0, 0
  for start in range(0, len(images), batch):
    real = images[start:start + batch]
    tokens = np.asarray(encode(real, start))
    wrong = perturb(spec, tokens, alpha=alpha, near=near, seed=seed, start=start)
    valid = np.asarray(spec.valid(tokens))
    changed, total = changed + int((wrong != tokens)[valid].sum()), total + int(valid.sum())
    clean.append(reconstruction.measure(real, np.asarray(decode(tokens, start))))
    noisy.append(reconstruction.measure(real, np.asarray(decode(wrong, start))))
  before, after = reconstruction.summarize(clean), reconstruction.summarize(noisy)
  return Perturbed(
      alpha=alpha, delta=None if codes is None else delta, changed=changed / total, clean=before,
      perturbed=after, psnr_drop=_difference(before.psnr, after.psnr))


def recode(encode: Encode, decode: Decode, spec: TokenSpec, images: Images, *, rounds: int = 1,
           batch: int = 256) -> Recoded:
  """Decodes and encodes `rounds` times. What follows an EOS of the earlier tokens does not count.

  Raises:
    ValueError: rounds below 1, or no images.
  """
  if rounds < 1 or not len(images):
    raise ValueError(f'{rounds=} of {len(images)} images; give 1 or more of both.')
  errors: list[list] = [[] for _ in range(rounds + 1)]
  same, kept = np.zeros((2, rounds), int), np.zeros((2, rounds), int)
  for start in range(0, len(images), batch):
    real = images[start:start + batch]
    first = tokens = np.asarray(encode(real, start))
    for step in range(rounds + 1):
      decoded = np.asarray(decode(tokens, start))
      errors[step].append(reconstruction.measure(real, decoded))
      if step == rounds:
        break
      before, tokens = tokens, np.asarray(encode(decoded, start))
      same[:, step] += _equal(spec, before, tokens)
      kept[:, step] += _equal(spec, first, tokens)
  psnr = tuple(reconstruction.summarize(parts).psnr for parts in errors)
  return Recoded(
      images=len(images), unchanged=tuple(map(float, same[0] / same[1])),
      kept=tuple(map(float, kept[0] / kept[1])), psnr=psnr, drift=_difference(psnr[0], psnr[-1]))


def _equal(spec: TokenSpec, before: Tokens, after: Tokens) -> tuple[int, int]:
  valid = np.asarray(spec.valid(before))
  return int((before == after)[valid].sum()), int(valid.sum())


def _difference(a: float | None, b: float | None) -> float | None:
  return None if a is None or b is None else a - b

