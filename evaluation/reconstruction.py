"""PSNR and SSIM of uint8 reconstructions, per image.

Everything is measured on uint8 images (round floats with `networks.pixels.to_uint8` first) with a
data range of 255, per image, then averaged over images.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped

Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8, checked below: floats are refused

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, section III.C
K1, K2 = 0.01, 0.03


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
  """
  images: int
  psnr: float | None
  exact: int
  psnr_of_mean: float | None
  ssim: float
  window: int
  l1: float

  @property
  def ssim_name(self) -> str:
    """'ssim' with the window of the paper, 'ssim_w7' with one of 7 pixels."""
    return 'ssim' if self.window == WINDOW else f'ssim_w{self.window}'


def compare(images: Images, reconstructions: Images) -> Reconstruction:
  """All numbers of this module for one set of images. Raises ValueError where shapes differ."""
  values, errors = psnr(images, reconstructions), mse(images, reconstructions)
  exact = np.isinf(values)
  mean = float(errors.mean())
  return Reconstruction(
      images=len(images),
      psnr=None if exact.all() else float(values[~exact].mean()),
      exact=int(exact.sum()),
      psnr_of_mean=None if mean == 0 else -10 * float(np.log10(mean)),
      ssim=float(ssim(images, reconstructions).mean()),
      window=window(images.shape[1:3]),
      l1=float(np.abs(_unit(images) - _unit(reconstructions)).mean()))


def mse(images: Images, reconstructions: Images) -> Float[np.ndarray, 'b']:
  """Mean squared error per image, of values in [0, 1]."""
  _check(images, reconstructions)
  return np.square(_unit(images) - _unit(reconstructions)).mean((1, 2, 3))


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
  _check(images, reconstructions)
  taps = _taps(window(images.shape[1:3]))
  x, y = _unit(images), _unit(reconstructions)
  blur = lambda z: _filter(z, taps)  # noqa: E731
  mean_x, mean_y = blur(x), blur(y)
  variance_x = blur(x * x) - mean_x ** 2
  variance_y = blur(y * y) - mean_y ** 2
  covariance = blur(x * y) - mean_x * mean_y
  c1, c2 = K1 ** 2, K2 ** 2
  value = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
           / ((mean_x ** 2 + mean_y ** 2 + c1) * (variance_x + variance_y + c2)))
  return value.mean((1, 2, 3))


def window(size: tuple[int, int]) -> int:
  """11, or the largest odd number of pixels that fits into an image of `size`."""
  side = min(size)
  return min(WINDOW, side - 1 + side % 2)


def _taps(side: int) -> Float[np.ndarray, 'k']:
  offset = np.arange(side) - side // 2
  taps = np.exp(-offset ** 2 / (2 * SIGMA ** 2))
  return taps / taps.sum()


def _filter(x: Float[np.ndarray, 'b h w c'], taps: Float[np.ndarray, 'k']) -> np.ndarray:
  for axis in (1, 2):
    size = x.shape[axis] - len(taps) + 1
    x = sum(tap * np.take(x, np.arange(i, i + size), axis) for i, tap in enumerate(taps))
  return x


def _unit(images: Images) -> Float[np.ndarray, 'b h w c']:
  return images.astype(np.float64) / 255


def _check(images: Images, reconstructions: Images) -> None:
  for array in (images, reconstructions):
    if array.dtype != np.uint8 or array.ndim != 4:
      raise ValueError(f'Images of {array.dtype}{list(array.shape)} must be uint8[B, H, W, C]; '
                       'round floats with networks.pixels.to_uint8.')
  if images.shape != reconstructions.shape:
    raise ValueError(f'Images {images.shape} and reconstructions {reconstructions.shape} differ.')
  if not len(images):
    raise ValueError('No images to compare; give at least one.')
