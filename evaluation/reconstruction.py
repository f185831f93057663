"""PSNR, SSIM and MS-SSIM of uint8 reconstructions, per image.

Everything is measured on uint8 images (round floats with `networks.pixels.to_uint8` first) with a
data range of 255, per image, then averaged over images. A data set that does not fit in memory goes
through `measure` batch by batch and `summarize` once.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Shaped

Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8, checked below: floats are refused

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, section III.C
K1, K2 = 0.01, 0.03
SCALES = (.0448, .2856, .3001, .2363, .1333)  # Wang, Simoncelli and Bovik 2003, section 3.2
SMALLEST = WINDOW * 2 ** (len(SCALES) - 1)  # 176 pixels: the window still fits at the last scale
CHUNK = 1 << 20  # pixel values in work at once: some 0.1 GB of float64 maps


@dataclasses.dataclass(frozen=True, eq=False)
class Errors:
  """What `measure` says of every image.

  Attributes:
    mse: mean squared error of values in [0, 1].
    l1: mean absolute error of values in [0, 1].
    ssim: structural similarity.
    ms_ssim: the same over five scales; None for images below 176 pixels.
    window: side of SSIM's window; 11 in the paper, less for images below 11 pixels.
  """
  mse: Float[np.ndarray, 'b']
  l1: Float[np.ndarray, 'b']
  ssim: Float[np.ndarray, 'b']
  ms_ssim: Float[np.ndarray, 'b'] | None
  window: int

  @property
  def psnr(self) -> Float[np.ndarray, 'b']:
    """-10 log10(MSE) per image in dB; infinite for an exact image."""
    with np.errstate(divide='ignore'):
      return -10 * np.log10(self.mse)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """Averages over images.

  Attributes:
    images: how many.
    psnr: mean over images that are not exact, in dB; None where all are.
    exact: images without any error, whose PSNR is infinite.
    psnr_of_mean: PSNR of the mean squared error of all images, another number; None where it is 0.
    ssim: mean of the structural similarity.
    window: side of SSIM's window; 11 in the paper, less for images below 11 pixels.
    l1: mean absolute error in [0, 1].
    ms_ssim: mean over images; None for images below 176 pixels, for which there is no such number.
  """
  images: int
  psnr: float | None
  exact: int
  psnr_of_mean: float | None
  ssim: float
  window: int
  l1: float
  ms_ssim: float | None = None

  @property
  def ssim_name(self) -> str:
    """'ssim' with the window of the paper, 'ssim_w7' with one of 7 pixels."""
    return 'ssim' if self.window == WINDOW else f'ssim_w{self.window}'


def compare(images: Images, reconstructions: Images) -> Reconstruction:
  """All numbers of this module for one set of images. Raises ValueError where shapes differ."""
  return summarize([measure(images, reconstructions)])


def measure(images: Images, reconstructions: Images) -> Errors:
  """Every number of every image. Raises ValueError where shapes differ, or for floats."""
  scales = len(SCALES) if min(images.shape[1:3]) >= SMALLEST else 1

  def columns(x: Images, y: Images) -> np.ndarray:
    x, y = _unit(x), _unit(y)
    similarity = _similarity(x, y, scales)
    return np.stack([np.square(x - y).mean((1, 2, 3)), np.abs(x - y).mean((1, 2, 3)),
                     similarity[0][0].mean(1), _combined(similarity)], 1)

  mse, l1, ssim, combined = _each(columns, images, reconstructions).T
  return Errors(mse=mse, l1=l1, ssim=ssim, ms_ssim=combined if scales > 1 else None,
                window=window(images.shape[1:3]))


def summarize(parts: Sequence[Errors]) -> Reconstruction:
  """Averages over the images of all parts; the same however they were divided.

  Raises ValueError for no parts, and for images of which only some have MS-SSIM or one window.
  """
  if len({(part.window, part.ms_ssim is None) for part in parts}) != 1:
    raise ValueError(f'{len(parts)} parts with windows {sorted({p.window for p in parts})} do not '
                     'average; give one or more, of images of one size.')
  all_of = lambda name: np.concatenate([getattr(p, name) for p in parts])  # noqa: E731
  values, mean = all_of('psnr'), float(all_of('mse').mean())
  exact = np.isinf(values)
  return Reconstruction(
      images=len(values),
      psnr=None if exact.all() else float(values[~exact].mean()),
      exact=int(exact.sum()),
      psnr_of_mean=None if mean == 0 else -10 * float(np.log10(mean)),
      ssim=float(all_of('ssim').mean()),
      window=parts[0].window,
      l1=float(all_of('l1').mean()),
      ms_ssim=None if parts[0].ms_ssim is None else float(all_of('ms_ssim').mean()))


def mse(images: Images, reconstructions: Images) -> Float[np.ndarray, 'b']:
  """Mean squared error per image, of values in [0, 1]."""
  return _each(lambda x, y: np.square(_unit(x) - _unit(y)).mean((1, 2, 3)),
               images, reconstructions)


def psnr(images: Images, reconstructions: Images) -> Float[np.ndarray, 'b']:
  """-10 log10(MSE) per image in dB; infinite for an exact image, 48.13 for one level everywhere."""
  with np.errstate(divide='ignore'):
    return -10 * np.log10(mse(images, reconstructions))


def ssim(images: Images, reconstructions: Images) -> Float[np.ndarray, 'b']:
  """Structural similarity per image, Wang et al. 2004, in its original form.

  Gaussian window of 11 pixels with sigma 1.5, population covariances, windows within the image only
  ('valid'), per channel, then the mean. Images below 11 pixels have a smaller window, see `window`:
  such a value is not the published measure and is called `ssim_w7` or the like.
  """
  return _each(lambda x, y: _similarity(_unit(x), _unit(y), 1)[0][0].mean(1),
               images, reconstructions)


def ms_ssim(images: Images, reconstructions: Images) -> Float[np.ndarray, 'b']:
  """SSIM over five scales per image, Wang, Simoncelli and Bovik 2003, equation 7.

  prod_s contrast_s^w_s with the full SSIM at the last scale, per channel, then the mean; a negative
  factor counts as 0 (its power is none). Images are halved by 2x2 means between scales, an odd row
  or column repeated.

  Raises:
    ValueError: a side is below 176 pixels, where the window does not fit at the last scale.
  """
  if min(images.shape[1:3]) < SMALLEST:
    raise ValueError(f'MS-SSIM needs images of {SMALLEST} pixels or more, got {images.shape[1:3]}; '
                     'a smaller window would be another measure. Use ssim.')
  return _each(lambda x, y: _combined(_similarity(_unit(x), _unit(y), len(SCALES))),
               images, reconstructions)


def window(size: tuple[int, ...]) -> int:
  """11, or the largest odd number of pixels that fits into an image of `size`."""
  side = min(size)
  return min(WINDOW, side - 1 + side % 2)


def _similarity(x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c'], scales: int
                ) -> list[tuple[np.ndarray, np.ndarray]]:
  """(SSIM, its contrast and structure alone), each [b, c], for every scale."""
  taps, out = _taps(window(x.shape[1:3])), []
  for scale in range(scales):
    if scale:
      x, y = _half(x), _half(y)
    mean_x, mean_y = _filter(x, taps), _filter(y, taps)
    variances = _filter(x * x + y * y, taps) - mean_x ** 2 - mean_y ** 2
    covariance = _filter(x * y, taps) - mean_x * mean_y
    c1, c2 = K1 ** 2, K2 ** 2
    contrast = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x ** 2 + mean_y ** 2 + c1)
    out.append(((luminance * contrast).mean((1, 2)), contrast.mean((1, 2))))
  return out


def _combined(scales: list[tuple[np.ndarray, np.ndarray]]) -> Float[np.ndarray, 'b']:
  factors = [contrast for _, contrast in scales[:-1]] + [scales[-1][0]]
  powers = [np.maximum(f, 0) ** weight for f, weight in zip(factors, SCALES)]
  return np.prod(powers, 0).mean(1)


def _half(x: Float[np.ndarray, 'b h w c']) -> Float[np.ndarray, 'b h2 w2 c']:
  for axis in (1, 2):
    even, odd = (x[:, i::2] if axis == 1 else x[:, :, i::2] for i in (0, 1))
    if x.shape[axis] % 2:  # the last row stands for the one that it lacks
      odd = np.concatenate([odd, np.take(x, [-1], axis)], axis)
    x = (even + odd) / 2
  return x


def _taps(side: int) -> Float[np.ndarray, 'k']:
  offset = np.arange(side) - side // 2
  taps = np.exp(-offset ** 2 / (2 * SIGMA ** 2))
  return taps / taps.sum()


def _filter(x: Float[np.ndarray, 'b h w c'], taps: Float[np.ndarray, 'k']) -> np.ndarray:
  rows, columns = (size - len(taps) + 1 for size in x.shape[1:3])
  x = sum(tap * x[:, i:i + rows] for i, tap in enumerate(taps))
  return sum(tap * x[:, :, i:i + columns] for i, tap in enumerate(taps))


def _unit(images: Images) -> Float[np.ndarray, 'b h w c']:
  return images.astype(np.float64) / 255


def _each(function: Callable, images: Images, reconstructions: Images) -> np.ndarray:
  """`function` of a few images at a time, after the checks."""
  _check(images, reconstructions)
  step = max(1, CHUNK // images[0].size)
  return np.concatenate([function(images[i:i + step], reconstructions[i:i + step])
                         for i in range(0, len(images), step)])


def _check(images: Images, reconstructions: Images) -> None:
  for array in (images, reconstructions):
    if array.dtype != np.uint8 or array.ndim != 4:
      raise ValueError(f'Images of {array.dtype}{list(array.shape)} must be uint8[B, H, W, C]; '
                       'round floats with networks.pixels.to_uint8.')
  if images.shape != reconstructions.shape:
    raise ValueError(f'Images {images.shape} and reconstructions {reconstructions.shape} differ.')
  if not len(images):
    raise ValueError('No images to compare; give at least one.')
