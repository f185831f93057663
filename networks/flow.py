"""The transformer of a rectified-flow decoder: noised patches and registers in one sequence.

FlexTok (arXiv 2502.13967; apple/ml-flextok): everything attends to everything; the time modulates
by adaLN-zero, patches and registers each in their own way, and the head alone reads the patches.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.layers import Linear, TimeEmbedding, deviation, grid_sinusoid
from smalti.networks.transformer import Transformer, TransformerConfig


def lean(layers: int, width: int | None = None, *, head: int = 64) -> TransformerConfig:
  """Blocks without biases and gains, SwiGLU of exactly int(8/3 width), Xavier starts: FlexTok's.

  Its widths are 64 per layer, and its heads have 64 channels.
  """
  width = 64 * layers if width is None else width
  return TransformerConfig(
      layers=layers, width=width, heads=max(1, width // head), hidden=int(2 * 4 * width / 3),
      axes=0, norm='layer', init='xavier')


class FlowTransformer(nnx.Module):
  """The velocity at noised patches [b, n, f] and times [b], given registers [b, k, c].

  Zero at initialisation. Patches have the positions of a fixed sine and cosine table; registers
  bring their own.

  Args:
    config: of the blocks; adaLN, its two streams and the absence of rotations are set here.
    grid: of the patches, row-major.
    features: values of a patch.
    registers: how many there are.
  """

  def __init__(self, config: TransformerConfig, *, grid: tuple[int, int], features: int,
               registers: int, rngs: nnx.Rngs):
    width, patches = config.width, math.prod(grid)
    if width % 4:
      raise ValueError(f'width={width} must be a multiple of 4, for the positions of two axes.')
    self.grid, self.width = tuple(grid), width
    self.input = Linear(features, width, bias=True, std=deviation(features, width),
                        dtype=config.dtype, rngs=rngs)
    self.time = TimeEmbedding(width, base=256.0, xavier=True, rngs=rngs)
    self.transformer = Transformer(dataclasses.replace(
        config, axes=0, modulated=True, streams=(patches, registers)), rngs=rngs)
    self.head = Linear(width, features, bias=True, std=0, rngs=rngs)

  def __call__(self, x: Float[Array, 'b n f'], registers: Float[Array, 'b k c'],
               t: Float[Array, 'b'], *, key: Array | None = None, train: bool = False
               ) -> Float[Array, 'b n f']:
    y, time = self._begin(x, registers, t)
    return self._end(x, self.transformer(y, modulation=time, key=key, train=train))

  def tapped(self, x: Float[Array, 'b n f'], registers: Float[Array, 'b k c'],
             t: Float[Array, 'b'], block: int, *, key: Array | None = None, train: bool = False
             ) -> tuple[Float[Array, 'b n f'], Float[Array, 'b n c']]:
    """The same, and what the patches are after a block, 1 the first."""
    y, time = self._begin(x, registers, t)
    options: Any = dict(modulation=time, key=key, train=train)
    y = self.transformer(y, part=(0, block), **options)
    z = self.transformer(y, part=(block, self.transformer.layers), **options)
    return self._end(x, z), y[:, :x.shape[1]]

  def _begin(self, x: Array, registers: Array, t: Array) -> tuple[Array, Array]:
    y = self.input(x) + jnp.asarray(grid_sinusoid(self.grid, self.width), self.input.dtype)
    return jnp.concatenate([y, registers.astype(y.dtype)], 1), self.time(t)

  def _end(self, x: Array, y: Array) -> Array:
    return self.head(jax.lax.slice_in_dim(y, 0, x.shape[1], axis=1))
