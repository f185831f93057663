"""Nested codes: prefixes of an ordered axis, drawn per example in training.

Kusupati et al. 2022, arXiv 2205.13147 (Matryoshka representations); nested dropout, Rippel et al.
2014, arXiv 1402.0915. `draw_budget` is the one place that says which prefix lengths are trained.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Schedule = Literal['uniform', 'power', 'uniform_power']
SCHEDULES = ('uniform', 'power', 'uniform_power')


def budgets(length: int, schedule: Schedule, least: int = 1) -> tuple[int, ...]:
  """The prefix lengths `draw_budget` can draw, increasing; what `TokenSpec.budgets` should hold.

  Raises:
    ValueError: an unknown schedule, or `least` outside 1..length.
  """
  if schedule not in SCHEDULES:
    raise ValueError(f'schedule={schedule!r} is not one of {", ".join(SCHEDULES)}.')
  if not 1 <= least <= length:
    raise ValueError(f'least={least} must be in 1..{length}, the codes there are.')
  if schedule == 'uniform':
    return tuple(range(least, length + 1))
  return (*(2**i for i in range(length.bit_length()) if least <= 2**i < length), length)


def draw_budget(key: Array, batch: int, length: int, schedule: Schedule = 'uniform',
                least: int = 1) -> Int[Array, 'b']:
  """int32[B]: how many entries every example keeps.

  'uniform' is U{least..length}. 'power' is uniform over the powers of two, and `length` itself.
  'uniform_power' is 'uniform' rounded up to those (FlexTok's three modes, arXiv 2502.13967). A
  decoder is good at the lengths it was trained for alone: of 256, the full length has probability
  1/256, 1/9 and 1/2, and the mean is 128.5, 56.8 and 170.7.
  """
  table = jnp.array(budgets(length, schedule, least), jnp.int32)
  if schedule == 'power':
    return table[jax.random.randint(key, (batch,), 0, table.size)]
  keep = jax.random.randint(key, (batch,), least, length + 1)  # the upper end is exclusive
  return table[jnp.searchsorted(table, keep)]  # the first that is not smaller
