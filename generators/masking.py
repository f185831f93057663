"""Which tokens training and the bound of a masked model hide, and with what weight.

Every draw returns masks [b, n] and weights [b] with which `weight * sum over hidden of -log p` is
an unbiased estimate of the bound, because for every schedule that is

    -ELBO = sum_m 1/m mean over sets M of m tokens of [sum over i in M of -log p(x_i | the others)].

`real` are the tokens there are; `u` is uniform in [0, 1), one per row.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from smalti.generators import schedules
from smalti.generators.unmasking import subset

Counts = Literal['ceil', 'round', 'bernoulli']
# The time below which the bound takes one discrete step to the clean end: w(t) grows like 1/t there
# and its variance with it. MDLM cuts at the same time and drops the rest; this keeps a bound.
FLOOR = 1e-3
ENUMERABLE = 12  # positions whose 2^N masks `every` may list
CELLS = 4096  # of the quadrature over masked shares, 8 and more per token of 512


def by_time(key: Array, u: Float[Array, 'b'], real: Bool[Array, 'b n'],
            schedule: schedules.Schedule, steps: int | None = None
            ) -> tuple[Bool[Array, 'b n'], Float[Array, 'b']]:
  """Hides each token with probability 1 - alpha(t), t from u; weight w(t)."""
  if steps is None:  # [0, FLOOR] is one discrete step, taken with probability FLOOR
    chance = schedule.masked(jnp.maximum(u, FLOOR))
    weight = jnp.where(u < FLOOR, 1 / FLOOR, schedule.weight(jnp.maximum(u, FLOOR)))
  else:
    step = jnp.minimum(jnp.floor(u * steps), steps - 1)
    chance = schedule.masked((step + 1) / steps)
    before = jnp.where(step == 0, 0, schedule.masked(step / steps))
    weight = steps * (chance - before) / chance
  return (jax.random.uniform(key, real.shape) < chance[:, None]) & real, weight


def by_rate(key: Array, u: Float[Array, '*b'], size: int, rates: tuple[float, ...]
            ) -> tuple[Bool[Array, '*b n'], Float[Array, '*b'], Float[Array, '*b']]:
  """Hides each of `size` tokens with probability t, t from u and within `rates` (arXiv 2503.09573).

  The first weight is the mean of 1 / t given how many are hidden, which has less variance than 1/t:
  the bound's part within the rates. The second is of the bound itself, whatever the rates.
  """
  low, high = rates
  masked = jax.random.uniform(key, (*u.shape, size)) < (low + (high - low) * u)[..., None]
  chance, inverse = schedules.hidden(low, high, size)
  count = np.arange(size + 1)
  # a count that is never drawn needs no weight
  weight, unbiased = (
      np.divide(value, chance, out=np.zeros_like(chance), where=chance > 0).astype(np.float32)
      for value in (inverse, np.where(count > 0, 1 / np.maximum(count, 1), 0)))
  drawn = masked.sum(-1)
  return masked, jnp.asarray(weight)[drawn], jnp.asarray(unbiased)[drawn]


def by_count(key: Array, u: Float[Array, '*b'], real: Bool[Array, '*b n']
             ) -> tuple[Bool[Array, '*b n'], Float[Array, '*b']]:
  """Hides m ~ U{1..n} of the n real tokens; weight n / m."""
  total = real.sum(-1)
  count = jnp.clip(1 + jnp.floor(u * total).astype(jnp.int32), 1, jnp.maximum(total, 1))
  return subset(jax.random.uniform(key, real.shape), count, real), total / count


def by_ratio(key: Array, u: Float[Array, 'b'], real: Bool[Array, 'b n'], ratio: schedules.Ratio,
             counts: Counts) -> tuple[Bool[Array, 'b n'], Float[Array, 'b']]:
  """Hides gamma(u) n tokens, rounded as `counts` says; weight 1 / (m q(m)), q the chance of m."""
  total = jnp.maximum(real.sum(-1), 1)
  gamma = schedules.ratio(ratio, u)
  inverse: Any = {'cosine': lambda g: jnp.arccos(g) * 2 / math.pi,
                  'arccos': lambda g: jnp.cos(math.pi / 2 * g), 'linear': lambda g: 1 - g}[ratio]
  if counts == 'bernoulli':  # q is the mean of binomial chances; given m, all sets are as likely
    masked = (jax.random.uniform(key, real.shape) < gamma[:, None]) & real
    count, total = (x[:, None].astype(jnp.float32) for x in (masked.sum(-1), total))
    edge = inverse(jnp.arange(CELLS + 1) / CELLS)
    share = (jnp.arange(CELLS) + 0.5) / CELLS
    choose = (jax.lax.lgamma(total + 1) - jax.lax.lgamma(count + 1)
              - jax.lax.lgamma(total - count + 1))
    log = choose + count * jnp.log(share) + (total - count) * jnp.log1p(-share)
    chance = (jnp.exp(log) * (edge[:-1] - edge[1:])).sum(-1)
    return masked, jnp.where(count[:, 0] > 0, 1 / (jnp.maximum(count[:, 0], 1) * chance), 0)
  wanted = gamma * total
  if counts == 'ceil':
    count = jnp.clip(jnp.ceil(wanted), 1, total)
    low, high = count - 1, count
  else:
    count = jnp.clip(jnp.round(wanted), 1, total)
    low = jnp.where(count == 1, 0, count - 0.5)
    high = jnp.where(count == total, total, count + 0.5)
  chance = inverse(low / total) - inverse(high / total)
  masked = subset(jax.random.uniform(key, real.shape), count.astype(jnp.int32), real)
  return masked, 1 / (count * chance)


def every(real: Bool[Array, 'b n'], schedule: schedules.Schedule | None,
          steps: int | None) -> tuple[Bool[Array, 'm n'], Float[Array, 'm b']]:
  """All masks, and the weight of each for each example.

  Args:
    schedule, steps: of a diffusion of so many steps; None are the continuous limit, of no schedule.

  Raises:
    ValueError: too many positions.
  """
  length = real.shape[1]
  if length > ENUMERABLE:
    raise ValueError(f"mode='enumerate' is for {ENUMERABLE} positions at most, "
                     f"got {length}; use 'count'.")
  masks = (np.arange(1, 2**length)[:, None] >> np.arange(length)) & 1 == 1
  size = jnp.asarray(masks.sum(-1))[:, None]
  total = real.sum(-1)
  if steps is None:
    choose = np.array([[math.comb(n, m) for m in range(length + 1)] for n in range(length + 1)])
    weight = 1 / (size * jnp.maximum(jnp.asarray(choose)[total, size], 1))
  else:
    masked = schedule.masked(jnp.arange(1, steps + 1) / steps)
    before = jnp.concatenate([jnp.zeros(1), masked[:-1]])
    factor, chance = ((masked - before) / masked)[:, None, None], masked[:, None, None]
    weight = (factor * chance**size * (1 - chance) ** jnp.maximum(total - size, 0)).sum(0)
  inside = ~(masks[:, None] & ~real).any(-1)
  return jnp.asarray(masks), jnp.where(inside, weight, 0)
