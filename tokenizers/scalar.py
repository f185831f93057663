"""Finite scalar quantization: each channel is rounded to one of a few levels.

Mentzer et al. 2023, arXiv 2309.15505, appendix A.1. The codebook is the grid of all level
combinations, V = prod(levels): nothing to learn, nothing to collapse. The paper's listing shifts by
tan(offset / half) with (1 - eps); we use arctanh and (1 + eps), as deployed libraries do: it is
exact at zero and reaches every level.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers.quantizer import Quantized, Quantizer, QuantizerConfig, straight_through
from smalti.tokenizers.statistics import diversity, mean, segment_count

COUNTED = 2**20  # larger grids are not counted in training: evaluation.codes does it over a window


@dataclasses.dataclass(kw_only=True, slots=True)
class FSQConfig(QuantizerConfig):
  """Levels per channel; (8, 8, 8, 5, 5, 5) gives V = 64,000.

  Table 1 of the paper: (8, 6, 5) for 2^8, (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12,
  (8, 8, 8, 6, 5) for 2^14, (8, 8, 8, 5, 5, 5) for 2^16; five or more levels are recommended.
  """
  levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

  def build(self, *, rngs: nnx.Rngs) -> 'FSQ':
    del rngs  # nothing is learned
    return FSQ(self)


class FSQ(Quantizer):
  """Rounds channel i to one of levels[i] values in [-1, 1], with straight-through gradient.

  `step` is what Residual scales level i by, `step ** i`: one level's rounding error fills the next
  level's range.
  """

  def __init__(self, config: FSQConfig):
    if not config.levels or min(config.levels) < 3:
      raise ValueError(
          f'FSQ needs 3 or more levels per channel, got levels={config.levels}; '
          'for two levels use tokenizers.binary.')
    if math.prod(config.levels) >= 2**31:
      raise ValueError(
          f'levels={config.levels} make {math.prod(config.levels)} codes, which must stay below '
          '2**31; split the channels with GroupedConfig.')
    self.dim, self.vocab = len(config.levels), (math.prod(config.levels),)
    self.factors = tuple(config.levels)
    self.step = tuple(1 / (n - 1) for n in config.levels)

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None, train: bool = False,
               valid: Bool[Array, 'b n'] | None = None) -> Quantized:
    del key, train  # nothing is drawn and nothing learned
    z = z.astype(jnp.float32)
    quantized = self.round(self.bound(z), valid=valid)
    saturated = jnp.abs(jnp.tanh(z + self._shift())) > 0.99
    quantized.metrics['saturation'] = mean(saturated.astype(jnp.float32), valid)
    return quantized

  def bound(self, z: Float[Array, 'b n c']) -> Float[Array, 'b n c']:
    """Squashes onto the range of the codes: [-1, 1], or [-1, 1 - 2 / L] for an even count."""
    levels = np.array(self.factors)
    bounded = jnp.tanh(z + self._shift()) * self._half() - self._offset()
    return bounded / (levels // 2)

  def round(self, bounded: Float[Array, 'b n c'], *, valid: Bool[Array, 'b n'] | None = None
            ) -> Quantized:
    """The nearest levels of vectors that are bounded already."""
    levels = np.array(self.factors)
    digits = jnp.round(bounded * (levels // 2)).astype(jnp.int32) + levels // 2
    digits = jnp.clip(digits, 0, levels - 1)  # 1 + 1e-3 overshoots from 1001 levels on
    tokens = jnp.sum(digits * self._place(), -1, keepdims=True, dtype=jnp.int32)
    vectors = straight_through(bounded, self.lookup(tokens))
    codes, metrics = self.vocab[0], {}
    if codes <= COUNTED:
      counted = tokens if valid is None else jnp.where(valid[..., None], tokens, codes)
      metrics = diversity(segment_count(counted, codes))
    return Quantized(vectors, tokens, losses={}, metrics=metrics, statistics=None)

  def lookup(self, tokens: Int[Array, 'b n 1']) -> Float[Array, 'b n c']:
    """The vectors of `tokens`, exactly what `__call__` returned for them."""
    half = np.array(self.factors) // 2
    digits = tokens // self._place() % np.array(self.factors, np.int32)
    return (digits - half).astype(jnp.float32) / half.astype(np.float32)

  def _half(self) -> np.ndarray:
    return (np.array(self.factors, np.float32) - 1) * (1 + 1e-3) / 2  # tanh reaches the ends

  def _offset(self) -> np.ndarray:
    # an even count has no level at zero
    return np.where(np.array(self.factors) % 2 == 0, 0.5, 0.0).astype(np.float32)

  def _shift(self) -> np.ndarray:
    return np.arctanh(self._offset() / self._half())

  def _place(self) -> np.ndarray:
    return np.array([math.prod(self.factors[:i]) for i in range(self.dim)], np.int32)
