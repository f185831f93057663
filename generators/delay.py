"""Several codes per position by a pattern of delays (MusicGen, arXiv 2306.05284, section 2.2).

Code d of position n is predicted at step `stride * n + delays[d]`, all codes of a step at once from
one state of the trunk, by a head each:

    stride 1, delays (0, 1, .., D - 1)   'delay': N + D - 1 steps, a code knows the coarser ones of
                                         its own position
    stride 1, delays (0, .., 0)          'parallel': N steps, codes of a position are independent
    stride D, delays (0, 1, .., D - 1)   'flatten': N D steps, the whole chain rule

Whatever the pattern, log_prob is exact for the model that it describes: codes of one step are
independent given those of the steps before. A cell of the pattern without a code has a row of the
embedding and is never predicted.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.generators import logits as ids
from smalti.generators.generator import (
    DrawSettings,
    Generator,
    GeneratorConfig,
    GuidanceSettings,
    Sample,
    check_request,
    check_shares,
    drop_labels,
    fold,
    read_first,
    settings,
)
from smalti.networks.layers import Embedding, Linear, constrain, dropout
from smalti.networks.transformer import Transformer, TransformerConfig
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class DelayConfig(GeneratorConfig):
  """A causal transformer over the steps of a pattern.

  Args:
    transformer: with `axes` 1, the step.
    classes: labels 0..classes - 1; 0 is unconditional.
    label_dropout: how often training replaces a label by the null label, per example.
    dropout: of the sums of embeddings.
    delays: steps by which each code of a position waits, the smallest 0; None is 0, 1, .., D - 1.
    stride: steps from a position to the next.
  """
  transformer: TransformerConfig
  classes: int = 0
  label_dropout: float = 0.1
  dropout: float = 0.0
  delays: tuple[int, ...] | None = None
  stride: int = 1

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'Delay':
    return Delay(self, spec, rngs=rngs)


@settings
class DelaySettings(DrawSettings, GuidanceSettings):
  """How to draw the codes of every step."""


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Which code is predicted when.

  Attributes:
    length: positions N.
    delays: of each of the D codes.
    stride: steps from a position to the next.
  """
  length: int
  delays: tuple[int, ...]
  stride: int = 1

  def __post_init__(self):
    if min(self.delays) != 0 or self.stride < 1:
      raise ValueError(f'delays={self.delays} must begin at 0, stride={self.stride} at 1.')

  @property
  def steps(self) -> int:
    return self.stride * (self.length - 1) + max(self.delays) + 1

  def positions(self) -> np.ndarray:
    """int32[S, D]: the position whose code d comes at step s; -1 where there is none."""
    late = np.arange(self.steps)[:, None] - np.array(self.delays)
    place, rest = np.divmod(late, self.stride)
    return np.where((rest == 0) & (place >= 0) & (place < self.length), place, -1).astype(np.int32)

  def due(self) -> np.ndarray:
    """int32[N, D]: the step of every code."""
    return (self.stride * np.arange(self.length)[:, None] + np.array(self.delays)).astype(np.int32)

  def lay(self, codes: Array, empty: Array | int) -> Array:
    """[B, N, D] to [B, S, D], `empty` where the pattern has no code."""
    place = self.positions()
    return jnp.where(place >= 0, codes[:, np.maximum(place, 0), np.arange(place.shape[1])], empty)

  def lift(self, laid: Array) -> Array:
    """[B, S, D] to [B, N, D], the inverse of `lay`."""
    return laid[:, self.due(), np.arange(len(self.delays))]


