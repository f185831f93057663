"""Image to a few numbers and back, with a decoder in which the numbers modulate every layer.

The networks of Hsu et al. 2023 (arXiv 2305.18378), small. The decoder starts from a learned
constant and sees the image only through the scale and shift of its instance norms, as in StyleGAN
(Karras et al. 2019, arXiv 1812.04948). One convolution per resolution and patches at the pixels,
where the paper's code has three and begins at full size: a few hundredths of its work.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.convnet import conv, depth_to_space, linear, space_to_depth


class StyleEncoder(nnx.Module):
  """Patches, convolutions of stride 2, two linear maps: images to vectors of `features`.

  Args:
    size: (height, width), multiples of `patch * 2 ** (len(widths) - 1)`.
    channels: of the image.
    patch: side of the patches that are projected to the first width.
    widths: channels per resolution, the finest first.
    hidden: width of the dense layer before the last.
    features: of the output.
    dtype: compute dtype; parameters and output are float32.
  """

  def __init__(self, *, size: tuple[int, int], channels: int, patch: int, widths: tuple[int, ...],
               hidden: int, features: int, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.patch, self.dtype = patch, dtype
    self.input = linear(patch * patch * channels, widths[0], dtype=dtype, rngs=rngs)
    self.down = nnx.List([
        conv(a, b, strides=2, dtype=dtype, rngs=rngs) for a, b in zip(widths, widths[1:])])
    flat = math.prod(coarsest(size, patch, widths)) * widths[-1]
    self.hidden = linear(flat, hidden, dtype=dtype, rngs=rngs)
    self.output = linear(hidden, features, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b f']:
    x = nonlinear(self.input(space_to_depth(x, self.patch).astype(self.dtype)))
    for down in self.down:
      x = nonlinear(down(x))
    x = nonlinear(self.hidden(x.reshape(x.shape[0], -1)))
    return self.output(x.astype(jnp.float32))


class StyleDecoder(nnx.Module):
  """The way back, with the same arguments; what comes out are logits of pixels in [0, 1]."""

  def __init__(self, *, size: tuple[int, int], channels: int, patch: int, widths: tuple[int, ...],
               hidden: int, features: int, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.patch, self.dtype = patch, dtype
    self.style = nnx.List([
        linear(features, hidden, dtype=dtype, rngs=rngs),
        linear(hidden, hidden, dtype=dtype, rngs=rngs)])
    start = (*coarsest(size, patch, widths), widths[-1])
    self.bias = nnx.Param(  # the constant: the first layer's input is nothing but a bias
        jax.random.normal(rngs.params(), (math.prod(start),)).reshape(start))
    inside = (widths[-1], *widths[:0:-1])
    self.levels = nnx.List([
        Modulated(a, b, hidden, dtype=dtype, rngs=rngs) for a, b in zip(inside, widths[::-1])])
    self.output = linear(widths[0], patch * patch * channels, dtype=jnp.float32, rngs=rngs)

  def __call__(self, z: Float[Array, 'b f']) -> Float[Array, 'b h w c']:
    style = z.astype(self.dtype)
    for layer in self.style:
      style = nonlinear(layer(style))
    x = jnp.broadcast_to(self.bias[...].astype(self.dtype), (z.shape[0], *self.bias.shape))
    for i, level in enumerate(self.levels):
      x = level(upsample(x) if i else x, style)
    return depth_to_space(self.output(x.astype(jnp.float32)), self.patch)


class Modulated(nnx.Module):
  """norm(act(conv(x))) * scale(style) + shift(style), per channel."""

  def __init__(self, inside: int, outside: int, style: int, *, dtype: Any, rngs: nnx.Rngs):
    self.conv = conv(inside, outside, dtype=dtype, rngs=rngs)
    self.affine = linear(style, 2 * outside, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c'], style: Float[Array, 'b f']
               ) -> Float[Array, 'b h w d']:
    y = instance_norm(nonlinear(self.conv(x)))
    scale, shift = jnp.split(self.affine(style)[:, None, None], 2, -1)
    return y * (1 + scale) + shift  # 1: a style of nothing leaves the norm as it is


def instance_norm(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  """Mean 0 and variance 1 of every channel of every image, in float32."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, (1, 2), keepdims=True)
  variance = jnp.mean(jnp.square(y), (1, 2), keepdims=True)
  return (y * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def upsample(x: Float[Array, 'b h w c']) -> Float[Array, 'b x y c']:
  """Twice the resolution: nearest neighbour."""
  b, h, w, c = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
  return x.reshape(b, 2 * h, 2 * w, c)


def nonlinear(x: Array) -> Array:
  return jax.nn.leaky_relu(x, 0.2)


def coarsest(size: tuple[int, int], patch: int, widths: tuple[int, ...]) -> tuple[int, int]:
  """Height and width of the last features.

  Raises:
    ValueError: an image size that they do not divide.
  """
  step = patch * 2 ** (len(widths) - 1)
  if not widths or len(size) != 2 or any(s < 1 or s % step for s in size):
    raise ValueError(f'image_size={tuple(size)} must be a multiple of {step} on both sides: '
                     f'{patch=}, halved between {widths=}.')
  return size[0] // step, size[1] // step
