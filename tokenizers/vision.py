"""ViT-VQGAN: patches through a transformer, any quantizer, and a transformer back to pixels.

Yu et al. 2021, arXiv 2110.04627; sizes and layers as in thuanz123/enhancing-transformers. The code
of a patch sees the whole image, and decoding costs four products per block and no convolution.
"""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.transformer import TransformerConfig
from smalti.networks.vision import (
    Grid,
    Pixels,
    Positions,
    Projection,
    VisionDecoder,
    VisionEncoder,
    plain,
)
from smalti.tokenizers.image import ImageTokenizer, ImageTokenizerConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class PatchTokenizerConfig(ImageTokenizerConfig):
  """Base of the configs of tokenizers of patches.

  Attributes:
    patch: side of a patch in pixels (ViT-VQGAN 8, TiTok 16); a divisor of both image sides.
    encoder, decoder: the blocks; their dtype is this config's.
    hidden: units of a tanh layer between encoder and quantizer; 0 is a linear map alone. Neither is
      there where the quantizer takes as many channels as the encoder is wide (ProjectedConfig).
    positions: 'sincos' is fixed, 'learned' a table.
    table: the grid of that table, (rows, columns) of patches; None is the images' own. Another one
      is interpolated bicubically: how weights trained at one size serve another.
    smooth: a 3x3 convolution over the pixels is the last layer (TA-TiTok).
  """
  patch: int = 8
  encoder: TransformerConfig = dataclasses.field(default_factory=lambda: plain(8, 512, 8))
  decoder: TransformerConfig = dataclasses.field(default_factory=lambda: plain(8, 512, 8))
  hidden: int = 0
  positions: Positions = 'sincos'
  table: Grid | None = None
  smooth: bool = False


@dataclasses.dataclass(kw_only=True, slots=True)
class VisionTokenizerConfig(PatchTokenizerConfig):
  """Images of one size to one position per patch."""

  def build(self, *, rngs: nnx.Rngs) -> 'VisionTokenizer':
    return VisionTokenizer(self, rngs=rngs)


class PatchTokenizer(ImageTokenizer):
  """What tokenizers of patches share: grid, quantizer, bottleneck and pixels.

  A subclass brings `encoder` and `decoder`.
  """

  encoder: Any
  decoder: Any

  def parts(self, config: PatchTokenizerConfig, *, rngs: nnx.Rngs
            ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The quantizer, and the arguments of encoder and decoder."""
    size, patch = tuple(config.image_size), config.patch
    if patch < 1 or len(size) != 2 or any(s < 1 or s % patch for s in size):
      raise ValueError(f'image_size={size} must be a multiple of patch={patch} on both sides.')
    if config.hidden < 0:
      raise ValueError(f'hidden={config.hidden} must be 0, for no tanh layer, or its units.')
    self.patches = (size[0] // patch, size[1] // patch)
    table = self.patches if config.table is None else tuple(config.table)
    if len(table) != 2 or min(table) < 1:
      raise ValueError(f'table={table} must be the rows and columns of a grid of patches.')
    encoder = dataclasses.replace(config.encoder, dtype=config.dtype)
    decoder = dataclasses.replace(config.decoder, dtype=config.dtype)
    q: Any = config.quantizer.build(rngs=rngs)
    whole = q.dim == encoder.width and not config.hidden
    # TiTok's N(0, 0.02) at its widths; Glorot's start saturates 60 % of FSQ's inputs in 50 steps
    self.bottleneck = None if whole else Projection(
        encoder, encoder.width, q.dim, hidden=config.hidden, scale=0.5, rngs=rngs)
    self.pixels = Pixels(decoder, channels=config.channels, patch=patch, smooth=config.smooth,
                         rngs=rngs)
    self.last = ('pixels', 'smooth' if config.smooth else 'output', 'kernel')
    shared = dict(grid=table, positions=config.positions, rngs=rngs)
    return (q, dict(config=encoder, channels=config.channels, patch=patch, **shared),
            dict(config=decoder, features=q.dim, **shared))

  def features(self, x: Float[Array, 'b h w c'], *, key: Array | None, train: bool
               ) -> Float[Array, 'b n f']:
    z = self.encoder(x, key=key, train=train)
    return z if self.bottleneck is None else self.bottleneck(z)

  def paint(self, features: Array) -> Float[Array, 'b h w c']:
    return self.pixels.paint(features, self.patches)


class VisionTokenizer(PatchTokenizer):
  """One position per patch, row-major."""

  def __init__(self, config: VisionTokenizerConfig, *, rngs: nnx.Rngs):
    q, encoder, decoder = self.parts(config, rngs=rngs)
    self.encoder, self.decoder = VisionEncoder(**encoder), VisionDecoder(**decoder)
    self.setup(config, q, self.patches, rngs=rngs)

  def trunk(self, vectors: Float[Array, 'b n f'], *, keep: Int[Array, 'b'] | None = None,
            key: Array | None = None, train: bool = False) -> Array:
    del keep  # `lookup` has cut the vectors already
    y = self.decoder(vectors, self.patches, key=key, train=train)
    return self.pixels.trunk(y, self.patches)
