"""Autoencoder: convolutional encoder, any quantizer, convolutional decoder.

VQGAN's first stage (Esser et al. 2021, arXiv 2012.09841); the quantizer's config selects the rest.
LlamaGen's VQ-16 is width 128, multipliers (1, 1, 2, 2, 4), 2 blocks, attention at 16 and
ProjectedConfig(VQConfig(codes=16384, dim=8, cosine=True), dim=256).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.convnet import ConvDecoder, ConvEncoder, ConvOptions
from smalti.tokenizers.image import ImageTokenizer, ImageTokenizerConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class AutoencoderConfig(ImageTokenizerConfig):
  """Images of one size to a grid of codes, `patch * 2 ** (len(multipliers) - 1)` times smaller.

  The weights do not depend on the image's size.

  Attributes:
    width, multipliers, blocks: of the convolutions, see `ConvEncoder`.
    attention: resolutions (the shorter side, in features) with attention, such as (16,).
    patch: 1 for a 3x3 stem, else the side of linearly projected patches.
    dropout: in the residual blocks.
    layers: taming-transformers', unless MaskGIT's or Open-MAGVIT2's are asked for.
  """
  width: int = 32
  multipliers: tuple[int, ...] = (1, 2, 2)
  blocks: int = 1
  attention: tuple[int, ...] = ()
  patch: int = 1
  dropout: float = 0.0
  layers: ConvOptions = dataclasses.field(default_factory=ConvOptions)

  def build(self, *, rngs: nnx.Rngs) -> 'Autoencoder':
    return Autoencoder(self, rngs=rngs)


class Autoencoder(ImageTokenizer):
  """Encoder, quantizer and decoder; tokens are row-major over the grid."""

  def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
    size = tuple(config.image_size)
    sides = [config.patch * 2 ** i for i in range(len(config.multipliers))]  # pixels per feature
    if not sides or len(size) != 2 or any(s < 1 or s % sides[-1] for s in size):
      raise ValueError(
          f'image_size={size} must be a multiple of {sides[-1:]} on both sides: patch='
          f'{config.patch}, halved between the levels of multipliers={config.multipliers}.')
    resolutions = [min(size) // s for s in sides]
    if unknown := sorted(set(config.attention) - set(resolutions)):
      raise ValueError(f'attention={unknown} is at none of the resolutions {resolutions}.')
    q: Any = config.quantizer.build(rngs=rngs)
    options: dict[str, Any] = dict(
        channels=config.channels, features=q.dim, width=config.width,
        multipliers=tuple(config.multipliers), blocks=config.blocks, patch=config.patch,
        attention=tuple(i for i, r in enumerate(resolutions) if r in config.attention),
        dropout=config.dropout, layers=config.layers, dtype=jnp.dtype(config.dtype), rngs=rngs)
    self.encoder, self.decoder = ConvEncoder(**options), ConvDecoder(**options)
    self.setup(config, q, tuple(s // sides[-1] for s in size), rngs=rngs)

  def features(self, x: Float[Array, 'b h w c'], *, key: Array | None, train: bool
               ) -> Float[Array, 'b n f']:
    z = self.encoder(x, key=key, train=train)
    return z.reshape(z.shape[0], -1, z.shape[-1])

  def trunk(self, vectors: Float[Array, 'b n f'], *, keep: Int[Array, 'b'] | None = None,
            key: Array | None = None, train: bool = False) -> Float[Array, 'b x y c']:
    del keep  # `lookup` has cut the vectors already
    grid = vectors.reshape(vectors.shape[0], *self.grid, vectors.shape[-1])
    return self.decoder.trunk(grid, key=key, train=train)

  def paint(self, features: Float[Array, 'b x y f']) -> Float[Array, 'b h w c']:
    return self.decoder.paint(features)
