"""Vision transformers: images to patches and back, and registers that sum an image up.

Patches are projected linearly, get the vector of their place in a grid and go through the one
transformer (Dosovitskiy et al. 2020, arXiv 2010.11929). Registers are extra positions with vectors
of their own: the encoder reads the image out of them alone, and the decoder grows patches from a
learned mask token beside them (TiTok, Yu et al. 2024, arXiv 2406.07550). Networks take any grid of
patches: tables of positions are interpolated.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.networks.convnet import conv, depth_to_space, space_to_depth
from smalti.networks.layers import Embedding, LayerNorm, Linear, grid_sinusoid
from smalti.networks.transformer import Transformer, TransformerConfig, std

Grid = tuple[int, int]
Positions = Literal['sincos', 'learned']


def plain(layers: int, width: int, heads: int, **options: Any) -> TransformerConfig:
  """The blocks of published vision transformers: TiTok's, and with options ViT-VQGAN's.

  Layer norms with gain and shift, biases, exact GELU and 4 width hidden units; no QK-norm.
  """
  published: dict[str, Any] = dict(
      axes=0, qk_norm=False, norm='affine', mlp='gelu', bias=True, qkv_bias=True)
  return TransformerConfig(layers=layers, width=width, heads=heads, **{**published, **options})


def patchify(x: Float[Array, 'b h w c'], patch: int) -> Float[Array, 'b n p']:
  """patch x patch pixels to a vector, row-major within and over patches."""
  y = space_to_depth(x, patch)
  return y.reshape(y.shape[0], -1, y.shape[-1])


def unpatchify(x: Float[Array, 'b n p'], grid: Grid, patch: int) -> Float[Array, 'b h w c']:
  """The inverse of `patchify` for a grid of patches."""
  return depth_to_space(x.reshape(x.shape[0], *grid, x.shape[-1]), patch)


def interpolate(table: Float[Array, 'n c'], grid: Grid, target: Grid) -> Float[Array, 'm c']:
  """A table over a grid, row-major, on another grid: bicubic (a = -1/2), smoothed where coarser."""
  if tuple(grid) == tuple(target):
    return table
  y = jax.image.resize(table.reshape(*grid, -1), (*target, table.shape[-1]), 'cubic')
  return y.reshape(-1, table.shape[-1])


class GridPositions(nnx.Module):
  """A vector for every cell of a grid.

  Args:
    grid: of the table; for another one it is interpolated.
    kind: 'sincos' is fixed (MAE, ViT-VQGAN, FlexTok), 'learned' starts as N(0, 1 / width) (TiTok).
  """

  def __init__(self, grid: Grid, width: int, *, kind: Positions = 'sincos', rngs: nnx.Rngs):
    if kind == 'sincos' and width % 4:
      raise ValueError(f'{width=} must be a multiple of 4, for sines and cosines of two axes.')
    self.grid, self.width = (grid[0], grid[1]), width  # not a list, which has no hash
    self.table = None if kind == 'sincos' else Embedding(
        math.prod(grid), width, std=width ** -0.5, rngs=rngs)

  def __call__(self, grid: Grid) -> Float[Array, 'n c']:
    if self.table is None:
      table = jnp.asarray(grid_sinusoid(self.grid, self.width))
    else:
      table = self.table.embedding[...]
    return interpolate(table, self.grid, grid)


class Projection(nnx.Module):
  """A linear map to float32, after a layer of `hidden` tanh units where there are any.

  With `scale`, outputs start with that deviation for normed inputs, whatever the width.
  """

  def __init__(self, config: TransformerConfig, inputs: int, outputs: int, *, hidden: int = 0,
               scale: float | None = None, rngs: nnx.Rngs):
    self.hidden = Linear(inputs, hidden, bias=True, std=std(config, inputs, hidden),
                         dtype=config.dtype, rngs=rngs) if hidden else None
    inputs = hidden or inputs
    deviation = std(config, inputs, outputs) if scale is None else scale * inputs ** -0.5
    self.output = Linear(inputs, outputs, bias=True, std=deviation, dtype=config.dtype,
                         result='float32', rngs=rngs)

  def __call__(self, x: Float[Array, 'b n c']) -> Float[Array, 'b n f']:
    return self.output(x if self.hidden is None else jnp.tanh(self.hidden(x)))


class Patches(nnx.Module):
  """Images to vectors of patches with their positions: the first layer of every encoder."""

  def __init__(self, config: TransformerConfig, *, channels: int, patch: int, grid: Grid,
               positions: Positions, rngs: nnx.Rngs):
    self.patch, inputs = patch, patch * patch * channels
    self.input = Linear(inputs, config.width, bias=True, std=std(config, inputs, config.width),
                        dtype=config.dtype, rngs=rngs)
    self.positions = GridPositions(grid, config.width, kind=positions, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b n f']:
    y = self.input(patchify(x, self.patch))
    grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
    return y + self.positions(grid).astype(y.dtype)


class Pixels(nnx.Module):
  """Features of patches to a float32 image: the last layers of every decoder.

  Args:
    smooth: a 3x3 convolution over the pixels follows, across the borders of patches (TA-TiTok).
  """

  def __init__(self, config: TransformerConfig, *, channels: int, patch: int, smooth: bool,
               rngs: nnx.Rngs):
    self.patch, outputs = patch, patch * patch * channels
    self.output = Linear(config.width, outputs, bias=True, std=std(config, config.width, outputs),
                         dtype=config.dtype, result='float32', rngs=rngs)
    self.smooth = conv(channels, channels, dtype=jnp.float32, rngs=rngs) if smooth else None

  def trunk(self, features: Float[Array, 'b n f'], grid: Grid) -> Array:
    """All but the last layer."""
    return features if self.smooth is None else self._image(features, grid)

  def paint(self, x: Array, grid: Grid) -> Float[Array, 'b h w c']:
    """The last layer alone."""
    return self._image(x, grid) if self.smooth is None else self.smooth(x)

  def _image(self, features: Float[Array, 'b n f'], grid: Grid) -> Float[Array, 'b h w c']:
    return unpatchify(self.output(features), grid, self.patch)


class VisionEncoder(nnx.Module):
  """Images to one feature per patch, [b, h, w, c] to [b, n, width].

  Args:
    config: of the blocks; rotations are off, positions are added.
    channels, patch: of the image, and the side of a patch in pixels.
    grid: of the table of positions.
  """

  def __init__(self, config: TransformerConfig, *, channels: int, patch: int, grid: Grid,
               positions: Positions = 'sincos', rngs: nnx.Rngs):
    self.patches = Patches(config, channels=channels, patch=patch, grid=grid, positions=positions,
                           rngs=rngs)
    self.transformer = Transformer(dataclasses.replace(config, axes=0), rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c'], *, key: Array | None = None, train: bool = False
               ) -> Float[Array, 'b n f']:
    return self.transformer(self.patches(x), key=key, train=train)


class VisionDecoder(nnx.Module):
  """Vectors of a grid to features of its patches, [b, n, c] to [b, n, width]."""

  def __init__(self, config: TransformerConfig, *, features: int, grid: Grid,
               positions: Positions = 'sincos', rngs: nnx.Rngs):
    self.input = enter(config, features, rngs)
    self.positions = GridPositions(grid, config.width, kind=positions, rngs=rngs)
    self.transformer = Transformer(dataclasses.replace(config, axes=0), rngs=rngs)

  def __call__(self, z: Float[Array, 'b n c'], grid: Grid, *, key: Array | None = None,
               train: bool = False) -> Float[Array, 'b n f']:
    y = z if self.input is None else self.input(z)
    return self.transformer(y + self.positions(grid).astype(y.dtype), key=key, train=train)


class Registered(nnx.Module):
  """Patches, registers and perhaps a class token through one transformer.

  Args:
    token: a class token is in the sequence, as in TiTok; nothing is read from it.
    normed: a layer norm comes before the first block, as in TiTok.
  """

  def __init__(self, config: TransformerConfig, *, token: bool, normed: bool, rngs: nnx.Rngs):
    self.token = Embedding(1, config.width, std=config.width ** -0.5, rngs=rngs) if token else None
    self.norm = LayerNorm(config.width) if normed else None
    self.transformer = Transformer(dataclasses.replace(config, axes=0), rngs=rngs)

  @property
  def prefix(self) -> int:
    """Positions before the patches."""
    return int(self.token is not None)

  def __call__(self, patches: Float[Array, 'b n f'], registers: Float[Array, 'b k f'], *,
               mask: Array | None, key: Array | None, train: bool
               ) -> tuple[Float[Array, 'b n f'], Float[Array, 'b k f']]:
    """Features of patches and registers; `mask` is the transformer's, over the whole sequence."""
    parts = [patches, registers.astype(patches.dtype)]
    if self.token is not None:
      parts.insert(0, repeated(self.token.embedding[...], patches))
    x = jnp.concatenate(parts, 1)
    x = self.transformer(x if self.norm is None else self.norm(x), mask=mask, key=key, train=train)
    end = self.prefix + patches.shape[1]
    return x[:, self.prefix:end], x[:, end:]


