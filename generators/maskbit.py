"""MaskBit: masked generation of bits that are read as they are, without an embedding table.

Weber et al. 2024, arXiv 2409.16211 (markweberdev/maskbit), for tokens that are made of bits (LFQ,
BSQ, Bernoulli codes). The K bits of a position are split into groups, hidden and drawn as words of
2^(K/G) values; a slot of the transformer reads its bits as -1 and +1, and 0 where the group is
hidden, through one linear map, and writes one head per group. A token of 2^14 codes costs two
heads of 128 columns, and codes that differ by a bit are read alike, as the tokenizer made them.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.generators.masked import Masked, MaskedConfig
from smalti.networks.layers import Linear
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class MaskBitConfig(MaskedConfig):
  """A masked model of words of bits; published: 'maskgit', 'arccos', 'bernoulli', `visible` 1.

  Args:
    groups: words that the bits of a position are split into, of sizes that differ by one bit at
      most (2 published).
  """
  groups: int = 2

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'MaskBit':
    return MaskBit(self, spec, rngs=rngs)


class MaskBit(Masked):
  """See the module. Known bits of a word that is not known as a whole restrict what is drawn."""

  def _slots(self, config: Any, spec: TokenSpec) -> TokenSpec:
    if not (set(spec.vocab) == {2} or set(spec.factors) == {2}):
      raise ValueError(
          f'vocab={spec.vocab} with factors={spec.factors}: the codes of this tokenizer are not '
          'made of bits; take LFQ, BSQ or Bernoulli codes, or another generator.')
    bits = spec.view('bits').depth
    if not 1 <= config.groups <= bits:
      raise ValueError(f'groups={config.groups} must be within 1..{bits}, the bits of a position.')
    size, more = divmod(bits, config.groups)
    self.words = (size + 1,) * more + (size,) * (config.groups - more)
    return spec.view(self.words)

  def _input(self, width: int, dtype: Any, rngs: nnx.Rngs) -> Linear:
    return Linear(sum(self.words), width, bias=True, dtype=dtype, rngs=rngs)

  def _embed(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n']) -> Float[Array, 'b s c']:
    shape = (-1, self.slots.length, self.slots.depth)
    bits = self.slots.to('bits', tokens.reshape(shape))
    hidden = jnp.repeat(masked.reshape(shape), np.array(self.words), 2)
    return self.token(jnp.where(hidden, 0.0, 2.0 * bits - 1))

  def _codes(self, tokens: Int[Array, 'b n d']) -> Int[Array, 'b m']:
    return self.spec.to(self.words, tokens).reshape(len(tokens), -1)

  def _tokens(self, codes: Int[Array, 'b m']) -> Int[Array, 'b n d']:
    return self.spec.back(self.words, codes.reshape(-1, self.slots.length, self.slots.depth))

  def _inside(self, mask: Bool[Array, 'b n d']) -> Bool[Array, 'b m']:
    bits = self._bits(mask)
    words = [word.all(-1) for word in jnp.split(bits, np.cumsum(self.words)[:-1], 2)]
    return jnp.stack(words, -1).reshape(len(mask), -1)

  def _outside(self, masked: Bool[Array, 'b m']) -> Bool[Array, 'b n d']:
    words = masked.reshape(-1, self.slots.length, self.slots.depth)
    bits = jnp.repeat(words, np.array(self.words), 2)
    return bits.reshape(*bits.shape[:2], self.spec.depth, -1).any(-1)

  def _bits(self, mask: Bool[Array, 'b n d']) -> Bool[Array, 'b n k']:
    return jnp.repeat(mask, sum(self.words) // self.spec.depth, 2)

  def _narrowed(self, known: Int[Array, 'b n d'], known_mask: Bool[Array, 'b n d']
                ) -> tuple[Bool[Array, 'b m v'] | None, Bool[Array, 'b']]:
    if self.spec.depth == 1:  # a code is known with all its words
      return None, jnp.zeros(len(known), bool)
    fixed, bits = self._bits(known_mask), self.spec.to('bits', known)
    cuts = np.cumsum(self.words)[:-1]
    parts, largest = [], self.flat.vocab[0]
    for size, seen, bit in zip(
        self.words, jnp.split(fixed, cuts, 2), jnp.split(bits, cuts, 2), strict=True):
      values = np.arange(largest)[:, None] >> np.arange(size) & 1
      parts.append(jnp.all(~seen[:, :, None] | (bit[:, :, None] == values), -1))
    possible = jnp.stack(parts, 2).reshape(len(known), -1, largest)
    known_words = self._inside(known_mask)
    partly = (~possible.all(-1) & ~known_words).any(-1)
    return possible | known_words[..., None], partly & ((~known_words).sum(-1) > 1)
