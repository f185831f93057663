"""Image files from strangers to uint8 arrays, under stated caps and rules.

Decoding refuses with a reason instead of crashing: the caps on bytes and pixels are checked before
anything is decoded, only formats that Pillow decodes inside the process are tried (no EPS, which
starts Ghostscript), and whatever a decoder raises becomes a `Refused`. Rules of conversion:

- the EXIF orientation is applied; colour profiles and gamma are ignored;
- the first frame of an animation is the image;
- transparency (RGBA, LA, palettes, PNG's transparent colour) is composed over white;
- 16-bit grey keeps its high byte, as Pillow itself does for 16-bit colour;
- palettes, CMYK and YCbCr become RGB, one channel is repeated to three or three are weighted to one
  (ITU-R 601: 0.299, 0.587, 0.114);
- 32-bit integers and floats have no known range and are refused.
"""

import io
import os
import stat
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PIXELS = 2**26  # 8192 x 8192, below the 89 megapixels that Pillow opens without a word
BYTES = 2**26
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF')
Reason = Literal[
    'not a regular file', 'unreadable', 'empty', 'too many bytes', 'not an image',
    'too many pixels', 'too elongated', 'unsupported mode', 'suspicious', 'damaged',
    'out of memory', 'timed out', 'crashed the decoder', 'outside class folders']
REASONS: tuple[str, ...] = get_args(Reason)


class Refused(ValueError):
  """An image that is not used; `reason` is one of `REASONS`."""

  def __init__(self, reason: Reason, detail: str = ''):
    super().__init__(f'{reason}: {detail}' if detail else reason)
    self.reason = reason


def read_bytes(path: str | os.PathLike, limit: int = BYTES) -> bytes:
  """The bytes of a regular file of at most `limit`; a pipe or device is never opened.

  Raises:
    Refused: not a regular file, unreadable, empty, or too large.
  """
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
      raise Refused('not a regular file')
    if status.st_size > limit:
      raise Refused('too many bytes', f'{status.st_size:,}, at most {limit:,} are read')
    with open(path, 'rb') as file:
      data = file.read(limit + 1)
  except OSError as error:
    raise Refused('unreadable', error.strerror or type(error).__name__) from error
  if len(data) > limit:  # it grew since
    raise Refused('too many bytes', f'at most {limit:,} are read')
  if not data:
    raise Refused('empty')
  return data


def decode(data: bytes, channels: int = 3, pixels: int = PIXELS) -> np.ndarray:
  """uint8[H, W, channels] of an encoded image.

  Where Pillow's warnings are errors, as in the workers of `inspection`, a file that causes one is
  refused as 'suspicious'; this function does not switch them itself, because a filter of warnings
  belongs to the whole process and not to a thread.

  Args:
    channels: 1 (grey) or 3 (RGB).
    pixels: the largest number of pixels that is decoded.

  Raises:
    Refused: the image is not used, with the reason.
    ValueError: `channels` is neither 1 nor 3.
  """
  if channels not in (1, 3):
    raise ValueError(f'{channels=} must be 1 (grey) or 3 (RGB).')
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      if image.width * image.height > pixels:
        raise Refused('too many pixels', f'{image.width}x{image.height}, at most {pixels:,}')
      return _convert(ImageOps.exif_transpose(image), channels)
  except Refused:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise Refused('too many pixels', f'at most {pixels:,}') from error
  except UnidentifiedImageError as error:
    raise Refused('not an image', f'none of {", ".join(FORMATS)}') from error
  except Warning as error:
    raise Refused('suspicious', _first_line(error)) from error
  except MemoryError as error:
    raise Refused('out of memory') from error
  except Exception as error:  # a hostile file can make a decoder raise nearly anything
    raise Refused('damaged', _first_line(error)) from error


def fit(image: np.ndarray, size: int) -> np.ndarray:
  """uint8[size, size, C]: shorter side to `size`, then the centre square.

  The shorter side is halved with a box filter while it is 2 * size or more, then resized with a
  bicubic filter: `center_crop_arr` of ADM (Dhariwal and Nichol 2021, arXiv 2105.05233, published
  code), so that references and training images agree. Smaller images are enlarged.

  Raises:
    Refused: an image so elongated that resizing it would exceed the cap on pixels.
  """
  height, width, _ = image.shape
  check_elongation(height, width, size)
  if height == width == size:
    return image
  grey = image.shape[2] == 1
  picture = Image.fromarray(image[..., 0] if grey else image)
  while min(picture.size) >= 2 * size:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  scale = size / min(picture.size)
  picture = picture.resize((round(picture.width * scale), round(picture.height * scale)),
                           Image.Resampling.BICUBIC)
  left, top = (picture.width - size) // 2, (picture.height - size) // 2
  cropped = np.asarray(picture)[top:top + size, left:left + size]
  return cropped[..., None] if grey else cropped


def check_elongation(height: int, width: int, size: int) -> None:
  """Raises Refused where `fit` to `size` would need more than `PIXELS` in between."""
  if size * size * max(height, width) > PIXELS * min(height, width):
    raise Refused('too elongated', f'{width}x{height} has no {size}x{size} centre worth reading')


def _convert(image: Image.Image, channels: int) -> np.ndarray:
  if image.mode in ('I', 'F'):
    raise Refused('unsupported mode', f'{image.mode} has no known range')
  if image.mode.startswith('I;16'):
    values = np.asarray(image)
    image = Image.fromarray((values >> 8).astype(np.uint8))
  if image.has_transparency_data:
    colour = image.convert('RGBA')
    image = Image.new('RGBA', image.size, 'white')
    image.alpha_composite(colour)
    image = image.convert('RGB')
  array = np.asarray(image.convert('L' if channels == 1 else 'RGB'))
  return array[..., None] if channels == 1 else array


def _first_line(error: BaseException) -> str:
  text = str(error).strip().splitlines()
  return (text[0] if text else type(error).__name__)[:200]
