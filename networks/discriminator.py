"""Discriminators: images to logits of being real, one per patch of the image or one in all.

GroupNorm where published code has BatchNorm: a logit must not depend on the other images of its
batch, which are all real or all generated, nor on how a mesh splits them. Blurs are shifted sums:
depthwise convolutions are 60 times slower on CPUs.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.convnet import Norm, kernel_init, linear
from smalti.networks.convolution import convolve


@dataclasses.dataclass(kw_only=True, slots=True)
class DiscriminatorConfig:
  """Base of all discriminator configs; the type of a config selects the network."""

  def build(self, *, size: tuple[int, int], channels: int, dtype: Any = jnp.float32,
            rngs: nnx.Rngs) -> 'Discriminator':
    """The network for images of (height, width) and channels."""
    raise TypeError(f'{type(self).__name__} does not say what it builds.')


class Discriminator(nnx.Module):
  """Base of all discriminators."""

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b n']:
    """float32 logits of the image, or of each of its patches, being real."""
    raise TypeError(f'{type(self).__name__} does not judge.')


@dataclasses.dataclass(kw_only=True, slots=True)
class PatchDiscriminatorConfig(DiscriminatorConfig):
  """PatchGAN of pix2pix (Isola et al. 2017, arXiv 1611.07004), as taming-transformers has it.

  2,765,633 parameters at the defaults and 3 channels. Sides must be 3 * 2 ** layers or more.

  Attributes:
    width: channels after the first layer; doubled by each next, 8 times that at most.
    layers: convolutions of stride 2; a logit sees 70 pixels a side at 3, 34 at 2, 16 at 1, and of
      all others their moments, by GroupNorm.
  """
  width: int = 64
  layers: int = 3

  def build(self, *, size: tuple[int, int], channels: int, dtype: Any = jnp.float32,
            rngs: nnx.Rngs) -> 'PatchDiscriminator':
    return PatchDiscriminator(self, size=size, channels=channels, dtype=dtype, rngs=rngs)


class PatchDiscriminator(Discriminator):
  """4x4 convolutions, all but the last two of stride 2, with leaky ReLUs of slope 0.2."""

  def __init__(self, config: PatchDiscriminatorConfig, *, size: tuple[int, int], channels: int,
               dtype: Any, rngs: nnx.Rngs):
    if config.layers < 1 or min(size) < 3 * 2 ** config.layers:
      raise ValueError(
          f'layers={config.layers} must be 1 or more, and images of {min(size)} pixels a side '
          f'leave no logit below {3 * 2 ** config.layers}; take fewer layers.')
    self.dtype = dtype
    widths = [config.width * min(2 ** i, 8) for i in range(config.layers + 1)]
    # all but the first and the last have a norm, whose shift is their bias
    self.convs = nnx.List([
        _conv(a, b, 4, strides=2 if i < config.layers else 1, bias=not i, dtype=dtype, rngs=rngs)
        for i, (a, b) in enumerate(zip([channels, *widths], widths))])
    self.norms = nnx.List([Norm(width, swish=False, rngs=rngs) for width in widths[1:]])
    self.output = _conv(widths[-1], 1, 4, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b n']:
    x = x.astype(self.dtype)
    for i, conv in enumerate(self.convs):
      x = conv(x)
      x = jax.nn.leaky_relu(self.norms[i - 1](x) if i else x, 0.2)
    return self.output(x.astype(jnp.float32)).reshape(x.shape[0], -1)


@dataclasses.dataclass(kw_only=True, slots=True)
class BlurDiscriminatorConfig(DiscriminatorConfig):
  """The discriminator of VQGAN+ (Weber et al. 2024, arXiv 2409.16211; TiTok has the same).

  Attributes:
    width: channels before the first stage; stages have 1, 2, 4, ... times that. MaskBit and TiTok
      have 128; 32 is enough at 32 pixels.
    stages: how often the resolution is halved.
    pool: logits per side at most; maxima are taken over what is more (published 16; 4 at 32 px).
  """
  width: int = 128
  stages: int = 3
  pool: int = 16

  def build(self, *, size: tuple[int, int], channels: int, dtype: Any = jnp.float32,
            rngs: nnx.Rngs) -> 'BlurDiscriminator':
    return BlurDiscriminator(self, size=size, channels=channels, dtype=dtype, rngs=rngs)


class BlurDiscriminator(Discriminator):
  """5x5 stem; stages of 3x3, blur, GroupNorm, leaky ReLU of slope 0.1; pool; 1x1 and 5x5 head."""

  def __init__(self, config: BlurDiscriminatorConfig, *, size: tuple[int, int], channels: int,
               dtype: Any, rngs: nnx.Rngs):
    factor = 2 ** config.stages
    sides = [s // factor for s in size]
    if config.stages < 1 or any(s % factor or (s // factor > config.pool and
                                               s // factor % config.pool) for s in size):
      raise ValueError(
          f'Images of {size} do not fit stages={config.stages}, pool={config.pool}: sides must be '
          f'multiples of {factor}, and {sides} no more than pool, or multiples of it.')
    self.dtype, self.pool = dtype, config.pool
    widths = [config.width, *(config.width * 2 ** i for i in range(config.stages))]
    self.input = _conv(channels, widths[0], 5, init=kernel_init, dtype=dtype, rngs=rngs)
    self.stages = nnx.List([
        _conv(a, b, 3, init=kernel_init, dtype=dtype, rngs=rngs)
        for a, b in zip(widths, widths[1:])])
    self.norms = nnx.List([Norm(width, swish=False, rngs=rngs) for width in widths[1:]])
    self.mix = _conv(widths[-1], widths[-1], 1, init=kernel_init, dtype=dtype, rngs=rngs)
    self.output = _conv(widths[-1], 1, 5, init=kernel_init, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b n']:
    x = jax.nn.leaky_relu(self.input(x.astype(self.dtype)), 0.1)
    for stage, norm in zip(self.stages, self.norms):
      x = jax.nn.leaky_relu(norm(blur(stage(x))), 0.1)
    b, h, w, c = x.shape
    windows = [max(side // self.pool, 1) for side in (h, w)]
    x = jnp.max(x.reshape(b, h // windows[0], windows[0], w // windows[1], windows[1], c), (2, 4))
    x = jax.nn.leaky_relu(self.mix(x), 0.1)
    return self.output(x.astype(jnp.float32)).reshape(b, -1)


@dataclasses.dataclass(kw_only=True, slots=True)
class StyleDiscriminatorConfig(DiscriminatorConfig):
  """StyleGAN2's discriminator (Karras et al. 2020, arXiv 1912.04958) as MaskGIT's tokenizer has it.

  Attributes:
    width: channels at 256 pixels; a resolution has width * 256 / side of them.
    most: channels at most (512); 64 is enough at 32 pixels.
    group: images over which features are compared before the last layers, as StyleGAN does (4;
      BSQ); 0 in MaskGIT. With it a logit depends on the other images of its group.
  """
  width: int = 64
  most: int = 512
  group: int = 0

  def build(self, *, size: tuple[int, int], channels: int, dtype: Any = jnp.float32,
            rngs: nnx.Rngs) -> 'StyleDiscriminator':
    return StyleDiscriminator(self, size=size, channels=channels, dtype=dtype, rngs=rngs)


class StyleDiscriminator(Discriminator):
  """Residual stages with blurs until the shorter side is 4, then two dense layers: one logit."""

  def __init__(self, config: StyleDiscriminatorConfig, *, size: tuple[int, int], channels: int,
               dtype: Any, rngs: nnx.Rngs):
    halvings = int(math.log2(max(min(size), 4) / 4))
    factor = 2 ** halvings
    if any(s % factor for s in size) or min(size) != 4 * factor:
      raise ValueError(f'Images of {size} do not halve to 4 pixels on their shorter side; take '
                       'sides of 4 times a power of two.')
    self.dtype, self.group = dtype, config.group
    widths = [min(config.most, config.width * 256 * 2 ** i // min(size))
              for i in range(halvings + 1)]
    self.input = _conv(channels, widths[0], 3, init=kernel_init, dtype=dtype, rngs=rngs)
    self.stages = nnx.List([
        StyleStage(a, b, dtype=dtype, rngs=rngs) for a, b in zip(widths, widths[1:])])
    last, extra = widths[-1], int(config.group > 0)
    self.mix = _conv(last + extra, last, 3, init=kernel_init, dtype=dtype, rngs=rngs)
    pixels = math.prod(s // factor for s in size)
    self.hidden = linear(pixels * last, last, dtype=dtype, rngs=rngs)
    self.output = linear(last, 1, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b n']:
    x = jax.nn.leaky_relu(self.input(x.astype(self.dtype)), 0.2)
    for stage in self.stages:
      x = stage(x)
    if self.group:
      x = jnp.concatenate([x, deviation(x, self.group)], -1)
    x = jax.nn.leaky_relu(self.mix(x), 0.2)
    x = jax.nn.leaky_relu(self.hidden(x.reshape(x.shape[0], -1)), 0.2)
    return self.output(x.astype(jnp.float32))


class StyleStage(nnx.Module):
  """(conv(blur(lrelu(conv(x)))) + 1x1(blur(x))) / sqrt(2), with a leaky ReLU after each 3x3."""

  def __init__(self, inside: int, outside: int, *, dtype: Any, rngs: nnx.Rngs):
    self.first = _conv(inside, inside, 3, init=kernel_init, dtype=dtype, rngs=rngs)
    self.second = _conv(inside, outside, 3, init=kernel_init, dtype=dtype, rngs=rngs)
    self.skip = linear(inside, outside, bias=False, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y f']:
    y = blur(jax.nn.leaky_relu(self.first(x), 0.2))
    y = jax.nn.leaky_relu(self.second(y), 0.2)
    return (y + self.skip(blur(x))) / math.sqrt(2)


def deviation(x: Float[Array, 'b h w c'], group: int) -> Float[Array, 'b h w 1']:
  """The mean deviation of all features over the images of a group, the same for each of them.

  A batch that does not divide, as the last one of an evaluation, has smaller groups: of the
  greatest common divisor.
  """
  b, h, w, c = x.shape
  group = math.gcd(b, group)
  y = x.astype(jnp.float32).reshape(b // group, group, h, w, c)
  spread = jnp.mean(jnp.sqrt(jnp.var(y, 1) + 1e-8), (1, 2, 3))
  spread = jnp.repeat(spread, group)[:, None, None, None]
  return jnp.broadcast_to(spread, (b, h, w, 1)).astype(x.dtype)


def blur(x: Float[Array, 'b h w c']) -> Float[Array, 'b x y c']:
  """Half the resolution: [1, 3, 3, 1] / 8 along both axes at every second pixel, zeros around."""
  for axis in (1, 2):
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1:])
    even, odd = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    edge = jnp.zeros_like(jax.lax.slice_in_dim(odd, 0, 1, axis=axis))
    before = jnp.concatenate([edge, jax.lax.slice_in_dim(odd, 0, -1, axis=axis)], axis)
    after = jnp.concatenate([jax.lax.slice_in_dim(even, 1, None, axis=axis), edge], axis)
    x = (before + 3 * (even + odd) + after) / 8
  return x


def _normal(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *_: Any) -> Array:
  """N(0, 0.02), as pix2pix starts; drawn flat, see `convnet.kernel_init`."""
  return 0.02 * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def _conv(inside: int, outside: int, size: int, *, strides: int = 1, bias: bool = True,
          init: Any = _normal, dtype: Any, rngs: nnx.Rngs) -> nnx.Conv:
  padding: Any = ((1, 1), (1, 1)) if size == 4 else 'SAME'
  return nnx.Conv(inside, outside, (size, size), strides=strides, padding=padding, use_bias=bias,
                  dtype=dtype, kernel_init=init, conv_general_dilated=convolve, rngs=rngs)
