"""Masked diffusion of pixels as MD4 publishes it (arXiv 2406.04329, section 7): a U-Net.

Every level of every channel of a pixel is a token. One table of embeddings serves all channels;
those of a pixel are joined, and the network writes the columns of all its channels. Nothing else
differs from `Masked`: levels are hidden and drawn one by one, so that bound, samplers and infilling
are the same. MD4's network is told the time, this one is not, as no masked generator here.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.generators.bodies import check_modulated
from smalti.generators.masked import Masked, MaskedConfig
from smalti.networks.layers import Embedding, constrain
from smalti.networks.transformer import TransformerConfig
from smalti.networks.unet import UNet
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class MaskedUNetConfig(MaskedConfig):
  """A masked model of pixels; a label modulates the norms of all residual blocks.

  Args:
    transformer: the middle of the U-Net, where it has one, over patches; told the label too if it
      is `modulated`. `axes` is 0 or 2: positions have a table besides.
    width: channels of the residual blocks, and of the embedding of one level.
    blocks: residual blocks on the way down; there is one more on the way up.
    patch: side of the transformer's patches, which divides the grid.
    dropout: in the residual blocks.
    remat: recompute residual blocks in the backward pass.
    dtype: of products and activations; parameters are float32.
  """
  transformer: TransformerConfig | None = None  # type: ignore[assignment]
  width: int = 128
  blocks: int = 32
  patch: int = 2
  dropout: float = 0.1
  remat: bool = True
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'MaskedUNet':
    return MaskedUNet(self, spec, rngs=rngs)


class MaskedUNet(Masked):
  """See the module."""

  def _slots(self, config: Any, spec: TokenSpec) -> TokenSpec:
    if len(spec.grid) != 2:
      raise ValueError(f'A U-Net reads rows and columns, and the grid {spec.grid} has '
                       f'{len(spec.grid)} axes; take MaskedConfig or StackedConfig.')
    return spec

  def _network(self, config: MaskedUNetConfig, rngs: nnx.Rngs) -> None:
    body, dtype = config.transformer, config.dtype
    if body is not None:
      check_modulated(body, config.classes)
    self.token = self._input(config.width, dtype, rngs)
    self.label = Embedding(  # the last row is the null label
        config.classes + 1, config.width, rngs=rngs) if config.classes else None
    height, width = self.slots.grid
    self.unet = UNet(
        inputs=config.width * self.slots.depth, outputs=sum(self.slots.vocab), grid=(height, width),
        width=config.width, blocks=config.blocks, transformer=body, patch=config.patch,
        condition=config.width if config.classes else 0, dropout=config.dropout,
        remat=config.remat, dtype=jnp.dtype(dtype), rngs=rngs)

  def _embed(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n']) -> Float[Array, 'b s c']:
    return super()._embed(tokens, masked).reshape(len(tokens), self.slots.length, -1)

  def _outputs(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n'],
               labels: Int[Array, 'b'] | None, *, key: Array | None, train: bool
               ) -> Float[Array, 'b s v']:
    x = self._embed(tokens, masked).reshape(len(tokens), *self.slots.grid, -1)
    condition = None if self.label is None else self.label(labels)
    y = self.unet(constrain(x, 'b h w c'), condition=condition, key=key, train=train)
    return y.reshape(len(tokens), self.slots.length, -1)

  @property
  def hidden(self) -> Any:  # type: ignore[override]
    """There is no row of blocks to choose from, so that `hasattr` says no."""
    raise AttributeError('A U-Net does not show hidden states.')
