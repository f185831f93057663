"""Convolutional encoder and decoder of the VQGAN family.

Esser et al. 2021, arXiv 2012.09841 (CompVis/taming-transformers, reproduced by LlamaGen with the
same layers): a 3x3 stem, per level residual blocks and a stride-2 convolution, a middle, and the
mirror image with nearest-neighbour upsampling. `ConvOptions` are what MaskGIT and Open-MAGVIT2 do
otherwise. Only dense 2-D convolutions: native transposed,
grouped and depthwise ones are 5-90 times slower on CPUs. GroupNorm statistics, attention
weights and the decoder's last convolution are float32 whatever the compute dtype.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.convolution import convolve
from smalti.networks.layers import Linear, constrain


def kernel_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *_: Any) -> Array:
  """U(+-1 / sqrt(fan_in)), PyTorch's default, which the published runs started from.

  Drawn flat: the numbers are the same, and a program of many four-dimensional draws takes minutes
  to compile on a CPU (3 s each, 0.2 s flat). Biases start at zero.
  """
  bound = math.prod(shape[:-1]) ** -0.5
  return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


@dataclasses.dataclass(kw_only=True, slots=True)
class ConvOptions:
  """Where the networks of this family differ; the defaults are those of taming-transformers.

  MaskGIT's are ConvOptions(bias=False, extra=0, pointwise=True, down='pool'); Open-MAGVIT2 has
  ConvOptions(bias=False, middle=4, extra=0, pointwise=True, up='shuffle', adaptive=True), and pads
  its stride-2 convolutions on all sides. Binary Latent Diffusion has ConvOptions(extra=0,
  first=True) for 64 bits, and extra=4 for 128.

  Attributes:
    bias: of the stem and of residual blocks.
    middle: residual blocks at the coarsest resolution, 2 or more; attention follows the first.
    extra: how many more residual blocks a level of the decoder has than one of the encoder.
    pointwise: the encoder ends in a 1x1 convolution instead of a 3x3 one.
    down: 'conv' of stride 2, or 'pool', means of 2 x 2 pixels.
    up: 'nearest' neighbours and a convolution, or 'shuffle', a convolution to four times the
      channels, which become 2 x 2 pixels.
    first: the decoder begins with a norm of the latents.
    adaptive: before each level of the decoder, a norm whose gain and shift are linear in the
      deviation and the mean of the latents over the image: decoding a part of an image, or a
      prefix, then depends on the rest.
  """
  bias: bool = True
  middle: int = 2
  extra: int = 1
  pointwise: bool = False
  down: Literal['conv', 'pool'] = 'conv'
  up: Literal['nearest', 'shuffle'] = 'nearest'
  first: bool = False
  adaptive: bool = False

  def __post_init__(self):
    if self.middle < 2 or self.extra < 0:
      raise ValueError(f'middle={self.middle} must be 2 or more, and extra={self.extra} 0 or more.')


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
    layers: what the layers are.
    dtype: compute dtype; parameters are float32.
  """

  def __init__(self, *, channels: int, features: int, width: int, multipliers: tuple[int, ...],
               blocks: int, attention: tuple[int, ...] = (), patch: int = 1, dropout: float = 0.0,
               layers: ConvOptions | None = None, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    layers = layers or ConvOptions()
    self.patch, self.dtype = patch, dtype
    if patch == 1:
      self.input: Any = conv(channels, width, bias=layers.bias, dtype=dtype, rngs=rngs)
    else:
      self.input = linear(patch * patch * channels, width, bias=layers.bias, dtype=dtype, rngs=rngs)
    down: Any = Down if layers.down == 'conv' else Pool
    self.levels = nnx.List([])
    inside = width
    for i, multiplier in enumerate(multipliers):
      outside, last = width * multiplier, i == len(multipliers) - 1
      self.levels.append(Level(
          inside, outside, blocks=blocks, attention=i in attention, dropout=dropout,
          resize=None if last else down(outside, dtype=dtype, rngs=rngs), bias=layers.bias,
          dtype=dtype, rngs=rngs))
      inside = outside
    self.middle = Middle(
        inside, blocks=layers.middle, attention=len(multipliers) - 1 in attention, dropout=dropout,
        bias=layers.bias, dtype=dtype, rngs=rngs)
    self.norm = Norm(inside, rngs=rngs)
    last_layer: Any = linear if layers.pointwise else conv
    self.output = last_layer(inside, features, dtype=dtype, rngs=rngs)

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
               layers: ConvOptions | None = None, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    layers = layers or ConvOptions()
    self.patch, self.dtype = patch, dtype
    inside = width * multipliers[-1]
    self.first = Norm(features, swish=False, rngs=rngs) if layers.first else None
    self.input = conv(features, inside, dtype=dtype, rngs=rngs)
    self.middle = Middle(
        inside, blocks=layers.middle, attention=len(multipliers) - 1 in attention, dropout=dropout,
        bias=layers.bias, dtype=dtype, rngs=rngs)
    up: Any = Up if layers.up == 'nearest' else Shuffle
    self.levels, self.adaptive = nnx.List([]), nnx.List([])
    for i in reversed(range(len(multipliers))):
      outside = width * multipliers[i]
      if layers.adaptive:
        self.adaptive.append(AdaptiveNorm(inside, features, rngs=rngs))
      self.levels.append(Level(
          inside, outside, blocks=blocks + layers.extra, attention=i in attention, dropout=dropout,
          resize=up(outside, dtype=dtype, rngs=rngs) if i else None, bias=layers.bias, dtype=dtype,
          rngs=rngs))
      inside = outside
    self.norm = Norm(inside, rngs=rngs)
    self.output = conv(inside, patch * patch * channels, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: Float[Array, 'b x y f'], *, key: Array | None = None,
               train: bool = False) -> Float[Array, 'b h w c']:
    return self.paint(self.trunk(x, key=key, train=train))

  def trunk(self, x: Float[Array, 'b x y f'], *, key: Array | None = None, train: bool = False
            ) -> Float[Array, 'b _h _w c']:
    """All layers but the last convolution."""
    latents = x
    x = x if self.first is None else self.first(x)
    x = self.input(x.astype(self.dtype))
    x = self.middle(x, key=fold(key, len(self.levels)), train=train)
    for i, level in enumerate(self.levels):
      x = self.adaptive[i](x, latents) if self.adaptive else x
      x = level(x, key=fold(key, i), train=train)
    return self.norm(x).astype(jnp.float32)

  def paint(self, x: Float[Array, 'b _h _w _f']) -> Float[Array, 'b h w c']:
    """The last convolution."""
    return depth_to_space(self.output(x), self.patch)


class Level(nnx.Module):
  """Residual blocks of one resolution, attention after each if asked for, then a resize."""

  def __init__(self, inside: int, outside: int, *, blocks: int, attention: bool, dropout: float,
               resize: nnx.Module | None, bias: bool = True, dtype: Any, rngs: nnx.Rngs):
    self.blocks = nnx.List([
        Residual(outside if i else inside, outside, dropout=dropout, bias=bias, dtype=dtype,
                 rngs=rngs)
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
  """Residual block, attention if asked for, residual blocks."""

  def __init__(self, features: int, *, blocks: int = 2, attention: bool, dropout: float,
               bias: bool = True, dtype: Any, rngs: nnx.Rngs):
    def block() -> Residual:
      return Residual(features, features, dropout=dropout, bias=bias, dtype=dtype, rngs=rngs)

    self.first = block()
    self.attention = Attention(features, dtype=dtype, rngs=rngs) if attention else None
    self.second = block()
    self.rest = nnx.List([block() for _ in range(blocks - 2)])

  def __call__(self, x: Float[Array, 'b h w c'], *, key: Array | None, train: bool
               ) -> Float[Array, 'b h w c']:
    x = self.first(x, key=fold(key, 0), train=train)
    if self.attention is not None:
      x = self.attention(x)
    for i, block in enumerate([self.second, *self.rest]):
      x = block(x, key=fold(key, i + 1), train=train)
    return x


class Residual(nnx.Module):
  """x + conv(swish(norm(conv(swish(norm(x)))))), 1x1 on the skip when the channels change.

  Args:
    zero: the last convolution starts at zero, and the block as its skip.
    condition: width of a vector per example from which both norms are modulated; 0 is none.
  """

  def __init__(self, inside: int, outside: int, *, dropout: float, bias: bool = True,
               zero: bool = False, condition: int = 0, dtype: Any, rngs: nnx.Rngs):
    self.norm1 = Norm(inside, rngs=rngs)
    self.conv1 = conv(inside, outside, bias=bias, dtype=dtype, rngs=rngs)
    self.norm2 = Norm(outside, rngs=rngs)
    self.conv2 = conv(outside, outside, bias=bias, zero=zero, dtype=dtype, rngs=rngs)
    self.skip = None if inside == outside else linear(
        inside, outside, bias=bias, dtype=dtype, rngs=rngs)
    self.modulation = Linear(  # scale and shift of the first norm, then of the second
        condition, 2 * (inside + outside), bias=True, std=0, rngs=rngs) if condition else None
    self.dropout, self.inside = dropout, inside

  def __call__(self, x: Float[Array, 'b h w c'], *, key: Array | None, train: bool,
               condition: Float[Array, 'b m'] | None = None) -> Float[Array, 'b h w f']:
    first = second = None
    if self.modulation is not None:
      first, second = jnp.split(self.modulation(condition), [2 * self.inside], -1)
    y = self.conv1(self.norm1(x, first))
    y = self.norm2(y, second)
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

  def __call__(self, x: Float[Array, 'b h w c'], modulation: Float[Array, 'b m'] | None = None
               ) -> Float[Array, 'b h w c']:
    y = x.astype(jnp.float32)
    mean, variance = moments(y, self.groups)
    gain = jax.lax.rsqrt(variance + 1e-6) * self.scale[...]  # 1e-6 as in taming-transformers
    y = (y - mean) * gain + self.bias[...]
    if modulation is not None:
      scale, shift = jnp.split(modulation[:, None, None], 2, -1)
      y = y * (1 + scale) + shift
    return (jax.nn.swish(y) if self.swish else y).astype(x.dtype)


class AdaptiveNorm(nnx.Module):
  """GroupNorm whose gain and shift are linear in the latents' deviation and mean over the image."""

  def __init__(self, features: int, latents: int, *, rngs: nnx.Rngs):
    self.groups = math.gcd(32, features)
    self.gain, self.shift = (linear(latents, features, dtype=jnp.float32, rngs=rngs)
                             for _ in range(2))

  def __call__(self, x: Float[Array, 'b h w c'], latents: Float[Array, 'b _h _w f']
               ) -> Float[Array, 'b h w c']:
    y, z = x.astype(jnp.float32), latents.astype(jnp.float32)
    mean, variance = moments(y, self.groups)
    deviation = jnp.sqrt(jnp.var(z, (1, 2), keepdims=True) + 1e-6)
    gain, shift = self.gain(deviation), self.shift(jnp.mean(z, (1, 2), keepdims=True))
    return ((y - mean) * jax.lax.rsqrt(variance + 1e-6) * gain + shift).astype(x.dtype)


def moments(x: Float[Array, 'b h w c'], groups: int
            ) -> tuple[Float[Array, 'b 1 1 c'], Float[Array, 'b 1 1 c']]:
  """Mean and variance of the group of every channel, over the image.

  Per channel, then per group: reducing views of [h, w, group] takes 3-4 times longer.
  """
  def spread(each: Float[Array, 'b 1 1 c']) -> Float[Array, 'b 1 1 c']:
    means = jnp.mean(each.reshape(each.shape[0], 1, 1, groups, -1), -1)
    return jnp.repeat(means, each.shape[-1] // groups, -1)

  mean = spread(jnp.mean(x, (1, 2), keepdims=True))
  return mean, spread(jnp.mean(jnp.square(x - mean), (1, 2), keepdims=True))


class Down(nnx.Module):
  """Half the resolution: stride-2 3x3 convolution, padded below and to the right (taming)."""

  def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs):
    self.conv = conv(features, features, strides=2, padding=((0, 1), (0, 1)), dtype=dtype,
                     rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y c']:
    return self.conv(x)


class Pool(nnx.Module):
  """Half the resolution: means of 2 x 2 pixels; nothing is learned."""

  def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs):
    del features, dtype, rngs

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y c']:
    b, h, w, c = x.shape
    return jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), (2, 4))


class Shuffle(nnx.Module):
  """Twice the resolution: a 3x3 convolution to four times the channels, which become pixels."""

  def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs):
    self.conv = conv(features, 4 * features, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y c']:
    return depth_to_space(self.conv(x), 2)


class Up(nnx.Module):
  """Twice the resolution: nearest neighbour, then a 3x3 convolution."""

  def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs):
    self.conv = conv(features, features, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y c']:
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return self.conv(x.reshape(b, 2 * h, 2 * w, c))


def conv(inside: int, outside: int, *, strides: int = 1, padding: Any = 'SAME', bias: bool = True,
         zero: bool = False, dtype: Any, rngs: nnx.Rngs) -> nnx.Conv:
  """A 3x3 convolution."""
  init = nnx.initializers.zeros if zero else kernel_init
  return nnx.Conv(inside, outside, (3, 3), strides=strides, padding=padding, use_bias=bias,
                  dtype=dtype, kernel_init=init, conv_general_dilated=convolve, rngs=rngs)


def linear(inside: int, outside: int, *, bias: bool = True, dtype: Any, rngs: nnx.Rngs
           ) -> nnx.Linear:
  """A 1x1 convolution, as the matrix product it is."""
  return nnx.Linear(inside, outside, use_bias=bias, dtype=dtype, kernel_init=kernel_init, rngs=rngs)


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
