"""The four ways to 299 pixels, against NumPy written from their rules and against Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from smalti.evaluation import resize


def tf1_by_hand(image, side):
  """Rows and columns one by one, in float32."""
  height, width = image.shape[:2]
  out = np.empty((side, side, image.shape[2]), np.float32)
  scale_y, scale_x = np.float32(height) / np.float32(side), np.float32(width) / np.float32(side)
  for i in range(side):
    y = np.float32(i) * scale_y
    top, bottom = int(y), min(int(y) + 1, height - 1)
    for j in range(side):
      x = np.float32(j) * scale_x
      left, right = int(x), min(int(x) + 1, width - 1)
      upper = image[top, left] + (image[top, right] - image[top, left]) * (x - np.float32(left))
      lower = image[bottom, left] + (
          image[bottom, right] - image[bottom, left]) * (x - np.float32(left))
      out[i, j] = upper + (lower - upper) * (y - np.float32(top))
  return out


def line(values, side, mode):
  x = jnp.asarray(values, jnp.float32)[None, None, :, None]
  return np.asarray(getattr(resize, mode)(jnp.broadcast_to(x, (1, side, len(values), 1)), side))[
      0, 0, :, 0]


def test_the_published_lines():
  np.testing.assert_array_equal(line(range(4), 8, 'tf1'), [0, .5, 1, 1.5, 2, 2.5, 3, 3])
  np.testing.assert_array_equal(line(range(4), 2, 'tf1'), [0, 2])
  np.testing.assert_array_equal(
      line(range(4), 3, 'tf1'), np.float32([0, 1.3333334, 2.6666667]))


@pytest.mark.parametrize('shape', [(32, 32), (57, 23), (64, 300)])
def test_tf1_is_the_rule(shape):
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.float32)
  got = jax.jit(resize.tf1, static_argnums=1)(image[None], 61)[0]
  np.testing.assert_allclose(got, tf1_by_hand(image, 61), atol=1e-4)  # of 255; fused products
  assert not np.allclose(got, jax.image.resize(image, (61, 61, 3), 'bilinear'), atol=1)


def test_no_mode_moves_an_image_of_its_size():
  x = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3)).astype(np.float32)
  for mode in (resize.tf1, resize.legacy_pytorch, resize.clean):
    np.testing.assert_array_equal(mode(x, 40), x)


def test_half_pixel_centres():
  """torch's bilinear without aligned corners: 4 to 8 and to 2, by hand."""
  np.testing.assert_allclose(
      line(range(4), 8, 'legacy_pytorch'), [0, .25, .75, 1.25, 1.75, 2.25, 2.75, 3], rtol=1e-6)
  np.testing.assert_allclose(line(range(4), 2, 'legacy_pytorch'), [.5, 2.5], rtol=1e-6)


@pytest.mark.parametrize('shape', [(20, 30), (90, 70)])
def test_clean_is_pillow_on_floats(shape):
  images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
  got = resize.clean(images, 45)
  plane = Image.fromarray(images[1, ..., 2].astype(np.float32))
  want = np.asarray(plane.resize((45, 45), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(got[1, ..., 2], np.clip(want, 0, 255))
  assert got.dtype == np.float32 and np.mean(got == np.rint(got)) < 0.2  # clipped, not rounded
  if shape == (20, 30):
    assert want.min() < 0 and want.max() > 255  # there was something to clip
