"""Residual codes as sums of their vectors, and back: the last ones of a position are hidden."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smalti.generators import logits as processing
from smalti.generators.mixture import HIGHEST


def hidden(count: Int[Array, 'b n'], depth: int) -> Bool[Array, 'b n d']:
  """Which codes are hidden: the last `count` of every position."""
  return jnp.arange(depth) >= depth - count[..., None]


def requantise(vectors: Float[Array, 'd v c'], z: Float[Array, 'b n c'],
               support: Bool[Array, 'd v'] | None = None, count: Int[Array, 'b n'] | None = None,
               known: Int[Array, 'b n d'] | None = None,
               known_mask: Bool[Array, 'b n d'] | None = None) -> Int[Array, 'b n d']:
  """Codes whose vectors sum to about `z`, coarse to fine: at each depth the nearest to the rest.

  Args:
    support: which codes there are; None is all.
    count: codes are those of the last `count` depths (the others are not meant); None is all.
    known, known_mask: codes that are what they are; those after them make up for them.
  """
  depth = len(vectors)
  active = jnp.ones((*z.shape[:2], depth), bool) if count is None else hidden(count, depth)
  if known is None or known_mask is None:
    known, known_mask = jnp.zeros(active.shape, jnp.int32), jnp.zeros(active.shape, bool)
  support = jnp.ones(vectors.shape[:2], bool) if support is None else support

  def level(rest, now):
    codes, there, active, known, fixed = now
    product = jnp.matmul(rest, codes.T, precision=HIGHEST)
    closeness = processing.restrict(product - jnp.sum(codes * codes, -1) / 2, there)
    code = processing.first(closeness == jnp.max(closeness, -1, keepdims=True))
    code = jnp.where(fixed, known, code)
    return rest - jnp.where(active[..., None], codes[code], 0), code

  by_depth = [jnp.moveaxis(x, -1, 0) for x in (active, known, known_mask)]
  _, tokens = jax.lax.scan(level, z, (vectors, support, *by_depth))
  return jnp.moveaxis(tokens, 0, -1)


def change_rate(vectors: Float[Array, 'd v c'], tokens: Int[Array, 'b n d'],
                support: Bool[Array, 'd v'] | None = None) -> Float[Array, 'b']:
  """The share of positions whose codes change when their sum is quantized again.

  Greedy quantization of a sum of codes need not return them, unless codebooks decay fast: it is
  what a perfect model of sums still gets wrong.
  """
  z = vectors[jnp.arange(len(vectors)), tokens].sum(2)
  return jnp.mean(jnp.any(requantise(vectors, z, support) != tokens, -1), -1)