class RegisterEncoder(nnx.Module):
  """Images to the features of registers, [b, h, w, c] to [b, k, width].

  Args:
    config, channels, patch, grid, positions: as for `VisionEncoder`.
    registers: how many there are.
    mask: 'full', or 'causal': patches see patches alone, register i them and registers 0..i
      (FlexTok), so that what it holds does not depend on how many follow.
    token, normed: see `Registered`.
    spread: deviation of the registers at the start; None is TiTok's width ** -0.5 (FlexTok 0.02).
  """

  def __init__(self, config: TransformerConfig, *, channels: int, patch: int, grid: Grid,
               registers: int, mask: Literal['full', 'causal'] = 'full',
               positions: Positions = 'sincos', token: bool = False, normed: bool = False,
               spread: float | None = None, rngs: nnx.Rngs):
    self.patches = Patches(config, channels=channels, patch=patch, grid=grid, positions=positions,
                           rngs=rngs)
    self.registers = Embedding(registers, config.width, std=spread or config.width ** -0.5,
                               rngs=rngs)
    self.body = Registered(config, token=token, normed=normed, rngs=rngs)
    self.causal, self.count = mask == 'causal', registers

  def __call__(self, x: Float[Array, 'b h w c'], *, key: Array | None = None, train: bool = False
               ) -> Float[Array, 'b k f']:
    patches = self.patches(x)
    mask = None
    if self.causal:
      mask = jnp.asarray(causal_registers(self.body.prefix + patches.shape[1], self.count))
      mask = mask[None, None]
    registers = repeated(self.registers.embedding[...], patches)
    return self.body(patches, registers, mask=mask, key=key, train=train)[1]


