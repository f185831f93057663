"""The U-Net of MD4 (arXiv 2406.04329), which keeps the resolution of the image.

Residual blocks down, a middle, and one block more up, each of which reads the output of its mirror
image beside its own: the layout of VDM (arXiv 2107.00630), without down-sampling. The middle is two
residual blocks around attention of all pixels, or a transformer over patches (DiT, arXiv
2212.09748). Blocks of a side have one shape and are stacked and scanned, so that compile time does
not grow with their number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.convnet import (
    Attention,
    Norm,
    Residual,
    conv,
    depth_to_space,
    fold,
    linear,
    space_to_depth,
)
from smalti.networks.layers import Embedding, Linear, grid_sinusoid
from smalti.networks.transformer import Transformer, TransformerConfig


class UNet(nnx.Module):
  """Features of every pixel to float32 features of every pixel; all zero at initialisation.

  Args:
    inputs, outputs: features of a pixel.
    grid: (height, width).
    width: channels of all residual blocks.
    blocks: residual blocks on the way down; there is one more on the way up.
    transformer: of the middle; None is attention with one head between residual blocks.
    patch: side of the patches that the transformer reads.
    condition: width of a vector per example that modulates the residual blocks, and the transformer
      if it is `modulated`; 0 is none.
    dropout: in the residual blocks.
    remat: recompute blocks in the backward pass.
    dtype: compute dtype; parameters are float32.
  """

  def __init__(self, *, inputs: int, outputs: int, grid: tuple[int, int], width: int, blocks: int,
               transformer: TransformerConfig | None = None, patch: int = 2, condition: int = 0,
               dropout: float = 0.0, remat: bool = True, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    if blocks < 1:
      raise ValueError(f'blocks={blocks} must be 1 or more.')
    self.blocks, self.dropout, self.remat, self.dtype = blocks, dropout, remat, dtype
    options: Any = dict(dropout=dropout, zero=True, condition=condition, dtype=dtype)

    def stacked(count: int, inside: int) -> Residual:
      @nnx.split_rngs(splits=count)
      @nnx.vmap(in_axes=0, out_axes=0)
      def build(rngs: nnx.Rngs) -> Residual:
        return Residual(inside, width, **options, rngs=rngs)
      return build(rngs)

    self.input = conv(inputs, width, dtype=dtype, rngs=rngs)
    self.down = stacked(blocks, width)
    self.middle: Any = Between(width, **options, rngs=rngs) if transformer is None else Patches(
        width, grid, transformer, patch=patch, condition=condition, dtype=dtype, rngs=rngs)
    self.up = stacked(blocks + 1, 2 * width)
    self.norm = Norm(width, rngs=rngs)
    self.output = conv(width, outputs, zero=True, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w i'], *, condition: Float[Array, 'b f'] | None = None,
               key: Array | None = None, train: bool = False) -> Float[Array, 'b h w o']:
    options = dict(condition=condition, train=train)
    first = self.input(x.astype(self.dtype))

    def down(x, block, skip, key):
      del skip
      x = block(x, key=key, **options)
      return x, x

    def up(x, block, skip, key):
      return block(jnp.concatenate([x, skip], -1), key=key, **options), None

    x, skips = self._scan(down, first, self.down, None, fold(key, 0))
    x = self.middle(x, key=fold(key, 1), **options)
    skips = jnp.concatenate([first[None], skips])
    x, _ = self._scan(up, x, self.up, skips, fold(key, 2), reverse=True)
    return self.output(self.norm(x).astype(jnp.float32))

  def _scan(self, apply: Callable[..., tuple[Array, Any]], x: Array, blocks: Residual,
            skips: Array | None, key: Array | None, reverse: bool = False) -> tuple[Array, Any]:
    graph, params = nnx.split(blocks)

    def body(x, layer):
      params, skip, i = layer
      return apply(x, nnx.merge(graph, params), skip, fold(key, i))

    if self.remat:
      body = jax.checkpoint(body, prevent_cse=False)
    count = self.blocks + (skips is not None)
    return jax.lax.scan(
        body, x, (params, skips, jnp.arange(count)), reverse=reverse,
        unroll=jax.default_backend() == 'cpu')  # a convolution in a loop is 20 times slower there


class Between(nnx.Module):
  """A residual block, attention of all pixels with one head, a residual block."""

  def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs, **options: Any):
    self.first, self.second = (
        Residual(width, width, **options, dtype=dtype, rngs=rngs) for _ in range(2))
    self.attention = Attention(width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c'], *, condition: Array | None, key: Array | None,
               train: bool) -> Float[Array, 'b h w c']:
    x = self.first(x, condition=condition, key=fold(key, 0), train=train)
    return self.second(
        self.attention(x), condition=condition, key=fold(key, 1), train=train)


class Patches(nnx.Module):
  """A transformer over patches, whose output takes the place of its input.

  Positions are a learned table that starts as sinusoids.
  """

  def __init__(self, width: int, grid: tuple[int, int], transformer: TransformerConfig, *,
               patch: int, condition: int, dtype: Any, rngs: nnx.Rngs):
    if grid[0] % patch or grid[1] % patch:
      raise ValueError(f'patch={patch} must divide the grid {grid}.')
    if transformer.axes not in (0, 2):
      raise ValueError(f'axes={transformer.axes} must be 0 or 2: patches have rows and columns.')
    if transformer.width % 4:
      raise ValueError(f'width={transformer.width} must be a multiple of 4: sinusoids and cosines '
                       'of rows and columns.')
    self.patch, self.modulated = patch, transformer.modulated
    self.grid = grid[0] // patch, grid[1] // patch
    features = patch * patch * width
    self.input = linear(features, transformer.width, dtype=dtype, rngs=rngs)
    self.place = Embedding(
        self.grid[0] * self.grid[1], transformer.width, dtype=transformer.dtype, rngs=rngs)
    self.place.embedding[...] = jnp.asarray(grid_sinusoid(self.grid, transformer.width))
    self.condition = Linear(
        condition, transformer.width, bias=True, rngs=rngs) if transformer.modulated else None
    self.transformer = Transformer(transformer, rngs=rngs)
    self.output = Linear(
        transformer.width, features, bias=True, std=0, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c'], *, condition: Array | None, key: Array | None,
               train: bool) -> Float[Array, 'b h w c']:
    h, w = self.grid
    y = self.input(space_to_depth(x, self.patch)).reshape(len(x), h * w, -1)
    y = y + self.place(jnp.arange(h * w))
    rows, columns = jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing='ij')
    y = self.transformer(
        y, positions=jnp.stack([rows, columns], -1).reshape(-1, 2), key=key, train=train,
        modulation=None if self.condition is None else self.condition(condition))
    return depth_to_space(self.output(y).reshape(len(x), h, w, -1), self.patch).astype(x.dtype)
