"""Masked generation with all codes of a position in one slot of the transformer.

Where a position has several codes (residual, product or grouped quantizers) the plain model reads
them as one longer row, N * D slots. Here a slot reads the sum of one embedding per code, each with
a MASK of its own, and writes one head per code: N slots, whatever the depth. It is the layout of
the factorised tokens of VQGAN+ in arXiv 2409.16211 (`Bert` of its code). Codes are hidden and drawn
one by one as before, so that bound, samplers and infilling are those of `Masked`; codes that are
revealed in the same step are independent of each other. Alphabets may be unequal.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.generators.masked import Masked, MaskedConfig
from smalti.networks.layers import Embedding
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class StackedConfig(MaskedConfig):
  """A masked model of N slots; `axes` of its transformer is 0, 1 or the axes of the grid."""

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'Stacked':
    return Stacked(self, spec, rngs=rngs)


class Stacked(Masked):
  """See the module."""

  def _slots(self, config: Any, spec: TokenSpec) -> TokenSpec:
    return spec

  def _input(self, width: int, dtype: Any, rngs: nnx.Rngs) -> Embedding:
    # one table after the other; the last row of each is its MASK
    return Embedding(sum(self.slots.vocab) + self.slots.depth, width, dtype=dtype, rngs=rngs)

  def _embed(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n']) -> Float[Array, 'b s c']:
    sizes = np.array(self.slots.vocab)
    shape = (-1, self.slots.length, self.slots.depth)
    rows = jnp.where(masked.reshape(shape), sizes, tokens.reshape(shape))
    return self.token(rows + np.cumsum(sizes + 1) - sizes - 1).sum(2)
