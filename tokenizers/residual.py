"""Residual quantization: each level quantizes what the levels before it left over.

SoundStream (Zeghidour et al. 2021, arXiv 2107.03312, section III-C), Encodec (arXiv 2210.13438);
RQ-VAE (Lee et al. 2022, arXiv 2203.01941) shares one codebook between the levels. Two mistakes of
public code, and how they are avoided here: the straight-through estimator is applied once, to the
sum (once per level it multiplies the encoder's gradient by the number of levels), and residuals are
z - sg(q_0 + .. + q_i), so that every level's commitment reaches the encoder (with q_i not detached
the gradients of z and q_i cancel, and only level 0 commits). A shared codebook learns from all
levels at once, after the step: updates inside the loop would let later levels see other codes than
evaluation does.
"""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers import nested
from smalti.tokenizers.quantizer import (
  Quantized,
  Quantizer,
  QuantizerConfig,
  check_inner,
  combine,
  sg,
  straight_through,
)
from smalti.tokenizers.search import HIGHEST, chunk_rows, chunked, unchunked
from smalti.tokenizers.statistics import mean


@dataclasses.dataclass(kw_only=True, slots=True)
class ResidualConfig(QuantizerConfig):
  """`levels` copies of `quantizer`, each on the residual of those before it.

  Attributes:
    quantizer: any quantizer of raster order, without a projection of its own.
    levels: codes per position (Encodec 8 at 6 kbit/s, RQ-VAE 4).
    shared: one codebook for all levels (RQ-VAE, 16,384 codes).
    dropout: fraction of the training examples that keep only some levels; 0 is off. SoundStream
      takes every example, Descript's codec half of them (arXiv 2306.06546). Prefixes need it.
    schedule: law of how many levels these keep, see `nested.draw_budget`.
    least: levels that are always kept.
    beam: partial sums that evaluation carries from level to level, instead of the nearest alone; 1
      is greedy, 2 to 4 lower the error for `beam` times the work. Training is always greedy.
  """
  quantizer: QuantizerConfig
  levels: int = 8
  shared: bool = False
  dropout: float = 0.0
  schedule: nested.Schedule = 'uniform'
  least: int = 1
  beam: int = 1

  def build(self, *, rngs: nnx.Rngs) -> 'Residual':
    return Residual(self, rngs=rngs)


