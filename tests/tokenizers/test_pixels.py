"""Pixels as tokens: every level comes back, and a token is the level at its place."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks.pixels import to_float, to_uint8
from smalti.tokenizers.pixels import PixelsConfig
from smalti.tokenizers.tokenizer import decode, encode

RNG = np.random.default_rng(0)


def build(height=4, width=8, channels=3):
  return PixelsConfig(image_size=(height, width), channels=channels).build(rngs=nnx.Rngs(0))


def test_every_level_of_every_channel_comes_back():
  images = np.stack([np.roll(np.arange(256).reshape(16, 16), i) for i in range(3)], -1)[None]
  images, pixels = images.astype(np.uint8), build(16, 16)
  for x in (images, to_float(jnp.asarray(images))):  # both sides of the border
    tokens = encode(pixels, x)
    np.testing.assert_array_equal(tokens, images.reshape(1, 256, 3))
    np.testing.assert_array_equal(to_uint8(decode(pixels, tokens)), images)


def test_tokens_are_row_major_and_channels_are_the_depth():
  images, pixels = RNG.integers(0, 256, (2, 4, 8, 3), np.uint8), build()
  tokens = np.asarray(encode(pixels, images))
  assert tokens.dtype == np.int32 and pixels.spec.bits == 4 * 8 * 3 * 8
  for n, (row, column) in enumerate(pixels.spec.coordinates()):
    np.testing.assert_array_equal(tokens[:, n], images[:, row, column])


def test_refusals_say_why():
  pixels = build()
  with pytest.raises(ValueError, match=r'\(8, 4, 3\).* do not fit image_size=\(4, 8\)'):
    pixels.encode(np.zeros((1, 8, 4, 3), np.uint8))
  with pytest.raises(ValueError, match='no prefixes'):
    pixels.decode(jnp.zeros((1, 32, 3), jnp.int32), keep=jnp.array([3]))
