"""The one categorical draw, by inverse CDF: of the samplers, and of codes in training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def draw(logits: Float[Array, '*b v'], uniform: Float[Array, '*b']) -> Int[Array, '*b']:
  """One id per row, from a number uniform in [0, 1) per row.

  With p = softmax(logits), c its cumulative sum and u = 1 - uniform in (0, 1], the id is the first
  with c >= u max(c) and p > 0. The second condition matters: XLA's cumulative sum is not monotone,
  and counting c < u drew a forbidden id once in 2,000,000. `jax.random.categorical` truncates its
  fp32 Gumbel noise at 15.94, which silently lowers the temperature.
  """
  probability = jax.nn.softmax(logits.astype(jnp.float32), -1)
  cumulative = jnp.where(probability > 0, jnp.cumsum(probability, -1), -1.0)
  total = jnp.max(cumulative, -1, keepdims=True)
  return first(cumulative >= (1 - uniform)[..., None] * total)


def first(hits: Bool[Array, '*b v']) -> Int[Array, '*b']:
  """The first True of each row (the last id where there is none): argmax, vectorised on CPU."""
  size = hits.shape[-1]
  place = jnp.arange(size, dtype=jnp.int32)
  return jnp.min(jnp.where(hits, place, size - 1), -1)
