"""The Tokenizer contract: data to tokens and back."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.model import ModelConfig
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerConfig(ModelConfig):
  """Base of all learned tokenizer configs; the type of a config selects the tokenizer."""

  def build(self, *, rngs: nnx.Rngs) -> 'Tokenizer':
    raise TypeError(f'{type(self).__name__} does not say what it builds.')


class Tokenizer(nnx.Module):
  """Base of learned tokenizers. Images are float32 NHWC in [-1, 1].

  `loss` returns `(scalar, aux)`, aux = `metrics` (flat dict of scalars), `weight` (what the scalar
  was averaged over) and `statistics` (for `quantizer.absorb`).
  """

  spec: TokenSpec

  def encode(self, x: Float[Array, 'b h w c'], *, keys: Array | None = None
             ) -> Int[Array, 'b n d']:
    raise TypeError(f'{type(self).__name__} does not encode.')

  def decode(self, tokens: Int[Array, 'b n d'], *, keep: Int[Array, 'b'] | None = None,
             keys: Array | None = None, settings: Any = None) -> Float[Array, 'b h w c']:
    raise TypeError(f'{type(self).__name__} does not decode.')

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    raise TypeError(f'{type(self).__name__} has no loss.')

  def prepare(self, batch: dict[str, Array], *, key: Array) -> None:
    """Data-dependent initialisation, once before step 0; does nothing by default."""


@jax.jit
def encode(tokenizer: Tokenizer, x: Array, *, keys: Array | None = None) -> Array:
  """Jitted `tokenizer.encode`; a second call with the same shapes does not compile."""
  return tokenizer.encode(x, keys=keys)


@jax.jit
def decode(tokenizer: Tokenizer, tokens: Array, *, keep: Array | None = None,
           keys: Array | None = None, settings: Any = None) -> Array:
  """Jitted `tokenizer.decode`."""
  return tokenizer.decode(tokens, keep=keep, keys=keys, settings=settings)
