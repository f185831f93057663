"""Decoding rules, each against pixels worked out by hand, and refusals by reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from smalti.data import images


def encode(image: Image.Image, kind: str = 'PNG', **options) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def forged_png(width: int, height: int) -> bytes:
  """A valid header that promises more pixels than the few bytes that follow could hold."""
  def chunk(kind, body):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(99)))


def reason(data: bytes, **options) -> str:
  with pytest.raises(images.Refused) as refusal:
    images.decode(data, **options)
  assert refusal.value.reason in images.REASONS
  return refusal.value.reason


def test_colour_is_read_as_it_is():
  pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  np.testing.assert_array_equal(images.decode(encode(Image.fromarray(pixels))), pixels)


def test_transparency_is_composed_over_white():
  pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
  expected = [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
  for kind, options in (('PNG', {}), ('WEBP', {'lossless': True, 'exact': True})):
    np.testing.assert_array_equal(
        images.decode(encode(Image.fromarray(pixels), kind, **options)), expected)
  palette = Image.new('P', (2, 1))
  palette.putpalette([10, 20, 30, 40, 50, 60])
  palette.putpixel((1, 0), 1)
  np.testing.assert_array_equal(
      images.decode(encode(palette, transparency=1)), [[[10, 20, 30], [255, 255, 255]]])


def test_grey_palette_and_bits_have_stated_values():
  grey = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
  np.testing.assert_array_equal(images.decode(encode(grey)), [[[0] * 3, [7] * 3, [255] * 3]])
  np.testing.assert_array_equal(images.decode(encode(grey), channels=1), [[[0], [7], [255]]])
  deep = Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16))
  np.testing.assert_array_equal(images.decode(encode(deep), channels=1), [[[0], [0], [1], [255]]])
  bits = Image.fromarray(np.array([[False, True]]))
  np.testing.assert_array_equal(images.decode(encode(bits), channels=1), [[[0], [255]]])
  colour = Image.new('RGB', (1, 1), (100, 150, 200))
  assert images.decode(encode(colour), channels=1).item() == round(29.9 + 88.05 + 22.8)


def test_cmyk_becomes_rgb():
  cyan = Image.new('CMYK', (8, 8), (255, 0, 0, 0))
  mean = images.decode(encode(cyan, 'JPEG', quality=95)).mean((0, 1))
  np.testing.assert_allclose(mean, [0, 255, 255], atol=3)


def test_orientation_is_applied_and_the_first_frame_taken():
  picture = Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
  turned = images.decode(encode(picture, exif=exif), channels=1)[..., 0]
  np.testing.assert_array_equal(turned, [[4, 1], [5, 2], [6, 3]])
  frames = [Image.new('L', (2, 2), value) for value in (10, 200)]
  moving = encode(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  np.testing.assert_array_equal(images.decode(moving), np.full((2, 2, 3), 10))


def test_refusals_have_their_reason(tmp_path):
  good = encode(Image.new('RGB', (64, 64), 'red'))
  assert reason(forged_png(20_000, 20_000)) == 'too many pixels'
  assert reason(forged_png(9_000, 9_000)) == 'too many pixels'  # Pillow opens it without a word
  assert reason(good, pixels=64 * 64 - 1) == 'too many pixels'
  assert reason(good[:-40]) == 'damaged'
  assert reason(b'%!PS-Adobe-3.0 EPSF-3.0\n') == 'not an image'
  assert reason(b'not an image at all') == 'not an image'
  assert reason(encode(Image.new('F', (4, 4)), 'TIFF')) == 'unsupported mode'
  for content, expected in ((b'', 'empty'), (bytes(101), 'too many bytes')):
    (tmp_path / 'file').write_bytes(content)
    with pytest.raises(images.Refused) as refusal:
      images.read_bytes(tmp_path / 'file', limit=100)
    assert refusal.value.reason == expected
  for path, expected in ((tmp_path, 'not a regular file'), (tmp_path / 'gone', 'unreadable')):
    with pytest.raises(images.Refused) as refusal:
      images.read_bytes(path)
    assert refusal.value.reason == expected
  with pytest.raises(ValueError, match='channels=2 must be 1'):
    images.decode(good, channels=2)


SEEDS = [encode(Image.effect_noise((23, 17), 60).convert(mode), kind)
         for mode, kind in (('RGB', 'PNG'), ('L', 'PNG'), ('P', 'PNG'), ('RGB', 'JPEG'),
                            ('RGBA', 'WEBP'), ('P', 'GIF'), ('RGB', 'BMP'), ('RGB', 'TIFF'))]


@pytest.mark.filterwarnings('ignore::UserWarning:PIL')
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_files_decode_or_are_refused(data):
  content = bytearray(data.draw(st.sampled_from(SEEDS)))
  for _ in range(data.draw(st.integers(1, 6))):
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
  try:
    found = images.decode(bytes(content[:data.draw(st.integers(1, len(content)))]), pixels=10**6)
    assert found.dtype == np.uint8 and found.shape[2] == 3
  except images.Refused as refusal:
    assert refusal.reason in images.REASONS


def test_fit_halves_with_boxes_and_crops_the_centre():
  coarse = np.random.default_rng(1).integers(0, 256, (8, 8, 1), np.uint8)
  fine = np.kron(coarse, np.ones((4, 4, 1), np.uint8))  # halving twice gives it back exactly
  np.testing.assert_array_equal(images.fit(fine, 8), coarse)
  wide = np.pad(fine, ((0, 0), (40, 40), (0, 0)))
  np.testing.assert_array_equal(images.fit(wide, 8), coarse)
  flat = np.full((50, 31, 3), 77, np.uint8)
  np.testing.assert_array_equal(images.fit(flat, 16), np.full((16, 16, 3), 77))
  np.testing.assert_array_equal(images.fit(flat[:1, :1], 16), np.full((16, 16, 3), 77))
  with pytest.raises(images.Refused, match='too elongated'):
    images.fit(np.zeros((1, 5000, 3), np.uint8), 256)


@pytest.mark.parametrize('shape', [(64, 64), (100, 37), (37, 100), (300, 290), (17, 16)])
def test_fit_is_the_published_crop(shape):
  picture = Image.effect_noise(shape, 80)
  size = 16
  expected = picture
  while min(expected.size) >= 2 * size:
    expected = expected.resize(tuple(x // 2 for x in expected.size), Image.Resampling.BOX)
  scale = size / min(expected.size)
  expected = np.array(expected.resize(tuple(round(x * scale) for x in expected.size), 3))
  top, left = (expected.shape[0] - size) // 2, (expected.shape[1] - size) // 2
  np.testing.assert_array_equal(
      images.fit(np.asarray(picture)[..., None], size)[..., 0],
      expected[top:top + size, left:left + size])
