"""Nested codes: every prefix of an ordered code axis is a coarser code that the decoder knows.

Kusupati et al. 2022, arXiv 2205.13147 (Matryoshka representations); nested dropout, Rippel et al.
2014, arXiv 1402.0915: in training each example keeps a prefix of random length. `draw_budget` is
the one place that says which lengths, for positions and scales too; Residual and MultiScale drop
their own levels, because what they drop must not move codebooks either, and `Nested` makes a prefix
of any other codes: channels of FSQ, bits, groups.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers.quantizer import (
  Quantized,
  Quantizer,
  QuantizerConfig,
  check_inner,
  straight_through,
)
from smalti.tokenizers.statistics import diversity, segment_count

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


def draw_keep(key: Array | None, batch: int, length: int, schedule: Schedule = 'uniform',
              least: int = 1, dropout: float = 1.0) -> Int[Array, 'b']:
  """int32[B]: `draw_budget` for a fraction `dropout` of the examples, and `length` for the others.

  Raises:
    ValueError: no key.
  """
  if key is None:
    raise ValueError('key=None: dropout draws levels in training; pass a key, or dropout=0.')
  pick, draw = jax.random.split(key)
  keep = draw_budget(draw, batch, length, schedule, least)
  return jnp.where(jax.random.uniform(pick, (batch,)) < dropout, keep, length)


@dataclasses.dataclass(kw_only=True, slots=True)
class NestedConfig(QuantizerConfig):
  """Prefixes of the codes of `quantizer`.

  Attributes:
    quantizer: of several codes per position, each with its own channels (bits, GroupedConfig), or
      with a meaning for every prefix (SparseConfig); of one code with factors (FSQ), which then
      become codes of their own.
    dropout: fraction of the training examples that keep only some codes.
    schedule: law of how many codes these keep, see `draw_budget`.
    least: codes that are always kept.
  """
  quantizer: QuantizerConfig
  dropout: float = 1.0
  schedule: Schedule = 'uniform'
  least: int = 1

  def build(self, *, rngs: nnx.Rngs) -> 'Nested':
    return Nested(self, rngs=rngs)


class Nested(Quantizer):
  """The codes of a quantizer, those beyond a prefix replaced by a learned vector.

  Not by zeros: zero is a code of FSQ. Where every code has channels of its own, `bias` [c] stands
  in the channels of those dropped; where codes add up, dropped code d adds row d of `bias` [D, c].
  Losses and statistics are those of the quantizer within, of all codes.
  """

  order = 'depth'
  committed = False  # `bias` learns from the vectors

  def __init__(self, config: NestedConfig, *, rngs: nnx.Rngs):
    if not 0 <= config.dropout <= 1:
      raise ValueError(f'dropout={config.dropout} is a fraction of the examples, in [0, 1].')
    q: Any = config.quantizer.build(rngs=rngs)
    self.split = len(q.vocab) == 1  # one code becomes its factors
    codes = q.factors if self.split else q.vocab
    name = type(q).__name__
    check_inner(q)
    if not q.apart and q.order == 'raster':
      raise ValueError(f'Codes of {name} have no channels of their own, one code after the other, '
                       'which a prefix cuts; put a projection outside, and use bits or groups of '
                       'one code each.')
    if q.budgets or q.order not in ('raster', 'depth'):
      raise ValueError(f'{name} has order={q.order!r} and prefixes {q.budgets} of its own; nest '
                       'codes of raster order, or of depth without dropout.')
    self.sums = q.order == 'depth'
    if len(codes) < 2 or not self.sums and q.dim % len(codes):
      raise ValueError(f'{name} with vocab={q.vocab} and factors={q.factors} has no codes to drop; '
                       'use a quantizer with factors or several codes per position.')
    self.coder, self.dim, self.vocab = q, q.dim, tuple(codes)
    self.factors = () if self.split else q.factors
    self.dropout, self.schedule, self.least = config.dropout, config.schedule, config.least
    lengths = budgets(len(codes), config.schedule, config.least)
    self.budgets = lengths if config.dropout else ()
    shape = (len(codes), q.dim) if self.sums else (q.dim,)
    draw = jax.random.normal(rngs.params(), (math.prod(shape),))
    self.bias = nnx.Param(0.02 * draw.reshape(shape))

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    inner = None
    if key is not None:
      key, inner = jax.random.split(key)
    out = self.coder(z, key=inner, train=train)
    tokens, metrics = self._unpack(out.tokens), out.metrics
    if self.split:
      use = [diversity(segment_count(tokens[..., d], v)) for d, v in enumerate(self.vocab)]
      metrics = {**metrics,
                 **{name: jnp.mean(jnp.stack([u[name] for u in use])) for name in use[0]},
                 **{f'{name}_{d}': u[name] for d, u in enumerate(use) for name in u}}
    vectors = out.vectors
    if train and self.dropout:
      keep = draw_keep(key, z.shape[0], len(self.vocab), self.schedule, self.least, self.dropout)
      mask = jnp.arange(len(self.vocab)) < keep[:, None, None]
      mask = jnp.broadcast_to(mask, tokens.shape)
      if self.sums:
        vectors = straight_through(vectors, self.coder.lookup(tokens, mask=mask))
      vectors = self._fill(vectors, mask)
    statistics = None if out.statistics is None else {'coder': out.statistics}
    return Quantized(vectors, tokens, out.losses, metrics, statistics)

  def lookup(self, tokens: Int[Array, 'b n d'], mask: Bool[Array, 'b n d'] | None = None
             ) -> Float[Array, 'b n c']:
    """The vectors of `tokens`, with the learned ones where `mask` is False."""
    if mask is None:
      return self.coder.lookup(self._pack(tokens))
    if self.sums:
      return self._fill(self.coder.lookup(tokens, mask=mask), mask)
    return self._fill(self.coder.lookup(self._pack(jnp.where(mask, tokens, 0))), mask)

  def prepare(self, z: Float[Array, 'b n c'], *, key: Array) -> None:
    self.coder.prepare(z, key=key)

  def _fill(self, vectors: Float[Array, 'b n c'], mask: Bool[Array, 'b n d']
            ) -> Float[Array, 'b n c']:
    """The learned vectors in place of codes that `mask` leaves out."""
    if not self.sums:
      return jnp.where(jnp.repeat(mask, self.dim // len(self.vocab), -1), vectors, self.bias[...])
    for d, row in enumerate(self.bias[...]):  # in this order in every program
      vectors = vectors + jnp.where(mask[..., d, None], 0.0, row)
    return vectors

  def _pack(self, tokens: Int[Array, 'b n d']) -> Int[Array, 'b n k']:
    """Tokens of the quantizer within."""
    if not self.split:
      return tokens
    return jnp.sum(tokens * self._place(), -1, keepdims=True, dtype=jnp.int32)

  def _unpack(self, tokens: Int[Array, 'b n k']) -> Int[Array, 'b n d']:
    if not self.split:
      return tokens
    return tokens // self._place() % np.array(self.vocab, np.int32)

  def _place(self) -> np.ndarray:
    return np.array([math.prod(self.vocab[:i]) for i in range(len(self.vocab))], np.int32)
