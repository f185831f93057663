"""Images to the 299 pixels of Inception, in the four ways that published scores use.

FID moves with the mode (Parmar et al. 2022, arXiv 2104.11222), so that a mode is part of an
extractor's identity:

  tf1             bilinear as in TensorFlow 1: no half-pixel centres, no antialiasing. The graph's
                  own, of TTUR, the ADM evaluator and torch-fidelity; what a plain FID means
  clean           Pillow's antialiased bicubic per channel on floats, clipped and not rounded
  legacy_pytorch  bilinear with half-pixel centres, no antialiasing, of [0, 1]: pytorch-fid
  none            as they come

`jax.image.resize` has half-pixel centres and antialiasing, and is none of them.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped
from PIL import Image

MODES = ('tf1', 'clean', 'legacy_pytorch', 'none')

Taps = tuple[np.ndarray, np.ndarray, np.ndarray]


def tf1(x: Float[Array, 'b h w c'], side: int) -> Float[Array, 'b s s c']:
  """Samples at i * in / out, from the pixel below or at it and the next one."""
  def taps(size: int) -> Taps:
    return _neighbours(np.arange(side, dtype=np.float32) * np.float32(size / side), size)

  return _bilinear(x, taps)


def legacy_pytorch(x: Float[Array, 'b h w c'], side: int) -> Float[Array, 'b s s c']:
  """Samples at max(0, (i + 1/2) * in / out - 1/2)."""
  def taps(size: int) -> Taps:
    scale = np.float32(size / side)
    at = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    return _neighbours(np.maximum(at, 0), size)

  return _bilinear(x, taps)


def clean(images: Shaped[np.ndarray, 'b h w c'], side: int) -> Float[np.ndarray, 'b s s c']:
  """Pillow's bicubic, which widens its kernel when it makes images smaller; clipped to [0, 255]."""
  out = np.empty((len(images), side, side, images.shape[3]), np.float32)
  for i, image in enumerate(images):
    for c in range(images.shape[3]):
      plane = Image.fromarray(image[..., c].astype(np.float32))
      out[i, ..., c] = np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC))
  return np.clip(out, 0, 255)


def _neighbours(at: np.ndarray, size: int) -> Taps:
  low = np.floor(at).astype(np.int32)
  return low, np.minimum(low + 1, size - 1), at - low.astype(np.float32)


def _bilinear(x: Float[Array, 'b h w c'], taps) -> Float[Array, 'b s s c']:
  # TensorFlow's order: along rows first, low + (high - low) * weight
  low, high, weight = taps(x.shape[2])
  x = x[:, :, low] + (x[:, :, high] - x[:, :, low]) * weight[:, None]
  low, high, weight = taps(x.shape[1])
  return x[:, low] + (x[:, high] - x[:, low]) * jnp.asarray(weight)[:, None, None]
