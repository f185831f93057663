"""Convolutional encoder and decoder of the VQGAN family.

Esser et al. 2021, arXiv 2012.09841 (CompVis/taming-transformers, reproduced by LlamaGen with the
same layers): a 3x3 stem, per level residual blocks and a stride-2 convolution, a middle, and the
mirror image with nearest-neighbour upsampling. Only dense 2-D convolutions: native transposed,
grouped and depthwise ones are 5-90 times slower on CPUs. GroupNorm statistics, attention
weights and the decoder's last convolution are float32 whatever the compute dtype.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.layers import constrain


def kernel_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *_: Any) -> Array:
  """U(+-1 / sqrt(fan_in)), PyTorch's default, which the published runs started from.

  Drawn flat: the numbers are the same, and a program of many four-dimensional draws takes minutes
  to compile on a CPU (3 s each, 0.2 s flat). Biases start at zero.
  """
  bound = math.prod(shape[:-1]) ** -0.5
  return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


class ConvEncoder(nnx.Module):
  """Images to a grid of features, smaller by `patch * 2 ** (len(multipliers) - 1)` on each side.

  Args:
    channels: of the image.
    features: of the grid.
    width, multipliers: level i has `width * multipliers[i]` channels.
    blocks: residual blocks per level (the decoder has one more).
    attention: levels whose blocks are followed by attention; the middle is where the last one is.
    patch: 1 is the 3x3 stem; above, patches of patch x patch pixels are projected linearly.
    dropout: in the residual blocks.
    dtype: compute dtype; parameters are float32.
  """

  def __init__(self, *, channels: int, features: int, width: int, multipliers: tuple[int, ...],
               blocks: int, attention: tuple[int, ...] = (), patch: int = 1, dropout: float = 0.0,
               dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.patch, self.dtype = patch, dtype
    if patch == 1:
      self.input: Any = conv(channels, width, dtype=dtype, rngs=rngs)
    else:
      self.input = nnx.Linear(patch * patch * channels, width, dtype=dtype, kernel_init=kernel_init,
                             rngs=rngs)
    self.levels = nnx.List([])
    inside = width
    for i, multiplier in enumerate(multipliers):
      outside, last = width * multiplier, i == len(multipliers) - 1
      self.levels.append(Level(
          inside, outside, blocks=blocks, attention=i in attention, dropout=dropout,
          resize=None if last else Down(outside, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs))
      inside = outside
    self.middle = Middle(inside, attention=len(multipliers) - 1 in attention, dropout=dropout,
                         dtype=dtype, rngs=rngs)
    self.norm = Norm(inside, rngs=rngs)
    self.output = conv(inside, features, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c'], *, key: Array | None = None,
               train: bool = False) -> Float[Array, 'b x y f']:
    x = self.input(space_to_depth(x, self.patch).astype(self.dtype))
    for i, level in enumerate(self.levels):
      x = level(x, key=fold(key, i), train=train)
    x = self.middle(x, key=fold(key, len(self.levels)), train=train)
    return self.output(self.norm(x)).astype(jnp.float32)


class ConvDecoder(nnx.Module):
  """The mirror image of `ConvEncoder`, with the same arguments: features to float32 images."""

  def __init__(self, *, channels: int, features: int, width: int, multipliers: tuple[int, ...],
               blocks: int, attention: tuple[int, ...] = (), patch: int = 1, dropout: float = 0.0,
               dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.patch, self.dtype = patch, dtype
    inside = width * multipliers[-1]
    self.input = conv(features, inside, dtype=dtype, rngs=rngs)
    self.middle = Middle(inside, attention=len(multipliers) - 1 in attention, dropout=dropout,
                         dtype=dtype, rngs=rngs)
    self.levels = nnx.List([])
    for i in reversed(range(len(multipliers))):
      outside = width * multipliers[i]
      self.levels.append(Level(
          inside, outside, blocks=blocks + 1, attention=i in attention, dropout=dropout,
          resize=Up(outside, dtype=dtype, rngs=rngs) if i else None, dtype=dtype, rngs=rngs))
      inside = outside
    self.norm = Norm(inside, rngs=rngs)
    self.output = conv(inside, patch * patch * channels, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: Float[Array, 'b x y f'], *, key: Array | None = None,
               train: bool = False) -> Float[Array, 'b h w c']:
    return self.paint(self.trunk(x, key=key, train=train))

  def trunk(self, x: Float[Array, 'b x y f'], *, key: Array | None = None, train: bool = False
            ) -> Float[Array, 'b _h _w c']:
    """All layers but the last convolution."""
    x = self.input(x.astype(self.dtype))
    x = self.middle(x, key=fold(key, len(self.levels)), train=train)
    for i, level in enumerate(self.levels):
      x = level(x, key=fold(key, i), train=train)
    return self.norm(x).astype(jnp.float32)

  def paint(self, x: Float[Array, 'b _h _w _f']) -> Float[Array, 'b h w c']:
    """The last convolution."""
    return depth_to_space(self.output(x), self.patch)


class Level(nnx.Module):
  """Residual blocks of one resolution, attention after each if asked for, then a resize."""

  def __init__(self, inside: int, outside: int, *, blocks: int, attention: bool, dropout: float,
               resize: nnx.Module | None, dtype: Any, rngs: nnx.Rngs):
    self.blocks = nnx.List([
        Residual(outside if i else inside, outside, dropout=dropout, dtype=dtype, rngs=rngs)
        for i in range(blocks)])
    self.attention = nnx.List([
        Attention(outside, dtype=dtype, rngs=rngs) for _ in range(blocks if attention else 0)])
    self.resize = resize

  def __call__(self, x: Float[Array, 'b h w c'], *, key: Array | None, train: bool
               ) -> Float[Array, 'b x y f']:
    for i, block in enumerate(self.blocks):
      x = block(x, key=fold(key, i), train=train)
      if self.attention:
        x = self.attention[i](x)
    return x if self.resize is None else self.resize(x)


class Middle(nnx.Module):
  """Residual block, attention if asked for, residual block."""

  def __init__(self, features: int, *, attention: bool, dropout: float, dtype: Any,
               rngs: nnx.Rngs):
    self.first = Residual(features, features, dropout=dropout, dtype=dtype, rngs=rngs)
    self.attention = Attention(features, dtype=dtype, rngs=rngs) if attention else None
    self.second = Residual(features, features, dropout=dropout, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c'], *, key: Array | None, train: bool
               ) -> Float[Array, 'b h w c']:
    x = self.first(x, key=fold(key, 0), train=train)
    if self.attention is not None:
      x = self.attention(x)
    return self.second(x, key=fold(key, 1), train=train)


class Residual(nnx.Module):
  """x + conv(swish(norm(conv(swish(norm(x)))))), 1x1 on the skip when the channels change."""

  def __init__(self, inside: int, outside: int, *, dropout: float, dtype: Any, rngs: nnx.Rngs):
    self.norm1 = Norm(inside, rngs=rngs)
    self.conv1 = conv(inside, outside, dtype=dtype, rngs=rngs)
    self.norm2 = Norm(outside, rngs=rngs)
    self.conv2 = conv(outside, outside, dtype=dtype, rngs=rngs)
    self.skip = None if inside == outside else linear(inside, outside, dtype=dtype, rngs=rngs)
    self.dropout = dropout

  def __call__(self, x: Float[Array, 'b h w c'], *, key: Array | None, train: bool
               ) -> Float[Array, 'b h w f']:
    y = self.conv1(self.norm1(x))
    y = self.norm2(y)
    if train and self.dropout:
      if key is None:
        raise ValueError(f'dropout={self.dropout} draws a mask in training; pass key.')
      kept = jax.random.bernoulli(key, 1 - self.dropout, (y.size,)).reshape(y.shape)
      y = jnp.where(kept, y / (1 - self.dropout), 0)
    return constrain((x if self.skip is None else self.skip(x)) + self.conv2(y), 'b h w c')


class Attention(nnx.Module):
  """x + proj(softmax(q k / sqrt(c)) v) over all pixels, one head."""

  def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs):
    self.norm = Norm(features, swish=False, rngs=rngs)
    self.q, self.k, self.v, self.proj = (
        linear(features, features, dtype=dtype, rngs=rngs) for _ in range(4))

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
    b, h, w, c = x.shape
    y = self.norm(x).reshape(b, h * w, c)
    scores = jnp.einsum('bqc,bkc->bqk', self.q(y), self.k(y), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores / math.sqrt(c), -1).astype(x.dtype)
    return x + self.proj(jnp.einsum('bqk,bkc->bqc', weights, self.v(y))).reshape(x.shape)


class Norm(nnx.Module):
  """GroupNorm with float32 statistics, then swish; 32 groups at most, a divisor of `features`."""

  def __init__(self, features: int, *, swish: bool = True, rngs: nnx.Rngs):
    self.groups, self.swish = math.gcd(32, features), swish
    self.scale = nnx.Param(jnp.ones(features))
    self.bias = nnx.Param(jnp.zeros(features))

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
    # Moments per channel, then per group: reducing views of [h, w, group] takes 3-4 times longer.
    y = x.astype(jnp.float32)
    mean = self._per_group(jnp.mean(y, (1, 2), keepdims=True))
    variance = self._per_group(jnp.mean(jnp.square(y - mean), (1, 2), keepdims=True))
    gain = jax.lax.rsqrt(variance + 1e-6) * self.scale[...]  # 1e-6 as in taming-transformers
    y = (y - mean) * gain + self.bias[...]
    return (jax.nn.swish(y) if self.swish else y).astype(x.dtype)

  def _per_group(self, x: Float[Array, 'b 1 1 c']) -> Float[Array, 'b 1 1 c']:
    means = jnp.mean(x.reshape(x.shape[0], 1, 1, self.groups, -1), -1)
    return jnp.repeat(means, x.shape[-1] // self.groups, -1)


class Down(nnx.Module):
  """Half the resolution: stride-2 3x3 convolution, padded below and to the right (taming)."""

  def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs):
    self.conv = conv(features, features, strides=2, padding=((0, 1), (0, 1)), dtype=dtype,
                     rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y c']:
    return self.conv(x)


class Up(nnx.Module):
  """Twice the resolution: nearest neighbour, then a 3x3 convolution."""

  def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs):
    self.conv = conv(features, features, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y c']:
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return self.conv(x.reshape(b, 2 * h, 2 * w, c))


def conv(inside: int, outside: int, *, strides: int = 1, padding: Any = 'SAME', dtype: Any,
         rngs: nnx.Rngs) -> nnx.Conv:
  """A 3x3 convolution."""
  return nnx.Conv(inside, outside, (3, 3), strides=strides, padding=padding, dtype=dtype,
                  kernel_init=kernel_init, rngs=rngs)


def linear(inside: int, outside: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
  """A 1x1 convolution, as the matrix product it is."""
  return nnx.Linear(inside, outside, dtype=dtype, kernel_init=kernel_init, rngs=rngs)


def space_to_depth(x: Float[Array, 'b h w c'], patch: int) -> Float[Array, 'b x y d']:
  """Patches of patch x patch pixels to channels, row-major; inverted by `depth_to_space`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c)
  return jnp.swapaxes(x, 2, 3).reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Float[Array, 'b x y d'], patch: int) -> Float[Array, 'b h w c']:
  b, h, w, _ = x.shape
  x = jnp.swapaxes(x.reshape(b, h, w, patch, patch, -1), 2, 3)
  return x.reshape(b, h * patch, w * patch, -1)


def fold(key: Array | None, i: int) -> Array | None:
  """The key of part i; None stays None, for evaluation."""
  return None if key is None else jax.random.fold_in(key, i)