class Residual(Quantizer):
  """q = q_0 + .. + q_{L-1}, q_i = Q_i(z - sg(q_0 + .. + q_{i-1})), straight-through on the sum.

  Losses are means over levels; a level that dropout takes from an example counts as zero for it,
  and leaves no statistics. `commitment` is also RQ-VAE's cumulative one, the mean over i of
  |z - sg(q_0 + .. + q_i)|^2: with these residuals the two are the same number and gradient.
  A quantizer with `bound` and `step` (FSQ) is bounded once, before level 0, and level i is scaled
  by step ** i, the range of the rounding errors before it.
  """

  order = 'depth'

  def __init__(self, config: ResidualConfig, *, rngs: nnx.Rngs):
    if config.levels < 1 or config.beam < 1:
      raise ValueError(f'levels={config.levels} and beam={config.beam} must be 1 or more.')
    if not 0 <= config.dropout <= 1:
      raise ValueError(f'dropout={config.dropout} is a fraction of the examples, in [0, 1].')
    budgets = nested.budgets(config.levels, config.schedule, config.least)
    copies: list[Any] = [
        config.quantizer.build(rngs=rngs) for _ in range(1 if config.shared else config.levels)]
    q = copies[0]
    if q.order != 'raster':
      raise ValueError(f'Levels of order={q.order!r} cannot be nested in depth; use a quantizer of '
                       'raster order.')
    check_inner(q, detached=True)
    if any(hasattr(m, 'step') for _, m in nnx.iter_modules(q)) and not hasattr(q, 'step'):
      raise ValueError(f'{type(q).__name__} hides a bounded quantizer from the levels; write '
                       'GroupedConfig(quantizer=ResidualConfig(...)).')
    if getattr(q, 'noise', None):
      raise ValueError('Levels are rounded without noise; set noise=None in the quantizer.')
    if hasattr(q, 'step') and (max(q.step) >= 1 or q.noise):
      raise ValueError('Levels of FSQ need 3 or more levels per channel, since 2 leave as much as '
                       'they take, and noise=None, since noise would be quantized next.')
    if config.dropout and not selective(q):
      raise ValueError(f'{type(q).__name__} cannot leave examples out, which dropout='
                       f'{config.dropout} needs; set dropout=0.')
    if config.beam > 1 and not hasattr(q, 'codes'):
      raise ValueError(f'beam={config.beam} searches a codebook, and {type(q).__name__} has none; '
                       'set beam=1.')
    self.levels = nnx.List(copies)
    self.depth, self.dropout, self.beam = config.levels, config.dropout, config.beam
    self.schedule, self.least = config.schedule, config.least
    self.dim, self.factors = q.dim, q.factors
    self.vocab, self.width = q.vocab * config.levels, len(q.vocab)
    self.budgets = tuple(n * self.width for n in budgets) if config.dropout else ()

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None, train: bool = False,
               valid: Bool[Array, 'b n'] | None = None) -> Quantized:
    z = self._bound(z)
    keep = None
    keys: Any = [None] * (self.depth + 1) if key is None else jax.random.split(key, self.depth + 1)
    if train and self.dropout:
      keep = nested.draw_keep(
          keys[-1], z.shape[0], self.depth, self.schedule, self.least, self.dropout)
    parts, fractions, energies, statistics = [], [], [], None
    total = vectors = jnp.zeros_like(z)
    for i in range(self.depth):
      active = valid if keep is None else (
          jnp.broadcast_to((keep > i)[:, None], z.shape[:2]) & (True if valid is None else valid))
      target = self._target(i, z, total)
      part = self._quantize(i, target, key=keys[i], train=train, valid=active)
      parts.append(part)
      total = total + sg(part.vectors)
      vectors = total if keep is None else jnp.where((keep > i)[:, None, None], total, vectors)
      fractions.append(1.0 if keep is None else mean(jnp.float32(active)[..., None], valid))
      energies.append(mean(jnp.square(sg(z) - total), valid))
      if part.statistics is not None:
        name = str(i % len(self.levels))
        statistics = combine(statistics, {'levels': {name: part.statistics}})
    tokens = jnp.concatenate([p.tokens for p in parts], -1)
    if self.beam > 1 and not train:
      tokens = self._search(z, tokens)
      vectors = self.lookup(tokens)
      energies[-1] = mean(jnp.square(sg(z - vectors)), valid)
    losses = {name: jnp.mean(jnp.stack([f * p.losses[name] for f, p in zip(fractions, parts)]))
              for name in parts[0].losses}
    relative = [e / (mean(jnp.square(sg(z)), valid) + 1e-12) for e in energies]
    metrics = {
        **numbered([p.metrics for p in parts], np.arange(len(self.vocab)).reshape(self.depth, -1)),
        'relative_commitment': relative[-1],
        **{f'relative_commitment_{i}': value for i, value in enumerate(relative)}}
    return Quantized(straight_through(z, vectors), tokens, losses, metrics, statistics)

  def lookup(self, tokens: Int[Array, 'b n d'], mask: Bool[Array, 'b n d'] | None = None
             ) -> Float[Array, 'b n c']:
    """The sum over levels; a level counts where `mask` has all of its codes."""
    total = None
    for i in range(self.depth):
      place = slice(i * self.width, (i + 1) * self.width)
      q = self._codes(i, tokens[..., place])
      if mask is not None:
        q = jnp.where(jnp.all(mask[..., place], -1, keepdims=True), q, 0.0)
      total = q if total is None else total + q
    return total

  def prepare(self, z: Float[Array, 'b n c'], *, key: Array) -> None:
    """Every level on the residuals that the levels before it, prepared already, leave.

    Levels take turns at the odd and the even examples: vectors that have become codes of a level
    leave nothing for the next. A shared codebook is prepared for the vectors, and then again for
    the residuals of all depths.
    """
    z, seen = self._bound(z), []
    total = jnp.zeros_like(z)
    keys, turns = jax.random.split(key, self.depth + 1), min(2, z.shape[0])
    for i in range(self.depth):
      seen.append(self._target(i, z, total) / self._scale(i))
      if i < len(self.levels):
        self._level(i).prepare(seen[i][i % turns::turns], key=keys[i])
      total = total + self._quantize(i, self._target(i, z, total)).vectors
    if len(self.levels) < self.depth:
      self._level(0).prepare(jnp.concatenate(seen, 1)[1 % turns::turns], key=keys[-1])

  def _target(self, i: int, z: Float[Array, 'b n c'], total: Float[Array, 'b n c']
              ) -> Float[Array, 'b n c']:
    """What level i quantizes, given the sum of the levels before it."""
    return z - total

  def _quantize(self, i: int, z: Float[Array, 'b n c'], *, valid: Array | None = None,
                **options: Any) -> Quantized:
    """Level i of `z`, in its own scale."""
    q = self._level(i)
    if not self._bounded():
      return q(z, **(options if valid is None else {**options, 'valid': valid}))
    out = q.round(z / self._scale(i), valid=valid)
    return dataclasses.replace(out, vectors=self._codes(i, out.tokens))

  def _codes(self, i: int, tokens: Int[Array, 'b n d']) -> Float[Array, 'b n c']:
    """What level i adds to the sum."""
    q = self._level(i).lookup(tokens)
    if not self._bounded():
      return q
    # The barrier keeps product and sum apart: fused, they would be rounded once in some programs
    # and twice in others, and decoding would not be the training forward.
    return jax.lax.optimization_barrier(q * self._scale(i))

  def _level(self, i: int) -> Any:
    return self.levels[i % len(self.levels)]

  def _bounded(self) -> bool:
    return hasattr(self.levels[0], 'step')

  def _bound(self, z: Float[Array, 'b n c']) -> Float[Array, 'b n c']:
    z = z.astype(jnp.float32)
    return self.levels[0].bound(z) if self._bounded() else z

  def _scale(self, i: int) -> Any:
    return np.float32(np.array(self.levels[0].step) ** i) if self._bounded() else np.float32(1)

  def _search(self, z: Float[Array, 'b n c'], greedy: Int[Array, 'b n d']) -> Int[Array, 'b n d']:
    """The tokens of a beam search, where they are closer than the greedy ones."""
    tables = [sg(self._level(i).codes()) for i in range(self.depth)]
    rows = sg(z).reshape(-1, self.dim)
    step = chunk_rows(rows.shape[0], self.beam * tables[0].shape[0])
    found = jax.lax.map(lambda z: beam_search(z, tables, self.beam), chunked(rows, step))
    found = unchunked(found, rows.shape[0]).reshape(greedy.shape)
    error = [jnp.sum(jnp.square(sg(z) - self.lookup(t)), -1) for t in (found, greedy)]
    return jnp.where((error[0] < error[1])[..., None], found, greedy)


