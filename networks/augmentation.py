"""Differentiable augmentation of what a discriminator sees, real and generated alike.

Zhao et al. 2020, arXiv 2006.10738; mit-han-lab/data-efficient-gans. A discriminator that never sees
an image as it is cannot know few images by heart, and the generator's gradient passes through.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Augmentation = Literal['none', 'color+translation', 'color+translation+cutout']


def augment(x: Float[Array, 'b h w c'], kind: Augmentation, key: Array) -> Float[Array, 'b h w c']:
  """Every image changed by draws of its own."""
  if kind == 'none':
    return x
  color, move, cut = jax.random.split(key, 3)
  x = translated(colored(x, color), move)
  return holed(x, cut) if 'cutout' in kind else x


def colored(x: Float[Array, 'b h w c'], key: Array) -> Float[Array, 'b h w c']:
  """Brightness + U(-1/2, 1/2), saturation * U(0, 2), contrast * U(1/2, 3/2)."""
  u = jax.random.uniform(key, (3, x.shape[0], 1, 1, 1))
  x = x + (u[0] - 0.5)
  grey = jnp.mean(x, 3, keepdims=True)
  x = (x - grey) * (2 * u[1]) + grey
  mean = jnp.mean(x, (1, 2, 3), keepdims=True)
  return (x - mean) * (u[2] + 0.5) + mean


def translated(x: Float[Array, 'b h w c'], key: Array, ratio: float = 0.125
               ) -> Float[Array, 'b h w c']:
  """Shifted by up to `ratio` of either side, zeros moving in."""
  b, h, w, c = x.shape
  reach = [int(side * ratio + 0.5) for side in (h, w)]
  start = jax.random.randint(key, (b, 2), 0, jnp.array([2 * r + 1 for r in reach]))
  padded = jnp.pad(x, [(0, 0), *((r, r) for r in reach), (0, 0)])
  return jax.vmap(lambda image, at: jax.lax.dynamic_slice(
      image, (at[0], at[1], 0), (h, w, c)))(padded, start)


def holed(x: Float[Array, 'b h w c'], key: Array, ratio: float = 0.5) -> Float[Array, 'b h w c']:
  """A rectangle of `ratio` of either side around a random pixel is zero."""
  inside: Array = jnp.ones((), bool)
  for axis, part in zip((1, 2), jax.random.split(key)):
    side = x.shape[axis]
    hole = int(side * ratio + 0.5)
    centre = jax.random.randint(part, (x.shape[0],), 0, side + (1 - hole % 2))
    first = (centre - hole // 2)[:, None]
    at = jnp.arange(side)[None]
    near = (at >= first) & (at < first + hole)
    inside = inside & (near[:, :, None, None] if axis == 1 else near[:, None, :, None])
  return jnp.where(inside, 0.0, x)
