"""Pixels: uint8 at the borders, float32 in [-1, 1] inside."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def to_float(image: UInt8[Array, '*b h w c'] | Float[Array, '*b h w c']
             ) -> Float[Array, '*b h w c']:
  """Level k to k / 127.5 - 1; floats pass unchanged."""
  if image.dtype != jnp.uint8:
    return image
  return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: Float[Array, '*b h w c']) -> UInt8[Array, '*b h w c']:
  """clip(rint(127.5 (x + 1)), 0, 255): inverts `to_float` on all 256 levels."""
  return jnp.clip(jnp.rint(127.5 * (image + 1)), 0, 255).astype(jnp.uint8)
