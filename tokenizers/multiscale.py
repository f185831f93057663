"""Multi-scale residual quantization: a feature grid as a pyramid of token grids, coarse to fine.

VAR (Tian et al. 2024, arXiv 2404.02905, algorithms 1 and 2; FoundationVision/VAR). Scale p takes
what is left of the grid, averaged down to p x p vectors, quantizes them with one codebook for all
scales, and adds them back, upsampled. Quantizer dropout over scales: ImageFolder (Li et al. 2024,
arXiv 2410.01756).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.networks.convnet import kernel_init
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
from smalti.tokenizers.residual import numbered, selective
from smalti.tokenizers.search import HIGHEST
from smalti.tokenizers.statistics import diversity, segment_count


@dataclasses.dataclass(kw_only=True, slots=True)
class MultiScaleConfig(QuantizerConfig):
  """One `quantizer` for token grids of every scale.

  Attributes:
    quantizer: VAR has 4,096 codes of 32 channels; GroupedConfig makes the product codes of
      ImageFolder.
    scales: sides of the token grids; the last is that of the (square) feature grid.
    blends: 3x3 convolutions that smooth what is added, each shared by the scales next to it.
    dropout: fraction of the training examples that keep only some scales (ImageFolder 0.1).
    schedule: law of how many scales these keep, see `nested.draw_budget`.
    least: scales that are always kept.
  """
  quantizer: QuantizerConfig
  scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
  blends: int = 4
  dropout: float = 0.0
  schedule: nested.Schedule = 'uniform'
  least: int = 1

  def build(self, *, rngs: nnx.Rngs) -> 'MultiScale':
    return MultiScale(self, rngs=rngs)


class MultiScale(Quantizer):
  """f_s = f_{s-1} + blend_s(up(Q(down(z - f_{s-1})))), straight-through on the last f.

  Losses, means over scales: `commitment` = mean |sg f_s - z|^2, and `codebook` = mean
  |f_s - sg z|^2, which trains the convolutions, and the codes where they are parameters; other
  terms are those of the quantizer within. Tokens are the grids of all scales one after the other,
  and a prefix counts positions: whole scales only.
  """

  order = 'scale'

  def __init__(self, config: MultiScaleConfig, *, rngs: nnx.Rngs):
    scales = tuple(config.scales)
    if not scales or scales[0] < 1 or any(b <= a for a, b in zip(scales, scales[1:])):
      raise ValueError(f'scales={scales} must be positive and increase, up to the feature grid.')
    if config.blends < 1:
      raise ValueError(f'blends={config.blends} must be 1 or more.')
    if not 0 <= config.dropout <= 1:
      raise ValueError(f'dropout={config.dropout} is a fraction of the examples, in [0, 1].')
    nested.budgets(len(scales), config.schedule, config.least)  # says what it cannot draw
    q: Any = config.quantizer.build(rngs=rngs)
    if q.order != 'raster':
      raise ValueError(f'Scales of order={q.order!r} have two orders of prefixes; use a quantizer '
                       'of raster order.')
    check_inner(q, detached=True)
    if config.dropout and not selective(q):
      raise ValueError(f'{type(q).__name__} cannot leave examples out, which dropout='
                       f'{config.dropout} needs; set dropout=0.')
    self.coder, self.scales = q, scales
    self.dropout, self.schedule, self.least = config.dropout, config.schedule, config.least
    self.dim, self.vocab, self.factors = q.dim, q.vocab, q.factors
    ends = np.cumsum(np.square(scales))
    self.budgets = tuple(int(n) for n in ends)
    self.grid = self.budgets[-1:]
    chosen = blend_of_scale(len(scales), config.blends)
    used = sorted(set(chosen))  # no convolution that no scale would train
    self.chosen = tuple(used.index(c) for c in chosen)
    self.blends = nnx.List([
        nnx.Conv(q.dim, q.dim, (3, 3), precision=HIGHEST, kernel_init=kernel_init, rngs=rngs)
        for _ in used])

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None, train: bool = False
               ) -> Quantized:
    z, keep, count = self._square(z), None, len(self.scales)
    keys: Any = [None] * (count + 1) if key is None else jax.random.split(key, count + 1)
    if train and self.dropout:
      keep = nested.draw_keep(
          keys[-1], z.shape[0], count, self.schedule, self.least, self.dropout)
    parts, statistics, power = [], None, jnp.mean(jnp.square(sg(z)))
    total = vectors = jnp.zeros_like(z)
    losses = {'commitment': jnp.zeros(()), 'codebook': jnp.zeros(())}
    metrics = {}
    for i in range(count):
      active = jnp.full(z.shape[0], True) if keep is None else keep > i
      target = self._target(i, z - sg(total))
      only = {} if keep is None else {'valid': jnp.broadcast_to(active[:, None], target.shape[:2])}
      part = self.coder(target, key=keys[i], train=train, **only)
      parts.append(part)
      total = total + self._added(i, part.tokens)
      active = active[:, None, None, None]
      vectors = jnp.where(active, total, vectors)
      losses['commitment'] += jnp.mean(jnp.where(active, jnp.square(sg(total) - z), 0.0))
      losses['codebook'] += jnp.mean(jnp.where(active, jnp.square(total - sg(z)), 0.0))
      for name, value in part.losses.items():
        if name not in ('commitment', 'codebook'):  # those are of the sums
          losses[name] = losses.get(name, 0.0) + jnp.mean(jnp.float32(active)) * value
      metrics[f'relative_commitment_{i}'] = jnp.mean(jnp.square(sg(z - total))) / (power + 1e-12)
      if part.statistics is not None:
        # the finest scale first: its spare rows, of the most vectors, are those that stay
        statistics = combine({'coder': part.statistics}, statistics)
    tokens = jnp.concatenate([part.tokens for part in parts], 1)
    places = np.arange(len(parts) * len(self.vocab)).reshape(len(parts), -1)
    metrics = {**numbered([part.metrics for part in parts], places), **metrics,
               'relative_commitment': metrics[f'relative_commitment_{len(parts) - 1}']}
    if 'perplexity' in metrics:  # of the tokens of all scales together, which share their codes
      use = [diversity(segment_count(tokens[..., d], v)) for d, v in enumerate(self.vocab)]
      metrics |= {name: jnp.mean(jnp.stack([u[name] for u in use])) for name in use[0]}
    losses = {name: value / len(self.scales) for name, value in losses.items()}
    vectors = straight_through(z, vectors).reshape(z.shape[0], -1, self.dim)
    return Quantized(vectors, tokens, losses, metrics, statistics)

  def lookup(self, tokens: Int[Array, 'b n d'], mask: Bool[Array, 'b n d'] | None = None
             ) -> Float[Array, 'b m c']:
    """The feature grid of `tokens`; a scale counts where `mask` has all of its codes."""
    total: Any = 0.0
    start = 0
    for i, end in enumerate(self.budgets):
      added = self._added(i, tokens[:, start:end])
      if mask is not None:
        whole = jnp.all(mask[:, start:end], (1, 2))
        added = jnp.where(whole[:, None, None, None], added, 0.0)
      total, start = total + added, end
    return total.reshape(tokens.shape[0], -1, self.dim)

  def prepare(self, z: Float[Array, 'b n c'], *, key: Array) -> None:
    """The codebook on the vectors, and then again on what is left for each scale by those codes."""
    first, second = jax.random.split(key)
    z, seen = self._square(z), []
    total = jnp.zeros_like(z)
    turns = min(2, z.shape[0])  # other examples, since vectors that are codes leave nothing
    self.coder.prepare(z[::turns].reshape(-1, z.shape[1] * z.shape[2], self.dim), key=first)
    for i in range(len(self.scales)):
      seen.append(self._target(i, z - total))
      total = total + self._added(i, self.coder(seen[i]).tokens)
    self.coder.prepare(jnp.concatenate(seen, 1)[1 % turns::turns], key=second)

  def fits(self, grid: tuple[int, ...]) -> None:
    if tuple(grid) != (self.scales[-1],) * 2:
      raise ValueError(f'scales={self.scales} need vectors on a square grid of their last side, '
                       f'and these lie on {" x ".join(map(str, grid))}; end them with its side.')

  def _square(self, z: Float[Array, 'b n c']) -> Float[Array, 'b h w c']:
    side = self.scales[-1]
    if z.shape[1] != side**2:
      raise ValueError(f'{z.shape[1]} vectors are not the {side} x {side} of the last scale of '
                       f'scales={self.scales}; end them with the side of the feature grid.')
    return z.astype(jnp.float32).reshape(z.shape[0], side, side, self.dim)

  def _target(self, i: int, rest: Float[Array, 'b h w c']) -> Float[Array, 'b n c']:
    """What scale i quantizes: the rest, averaged down."""
    if i < len(self.scales) - 1:
      rest = _resize(rest, area(self.scales[-1], self.scales[i]))
    return rest.reshape(rest.shape[0], -1, self.dim)

  def _added(self, i: int, tokens: Int[Array, 'b n d']) -> Float[Array, 'b h w c']:
    """What scale i adds to the grid: the codes, upsampled and smoothed."""
    q = self.coder.lookup(tokens).reshape(-1, self.scales[i], self.scales[i], self.dim)
    if i < len(self.scales) - 1:
      q = _resize(q, bicubic(self.scales[i], self.scales[-1]))
    return 0.5 * q + 0.5 * self.blends[self.chosen[i]](q)


def blend_of_scale(scales: int, blends: int) -> tuple[int, ...]:
  """Which convolution each scale has: the nearest of `blends` ticks to s / (S - 1).

  The ticks are VAR's: linspace(1/12, 11/12, 4) of four, and the centres of equal parts otherwise.
  """
  edge = 1 / 3 / blends if blends == 4 else 1 / 2 / blends
  ticks = np.linspace(edge, 1 - edge, blends)
  return tuple(int(np.argmin(np.abs(ticks - s / max(scales - 1, 1)))) for s in range(scales))


@functools.cache
def area(size: int, small: int) -> np.ndarray:
  """float32[small, size]: means over the adaptive bins floor(i S / s) to ceil((i + 1) S / s)."""
  matrix = np.zeros((small, size))
  for i in range(small):
    start, end = i * size // small, -(-(i + 1) * size // small)
    matrix[i, start:end] = 1 / (end - start)
  return matrix.astype(np.float32)


@functools.cache
def bicubic(small: int, size: int) -> np.ndarray:
  """float32[size, small]: cubic convolution with a = -0.75, pixel centres at halves, clamped edges.

  PyTorch's `interpolate(mode='bicubic', align_corners=False)`, which VAR was trained with; most
  other libraries have a = -0.5.
  """
  a, matrix = -0.75, np.zeros((size, small))
  for i in range(size):
    x = (i + 0.5) * small / size - 0.5
    for tap in range(math.floor(x) - 1, math.floor(x) + 3):
      t = abs(x - tap)
      weight = ((a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1
                else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a)
      matrix[i, min(max(tap, 0), small - 1)] += weight
  return matrix.astype(np.float32)


def _resize(x: Float[Array, 'b h w c'], matrix: np.ndarray) -> Float[Array, 'b y x c']:
  """Both axes times one matrix."""
  return jnp.einsum('yh,xw,bhwc->byxc', matrix, matrix, x, precision=HIGHEST)
