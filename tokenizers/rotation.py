"""The rotation trick: the gradient of a vector is turned and scaled as the vector was.

Fifty et al. 2024, arXiv 2410.06424. Straight-through moves the encoder alike for all vectors of a
code; with the rotation R that turns z towards q and lambda = |q| / |z|, seen as constants, the
output lambda R z has the value q, and gradients keep their angle to it. It is no substitute for
revival: dead codes stay dead. Losses are formed on z and q, not on the output.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smalti.tokenizers.quantizer import sg, straight_through

SMALL = 1e-12  # squared lengths below: no direction


@jax.jit
def rotate(z: Float[Array, '*b c'], q: Float[Array, '*b c']) -> Float[Array, '*b c']:
  """Value exactly `q`, jacobian lambda R by `z`.

  With u = z / |z|, v = q / |q| and w = (u + v) / |u + v|: R z = z - 2 (w.z) w + 2 (u.z) v, two
  reflections. Opposite directions have no such rotation, and are passed straight through.
  """
  u, v = sg(_unit(z)), sg(_unit(q))
  w = _unit(u + v)
  scale = sg(jnp.linalg.norm(q, axis=-1, keepdims=True)
             * jax.lax.rsqrt(jnp.maximum(_dot(z, z), SMALL)))
  rotated = scale * (z - 2 * _dot(w, z) * w + 2 * _dot(u, z) * v)
  opposite = _dot(u + v, u + v) < 1e-6
  return straight_through(jnp.where(opposite, z, rotated), q)


def _dot(x: Array, y: Array) -> Array:
  return jnp.sum(x * y, -1, keepdims=True)


def _unit(x: Array) -> Array:
  return x * jax.lax.rsqrt(jnp.maximum(_dot(x, x), SMALL))
