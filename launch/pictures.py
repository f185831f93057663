"""Pictures of many images: grids as arrays, and as PNG files.

Tiny images are enlarged by whole factors without smoothing, so that a pixel stays a square.
"""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from smalti.evaluation.files import whole

Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8, checked below: floats are refused

TILE = 64  # pixels that a small image is enlarged to, about
GAP = 2
TEXT = 11  # pixels of a label
GRAY = (128, 128, 128, 255)  # legible on light and on dark pages


def grid(images: Images, columns: int | None = None, scale: int | None = None, *, gap: int = GAP,
         band: int = 0, footer: int = 0, fill: int = 255) -> UInt8[np.ndarray, 'h w c']:
  """Images row by row in one array.

  Args:
    columns: per row; None makes the grid about square.
    scale: whole factor of enlargement; None takes small images to about 64 pixels.
    gap: pixels between images.
    band: rows that belong together, such as 2 for inputs above reconstructions; between bands the
      gap is 4 times as high. 0 is none.
    footer: pixels left free below every image, for a label.
    fill: value of the gaps and of missing images.
  """
  _check(images)
  count, height, width, channels = images.shape
  columns = _columns(count, columns)
  scale = _scale(images, scale)
  rows = -(-count // columns)
  tile_h, tile_w = height * scale + footer + gap, width * scale + gap
  tops = [row * tile_h + (row // band * 3 * gap if band else 0) for row in range(rows)]
  out = np.full((tops[-1] + tile_h - gap, columns * tile_w - gap, channels), fill, np.uint8)
  for i, image in enumerate(images):
    top, left = tops[i // columns], i % columns * tile_w
    out[top:top + height * scale, left:left + width * scale] = (
        image.repeat(scale, 0).repeat(scale, 1))
  return out


def save_grid(path: str | os.PathLike, images: Images, columns: int | None = None,
              scale: int | None = None, *, band: int = 0,
              labels: Sequence[str] | None = None) -> None:
  """Writes a grid as a PNG with transparent gaps, whole or not at all.

  Args:
    band: rows that belong together, see `grid`.
    labels: a short text below every image.
  """
  _check(images)
  if labels is not None and len(labels) != len(images):
    raise ValueError(f'{len(labels)} labels for {len(images)} images; give one for each.')
  footer = 0 if labels is None else TEXT + 4
  layout = dict(columns=columns, scale=scale, band=band, footer=footer)
  colours = grid(images, **layout)
  if images.shape[3] == 1:
    colours = colours.repeat(3, 2)
  opaque = grid(np.full((*images.shape[:3], 1), 255, np.uint8), **layout, fill=0)
  picture = Image.fromarray(np.concatenate([colours[..., :3], opaque], 2), 'RGBA')
  if labels is not None:
    _write_labels(picture, labels, images, columns, scale, band, footer)
  with whole(path) as file:
    picture.save(file, 'PNG', optimize=True)


def _write_labels(picture: Image.Image, labels: Sequence[str], images: Images,
                  columns: int | None, scale: int | None, band: int, footer: int) -> None:
  """Draws the labels, cut to the width of a tile, below the images."""
  columns, scale = _columns(len(images), columns), _scale(images, scale)
  tile_h, tile_w = (side * scale for side in images.shape[1:3])
  font, draw = ImageFont.load_default(TEXT), ImageDraw.Draw(picture)
  for i, label in enumerate(labels):
    while label and draw.textlength(label, font) > tile_w:
      label = label[:-1]
    left = i % columns * (tile_w + GAP) + tile_w / 2
    row = i // columns
    top = row * (tile_h + footer + GAP) + (row // band * 3 * GAP if band else 0)
    draw.text((left, top + tile_h + footer / 2), label, GRAY, font, anchor='mm')


def _columns(count: int, columns: int | None) -> int:
  if columns is not None and columns < 1:
    raise ValueError(f'{columns=} must be 1 or more.')
  return min(count, columns or round(count**0.5) or 1)


def _scale(images: Images, scale: int | None) -> int:
  if scale is not None and scale < 1:
    raise ValueError(f'{scale=} must be a whole factor of 1 or more.')
  return scale or max(1, TILE // max(images.shape[1:3]))


def _check(images: Images) -> None:
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
    raise ValueError(f'Images of {images.dtype}{list(images.shape)} must be uint8[B, H, W, 1 or 3];'
                     ' round floats with networks.pixels.to_uint8.')
  if not images.size:
    raise ValueError(f'Images of shape {list(images.shape)} have no pixels; give one or more.')
