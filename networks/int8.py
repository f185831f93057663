"""Int8 by absmax: x = codes * scale, scale = max |x| / 127 along one axis (arXiv 2208.07339).

Symmetric, without calibration. As a cache of keys and values a scale belongs to a token and a head,
so that it leaves both products of attention: q . (c s) = (q . c) s for keys, and for values
w (c s) = (w s) c. The cache is read as it is stored: no float copy of it is ever held.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8 as Codes

LARGEST = 127  # -128 is not used: the range is symmetric


class Int8(NamedTuple):
  """An array in int8.

  Attributes:
    codes: int8, of the shape of the array.
    scale: float32, 1 along the axis that shares it.
  """
  codes: Array
  scale: Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  def dequantize(self) -> Array:
    """codes * scale, in float32: what the int8 array stands for."""
    return self.codes.astype(jnp.float32) * self.scale


def quantize(x: Array, axis: int | tuple[int, ...] = -1) -> Int8:
  """The nearest codes, so that |x - codes * scale| <= scale / 2; `axis` shares a scale.

  Zeros have scale 0.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis, keepdims=True) / LARGEST
  codes = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
  return Int8(codes, scale)


def scores(query: Float[Array, 'b j n f'], key: Float[Array, 'b j t f'] | Int8
           ) -> Float[Array, 'b j n t']:
  """q k^T in float32; the scale of an int8 key is on its column."""
  if not isinstance(key, Int8):
    return jnp.einsum('bjnf,bjtf->bjnt', query, key, preferred_element_type=jnp.float32)
  return _scores(query, key.codes) * jnp.swapaxes(key.scale, 2, 3)


def mix(weight: Float[Array, 'b j n t'], value: Float[Array, 'b j t f'] | Int8, dtype: Any
        ) -> Float[Array, 'b j n f']:
  """weight v; the scale of an int8 value is on its weight, and the result of `dtype`."""
  if not isinstance(value, Int8):
    return jnp.einsum('bjnt,bjtf->bjnf', weight.astype(value.dtype), value)
  return _mix(weight * jnp.swapaxes(value.scale, 2, 3), value.codes, dtype).astype(dtype)


# XLA on CPU gives a product of matrices only whole arrays of floats, and so would write a float
# copy of the cache for every token; a sum of products reads the codes (measured: as fast from 4
# queries on, 1.8 times the time of a float cache for one). Elsewhere the conversion is part of the
# product.


def _scores(query: Float[Array, 'b j n f'], codes: Codes[Array, 'b j t f']
            ) -> Float[Array, 'b j n t']:
  if jax.default_backend() == 'cpu':
    return jnp.sum(query.astype(jnp.float32)[:, :, :, None] * codes[:, :, None], -1)
  return jnp.einsum('bjnf,bjtf->bjnt', query, codes.astype(query.dtype),
                    preferred_element_type=jnp.float32)


def _mix(weight: Float[Array, 'b j n t'], codes: Codes[Array, 'b j t f'], dtype: Any
         ) -> Float[Array, 'b j n f']:
  if jax.default_backend() == 'cpu':
    return jnp.sum(weight[..., None] * codes[:, :, None], -2)
  return jnp.einsum('bjnt,bjtf->bjnf', weight.astype(dtype), codes.astype(dtype),
                    preferred_element_type=jnp.float32)
