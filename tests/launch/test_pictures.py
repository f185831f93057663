"""Grids: every pixel of every image is found where it belongs, enlarged without smoothing."""

import numpy as np
import pytest
from PIL import Image

from smalti.launch import pictures


@pytest.mark.parametrize('count, columns, scale, channels', [
    (7, 3, 1, 3), (7, 3, 4, 1), (1, None, 2, 3), (16, None, None, 1), (2, 9, 3, 1)])
def test_every_image_is_at_its_place(count, columns, scale, channels):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 250, (count, 8, 6, channels), np.uint8)
  out = pictures.grid(images, columns, scale, gap=2, fill=255)
  columns, scale = min(columns or 4, count), scale or 8
  rows = -(-count // columns)
  assert out.shape == (rows * (8 * scale + 2) - 2, columns * (6 * scale + 2) - 2, channels)
  seen = np.zeros(out.shape[:2], bool)
  for i in range(count):
    top, left = i // columns * (8 * scale + 2), i % columns * (6 * scale + 2)
    tile = out[top:top + 8 * scale, left:left + 6 * scale]
    for di in range(scale):
      for dj in range(scale):
        np.testing.assert_array_equal(tile[di::scale, dj::scale], images[i])
    seen[top:top + 8 * scale, left:left + 6 * scale] = True
  assert (out[~seen] == 255).all()


def test_bands_stand_apart():
  images = np.arange(1, 13, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
  out = pictures.grid(images, 2, 1, gap=1, band=2, fill=0)[:, 0, 0]
  rows = [row for i in range(1, 12, 2) for row in [i] * 4 + [0] * (1 if i % 4 == 1 else 4)]
  np.testing.assert_array_equal(out, rows[:-4])


def test_files_are_transparent_between_images_and_exact_within(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
  pictures.save_grid(tmp_path / 'new' / 'grid.png', images, columns=3, scale=2)
  with Image.open(tmp_path / 'new' / 'grid.png') as picture:
    pixels = np.asarray(picture)
  np.testing.assert_array_equal(pixels[..., 0], np.where(
      pixels[..., 3] == 255, pictures.grid(images, 3, 2)[..., 0], 255))
  assert (pixels[..., 3] == 255).sum() == 5 * 16 * 16  # and nothing else is opaque
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['grid.png']


def test_labels_are_drawn_below_and_leave_the_images_alone(tmp_path):
  images = np.zeros((4, 8, 8, 3), np.uint8)
  path = tmp_path / 'grid.png'
  pictures.save_grid(path, images, columns=2, labels=['0', 'a very long label', '', '3'])
  with Image.open(path) as picture:
    pixels = np.asarray(picture)
  footer = pictures.TEXT + 4
  assert pixels.shape == (2 * (64 + footer) + 2, 130, 4)
  assert not pixels[:64, :64, :3].any() and (pixels[:64, :64, 3] == 255).all()
  assert pixels[64:64 + footer, :64, 3].any() and pixels[64:64 + footer, 66:, 3].any()
  assert not pixels[64 + footer + 2 + 64:, :64, 3].any()  # the empty label
  assert not pixels[:, 64:66, 3].any()  # nothing crosses the gap


@pytest.mark.parametrize('images, message', [
    (np.zeros((2, 8, 8, 1), np.float32), 'to_uint8'), (np.zeros((2, 8, 8, 2), np.uint8), '1 or 3'),
    (np.zeros((0, 8, 8, 1), np.uint8), 'no pixels')])
def test_refusals(images, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    pictures.grid(images)
  with pytest.raises(ValueError, match='one for each'):
    pictures.save_grid(tmp_path / 'x.png', np.zeros((2, 8, 8, 1), np.uint8), labels=['1'])
  with pytest.raises(ValueError, match='columns=0'):
    pictures.grid(np.zeros((2, 8, 8, 1), np.uint8), 0)