class RegisterDecoder(nnx.Module):
  """Vectors of registers to features of patches, [b, k, c] to [b, n, width].

  Every patch starts as the same mask token plus its position. With `keep`, nothing attends to the
  registers from `keep` on: their vectors influence no patch, and shapes stay as they are.

  Args:
    features: channels of the vectors.
    registers: how many there are.
    grid, positions: of the patches.
    token, normed: see `Registered`.
  """

  def __init__(self, config: TransformerConfig, *, features: int, registers: int, grid: Grid,
               positions: Positions = 'sincos', token: bool = False, normed: bool = False,
               rngs: nnx.Rngs):
    scale = config.width ** -0.5
    self.input = enter(config, features, rngs)
    self.mask = Embedding(1, config.width, std=scale, rngs=rngs)
    self.positions = GridPositions(grid, config.width, kind=positions, rngs=rngs)
    self.registers = Embedding(registers, config.width, std=scale, rngs=rngs)
    self.body = Registered(config, token=token, normed=normed, rngs=rngs)
    self.dtype = config.dtype

  def __call__(self, z: Float[Array, 'b k c'], grid: Grid, *, keep: Int[Array, 'b'] | None = None,
               key: Array | None = None, train: bool = False) -> Float[Array, 'b n f']:
    y = (z if self.input is None else self.input(z)).astype(self.dtype)
    y = y + self.registers.embedding[...].astype(y.dtype)
    patches = repeated(self.mask.embedding[...] + self.positions(grid), y)
    mask = None
    if keep is not None:
      before = self.body.prefix + patches.shape[1]
      mask = kept_registers(before, z.shape[1], keep)
    return self.body(patches, y, mask=mask, key=key, train=train)[0]


def enter(config: TransformerConfig, features: int, rngs: nnx.Rngs) -> Any:
  """The linear map from vectors to the width, or None where they have it already."""
  if features == config.width:
    return None
  return Linear(features, config.width, bias=True, std=std(config, features, config.width),
                dtype=config.dtype, rngs=rngs)


def repeated(table: Float[Array, 'k c'], like: Float[Array, 'b n c']) -> Float[Array, 'b k c']:
  """The same rows for every example."""
  return jnp.broadcast_to(table.astype(like.dtype), (like.shape[0], *table.shape))


def causal_registers(patches: int, registers: int) -> np.ndarray:
  """bool[n, n]: patches see patches; register i sees patches and the registers 0..i."""
  seen = np.tril(np.ones((patches + registers,) * 2, bool))
  seen[:, :patches] = True
  return seen


def kept_registers(patches: int, registers: int, keep: Int[Array, 'b']) -> Bool[Array, 'b n']:
  """Which positions may be attended to: all patches, and the first `keep` registers."""
  return jnp.arange(patches + registers) < patches + keep[:, None]
