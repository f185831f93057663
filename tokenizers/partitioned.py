"""Masked-channel residual quantization: the first levels share the channels between them.

MCRVQ of Language-Codec (Ji et al. 2024, arXiv 2402.12208; jishengpeng/languagecodec). The first
`split` levels each see their own part of the channels, the others zero, with codes of all channels;
later levels are ordinary residual ones. Information spreads over the first codebooks instead of
crowding into level 0, which a language model over the codes finds easier. The published `encode`
forgets the masks, so that its tokens are not those of training; here one function, `_target`, says
what a level sees, in training, encoding and preparation alike.
"""

import dataclasses

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from smalti.tokenizers.nested import Schedule
from smalti.tokenizers.quantizer import QuantizerConfig
from smalti.tokenizers.residual import Residual, ResidualConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class PartitionedConfig(QuantizerConfig):
  """`levels` copies of `quantizer`, of which the first `split` see a part of the channels each.

  Attributes:
    quantizer: Language-Codec has 1,024 codes of 128 channels.
    levels: codes per position, 8.
    split: levels that share the channels, 3; never dropped.
    dropout: fraction of the training examples that keep only some levels (published: all, with
      U{3..8} levels).
    schedule: law of how many levels these keep, see `nested.draw_budget`.
  """
  quantizer: QuantizerConfig
  levels: int = 8
  split: int = 3
  dropout: float = 1.0
  schedule: Schedule = 'uniform'

  def build(self, *, rngs: nnx.Rngs) -> 'Partitioned':
    return Partitioned(self, rngs=rngs)


class Partitioned(Residual):
  """Residual, but q_i = Q_i(m_i z) for i < split; the masks m_i are disjoint and cover all."""

  def __init__(self, config: PartitionedConfig, *, rngs: nnx.Rngs):
    if not 1 <= config.split <= config.levels:
      raise ValueError(f'split={config.split} must be in 1..levels={config.levels}.')
    super().__init__(ResidualConfig(
        quantizer=config.quantizer, levels=config.levels, dropout=config.dropout,
        schedule=config.schedule, least=config.split), rngs=rngs)
    if config.split > self.dim:
      raise ValueError(f'split={config.split} must be at most the {self.dim} channels.')
    self.split = config.split

  def _target(self, i: int, z: Float[Array, 'b n c'], total: Float[Array, 'b n c']
              ) -> Float[Array, 'b n c']:
    return z * channel_masks(self.dim, self.split)[i] if i < self.split else z - total

  def _scale(self, i: int) -> np.ndarray:
    return super()._scale(max(0, i - self.split + 1))  # the first ones together are one level


def channel_masks(channels: int, parts: int) -> Bool[np.ndarray, 'p c']:
  """Which channels each part has: 42, 43 and 43 of 128 for three."""
  ends = np.arange(parts + 1) * channels // parts
  place = np.arange(channels)
  return (place >= ends[:-1, None]) & (place < ends[1:, None])
