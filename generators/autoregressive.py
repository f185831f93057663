"""Autoregressive generation: log p(x | c) = sum_i log p(x_i | x_<i, c), codes in row-major order.

The class-conditional form of LlamaGen (arXiv 2406.06525): one prefix token holds the label (or
begins the sequence, where there are none), then the codes; the output at slot i predicts code i.
Several codes per position are generated one after the other (`spec.view('flat')`). The likelihood
is exact. Infilling clamps known codes, which is exact for prefixes only.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.generators import logits as ids
from smalti.generators.generator import Generator, GeneratorConfig, Sample, Settings, settings
from smalti.networks.layers import Embedding, Linear, constrain, dropout
from smalti.networks.transformer import Transformer, TransformerConfig
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class AutoregressiveConfig(GeneratorConfig):
  """A causal transformer over the codes.

  Args:
    transformer: its `axes` is 1 for the row-major index of a code, or the number of axes of the
      grid (one more for several codes per position) for one rotary coordinate each.
    classes: labels 0..classes - 1; 0 is unconditional.
    label_dropout: how often training replaces a label by the null label, per example.
    dropout: of the token embeddings; the transformer has its own.
  """
  transformer: TransformerConfig
  classes: int = 0
  label_dropout: float = 0.1
  dropout: float = 0.0

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'Autoregressive':
    return Autoregressive(self, spec, rngs=rngs)


@settings
class AutoregressiveSettings(Settings):
  """How to draw codes.

  Args:
    temperature, top_k, typical, top_p, min_p: see `generators.logits.process`.
    repetition: see `generators.logits.penalize`; known codes count too.
    guidance: scale s of u + s (c - u), on a doubled batch; None is one conditional pass.
    prefill: the number of leading positions that `known_mask` holds in every row; they are read
      in one pass.
  """
  temperature: float = 1.0
  repetition: float | None = None
  top_k: int | None = None
  typical: float | None = None
  top_p: float | None = None
  min_p: float | None = None
  guidance: float | None = None
  prefill: int = 0


class Autoregressive(Generator):
  """See the module."""

  settings = AutoregressiveSettings

  def __init__(self, config: AutoregressiveConfig, spec: TokenSpec, *, rngs: nnx.Rngs):
    flat, width, dtype = spec.view('flat'), config.transformer.width, config.transformer.dtype
    if config.transformer.modulated:
      raise ValueError('modulated=True has no use here: the label is a prefix token.')
    if config.transformer.axes not in (0, 1, len(flat.grid)):
      raise ValueError(
          f'axes={config.transformer.axes} must be 1 (the row-major index) or {len(flat.grid)} '
          f'(the coordinates of grid={flat.grid}).')
    self.spec, self.flat, self.classes = spec, flat, config.classes
    self.label_dropout, self.dropout = config.label_dropout, config.dropout
    self.token = Embedding(flat.vocab[0], width, dtype=dtype, rngs=rngs)
    self.label = Embedding(config.classes + 1, width, dtype=dtype, rngs=rngs)  # last: null, or BOS
    # which code of its position comes next
    self.depth = Embedding(spec.depth, width, dtype=dtype, rngs=rngs) if spec.depth > 1 else None
    self.transformer = Transformer(config.transformer, rngs=rngs)
    self.head = Linear(width, flat.vocab[0], std=0, dtype=dtype, result='float32', rngs=rngs)

  def loss(self, batch, *, step, key, train=True):
    """Mean nats per valid token; labels are dropped per example in training."""
    del step
    tokens = self.spec.to('flat', batch['tokens'])[..., 0]
    label, keys = self._label(batch, tokens.shape[0]), jax.random.split(key, 3)
    if train and self.classes:
      dropped = jax.random.bernoulli(keys[0], self.label_dropout, label.shape)
      label = jnp.where(dropped, self.classes, label)
    logits = self._logits(tokens, label, keys[1:] if train else None)
    valid = self._valid(tokens).astype(jnp.float32)
    count = jnp.sum(valid)
    nll = jnp.sum(valid * _nll(logits, tokens)) / count
    hits = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] >= jnp.max(logits, -1)
    metrics = {'nll': nll, 'bits_per_token': nll / math.log(2),
               'accuracy': jnp.sum(valid * hits) / count}
    return nll, {'metrics': metrics, 'weight': count, 'statistics': None}

  def log_prob(self, batch: dict[str, Array]) -> Float[Array, 'b']:
    """Exact log p(tokens | label) in nats, to the first EOS."""
    tokens = self.spec.to('flat', batch['tokens'])[..., 0]
    logits = self._logits(tokens, self._label(batch, tokens.shape[0]), None)
    return -jnp.sum(self._valid(tokens) * _nll(logits, tokens), -1)

  def hidden(self, tokens: Int[Array, 'b n d'], *, blocks: tuple[int, ...],
             keys: Array | None = None, noise: float = 0.0) -> list[Float[Array, 'b m c']]:
    """What the numbered blocks (1 the first) hold in the slot that predicts each code, for probes.

    A slot has read the codes before its own, so that none reads the last one; the label is never
    told.

    Raises:
      ValueError: `noise` other than 0: nothing can be hidden here.
    """
    del keys  # nothing is drawn
    if noise:
      raise ValueError(f'{noise=} hides codes, which this model cannot; leave it at 0.')
    codes = self.spec.to('flat', tokens)[..., 0]
    x = self._inputs(codes[:, :-1], self._label({}, len(codes)))
    return self.transformer.hidden(x, blocks=blocks, positions=self._positions(), causal=True)

  def sample(self, condition, *, keys, settings, known=None, known_mask=None) -> Sample:
    """Code by code, in row-major order, with cached keys and values.

    Known codes are clamped; between them and a known code further on no EOS is drawn. `log_prob`
    is that of the drawn codes under the processed distribution.
    """
    batch, length, guided = keys.shape[0], self.flat.length, settings.guidance is not None
    prefill = settings.prefill * self.spec.depth
    if prefill and known is None or not 0 <= prefill <= length:
      raise ValueError(
          f'prefill={settings.prefill} needs as many known positions; at most {self.spec.length}.')
    if guided and not self.classes:
      raise ValueError(f'guidance={settings.guidance} needs a generator with classes.')
    condition = condition or {}
    if unread := set(condition) - ({'label'} if self.classes else set()):
      raise ValueError(
          f'condition holds {sorted(unread)}, and this generator with classes={self.classes} reads '
          f'{"label" if self.classes else "nothing"}.')
    label = self._label(condition, batch)
    if known is None:
      fixed = None
      tokens = jnp.zeros((batch, length), jnp.int32)
    else:
      fixed = self.spec.to('flat', known_mask)[..., 0] | (jnp.arange(length) < prefill)
      known = self.spec.to('flat', known)[..., 0]
      tokens = jnp.where(fixed, known, 0).astype(jnp.int32)

    def double(x):  # conditional and unconditional row of an example next to each other
      return jnp.repeat(x, 2, 0) if guided else x

    if guided:
      label = jnp.stack([label, jnp.full_like(label, self.classes)], 1).reshape(-1)
    layers = self.transformer.unstack()
    slots = self._inputs(double(tokens[:, :prefill]), label)
    rotations = self.transformer.rotations(self._positions())
    cache = self.transformer.cache(label.shape[0], prefill)
    if prefill:
      _, cache = self.transformer.extend(
          slots[:, :-1], cache, positions=jax.tree.map(lambda r: r[:prefill], rotations),
          layers=layers)

    def step(state):
      i, x, cache, tokens, done, log_prob, seen = state
      y, cache = self.transformer.extend(
          x, cache, index=i, layers=layers,
          positions=jax.tree.map(lambda r: jax.lax.dynamic_slice_in_dim(r, i, 1), rotations))
      logits = constrain(self.head(y)[:, 0], 'b c')  # all columns on every device, to truncate
      if guided:
        logits = ids.guide(*jnp.moveaxis(logits.reshape(batch, 2, -1), 1, 0), settings.guidance)
      old = jax.lax.dynamic_index_in_dim(tokens, i, 1, keepdims=False)
      clamp = jnp.full(batch, False) if fixed is None else fixed[:, i]
      if self.flat.eos is not None and fixed is not None:
        later = jnp.any(fixed & (jnp.arange(length) > i), -1)
        logits = ids.restrict(
            logits, ~later[:, None] | (jnp.arange(logits.shape[-1]) != self.flat.eos))
      if seen is not None:
        logits = ids.penalize(logits, seen, settings.repetition)
      logits = ids.process(logits, temperature=settings.temperature, top_k=settings.top_k,
                           typical=settings.typical, top_p=settings.top_p, min_p=settings.min_p)
      new = ids.draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
      log_prob -= jnp.where(clamp | done, 0, _nll(logits, new))
      if self.flat.eos is not None:
        new = jnp.where(done, self.flat.eos, new)
      new = jnp.where(clamp, old, new)
      if self.flat.eos is not None:
        done |= new == self.flat.eos
      tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], i, 1)
      if seen is not None:
        seen |= new[:, None] == jnp.arange(seen.shape[-1])
      return i + 1, self._embed(double(new)[:, None], i + 1), cache, tokens, done, log_prob, seen

    seen = None
    if settings.repetition is not None:
      seen = jnp.any(tokens[:, :prefill, None] == jnp.arange(self.flat.vocab[0]), 1)
    done = jnp.full(batch, False)
    if self.flat.eos is not None:
      done = jnp.any(tokens[:, :prefill] == self.flat.eos, -1)
    state = (jnp.asarray(prefill), slots[:, -1:], cache, tokens, done, jnp.zeros(batch), seen)
    for end in segments(prefill, length):
      state = (*state[:2], self.transformer.grow(state[2], end), *state[3:])

      def unfinished(state, end=end):  # nothing is left to do once every row has its EOS
        return (state[0] < end) & ~jnp.all(state[4])

      state = jax.lax.while_loop(unfinished, step, state)
    last, _, _, tokens, _, log_prob, _ = state
    if self.flat.eos is not None:
      tokens = self.flat.canonical(tokens[..., None])[..., 0]
      tokens = tokens if fixed is None else jnp.where(fixed, known, tokens)
    passes = last - prefill + bool(prefill)
    exact = jnp.full(batch, True)
    if fixed is not None:
      exact = jnp.all(fixed[:, :-1] | ~fixed[:, 1:], -1)
    return Sample(tokens=self.spec.back('flat', tokens[..., None]), nfe=(1 + guided) * passes,
                  exact=exact, log_prob=log_prob)

  def advance(self, cache: Any, previous: Int[Array, 'b'], label: Int[Array, 'b'],
              i: Int[Array, '']) -> tuple[Float[Array, 'b v'], Any]:
    """Logits of code i of the flat view, given the codes before, of which `previous` is the last.

    Args:
      cache: `transformer.cache(b, flat.length)` at first, then what the call before returned.
      label: rows of the label table, `classes` where there is none.
    """
    first = self._inputs(jnp.zeros((len(label), 0), jnp.int32), label)
    x = jnp.where(i == 0, first, self._embed(previous[:, None], i))
    positions = jax.lax.dynamic_slice_in_dim(self._positions(), i, 1)
    y, cache = self.transformer.extend(x, cache, index=i, positions=positions)
    return constrain(self.head(y)[:, 0], 'b c'), cache

  def _label(self, batch: dict[str, Array], size: int) -> Int[Array, 'b']:
    """The row of the label table of every example; the null row where there is no label."""
    if not self.classes or 'label' not in batch:
      return jnp.full(size, self.classes, jnp.int32)
    return batch['label']

  def _logits(self, tokens: Int[Array, 'b n'], label: Int[Array, 'b'], keys: Array | None
              ) -> Float[Array, 'b n v']:
    x = self._inputs(tokens[:, :-1], label)
    if keys is not None:
      x = dropout(x, self.dropout, keys[0])
    y = self.transformer(x, positions=self._positions(), causal=True,
                         key=None if keys is None else keys[1], train=keys is not None)
    return constrain(self.head(y), 'b n v')

  def _inputs(self, tokens: Int[Array, 'b n'], label: Int[Array, 'b']) -> Float[Array, 'b m c']:
    """The label and then the codes: n + 1 slots."""
    first = self.label(label)[:, None]
    if self.depth is not None:
      first = first + self.depth(jnp.zeros((), jnp.int32))
    return jnp.concatenate([first, self._embed(tokens, 1 + jnp.arange(tokens.shape[1]))], 1)

  def _embed(self, tokens: Int[Array, 'b n'], slot: Int[Array, '*n']) -> Float[Array, 'b n c']:
    x = self.token(tokens)
    return x if self.depth is None else x + self.depth(slot % self.spec.depth)

  def _positions(self) -> Int[Array, 'n a']:
    """Coordinates of the slots: the origin for the prefix, then those of the codes but the last."""
    axes = self.transformer.axes
    places = self.flat.coordinates() if axes > 1 else jnp.arange(self.flat.length)[:, None]
    return jnp.concatenate([jnp.zeros_like(places[:1]), jnp.asarray(places[:-1])])

  def _valid(self, tokens: Int[Array, 'b n']) -> Array:
    return self.flat.valid(tokens[..., None])[..., 0]


def segments(start: int, length: int) -> list[int]:
  """Where the cache grows: attention reads all of it, so short caches save up to 3/8 of that.

  At most four (each is a program of its own within the compiled one), none shorter than 64.
  """
  count = max(1, min(4, length // 64))
  ends = [length * (i + 1) // count for i in range(count)]
  return [end for end in ends if end > start]


def _nll(logits: Float[Array, '*b v'], tokens: Int[Array, '*b']) -> Float[Array, '*b']:
  """-log softmax(logits)[token], in float32."""
  log = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
  return -jnp.take_along_axis(log, tokens[..., None], -1)[..., 0]
