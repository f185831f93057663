"""Text as a condition: features of a frozen encoder, or bytes read by a small one, and their null.

Two ways in, as in LlamaGen (arXiv 2406.06525, its text-to-image code) and in models of latents
since (arXiv 2112.10752, section 3.3): a prefix, where a two-layer map turns every feature into a
token before the codes, and a memory, to which every block attends. What is padded is never read:
its features are replaced before anything is computed of them, and it is masked out of attention.

A row without text (all of it padded, or dropped in training) has learned vectors in its place, the
null condition, all of them real: no row of attention is ever empty.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from smalti.generators.logits import pair
from smalti.networks.layers import Embedding, Linear
from smalti.networks.transformer import Transformer, TransformerConfig

BYTES = 256
Context = tuple[Float[Array, 'b s w'], Bool[Array, 'b s']]  # vectors, and which of them are real


@dataclasses.dataclass(kw_only=True, slots=True)
class ByteEncoderConfig:
  """A bidirectional transformer over UTF-8 bytes, trained with the generator.

  Args:
    transformer: with one rotary axis, the place of a byte.
  """
  transformer: TransformerConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class TextConfig:
  """What `text` holds.

  Args:
    length: slots T of `text` and `text_mask` (120 in LlamaGen).
    width: channels c of features [B, T, c] of a frozen encoder (2048 of T5-XL in LlamaGen); None
      with an encoder here.
    encoder: reads bytes [B, T]; None is features.
  """
  length: int
  width: int | None = None
  encoder: ByteEncoderConfig | None = None


class ByteEncoder(nnx.Module):
  """Bytes [b, t] and which are real to features [b, t, c]."""

  def __init__(self, config: ByteEncoderConfig, *, rngs: nnx.Rngs):
    body = config.transformer
    if body.axes != 1 or body.modulated or body.memory:
      raise ValueError(f'axes={body.axes}, modulated={body.modulated}, memory={body.memory}: bytes '
                       'have one place and no condition; leave axes at 1 and the others off.')
    self.byte = Embedding(BYTES, body.width, dtype=body.dtype, rngs=rngs)
    self.transformer = Transformer(body, rngs=rngs)

  def __call__(self, text: Array, mask: Bool[Array, 'b t'], *, key: Array | None = None,
               train: bool = False) -> Float[Array, 'b t c']:
    x = self.byte(jnp.where(mask, text, 0).astype(jnp.int32))
    return self.transformer(x, positions=jnp.arange(text.shape[1])[:, None], mask=mask, key=key,
                            train=train)


class Text(nnx.Module):
  """`text` and `text_mask` of a batch or condition to what a generator attends to.

  With `prefix` these are tokens of that width, T of them, and the null is T learned features;
  without, a memory of the features themselves, and the null is one learned vector.
  """

  def __init__(self, config: TextConfig, *, prefix: int | None, dtype: str = 'float32',
               rngs: nnx.Rngs):
    if config.length < 1 or (config.width is None) == (config.encoder is None):
      raise ValueError(
          f'length={config.length} must be 1 or more, and either a width (of features; here '
          f'{config.width}) or an encoder (of bytes) given.')
    width = config.width or config.encoder.transformer.width
    self.length, self.width, self.prefix = config.length, width, prefix
    self.encoder = None if config.encoder is None else ByteEncoder(config.encoder, rngs=rngs)
    # N(0, 1 / c), as LlamaGen draws it
    self.null = Embedding(
        1 if prefix is None else config.length, width, std=width**-0.5, rngs=rngs)
    self.up, self.down = (
        None if prefix is None else Linear(inputs, prefix, dtype=dtype, rngs=rngs)
        for inputs in (width, prefix))

  @property
  def slots(self) -> int:
    """How many tokens come before the codes."""
    return 0 if self.prefix is None else self.length

  def __call__(self, batch: dict[str, Any], size: int, *, dropped: Bool[Array, 'b'] | None = None,
               key: Array | None = None, train: bool = False) -> Context:
    """Vectors and which are real; a batch without `text` is the null condition in every row.

    Args:
      size: rows.
      dropped: rows whose text is replaced by the null condition.
      key: for the encoder's dropout, needed to train with it.

    Raises:
      ValueError: `text` and `text_mask` of other shapes or kinds than the config says.
    """
    if 'text' not in batch:
      return self._finish(*self._nothing(size))
    text, mask = self._check(batch, size)
    if self.encoder is not None:
      features = self.encoder(text, mask, key=key, train=train)
    else:
      features = text
    told = jnp.any(mask, -1, keepdims=True)
    if dropped is not None:
      told &= ~dropped[:, None]
    nothing, there = self._nothing(size)
    # padding by where: what is not a number there stays out of values and gradients
    features = jnp.where(mask[..., None], features, 0).astype(nothing.dtype)
    return self._finish(jnp.where(told[..., None], features, nothing),
                        jnp.where(told, mask, there))

  def guided(self, context: Context) -> tuple[Array, Array]:
    """Every row and after it the null condition, for passes on a doubled batch."""
    null = self._finish(*self._nothing(len(context[0])))
    vectors, mask = (pair(*both) for both in zip(context, null))
    return vectors, mask

  def _nothing(self, size: int) -> Context:
    """The null condition, as features."""
    rows = self.null.embedding[...]
    there = jnp.arange(self.length) < len(rows)
    rows = jnp.pad(rows, [(0, self.length - len(rows)), (0, 0)])
    return (jnp.broadcast_to(rows, (size, *rows.shape)),
            jnp.broadcast_to(there, (size, self.length)))

  def _finish(self, features: Float[Array, 'b s c'], mask: Bool[Array, 'b s']) -> Context:
    if self.up is None:
      return features, mask
    return self.down(jax.nn.gelu(self.up(features), approximate=True)), mask

  def _check(self, batch: dict[str, Any], size: int) -> tuple[Array, Bool[Array, 'b t']]:
    if 'text_mask' not in batch:
      raise ValueError('text needs text_mask: bool[B, T], True where text is real.')
    text, mask = jnp.asarray(batch['text']), jnp.asarray(batch['text_mask'], bool)
    shape = (size, self.length) if self.encoder is not None else (size, self.length, self.width)
    integers = jnp.issubdtype(text.dtype, jnp.integer)
    if text.shape != shape or mask.shape != shape[:2] or integers != (self.encoder is not None):
      kind = 'bytes' if self.encoder is not None else 'float features'
      raise ValueError(f'text {text.dtype}{list(text.shape)} with text_mask {list(mask.shape)} is '
                       f'not {kind} {list(shape)} with {list(shape[:2])}.')
    return text, mask
