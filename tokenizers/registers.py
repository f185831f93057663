"""TiTok and One-D-Piece: an image as a row of registers, of which a prefix may be enough.

TiTok (Yu et al. 2024, arXiv 2406.07550) reads an image out of learned registers and grows it back
beside them; in one stage, straight to pixels (TA-TiTok, arXiv 2501.07730; bytedance/1d-tokenizer
with is_legacy=False). One-D-Piece (Miwa et al. 2025, arXiv 2501.10064) trains the decoder on
prefixes. Unusual here: every example has its own length (theirs is one per device batch), as a mask
of attention and not as a slice, so that shapes are static. Published two-stage TiTok reshapes
[b, n, c] to [b, c, n] without transposing, which mixes the channels of different registers; here
register i alone becomes token i.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.vision import Positions, RegisterDecoder, RegisterEncoder
from smalti.tokenizers.nested import Schedule, budgets, draw_budget
from smalti.tokenizers.vision import PatchTokenizer, PatchTokenizerConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class RegisterTokenizerConfig(PatchTokenizerConfig):
  """Images of one size to `registers` positions.

  Attributes:
    registers: how many (TiTok 32 to 256, One-D-Piece 256).
    mask: 'full' (TiTok, One-D-Piece), or 'causal': register i sees the patches and the registers
      before it, so that a prefix can be encoded without the rest (FlexTok).
    token: a class token is in both sequences (TiTok).
    normed: a layer norm comes before the first block (TiTok).
    drop: the lengths that the decoder is trained for, see `nested.draw_budget`; 'uniform' is
      One-D-Piece. None trains the full length alone: tokens then have no prefixes (TiTok).
    least: the smallest of these lengths.
  """
  registers: int = 32
  mask: Literal['full', 'causal'] = 'full'
  positions: Positions = 'learned'
  token: bool = True
  normed: bool = True
  drop: Schedule | None = None
  least: int = 1

  def build(self, *, rngs: nnx.Rngs) -> 'RegisterTokenizer':
    return RegisterTokenizer(self, rngs=rngs)


class RegisterTokenizer(PatchTokenizer):
  """Positions are registers; with `drop` they are nested, and `keep` of them make an image."""

  def __init__(self, config: RegisterTokenizerConfig, *, rngs: nnx.Rngs):
    if config.registers < 1:
      raise ValueError(f'registers={config.registers} must be 1 or more.')
    trained = () if config.drop is None else budgets(config.registers, config.drop, config.least)
    q, encoder, decoder = self.parts(config, rngs=rngs)
    shared: dict[str, Any] = dict(
        registers=config.registers, token=config.token, normed=config.normed)
    self.encoder = RegisterEncoder(**encoder, **shared, mask=config.mask)
    self.decoder = RegisterDecoder(**decoder, **shared)
    self.drop, self.least = config.drop, config.least
    self.setup(config, q, (config.registers,), order='nested' if trained else None,
               budgets=trained, rngs=rngs)

  def budget(self, key: Array, batch: int) -> Int[Array, 'b'] | None:
    if self.drop is None:
      return None
    return draw_budget(key, batch, self.spec.length, self.drop, self.least)

  def trunk(self, vectors: Float[Array, 'b n f'], *, keep: Int[Array, 'b'] | None = None,
            key: Array | None = None, train: bool = False) -> Array:
    keep = None if self.drop is None else keep  # else it counts codes, which `lookup` has cut
    y = self.decoder(vectors, self.patches, keep=keep, key=key, train=train)
    return self.pixels.trunk(y, self.patches)
