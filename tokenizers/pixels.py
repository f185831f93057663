"""The levels of an image as they are: one token per channel of a pixel, and nothing learned.

What PixelCNN and MD4 (arXiv 2406.04329) model: C alphabets of 256 codes at H x W positions. A bit
per token of a generator of these is a bit per dimension of the image.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.pixels import to_float, to_uint8
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.tokenizer import Tokenizer, TokenizerConfig

LEVELS = 256


@dataclasses.dataclass(kw_only=True, slots=True)
class PixelsConfig(TokenizerConfig):
  """Images of uint8 levels.

  Attributes:
    image_size: (height, width).
    channels: of the image.
  """
  image_size: tuple[int, int] = (32, 32)
  channels: int = 3

  def build(self, *, rngs: nnx.Rngs) -> 'Pixels':
    del rngs  # nothing is drawn
    return Pixels(self)


class Pixels(Tokenizer):
  """uint8 levels and tokens, without loss either way; it has no parameters and no loss."""

  def __init__(self, config: PixelsConfig):
    self.size, self.channels = tuple(config.image_size), config.channels
    self.spec = TokenSpec(grid=self.size, vocab=(LEVELS,) * self.channels)

  def encode(self, x: Array, *, keys: Array | None = None) -> Int[Array, 'b n d']:
    """The levels of uint8 images, and the nearest ones of floats in [-1, 1].

    Raises:
      ValueError: images of another size or number of channels.
    """
    del keys
    if x.shape[1:] != (*self.size, self.channels):
      raise ValueError(
          f'Images of {x.shape[1:]} (height, width, channels) do not fit image_size={self.size}, '
          f'channels={self.channels}; convert them, or name pixels:HxWxC of these.')
    return to_uint8(to_float(x)).reshape(-1, self.spec.length, self.channels).astype(jnp.int32)

  def decode(self, tokens: Int[Array, 'b n d'], *, keep: Int[Array, 'b'] | None = None,
             keys: Array | None = None, settings: Any = None) -> Float[Array, 'b h w c']:
    """Images in [-1, 1] that `to_uint8` turns into the tokens' levels.

    Raises:
      ValueError: `keep`: pixels have no prefixes.
    """
    del keys, settings
    if keep is not None:
      self.spec.mask(keep)  # says why not
    return to_float(tokens.astype(jnp.uint8)).reshape(-1, *self.size, self.channels)