def beam_search(z: Float[Array, 'n c'], tables: list[Float[Array, 'v c']], beam: int
                ) -> Int[Array, 'n d']:
  """Tokens of a sum of one row per table close to `z`, from the `beam` best sums of each depth."""
  rest, tokens = z[:, None], jnp.zeros((z.shape[0], 1, 0), jnp.int32)
  for codes in tables:
    product = jnp.matmul(rest, codes.T, precision=HIGHEST)
    closeness = 2 * product - jnp.sum(jnp.square(codes), -1) - jnp.sum(
        jnp.square(rest), -1, keepdims=True)
    paths = closeness.shape[1] * min(beam, codes.shape[0])
    score, child = jax.lax.top_k(closeness, min(beam, codes.shape[0]))  # [n, paths so far, k]
    _, best = jax.lax.top_k(score.reshape(-1, paths), min(beam, paths))
    parent = best // score.shape[-1]
    code = jnp.take_along_axis(child.reshape(-1, paths), best, 1).astype(jnp.int32)
    rest = jnp.take_along_axis(rest, parent[..., None], 1) - codes[code]
    tokens = jnp.take_along_axis(tokens, parent[..., None], 1)
    tokens = jnp.concatenate([tokens, code[..., None]], -1)
  best = jnp.argmin(jnp.sum(jnp.square(rest), -1), -1)
  return jnp.take_along_axis(tokens, best[:, None, None], 1)[:, 0]


def selective(quantizer: Quantizer) -> bool:
  """Whether a quantizer, and all within it, can be told which vectors count."""
  return all('valid' in inspect.signature(type(m).__call__).parameters
             for _, m in nnx.iter_modules(quantizer) if isinstance(m, Quantizer))


def numbered(parts: list[dict[str, Array]], places: Any) -> dict[str, Array]:
  """Means over the parts of a quantizer, and what tells a collapsed part by its code's number.

  Args:
    parts: metrics of every part.
    places: for every part, which of the whole quantizer's codes its own are.
  """
  metrics = {name: jnp.mean(jnp.stack([p[name] for p in parts]))
             for name in parts[0] if not name[-1].isdigit()}
  for part, place in zip(parts, places):
    for name in ('perplexity', 'usage', 'ratio'):
      for j, code in enumerate(place):
        own = name if len(place) == 1 else f'{name}_{j}'
        if own in part:
          metrics[f'{name}_{code}'] = part[own]
  return metrics
