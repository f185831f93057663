"""Bits that flip: the forward process of binary diffusion, its posterior, and what turns it back.

See `generators/binary.py` for the equations; `keep` is k_t there.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Reverse = Literal['mixture', 'product']
NEVER = -1e30  # the logarithm of what cannot be; infinite ones have no gradient


def flip(bits: Int[Array, 'b n k'], u: Float[Array, 'b n k'], keep: Float[Array, '*b']
         ) -> Int[Array, 'b n k']:
  """z_t of clean bits: each other with probability (1 - keep) / 2; u is uniform in [0, 1)."""
  keep = jnp.reshape(keep, (-1, 1, 1))
  return bits ^ (u < (1 - keep) / 2).astype(jnp.int32)


def posterior(z_t: Array, z_0: Array, keep_s: Array, keep_t: Array) -> Float[Array, '...']:
  """q(z_s = 1 | z_t, z_0) for s < t; keep is k at both. Exactly z_0 at s=0."""
  ratio = keep_t / keep_s
  seen = jnp.where(z_t == 1, 1 + ratio, 1 - ratio) / 2  # q(z_t | z_s = 1)
  there = jnp.where(z_0 == 1, 1 + keep_s, 1 - keep_s) / 2  # q(z_s = 1 | z_0)
  one, zero = there * seen, (1 - there) * (1 - seen)
  return one / (one + zero)


def reverse(z_t: Array, p: Array, keep_s: Array, keep_t: Array, kind: Reverse
            ) -> Float[Array, '...']:
  """p_theta(z_s = 1 | z_t) of a network that says p = p(z_0 = 1 | z_t); p itself at s=0."""
  if kind == 'mixture':
    ones, zeros = (posterior(z_t, jnp.full_like(z_t, v), keep_s, keep_t) for v in (1, 0))
    return p * ones + (1 - p) * zeros
  ratio = keep_t / keep_s
  seen = jnp.where(z_t == 1, 1 + ratio, 1 - ratio) / 2
  there = keep_s * p + (1 - keep_s) / 2
  one, zero = there * seen, (1 - there) * (1 - seen)
  return jnp.where(keep_s == 1, p, one / (one + zero))


def reverse_logs(z_t: Array, logits: Array, keep_s: Array, keep_t: Array, kind: Reverse
                  ) -> tuple[Array, Array]:
  """log p_theta(z_s = 1 | z_t) and log p_theta(z_s = 0 | z_t), with gradients at any certainty."""
  sure, unsure = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
  if kind == 'mixture':
    ones, zeros = (posterior(z_t, jnp.full_like(z_t, v), keep_s, keep_t) for v in (1, 0))
    return (jnp.logaddexp(sure + _log(ones), unsure + _log(zeros)),
            jnp.logaddexp(sure + _log(1 - ones), unsure + _log(1 - zeros)))
  ratio, noise = keep_t / keep_s, _log((1 - keep_s) / 2)
  seen = jnp.where(z_t == 1, 1 + ratio, 1 - ratio) / 2
  one = _log(seen) + jnp.logaddexp(_log(keep_s) + sure, noise)
  zero = _log(1 - seen) + jnp.logaddexp(_log(keep_s) + unsure, noise)
  total = jnp.logaddexp(one, zero)
  last = keep_s == 1
  return jnp.where(last, sure, one - total), jnp.where(last, unsure, zero - total)


def _log(p: Array) -> Array:
  return jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)), NEVER)


def check_reverse(kind: str) -> None:
  if kind not in ('mixture', 'product'):
    raise ValueError(f'reverse={kind!r} is not one of mixture, product.')