class Delay(Generator):
  """See the module."""

  settings = DelaySettings

  def __init__(self, config: DelayConfig, spec: TokenSpec, *, rngs: nnx.Rngs):
    if spec.depth == 1:
      raise ValueError('a pattern of delays is for several codes per position; this spec has one: '
                       'use autoregressive.')
    delays = tuple(range(spec.depth)) if config.delays is None else config.delays
    if len(delays) != spec.depth:
      raise ValueError(f'delays={delays} must name one delay for each of {spec.depth} codes.')
    if config.transformer.axes > 1 or config.transformer.modulated:
      raise ValueError(f'axes={config.transformer.axes} and modulated='
                       f'{config.transformer.modulated}: a step is one coordinate and the label a '
                       'prefix; set axes to 1 and modulated to false.')
    self.spec, self.classes = spec, config.classes
    self.pattern = Pattern(spec.length, delays, config.stride)
    check_shares(label_dropout=config.label_dropout)
    self.label_dropout, self.dropout = config.label_dropout, config.dropout
    width, dtype, self.vocab = config.transformer.width, config.transformer.dtype, max(spec.vocab)
    # a table for each code; its last row is a cell without one
    self.token = Embedding(spec.depth * (self.vocab + 1), width, dtype=dtype, rngs=rngs)
    self.label = Embedding(config.classes + 1, width, dtype=dtype, rngs=rngs)  # last: null, or BOS
    self.transformer = Transformer(config.transformer, rngs=rngs)
    self.head = Linear(
        width, spec.depth * self.vocab, std=0, dtype=dtype, result='float32', rngs=rngs)

  def loss(self, batch, *, step, key, train=True):
    """Mean nats per code; `bits_code_i` is that of every code of a position."""
    del step
    (tokens, label), keys = self._read(batch), jax.random.split(key, 3)
    if train:
      label = drop_labels(self, label, keys[0])
    nll = self._nll(tokens, label, keys[1:] if train else None)
    by_code = nll.mean((0, 1))
    value = by_code.mean()
    metrics = {'nll': value, 'bits_per_token': value / math.log(2)}
    metrics |= {f'bits_code_{d}': by_code[d] / math.log(2) for d in range(self.spec.depth)}
    return value, {'metrics': metrics, 'weight': jnp.float32(nll.size), 'statistics': None}

  def log_prob(self, batch: dict[str, Array]) -> Float[Array, 'b']:
    """Exact log p(tokens | label) of the pattern's model, in nats."""
    return -self._nll(*self._read(batch), None).sum((1, 2))

  def sample(self, condition, *, keys, settings, known=None, known_mask=None) -> Sample:
    """Step by step, with cached keys and values; known codes are clamped.

    That is exact where no unknown code comes at an earlier step than a known one.
    """
    check_request(self, condition, known, known_mask, settings.guidance)
    pattern, size = self.pattern, keys.shape[0]
    label = read_first(self.classes, condition, size)
    scales = settings.scales(pattern.steps)
    guided = scales is not None
    if guided:
      label = ids.pair(label, jnp.full_like(label, self.classes))
    empty = jnp.full((size, pattern.steps, self.spec.depth), self.vocab, jnp.int32)
    laid, fixed = empty, None
    if known is not None:
      fixed = pattern.lay(jnp.asarray(known_mask, bool), False)
      laid = jnp.where(fixed, pattern.lay(jnp.asarray(known, jnp.int32), 0), empty)
    there, layers = jnp.asarray(pattern.positions() >= 0), self.transformer.unstack()
    rotations = self.transformer.rotations(jnp.arange(pattern.steps)[:, None])

    def step(state):
      s, x, cache, laid, log_prob = state
      y, cache = self.transformer.extend(
          x, cache, index=s, layers=layers,
          positions=jax.tree.map(lambda r: jax.lax.dynamic_slice_in_dim(r, s, 1), rotations))
      logits = constrain(self.head(y)[:, 0], 'b c').reshape(len(y), self.spec.depth, self.vocab)
      if guided:
        logits = ids.guide_pairs(logits, scales[s])
      logits = settings.process(ids.restrict(logits, jnp.asarray(self.spec.support())))
      new = ids.draw(logits, fold(keys, s))
      drawn = jnp.broadcast_to(there[s], new.shape)
      if fixed is not None:
        drawn = drawn & ~fixed[:, s]
      log_prob += jnp.where(drawn, ids.log_prob(logits, new), 0).sum(-1)
      new = jnp.where(drawn, new, laid[:, s])
      laid = jax.lax.dynamic_update_slice_in_dim(laid, new[:, None], s, 1)
      x = self._embed(jnp.repeat(new, 2, 0) if guided else new)[:, None]
      return s + 1, x, cache, laid, log_prob

    state = (jnp.int32(0), self.label(label)[:, None], self.transformer.cache(len(label), 0), laid,
             jnp.zeros(size))
    for end in self.transformer.segments(len(label), 0, pattern.steps):
      state = (*state[:2], self.transformer.grow(state[2], end), *state[3:])

      def unfinished(state, end=end):
        return state[0] < end

      state = jax.lax.while_loop(unfinished, step, state)
    tokens = pattern.lift(state[3])
    exact = jnp.full(size, True)
    if known_mask is not None:
      due = pattern.due()
      last = jnp.max(jnp.where(known_mask, due, -1), (1, 2))
      exact = jnp.min(jnp.where(known_mask, pattern.steps, due), (1, 2)) >= last
    return Sample(tokens=tokens, nfe=(1 + guided) * pattern.steps, exact=exact,
                  log_prob=state[4])

  def _read(self, batch: dict[str, Array]) -> tuple[Int[Array, 'b n d'], Int[Array, 'b']]:
    if 'keep' in batch:
      raise ValueError('keep: a pattern is over all positions; give whole token arrays.')
    tokens = jnp.asarray(batch['tokens'], jnp.int32)
    return tokens, read_first(self.classes, batch if 'label' in batch else None, len(tokens))

  def _nll(self, tokens: Int[Array, 'b n d'], label: Int[Array, 'b'], keys: Array | None
           ) -> Float[Array, 'b n d']:
    """-log p of every code, in one pass over the steps."""
    laid = self.pattern.lay(tokens, self.vocab)
    x = jnp.concatenate([self.label(label)[:, None], self._embed(laid[:, :-1])], 1)
    if keys is not None:
      x = dropout(x, self.dropout, keys[0])
    y = self.transformer(x, positions=jnp.arange(self.pattern.steps)[:, None], causal=True,
                         key=None if keys is None else keys[1], train=keys is not None)
    logits = constrain(self.head(y), 'b n v')
    logits = logits.reshape(*laid.shape, self.vocab)
    safe = jnp.minimum(laid, self.vocab - 1)  # cells without a code are not lifted
    logits = ids.restrict(logits, jnp.asarray(self.spec.support()))
    return -self.pattern.lift(ids.log_prob(logits, safe))

  def _embed(self, codes: Int[Array, '*b d']) -> Float[Array, '*b c']:
    """The sum over the codes of a step."""
    return self.token(codes + jnp.arange(self.spec.depth) * (self.vocab + 1)).sum(-2)
