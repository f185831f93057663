"""The Quantizer contract: vectors to codes and back, and how codebooks learn.

No forward pass writes state. A quantizer returns `statistics`, a nested dict that mirrors attribute
names down to one `Statistics` per codebook; `launch/step.py` adds them over micro-batches and calls
`absorb` once per step on the whole model, so assignment and losses use the old codebook.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

sg = jax.lax.stop_gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
  """What one pass tells a codebook: float32 count[K], total[K, c] and spare[K, c].

  `spare` holds vectors of the batch for dead codes to move to, drawn without replacement. Under
  `+`, counts and totals add and the spare rows are those of the first summand with a count.
  """

  count: Float[Array, 'v']
  total: Float[Array, 'v c']
  spare: Float[Array, 'v c']

  def __add__(self, other: 'Statistics') -> 'Statistics':
    spare = jnp.where(jnp.sum(self.count) > 0, self.spare, other.spare)
    return Statistics(self.count + other.count, self.total + other.total, spare)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """What a quantizer returns.

  Attributes:
    vectors: the quantized vectors with straight-through gradient; their value is `lookup(tokens)`.
    tokens: int32, one code per alphabet of the quantizer's `vocab`.
    losses: unweighted scalars by name; the weights live in the tokenizer's config.
    metrics: scalars to log.
    statistics: nested dict of `Statistics`, or None in evaluation.
  """

  vectors: Float[Array, 'b n c']
  tokens: Int[Array, 'b n d']
  losses: dict[str, Array]
  metrics: dict[str, Array]
  statistics: Any = None


@dataclasses.dataclass(kw_only=True, slots=True)
class QuantizerConfig:
  """Base of all quantizer configs; the type of a config selects the quantizer."""

  def build(self, *, rngs: nnx.Rngs) -> 'Quantizer':
    raise TypeError(f'{type(self).__name__} does not say what it builds.')


class Quantizer(nnx.Module):
  """Base of all quantizers: vectors float32[B, N, dim] to tokens int32[B, N, D] and back.

  Attributes:
    dim: channels of the vectors it takes and returns.
    vocab: one alphabet size per code; `D = len(vocab)`.
    factors: mixed radix of every code, or ().
    order, budgets: what a prefix of the codes means, as in `TokenSpec`.
    grid: of the tokens, where it is not that of the vectors (multi-scale: one list of all scales).
    stochastic: evaluation draws too, from `key` or, where that is an array, a key per example.
    committed: losses of its own train all it has; False where the gradient of its vectors must.
    apart: of several codes, each has consecutive channels of its own, in the order of the codes.
  """

  dim: int
  vocab: tuple[int, ...]
  factors: tuple[int, ...] = ()
  order: str = 'raster'
  budgets: tuple[int, ...] = ()
  grid: tuple[int, ...] | None = None
  stochastic: bool = False
  committed: bool = True
  apart: bool = True

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    """Quantizes `z`; `key` feeds random draws and may be None in evaluation.

    Quantizers that can be a level of Residual with dropout also take `valid: bool[B, N] | None`:
    vectors where it is False are quantized as all others are, but give no losses, no statistics and
    no metrics (`statistics.mean`, `spare_rows` and `segment_sums` leave them out).
    """
    raise TypeError(f'{type(self).__name__} does not quantize.')

  def lookup(self, tokens: Int[Array, 'b n d']) -> Float[Array, 'b n c']:
    """The vectors of `tokens`, bit for bit what `__call__` returned for them."""
    raise TypeError(f'{type(self).__name__} has no lookup.')

  def prepare(self, z: Float[Array, 'b n c'], *, key: Array) -> None:
    """Sets codebooks from the first batch, before step 0; does nothing by default."""

  def fits(self, grid: tuple[int, ...]) -> None:
    """Raises ValueError where vectors on `grid` make no sense to it; anything does by default."""


class Buffer(nnx.Variable):
  """State that no gradient reaches, written by `absorb` and `prepare` alone."""


def checked(option: Any) -> Any:
  """A copy of an option's config, or None; its rules hold for what overrides made of it, too."""
  return None if option is None else dataclasses.replace(option)


def check_inner(quantizer: Quantizer, *, detached: bool = False) -> None:
  """Refuses what cannot be a part of another quantizer.

  Args:
    detached: no gradient of the image reaches the part, as in a level of a sum.

  Raises:
    ValueError: it says why and what to do.
  """
  name = type(quantizer).__name__
  if quantizer.stochastic:
    raise ValueError(f'{name} with stochastic=True draws in evaluation, which parts of another '
                     'quantizer cannot; set stochastic=False.')
  if detached and any(isinstance(part, Quantizer) and not part.committed
                      for _, part in nnx.iter_modules(quantizer)):
    raise ValueError(f'{name} learns from the image alone, whose gradient levels do not get; use a '
                     'quantizer with losses of its own, and put a projection outside.')


def straight_through(z: Array, q: Array) -> Array:
  """Value exactly `q`, gradient of `z`. The usual `z + sg(q - z)` is off by a rounding error."""
  return sg(q) + (z - sg(z))


def combine(first: Any, second: Any) -> Any:
  """Adds two statistics dicts; a codebook missing from one keeps the other's."""
  if first is None or second is None:
    return second if first is None else first
  if isinstance(first, Statistics):
    return first + second
  return {k: combine(first.get(k), second.get(k)) for k in {**first, **second}}


def absorb(module: Any, statistics: Any) -> None:
  """Walks `statistics` along attribute names and lets every codebook absorb its own."""
  if statistics is None:
    return
  if isinstance(statistics, Statistics):
    module.absorb(statistics)
    return
  for name, part in statistics.items():
    child = module[int(name)] if isinstance(module, nnx.List) else getattr(module, name)
    absorb(child, part)
