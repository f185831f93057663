"""Finite scalar quantization: each channel is rounded to one of a few levels.

Mentzer et al. 2023, arXiv 2309.15505, appendix A.1. The codebook is the grid of all level
combinations, V = prod(levels): nothing to learn, nothing to collapse. The paper's listing shifts by
tan(offset / half) with (1 - eps); we use arctanh and (1 + eps), as deployed libraries do: it is
exact at zero and reaches every level. The symmetric form is of Parker et al. 2024, arXiv
2411.19842, and the noise of FlexTok (Bachmann et al. 2025, arXiv 2502.13967; apple/ml-flextok).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers.quantizer import Quantized, Quantizer, QuantizerConfig, straight_through
from smalti.tokenizers.statistics import diversity, mean, segment_count

COUNTED = 2**20  # larger grids are not counted in training: evaluation.codes does it over a window


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)  # an attribute of modules
class NoiseConfig:
  """What training does to vectors once their tokens are known; tokens and metrics stay clean.

  Peers read tokens from the disturbed vectors, truncated to integers: wrong ids where rounding was
  dropped.

  Attributes:
    drop: probability of an example to pass unrounded (`drop_quant_p`).
    corrupt: fraction of the codes of a chosen example that become random ones, without gradient
      (`corrupt_tokens_p`).
    gate: probability of an example to be chosen for that (0.2 in FlexTok's code).
  """
  drop: float = 0.0
  corrupt: float = 0.0
  gate: float = 0.2

  def __post_init__(self):
    if not all(0 <= p <= 1 for p in (self.drop, self.corrupt, self.gate)):
      raise ValueError(f'drop={self.drop}, corrupt={self.corrupt} and gate={self.gate} are '
                       'probabilities, in [0, 1].')


@dataclasses.dataclass(kw_only=True, slots=True)
class FSQConfig(QuantizerConfig):
  """Levels per channel; (8, 8, 8, 5, 5, 5) gives V = 64,000.

  Table 1 of the paper: (8, 6, 5) for 2^8, (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12,
  (8, 8, 8, 6, 5) for 2^14, (8, 8, 8, 5, 5, 5) for 2^16; five or more levels are recommended.

  Attributes:
    levels: codes per channel, 3 or more; 2 or more where symmetric.
    symmetric: levels are evenly spaced from -1 to 1; the paper's even counts stop short of 1 and
      have a level at 0.
    noise: disturbs vectors in training; None is off.
  """
  levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
  symmetric: bool = False
  noise: NoiseConfig | None = None

  def build(self, *, rngs: nnx.Rngs) -> 'FSQ':
    del rngs  # nothing is learned
    return FSQ(self)


class FSQ(Quantizer):
  """Rounds channel i to one of levels[i] values in [-1, 1], with straight-through gradient.

  `step` is what Residual scales level i by, `step ** i`: one level's rounding error fills the next
  level's range.
  """

  def __init__(self, config: FSQConfig):
    if not config.levels or min(config.levels) < (2 if config.symmetric else 3):
      raise ValueError(
          f'FSQ needs 3 or more levels per channel, got levels={config.levels}; '
          'for two levels set symmetric=True, or use tokenizers.binary.')
    if math.prod(config.levels) >= 2**31:
      raise ValueError(
          f'levels={config.levels} make {math.prod(config.levels)} codes, which must stay below '
          '2**31; split the channels with GroupedConfig.')
    self.dim, self.vocab = len(config.levels), (math.prod(config.levels),)
    self.factors = tuple(config.levels)
    self.symmetric, self.noise = config.symmetric, config.noise
    self.step = tuple(1 / (n - 1) for n in config.levels)

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None, train: bool = False,
               valid: Bool[Array, 'b n'] | None = None) -> Quantized:
    z = z.astype(jnp.float32)
    bounded = self.bound(z)
    quantized = self.round(bounded, valid=valid)
    saturated = jnp.abs(jnp.tanh(z + self._shift())) > 0.99
    quantized.metrics['saturation'] = mean(saturated.astype(jnp.float32), valid)
    if not (train and self.noise):
      return quantized
    if key is None:
      raise ValueError('key=None: noise is drawn in training; pass a key, or noise=None.')
    return dataclasses.replace(quantized, vectors=self._disturb(bounded, quantized.vectors, key))

  def bound(self, z: Float[Array, 'b n c']) -> Float[Array, 'b n c']:
    """Squashes onto the range of the codes: [-1, 1], or [-1, 1 - 2 / L] for an even count."""
    if self.symmetric:
      return jnp.tanh(z)
    bounded = jnp.tanh(z + self._shift()) * self._half() - self._offset()
    return bounded / self._centre()

  def round(self, bounded: Float[Array, 'b n c'], *, valid: Bool[Array, 'b n'] | None = None
            ) -> Quantized:
    """The nearest levels of vectors that are bounded already."""
    levels, centre = np.array(self.factors), self._centre()
    if self.symmetric:
      digits = jnp.floor(bounded * centre + (centre + 0.5))
    else:
      digits = jnp.round(bounded * centre) + centre
    # 1 + 1e-3 overshoots from 1001 levels on
    digits = jnp.clip(digits.astype(jnp.int32), 0, levels - 1)
    tokens = jnp.sum(digits * self._place(), -1, keepdims=True, dtype=jnp.int32)
    vectors = straight_through(bounded, self.lookup(tokens))
    codes, metrics = self.vocab[0], {}
    if codes <= COUNTED:
      counted = tokens if valid is None else jnp.where(valid[..., None], tokens, codes)
      metrics = diversity(segment_count(counted, codes))
    return Quantized(vectors, tokens, losses={}, metrics=metrics, statistics=None)

  def lookup(self, tokens: Int[Array, 'b n 1']) -> Float[Array, 'b n c']:
    """The vectors of `tokens`, exactly what `__call__` returned for them."""
    digits = tokens // self._place() % np.array(self.factors, np.int32)
    return (digits.astype(jnp.float32) - self._centre()) / self._centre()

  def _disturb(self, bounded: Float[Array, 'b n c'], vectors: Float[Array, 'b n c'], key: Array
               ) -> Float[Array, 'b n c']:
    """Some examples not rounded, some codes of some examples replaced by random ones."""
    drop, gate, pick, draw = jax.random.split(key, 4)
    batch, positions, _ = vectors.shape
    noise: Any = self.noise
    passed = jax.random.uniform(drop, (batch, 1, 1)) < noise.drop
    chosen = (jax.random.uniform(gate, (batch, 1, 1)) < noise.gate) & (
        jax.random.uniform(pick, (batch, positions, 1)) < noise.corrupt)
    others = jax.random.randint(draw, (batch, positions, 1), 0, self.vocab[0])
    return jnp.where(chosen, self.lookup(others), jnp.where(passed, bounded, vectors))

  def _centre(self) -> np.ndarray:
    """The digit of the value 0, and half the distance of -1 and 1 in digits."""
    levels = np.array(self.factors, np.float32)
    return (levels - 1) / 2 if self.symmetric else levels // 2

  def _half(self) -> np.ndarray:
    return (np.array(self.factors, np.float32) - 1) * (1 + 1e-3) / 2  # tanh reaches the ends

  def _offset(self) -> np.ndarray:
    # an even count has no level at zero
    even = (np.array(self.factors) % 2 == 0) & (not self.symmetric)
    return np.where(even, 0.5, 0.0).astype(np.float32)

  def _shift(self) -> np.ndarray:
    return np.arctanh(self._offset() / self._half())

  def _place(self) -> np.ndarray:
    return np.array([math.prod(self.factors[:i]) for i in range(self.dim)], np.int32)
