"""Autoregressive generation: log p(x | c) = sum_i log p(x_i | x_<i, c), codes in row-major order.

The class-conditional form of LlamaGen (arXiv 2406.06525): one prefix token holds the label (or
begins the sequence, where there are none), then the codes; the output at slot i predicts code i.
Several codes per position are generated one after the other (`spec.view('flat')`). The likelihood
is exact. Infilling clamps known codes, which is exact for prefixes only.

With `anneal` the order of the codes is part of what is learned (RAR, arXiv 2411.00776): training
permutes them, and every slot is told which code comes next, without which it could not know. Known
codes are then put first, so that infilling is exact for any of them.

Text (`generators/text.py`) comes before the prefix token, as T tokens, or is a memory of
cross-attention. The slot that predicts the first code is the prefix token in either case, which is
always real; LlamaGen's is the last slot of the text, for which it pads on the left.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.generators import logits as ids
from smalti.generators.generator import (
    DrawSettings,
    Generator,
    GeneratorConfig,
    GuidanceSettings,
    Sample,
    check_guided,
    check_request,
    check_shares,
    fold,
    read_first,
    settings,
)
from smalti.generators.text import Context, Text, TextConfig
from smalti.networks.layers import Embedding, Linear, constrain, dropout
from smalti.networks.quantized import quantized
from smalti.networks.transformer import Block, Transformer, TransformerConfig
from smalti.tokenizers.spec import TokenSpec

ORDERS = 8  # random ones, of an example whose likelihood is asked


@dataclasses.dataclass(kw_only=True, slots=True)
class AutoregressiveConfig(GeneratorConfig):
  """A causal transformer over the codes.

  Args:
    transformer: its `axes` is 1 for the row-major index of a code, or the number of axes of the
      grid (one more for several codes per position) for one rotary coordinate each. With `memory`,
      the width of the text's features, text enters by cross-attention, otherwise as a prefix.
    classes: labels 0..classes - 1; 0 is none.
    text: what text the codes are conditioned on; None is none.
    label_dropout: how often training replaces the whole condition, label and text, by the null
      condition, per example.
    dropout: of the token embeddings; the transformer has its own.
    anneal: the steps from and to which the share of examples in random order falls, linearly, from
      1 to 0 (RAR: 125,000 and 187,500 of 250,000; without an end, (steps, steps), the model keeps
      all orders, and infills as well as it draws). None is row-major alone. Positions are learned
      (`axes` 0); with `modulated` the label and the slot enter by adaLN, as published.
  """
  transformer: TransformerConfig
  classes: int = 0
  text: TextConfig | None = None
  label_dropout: float = 0.1
  dropout: float = 0.0
  anneal: tuple[int, int] | None = None

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'Autoregressive':
    return Autoregressive(self, spec, rngs=rngs)


@settings
class AutoregressiveSettings(DrawSettings, GuidanceSettings):
  """How to draw codes.

  Args:
    repetition: see `generators.logits.penalize`; known codes count too.
    prefill: the number of leading positions that `known_mask` holds in every row; they are read
      in one pass.
    keep: of ordered positions ('nested'), how many are drawn, the first of every length; the rest
      is 0, which `decode(keep=)` does not read. None is all of them.
    order: of a model of all orders: 'raster', or 'random', one for every example.
    cache: None keeps keys and values as they are computed, 'int8' in a quarter of float32.
    weights: of the blocks: None as trained, 'int8' rounded once, before the first code.
  """
  repetition: float | None = None
  prefill: int = 0
  keep: int | None = None
  order: Literal['raster', 'random'] = 'raster'
  cache: Literal['int8'] | None = None
  weights: Literal['int8'] | None = None

  def __post_init__(self):
    super().__post_init__()
    if isinstance(self.repetition, (int, float)) and not self.repetition > 0:
      raise ValueError(f'repetition={self.repetition} must be above 0; 1 changes nothing.')


class Autoregressive(Generator):
  """See the module."""

  settings = AutoregressiveSettings

  def __init__(self, config: AutoregressiveConfig, spec: TokenSpec, *, rngs: nnx.Rngs):
    flat, width, dtype = spec.view('flat'), config.transformer.width, config.transformer.dtype
    if config.transformer.modulated and config.anneal is None:
      raise ValueError('modulated=True has no use here: the label is a prefix token.')
    if config.anneal is not None:
      _check_anneal(config, spec)
    elif config.transformer.axes not in (0, 1, len(flat.grid)):
      raise ValueError(
          f'axes={config.transformer.axes} must be 1 (the row-major index) or {len(flat.grid)} '
          f'(the coordinates of grid={flat.grid}).')
    self.spec, self.flat, self.classes = spec, flat, config.classes
    check_shares(label_dropout=config.label_dropout)
    self.label_dropout, self.dropout = config.label_dropout, config.dropout
    self.token = Embedding(flat.vocab[0], width, dtype=dtype, rngs=rngs)
    self.label = Embedding(config.classes + 1, width, dtype=dtype, rngs=rngs)  # last: null, or BOS
    self.text = _text(config, rngs)
    self.before = 0 if self.text is None else self.text.slots  # tokens of text
    # which code of its position comes next
    self.depth = Embedding(spec.depth, width, dtype=dtype, rngs=rngs) if spec.depth > 1 else None
    self.anneal = config.anneal
    # where a code is, where the one to predict is, and how many there are before it
    self.place, self.next, self.slot = (
        Embedding(flat.length, width, dtype=dtype, rngs=rngs) if there else None
        for there in (config.anneal, config.anneal, config.transformer.modulated))
    self.transformer = Transformer(config.transformer, rngs=rngs)
    self.head = Linear(width, flat.vocab[0], std=0, dtype=dtype, result='float32', rngs=rngs)

  def loss(self, batch, *, step, key, train=True):
    """Mean nats per valid token; labels are dropped per example in training."""
    tokens = self._codes(batch)
    label, keys = self._label(batch, tokens.shape[0]), jax.random.split(key, 5)
    if self.text is not None and 'text' not in batch:
      raise ValueError(f'A generator of text needs an entry `text`, got {", ".join(batch)}.')
    order = dropped = None
    if self.anneal is not None:
      order = self._raster(len(tokens))
      if train:
        order = _shuffled(keys[3], order, self._share(step))
      tokens = jnp.take_along_axis(tokens, order, 1)
    if train and (self.classes or self.text is not None):
      dropped = jax.random.bernoulli(keys[0], self.label_dropout, label.shape)
      label = jnp.where(dropped, self.classes, label)
    text = self._read(batch, len(tokens), dropped, keys[4] if train else None)
    logits = self._logits(tokens, label, keys[1:3] if train else None, order, text)
    valid = self._valid(tokens).astype(jnp.float32)
    count = jnp.sum(valid)
    nll = -jnp.sum(valid * ids.log_prob(logits, tokens)) / count
    hits = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] >= jnp.max(logits, -1)
    metrics = {'nll': nll, 'bits_per_token': nll / math.log(2),
               'accuracy': jnp.sum(valid * hits) / count}
    return nll, {'metrics': metrics, 'weight': count, 'statistics': None}

  def log_prob(self, batch: dict[str, Array], order: Int[Array, 'b n'] | None = None
               ) -> Float[Array, 'b']:
    """Exact log p(tokens | label, text) in nats, to the first EOS.

    Without them the batch asks for the null condition.

    Args:
      order: of a model of all orders, permutations of the positions; None is row-major.
    """
    tokens = self._codes(batch)
    if self.anneal is None and order is not None:
      raise ValueError('order= is for models of all orders; set anneal.')
    if self.anneal is not None:
      order = self._raster(len(tokens)) if order is None else order
      tokens = jnp.take_along_axis(tokens, order, 1)
    logits = self._logits(tokens, self._label(batch, tokens.shape[0]), None, order,
                          self._read(batch, len(tokens)))
    return jnp.sum(self._valid(tokens) * ids.log_prob(logits, tokens), -1)

  def likelihood(self, settings=None):
    return 'bound' if _shuffles(settings) else 'exact'

  def nats(self, batch, *, key, settings=None):
    """Of random orders, whose law is the mean of p(tokens | order), the mean of the logarithms."""
    if not _shuffles(settings):
      return self.log_prob(batch)
    raster = self._raster(len(batch['tokens']))
    draws = jax.random.split(key, ORDERS)
    return jnp.mean(jax.lax.map(
        lambda key: self.log_prob(batch, _shuffled(key, raster, jnp.float32(1))), draws), 0)

  def hidden(self, tokens: Int[Array, 'b n d'], *, blocks: tuple[int, ...],
             keys: Array | None = None, noise: float = 0.0) -> list[Float[Array, 'b m c']]:
    """What the numbered blocks (1 the first) hold in the slot that predicts each code, for probes.

    A slot has read the codes before its own, so that none reads the last one; label and text are
    never told.

    Raises:
      ValueError: `noise` other than 0: nothing can be hidden here.
    """
    del keys  # nothing is drawn
    if noise:
      raise ValueError(f'{noise=} hides codes, which this model cannot; leave it at 0.')
    codes = self.spec.to('flat', tokens)[..., 0]
    label, order = self._label({}, len(codes)), None
    if self.anneal is not None:
      order = self._raster(len(codes))
    text = self._read({}, len(codes))  # all of it real: no mask
    x = self._inputs(codes[:, :-1], label, order, text)
    states = self.transformer.hidden(
        x, blocks=blocks, positions=self._positions(), causal=True, memory=self._memory(text),
        modulation=self._modulation(label, jnp.arange(x.shape[1]) - self.before))
    return [y[:, self.before:] for y in states]

  def sample(self, condition, *, keys, settings, known=None, known_mask=None) -> Sample:
    """Code by code, in row-major order, with cached keys and values.

    Known codes are clamped; between them and a known code further on no EOS is drawn. A model of
    all orders reads them first. `log_prob` is that of the drawn codes under the processed
    distribution.
    """
    if settings.weights is not None:
      rounded = quantized(self, settings.weights)
      return rounded.sample(condition, keys=keys, known=known, known_mask=known_mask,
                            settings=dataclasses.replace(settings, weights=None))
    batch, length, guided = keys.shape[0], self.flat.length, settings.guidance is not None
    prefill = settings.prefill * self.spec.depth
    if prefill and known is None or not 0 <= prefill <= length:
      raise ValueError(
          f'prefill={settings.prefill} needs as many known positions; at most {self.spec.length}.')
    if guided and not self.classes and self.text is None:
      raise ValueError(f'guidance={settings.guidance} needs a generator with classes or text.')
    condition = condition or {}
    reads = ['label'] * bool(self.classes) + ['text', 'text_mask'] * (self.text is not None)
    if unread := set(condition) - set(reads):
      raise ValueError(
          f'condition holds {sorted(unread)}, and this generator with classes={self.classes} reads '
          f'{", ".join(reads) or "nothing"}.')
    check_request(self, condition, known, known_mask, None)  # guidance may be by text
    if guided:
      check_guided(self.label_dropout)
    label, text = self._label(condition, batch), self._read(condition, batch)
    scales = settings.scales(length)
    if known is None:
      fixed = None
      tokens = jnp.zeros((batch, length), jnp.int32)
    else:
      fixed = self.spec.to('flat', known_mask)[..., 0] | (jnp.arange(length) < prefill)
      known = self.spec.to('flat', known)[..., 0]
      tokens = jnp.where(fixed, known, 0).astype(jnp.int32)
    order = self._order(settings, keys, fixed)
    if order is not None and fixed is not None:
      if settings.keep is not None:
        raise ValueError(f'keep={settings.keep} with known codes, which a model of all orders '
                         'reads before any other; leave one of them out.')
      tokens, fixed, known = (
          jnp.take_along_axis(x, order, 1) for x in (tokens, fixed, known))

    def double(x):
      return jnp.repeat(x, 2, 0) if guided else x

    if guided:
      label = ids.pair(label, jnp.full_like(label, self.classes))
      text = None if text is None else self.text.guided(text)
    layers, before = self.transformer.unstack(), self.before
    memories = self.transformer.read(self._memory(text), layers)
    orders = None if order is None else double(order)
    slots = self._inputs(double(tokens[:, :prefill]), label, orders, text)
    rotations = self.transformer.rotations(self._positions())
    real = self._real(text)
    read = before + prefill  # slots that are read in one pass
    cache = self.transformer.cache(label.shape[0], read, settings.cache)
    if read:
      _, cache = self.transformer.extend(
          slots[:, :-1], cache, positions=jax.tree.map(lambda r: r[:read], rotations),
          layers=layers, memories=memories, mask=None if real is None else real[:, :read],
          modulation=self._modulation(label, jnp.arange(-before, prefill)))

    def step(state, end):
      i, x, cache, tokens, done, log_prob, seen = state
      slot = before + i
      y, cache = self.transformer.extend(
          x, cache, index=slot, layers=layers, memories=memories,
          mask=None if real is None else real[:, :before + end],
          modulation=self._modulation(label, i[None]),
          positions=jax.tree.map(lambda r: jax.lax.dynamic_slice_in_dim(r, slot, 1), rotations))
      logits = constrain(self.head(y)[:, 0], 'b c')  # all columns on every device, to truncate
      if guided:
        logits = ids.guide_pairs(logits, scales[i])
      old = jax.lax.dynamic_index_in_dim(tokens, i, 1, keepdims=False)
      clamp = jnp.full(batch, False) if fixed is None else fixed[:, i]
      if self.flat.eos is not None and fixed is not None:
        later = jnp.any(fixed & (jnp.arange(length) > i), -1)
        logits = ids.restrict(
            logits, ~later[:, None] | (jnp.arange(logits.shape[-1]) != self.flat.eos))
      if seen is not None:
        logits = ids.penalize(logits, seen, settings.repetition)
      logits = settings.process(logits)
      new = ids.draw(logits, fold(keys, i))
      log_prob += jnp.where(clamp | done, 0, ids.log_prob(logits, new))
      if self.flat.eos is not None:
        new = jnp.where(done, self.flat.eos, new)
      new = jnp.where(clamp, old, new)
      if self.flat.eos is not None:
        done |= new == self.flat.eos
      tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], i, 1)
      if seen is not None:
        seen |= new[:, None] == jnp.arange(seen.shape[-1])
      x = self._embed(double(new)[:, None], (i + 1)[None], orders)
      return i + 1, x, cache, tokens, done, log_prob, seen

    seen = None
    if settings.repetition is not None:
      seen = jnp.any(tokens[:, :prefill, None] == jnp.arange(self.flat.vocab[0]), 1)
    done = jnp.full(batch, False)
    if self.flat.eos is not None:
      done = jnp.any(tokens[:, :prefill] == self.flat.eos, -1)
    state = (jnp.asarray(prefill), slots[:, -1:], cache, tokens, done, jnp.zeros(batch), seen)
    for end in self.transformer.segments(len(label), prefill, self._stop(settings, prefill)):
      state = (*state[:2], self.transformer.grow(state[2], before + end), *state[3:])

      def unfinished(state, end=end):  # nothing is left to do once every row has its EOS
        return (state[0] < end) & ~jnp.all(state[4])

      state = jax.lax.while_loop(unfinished, functools.partial(step, end=end), state)
    last, _, _, tokens, _, log_prob, _ = state
    if self.flat.eos is not None:
      tokens = self.flat.canonical(tokens[..., None])[..., 0]
      tokens = tokens if fixed is None else jnp.where(fixed, known, tokens)
    passes = last - prefill + bool(read)
    exact = jnp.full(batch, True)
    if fixed is not None:
      exact = jnp.all(fixed[:, :-1] | ~fixed[:, 1:], -1)
    if order is not None:
      tokens = jnp.take_along_axis(tokens, jnp.argsort(order, -1), 1)
    return Sample(tokens=self.spec.back('flat', tokens[..., None]), nfe=(1 + guided) * passes,
                  exact=exact, log_prob=log_prob)

  def forced(self, batch: dict[str, Array], *, cache: Literal['int8'] | None = None,
             weights: Literal['int8'] | None = None
             ) -> tuple[Float[Array, 'b n'], Int[Array, 'b n']]:
    """Code by code, as `sample` computes: nats of every code, 0 after an EOS, and the likeliest.

    What `log_prob` says in one pass (sum the nats, negate), under the settings `cache` and
    `weights`, which the one pass has no cache for.
    """
    if weights is not None:
      return quantized(self, weights).forced(batch, cache=cache)
    tokens = self._codes(batch)
    label, layers = self._label(batch, len(tokens)), self.transformer.unstack()

    def step(state, now):
      i, code = now
      logits, entries = self.advance(*state, label, i, layers)
      return (entries, code), (-ids.log_prob(logits, code), jnp.argmax(logits, -1))

    empty = self.transformer.cache(len(tokens), self.flat.length, cache)
    _, found = jax.lax.scan(
        step, (empty, tokens[:, 0]), (jnp.arange(self.flat.length), tokens.T))
    nats, likeliest = (x.T for x in found)
    return self._valid(tokens) * nats, likeliest

  def advance(self, cache: Any, previous: Int[Array, 'b'], label: Int[Array, 'b'],
              i: Int[Array, ''], layers: list[Block] | None = None
              ) -> tuple[Float[Array, 'b v'], Any]:
    """Logits of code i of the flat view, given the codes before, of which `previous` is the last.

    Args:
      cache: `transformer.cache(b, flat.length)` at first, then what the call before returned.
      label: rows of the label table, `classes` where there is none.
      layers: `transformer.unstack()`, sliced once.

    Raises:
      ValueError: a generator of text.
    """
    if self.text is not None:
      raise ValueError('This generator reads text, and `advance` has no place for it; `sample` and '
                       '`log_prob` do.')
    order = None if self.anneal is None else self._raster(len(label))
    first = self._inputs(jnp.zeros((len(label), 0), jnp.int32), label, order)
    x = jnp.where(i == 0, first, self._embed(previous[:, None], i[None], order))
    positions = jax.lax.dynamic_slice_in_dim(self._positions(), i, 1)
    y, cache = self.transformer.extend(x, cache, index=i, positions=positions, layers=layers,
                                       modulation=self._modulation(label, i[None]))
    return constrain(self.head(y)[:, 0], 'b c'), cache

  def _codes(self, batch: dict[str, Array]) -> Int[Array, 'b n']:
    if 'keep' in batch:
      raise ValueError('keep: the end of a prefix is not modelled; give whole token arrays.')
    return self.spec.to('flat', batch['tokens'])[..., 0]

  def _label(self, batch: dict[str, Array], size: int) -> Int[Array, 'b']:
    """The row of the label table of every example; the null row where there is no label."""
    return read_first(self.classes, batch if 'label' in batch else None, size)

  def _read(self, batch: dict[str, Array], size: int, dropped: Array | None = None,
            key: Array | None = None) -> Context | None:
    """What text becomes; a key trains."""
    return None if self.text is None else self.text(
        batch, size, dropped=dropped, key=key, train=key is not None)

  def _memory(self, text: Context | None) -> Context | None:
    return None if self.before else text

  def _real(self, text: Context | None) -> Bool[Array, 'b m'] | None:
    """Which slots may be attended to; None of no prefix, which are all."""
    return jnp.pad(text[1], [(0, 0), (0, self.flat.length)],
                   constant_values=True) if self.before else None

  def _logits(self, tokens: Int[Array, 'b n'], label: Int[Array, 'b'], keys: Array | None,
              order: Int[Array, 'b n'] | None = None, text: Context | None = None
              ) -> Float[Array, 'b n v']:
    text = self._read({}, len(tokens)) if text is None else text
    x = self._inputs(tokens[:, :-1], label, order, text)
    if keys is not None:
      x = dropout(x, self.dropout, keys[0])
    y = self.transformer(x, positions=self._positions(), causal=True, mask=self._real(text),
                         memory=self._memory(text),
                         modulation=self._modulation(label, jnp.arange(x.shape[1]) - self.before),
                         key=None if keys is None else keys[1], train=keys is not None)
    return constrain(self.head(y[:, self.before:]), 'b n v')

  def _inputs(self, tokens: Int[Array, 'b n'], label: Int[Array, 'b'],
              order: Int[Array, 'b l'] | None = None, text: Context | None = None
              ) -> Float[Array, 'b m c']:
    """Text, the label and then the codes, in their order: `before` + 1 + n slots."""
    first = self.label(label)[:, None]
    if self.depth is not None:
      first = first + self.depth(jnp.zeros((), jnp.int32))
    if order is not None:
      first = first + self.next(order[:, :1])
    parts = [first, self._embed(tokens, 1 + jnp.arange(tokens.shape[1]), order)]
    return jnp.concatenate([text[0].astype(first.dtype), *parts] if self.before else parts, 1)

  def _embed(self, tokens: Int[Array, 'b n'], slot: Int[Array, 'n'],
             order: Int[Array, 'b l'] | None = None) -> Float[Array, 'b n c']:
    """Codes in the numbered slots, of which slot i holds the i-th code, counted from 1."""
    x = self.token(tokens)
    if self.depth is not None:
      x = x + self.depth(slot % self.spec.depth)
    if order is not None:
      after = jnp.minimum(slot, self.flat.length - 1)  # after the last there is nothing to predict
      x = x + self.place(order[:, slot - 1]) + self.next(order[:, after])
    return x

  def _modulation(self, label: Int[Array, 'b'], slot: Int[Array, 'n']
                  ) -> Float[Array, 'b n c'] | None:
    """What adaLN is given in the numbered slots, 0 that of the label; text has the same as that."""
    if self.slot is None:
      return None
    return self.label(label)[:, None] + self.slot(jnp.maximum(slot, 0))

  def _raster(self, size: int) -> Int[Array, 'b l']:
    return jnp.broadcast_to(jnp.arange(self.flat.length), (size, self.flat.length))

  def _share(self, step: Array | int) -> Float[Array, '']:
    """Of the training examples that are in random order."""
    begin, end = self.anneal
    return 1 - jnp.clip((jnp.asarray(step, jnp.float32) - begin) / max(end - begin, 1), 0, 1)

  def _order(self, settings: AutoregressiveSettings, keys: Array, fixed: Array | None
             ) -> Int[Array, 'b l'] | None:
    """Which code comes when: known ones first; None of a model of one order."""
    if settings.order not in ('raster', 'random'):
      raise ValueError(f'order={settings.order!r} is not one of raster, random.')
    if self.anneal is None:
      if settings.order == 'random':
        raise ValueError("order='random' needs a model of all orders; train it with anneal.")
      return None
    rank = self._raster(len(keys))
    if settings.order == 'random':
      rank = jax.vmap(lambda key: jax.random.permutation(
          jax.random.fold_in(key, self.flat.length), self.flat.length))(keys)
    if fixed is not None:
      rank = jnp.where(fixed, jnp.arange(self.flat.length) - self.flat.length, rank)
    return jnp.argsort(rank, -1)

  def _stop(self, settings: AutoregressiveSettings, prefill: int) -> int:
    """How many codes are drawn."""
    if settings.keep is None:
      return self.flat.length
    stop = settings.keep * self.spec.depth
    if self.spec.order != 'nested' or settings.order != 'raster' or not (
        max(prefill, 1) <= stop <= self.flat.length):
      raise ValueError(
          f'keep={settings.keep} is for tokens whose order is nested (these: {self.spec.order}), '
          f'drawn in that order, from prefill={settings.prefill} to {self.spec.length}.')
    return stop

  def _positions(self) -> Int[Array, 'n a']:
    """Coordinates of the slots: the origin for the prefix, then those of the codes but the last."""
    axes = self.transformer.axes
    places = self.flat.coordinates() if axes > 1 else jnp.arange(self.flat.length)[:, None]
    return jnp.pad(jnp.asarray(places[:-1]), [(self.before + 1, 0), (0, 0)])

  def _valid(self, tokens: Int[Array, 'b n']) -> Array:
    return self.flat.valid(tokens[..., None])[..., 0]


def _text(config: AutoregressiveConfig, rngs: nnx.Rngs) -> Text | None:
  """The reader of text, as tokens or as a memory."""
  body = config.transformer
  if config.text is None:
    if body.memory:
      raise ValueError(f'memory={body.memory} is for text; give the generator text, or leave it 0.')
    return None
  text = Text(config.text, prefix=None if body.memory else body.width, dtype=body.dtype, rngs=rngs)
  if body.memory not in (0, text.width):
    raise ValueError(f'memory={body.memory} must be {text.width}, the width of the features of '
                     'text, or 0, for a prefix.')
  return text


def _check_anneal(config: AutoregressiveConfig, spec: TokenSpec) -> None:
  if not 0 <= config.anneal[0] <= config.anneal[1]:
    raise ValueError(f'anneal={config.anneal} must be two steps, the second no earlier.')
  if config.transformer.axes:
    raise ValueError(f'axes={config.transformer.axes}: with anneal positions are learned; set 0.')
  if spec.depth > 1 or spec.eos is not None:
    raise ValueError(f'vocab={spec.vocab}, eos={spec.eos}: codes of one alphabet without an end '
                     'can be permuted, others not; leave anneal at none.')


def _shuffles(settings: AutoregressiveSettings | None) -> bool:
  return settings is not None and settings.order == 'random'


def _shuffled(key: Array, order: Int[Array, 'b l'], share: Array) -> Int[Array, 'b l']:
  """A permutation of its own for `share` of the rows, the others as they are."""
  pick, draw = jax.random.split(key)
  random = jnp.argsort(jax.random.uniform(draw, order.shape), -1)
  return jnp.where(jax.random.bernoulli(pick, share, (len(order), 1)), random, order)
