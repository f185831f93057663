"""Autoregression over positions of several codes: one pass of the body each, a small head inside.

RQ-Transformer (Lee et al. 2022, arXiv 2203.01941). With a table of vectors per depth, e_d, the body
reads one slot per position, and a causal transformer over the D codes of a position goes on from
what the body says of it, h_p:

    h = body([c, W sum_d e_d(x_1d), .., W sum_d e_d(x_{N-1,d})])
    y_p = depth([h_p, W' e_1(x_p1), W' (e_1(x_p1) + e_2(x_p2)), ..])
    p(x_pd | x_<p, x_p<d, c) = softmax(classifier(y_pd))

Attention costs N^2 + N D^2 instead of (N D)^2, and the deep network runs N times for N D codes.
Without the inner transformer the codes of a position are independent given those before: what
Infinity (arXiv 2412.04431) does with bits and BiGR (arXiv 2410.14672) compares with. A position may
be seen as the words, digits or bits of its codes: Open-MAGVIT2 (arXiv 2409.04410) reads ids of 18
bits as words of 6 and 12. The chain rule is exact in every case, and so is the likelihood.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

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
from smalti.tokenizers.spec import TokenSpec, View


@dataclasses.dataclass(kw_only=True, slots=True)
class DepthConfig(GeneratorConfig):
  """A causal transformer over positions, and what draws the codes of one.

  Args:
    transformer: over positions; `axes` is 1 for the row-major index, the number of axes of the grid
      for one rotary coordinate each, or 0 for learned positions (RQ-Transformer).
    depth: over the codes of a position, as wide; their places are learned, and turn queries and
      keys too where `axes` is 1. None draws them independently of each other.
    view: a position as all digits ('factors') or bits ('bits') of its codes; None is its codes.
    words: a position as words of so many bits, instead of a view: (6, 12) for codes of 18 bits.
    shared: one classifier for all codes (RQ-Transformer), or one for each.
    code_width: the numbers of a code's vector, mapped to the width linearly, once for the body and
      once for the codes of a position (RQ-Transformer: 256); None is the width, without a map.
    classes: labels 0..classes - 1; 0 is unconditional.
    label_dropout: how often training replaces a label by the null label, per example.
    dropout: of the body's input; the transformers have their own.
  """
  transformer: TransformerConfig
  depth: TransformerConfig | None = None
  view: Literal['factors', 'bits'] | None = None
  words: tuple[int, ...] = ()
  shared: bool = False
  code_width: int | None = None
  classes: int = 0
  label_dropout: float = 0.1
  dropout: float = 0.0

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'Depth':
    return Depth(self, spec, rngs=rngs)


@settings
class DepthSettings(DrawSettings, GuidanceSettings):
  """How to draw codes. A float may also be an array of D numbers, one per code of a position.

  Args:
    prefill: the number of leading positions that `known_mask` holds in every row; they are read
      in one pass.
  """
  prefill: int = 0


class Depth(Generator):
  """See the module. Inside, tokens are those of the view, [b, n, d].

  The vectors of codes are learned. RQ-Transformer takes those of its tokenizer's codebook; here a
  generator knows tokens alone, so that any tokenizer may be below it.
  """

  settings = DepthSettings

  def __init__(self, config: DepthConfig, spec: TokenSpec, *, rngs: nnx.Rngs):
    body, inner = config.transformer, config.depth
    _check(config, spec)
    self.spec, self.classes = spec, config.classes
    self.view: View | None = config.words or config.view
    self.codes = spec if self.view is None else spec.view(self.view)
    self.label_dropout, self.dropout, self.shared = (
        config.label_dropout, config.dropout, config.shared)
    vocab, width, dtype = self.codes.vocab, body.width, body.dtype
    options: Any = dict(dtype=dtype, rngs=rngs)
    # the rows of all depths, one table after the other
    self.token = Embedding(sum(vocab), config.code_width or width, **options)
    self.label = Embedding(config.classes + 1, width, **options)  # last: null, or BOS
    self.place = Embedding(spec.length, width, **options) if body.axes == 0 else None
    self.outer = Linear(config.code_width, width, **options) if config.code_width else None
    self.inner = (
        Linear(config.code_width, width, **options) if config.code_width and inner else None)
    self.transformer = Transformer(body, rngs=rngs)
    self.slot = Embedding(self.codes.depth, width, **options) if inner else None
    self.depth = Transformer(inner, rngs=rngs) if inner else None
    # the columns of all depths, one classifier after the other
    self.head = Linear(width, max(vocab) if config.shared else sum(vocab), std=0,
                       result='float32', **options)

  # ---- training and likelihood

  def loss(self, batch, *, step, key, train=True):
    """Mean nats per code of the spec, whatever the view; labels are dropped in training.

    `metrics`: `nll`, `bits_per_token`, `accuracy` over codes of the view, and `bits_depth_i`, the
    bits of its i-th code of a position.
    """
    del step
    tokens, label = self._read(batch)
    drop, *keys = jax.random.split(key, 4)
    if train:
      label = drop_labels(self, label, drop)
    scores = self._scores(self._vectors(tokens), label, keys if train else None)
    nats = optax.softmax_cross_entropy_with_integer_labels(scores, tokens)
    by_depth = jnp.mean(nats, (0, 1))
    nll = jnp.sum(by_depth) / self.spec.depth
    best = jnp.take_along_axis(scores, tokens[..., None], -1)[..., 0] >= jnp.max(scores, -1)
    metrics = {'nll': nll, 'bits_per_token': nll / math.log(2), 'accuracy': jnp.mean(best)}
    for i in range(self.codes.depth):
      metrics[f'bits_depth_{i}'] = by_depth[i] / math.log(2)
    weight = jnp.float32(len(tokens) * self.spec.length * self.spec.depth)
    return nll, {'metrics': metrics, 'weight': weight, 'statistics': None}

  def log_prob(self, batch: dict[str, Array]) -> Float[Array, 'b']:
    """Exact log p(tokens | label) in nats."""
    tokens, label = self._read(batch)
    scores = self._scores(self._vectors(tokens), label)
    return -jnp.sum(optax.softmax_cross_entropy_with_integer_labels(scores, tokens), (1, 2))

  def _read(self, batch: dict[str, Array]) -> tuple[Int[Array, 'b n d'], Int[Array, 'b']]:
    if 'keep' in batch:
      raise ValueError('keep: all codes of a position are read together; give whole token arrays.')
    tokens = self._to(jnp.asarray(batch['tokens'], jnp.int32))
    return tokens, read_first(self.classes, batch if 'label' in batch else None, len(tokens))

  def _to(self, tokens: Int[Array, 'b n k']) -> Int[Array, 'b n d']:
    return tokens if self.view is None else self.spec.to(self.view, tokens)

  def _vectors(self, tokens: Int[Array, '*b d']) -> Float[Array, '*b d e']:
    """Of every code, of the table of its depth; float32, in which they are summed."""
    return self.token(tokens + self._rows()).astype(jnp.float32)

  def _rows(self) -> np.ndarray:
    """The first row (and column) of every depth."""
    return np.cumsum((0, *self.codes.vocab[:-1]))

  def _scores(self, vectors: Float[Array, 'b n d e'], label: Int[Array, 'b'],
              keys: Any = None) -> Float[Array, 'b n d v']:
    """Logits of every code, given those before; -inf is beyond its alphabet."""
    embed, outside, inside = (None,) * 3 if keys is None else keys
    batch, n, depth = vectors.shape[:3]
    x = dropout(self._slots(vectors[:, :-1].sum(2), label), self.dropout, embed)
    h = self.transformer(x, positions=self._positions(), causal=True, key=outside,
                         train=outside is not None)
    h = h[:, :, None]
    if self.depth is not None:
      partial = self._inner(jnp.cumsum(vectors[:, :, :-1], 2))
      slots = jnp.concatenate([h, partial.astype(h.dtype)], 2) + self.slot(jnp.arange(depth))
      y = self.depth(slots.reshape(batch * n, depth, -1), positions=_places(depth), causal=True,
                     key=inside, train=inside is not None)
      h = y.reshape(batch, n, depth, -1)
    return ids.restrict(self._classify(h), jnp.asarray(self.codes.support()))

  def _slots(self, totals: Float[Array, 'b n e'], label: Int[Array, 'b']
             ) -> Float[Array, 'b m c']:
    """The label and then positions, of whose vectors these are the sums: n + 1 slots."""
    x = jnp.concatenate([self.label(label)[:, None], self._outer(totals)], 1)
    return self._slot(x, jnp.minimum(jnp.arange(x.shape[1]), self.spec.length - 1))

  def _slot(self, x: Float[Array, 'b m c'], i: Int[Array, 'm']) -> Float[Array, 'b m c']:
    """What the numbered slots hold, told where they are; slot i predicts position i."""
    return x if self.place is None else x + self.place(i)

  def _outer(self, total: Float[Array, '*b e']) -> Float[Array, '*b c']:
    """What the body reads of a position whose vectors sum to `total`."""
    return total if self.outer is None else self.outer(total)

  def _inner(self, total: Float[Array, '*b e']) -> Float[Array, '*b c']:
    """What is read within a position of the codes there so far, whose vectors sum to `total`."""
    return total if self.inner is None else self.inner(total)

  def _positions(self) -> Int[Array, 'n a']:
    """Coordinates of the slots: the origin for the label, then those of positions but the last."""
    places = (self.spec.coordinates() if self.transformer.axes > 1
              else np.arange(self.spec.length)[:, None])
    return jnp.asarray(np.concatenate([np.zeros_like(places[:1]), places[:-1]]))

  def _classify(self, y: Float[Array, 'b n _ c']) -> Float[Array, 'b n _ v']:
    """Logits of slots of one depth each, or of all depths from the one slot there is."""
    if self.shared:
      return constrain(self.head(y), 'b n d v')
    if self.depth is None:
      parts = jnp.split(self.head(y[:, :, 0]), self._rows()[1:], -1)
    else:  # not one product with an axis for depths: XLA on CPU has none of that in bfloat16
      parts = [_product('bnc,cv->bnv', y[:, :, d], kernel)
               for d, kernel in enumerate(self._classifiers())]
    return constrain(jnp.stack(self._padded(parts), 2), 'b n d v')

  def _classifiers(self) -> list[Float[Array, 'c _']]:
    """The kernel of every depth, in the dtype it is used in."""
    return jnp.split(self.head.kernel[...].astype(self.head.dtype), self._rows()[1:], 1)

  def _padded(self, parts: list[Float[Array, '*b _']]) -> list[Float[Array, '*b v']]:
    """Zeros where an alphabet is smaller than the largest."""
    size = max(self.codes.vocab)
    return [jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, size - part.shape[-1])])
            for part in parts]

  # ---- sampling

  def sample(self, condition, *, keys, settings, known=None, known_mask=None) -> Sample:
    """Position by position, and code by code within each, with cached keys and values.

    Known codes are clamped; a word of which some bits are known is drawn among those that have
    them. `exact` is True where what is known comes first; codes that are drawn independently have
    no order within their position. `nfe` counts passes of the body, each with D of the inner
    transformer; `log_prob` is that of the drawn codes under the processed distribution.
    """
    batch, length = keys.shape[0], self.spec.length
    check_request(self, condition, known, known_mask, settings.guidance)
    prefill, guided = settings.prefill, settings.guidance is not None
    if (prefill and known is None) or not 0 <= prefill <= length:
      raise ValueError(f'{prefill=} needs as many known positions; at most {length}.')
    if known is None:
      known, known_mask = (
          jnp.zeros((batch, length, self.spec.depth), kind) for kind in (jnp.int32, bool))
    fixed = jnp.asarray(known_mask, bool) | (jnp.arange(length) < prefill)[:, None]
    code, held, whole = known_bits(
        self.spec, self.view, jnp.where(fixed, known, 0).astype(jnp.int32), fixed)
    label = read_first(self.classes, condition, batch)
    if guided:
      label = ids.pair(label, jnp.full_like(label, self.classes))
    plan, each = self._plan(settings, code, held)
    layers, inner = self.transformer.unstack(), self.depth and self.depth.unstack()
    rotations = self.transformer.rotations(self._positions())

    def step(state, now):
      x, cache, log_prob = state
      n = now.pop('n')
      h, cache = self.transformer.extend(
          x, cache, index=n, layers=layers,
          positions=jax.tree.map(lambda r: jax.lax.dynamic_slice_in_dim(r, n, 1), rotations))
      new, nats, total = self._within(h, now | each, fold(keys, n), inner)
      after = jnp.minimum(n + 1, length - 1)  # after the last there is nothing to predict
      x = self._slot(self._outer(total)[:, None], after[None])
      return (x.astype(h.dtype), cache, log_prob - nats.sum(0)), new

    slots = self._slots(jnp.repeat(self._vectors(code[:, :prefill]).sum(2), 1 + guided, 0), label)
    cache = self.transformer.cache(len(label), prefill)
    if prefill:
      _, cache = self.transformer.extend(
          slots[:, :prefill], cache, layers=layers,
          positions=jax.tree.map(lambda r: r[:prefill], rotations))
    state = slots[:, -1:].astype(self.transformer.dtype), cache, jnp.zeros(batch)
    drawn, start = [plan['code'][:prefill]], prefill
    for end in self.transformer.segments(len(label), prefill, length):
      state = (state[0], self.transformer.grow(state[1], end), state[2])
      state, new = jax.lax.scan(step, state, {k: x[start:end] for k, x in plan.items()})
      drawn, start = [*drawn, new], end
    tokens = jnp.moveaxis(jnp.concatenate(drawn), -1, 0)
    tokens = tokens if self.view is None else self.spec.back(self.view, tokens)
    return Sample(tokens=jnp.where(fixed, known, tokens).astype(jnp.int32),
                  nfe=(1 + guided) * (length - prefill + bool(prefill)),
                  exact=self._exact(held == whole, held != 0), log_prob=state[2])

  def _plan(self, settings: DepthSettings, code: Int[Array, 'b n d'], held: Int[Array, 'b n d']
            ) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a draw reads, as arrays over positions (and depths), and over depths alone."""
    length, depth = code.shape[1:]
    settings = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (depth,)), settings)
    plan = {'n': jnp.arange(length), 'code': jnp.moveaxis(code, 0, -1),
            'held': jnp.moveaxis(held, 0, -1)}
    if settings.guidance is not None:
      plan['scale'] = jax.vmap(lambda own: own.scales(length), out_axes=1)(settings)
    own = self.depth is not None and not self.shared
    return plan, {
        'd': jnp.arange(depth), 'row': jnp.asarray(self._rows()),
        'support': jnp.asarray(self.codes.support()), 'settings': settings,
        'kernel': jnp.stack(self._padded(self._classifiers())) if own else None}

  def _within(self, h: Float[Array, 'c 1 w'], now: dict[str, Any], keys: Array, inner: Any
              ) -> tuple[Int[Array, 'd b'], Float[Array, 'd b'], Float[Array, 'c e']]:
    """The codes of a position, their nats, and the sum of their vectors."""
    def double(x):
      return jnp.repeat(x, len(h) // len(keys), 0)

    if self.depth is None:
      logits = jnp.moveaxis(self._classify(h[:, None])[:, 0], 1, 0)
      new, nats = jax.vmap(lambda logits, now: _choose(logits, now, keys))(logits, now)
      return new, nats, self._vectors(double(new.T)).sum(1)

    def step(state, now):
      x, cache, total = state
      d = now['d'][None]
      y, cache = self.depth.extend(
          x + self.slot(d), cache, index=now['d'], layers=inner, positions=d[:, None])
      logits = self.head(y)[:, 0] if self.shared else _product('bc,cv->bv', y[:, 0], now['kernel'])
      # all columns on every device, to truncate
      new, nats = _choose(constrain(logits, 'b c'), now, keys)
      total += self.token(double(new) + now['row']).astype(jnp.float32)
      return (self._inner(total)[:, None].astype(h.dtype), cache, total), (new, nats)

    total = jnp.zeros((len(h), self.token.embedding.shape[1]), jnp.float32)
    start = h, self.depth.cache(len(h), self.codes.depth), total
    (_, _, total), (new, nats) = jax.lax.scan(step, start, now)
    return new, nats, total

  def _exact(self, full: Bool[Array, 'b n d'], some: Bool[Array, 'b n d']) -> Bool[Array, 'b']:
    """Whether nothing is known after what is not known as a whole."""
    if self.depth is None:  # codes of a position have no order
      full, some = full.all(-1, keepdims=True), some.any(-1, keepdims=True)
    full, some = (x.reshape(len(x), -1) for x in (full, some))
    return jnp.all(full[:, :-1] | ~some[:, 1:], -1)


def known_bits(spec: TokenSpec, view: View | None, known: Int[Array, 'b n k'],
               fixed: Bool[Array, 'b n k']) -> tuple[Array, Array, Any]:
  """Known codes as a view sees them, which of their bits are known, and all of their bits.

  A code x of the view agrees with what is known where (x ^ code) & held is 0.
  """
  to = lambda tokens: tokens if view is None else spec.to(view, tokens)  # noqa: E731
  held = to(fixed * (np.array(spec.vocab, np.int32) - 1))
  if view in (None, 'factors'):  # known as a whole or not at all
    return to(known), -(held > 0).astype(np.int32), -1
  return to(known), held, np.array(spec.view(view).vocab) - 1


def _choose(logits: Float[Array, 'c v'], now: dict[str, Any], keys: Array
            ) -> tuple[Int[Array, 'b'], Float[Array, 'b']]:
  """Codes of one depth that agree with what is known of them, and their nats."""
  if 'scale' in now:
    logits = ids.guide_pairs(logits, now['scale'])
  differs = (jnp.arange(logits.shape[-1]) ^ now['code'][:, None]) & now['held'][:, None]
  logits = ids.restrict(logits, now['support'] & (differs == 0))
  logits = now['settings'].process(logits)
  new = ids.draw(logits, fold(keys, now['d']))
  return new, optax.softmax_cross_entropy_with_integer_labels(logits, new)


def _check(config: DepthConfig, spec: TokenSpec) -> None:
  """Raises ValueError where tokens and sizes do not go together; views have their own reasons."""
  body, inner = config.transformer, config.depth
  if spec.eos is not None:
    raise ValueError(f'eos={spec.eos}: a string that ends has one code per position; take the '
                     'autoregressive generator.')
  if config.view and config.words:
    raise ValueError(f'view={config.view!r} and words={config.words} are two ways to see a '
                     'position; leave one out.')
  if config.view not in (None, 'factors', 'bits'):
    raise ValueError(f'view={config.view!r} is not one of factors, bits.')
  if body.axes not in (0, 1, len(spec.grid)):
    raise ValueError(f'axes={body.axes} must be 0 (learned positions), 1 (the row-major index) or '
                     f'{len(spec.grid)} (the coordinates of grid={spec.grid}).')
  if body.modulated or (inner and inner.modulated):
    raise ValueError('modulated=True has no use here: the label is a prefix token.')
  if inner and inner.axes not in (0, 1):
    raise ValueError(f'depth.axes={inner.axes} must be 0 or 1: a code has one place in its '
                     'position.')
  if inner and inner.width != body.width:
    raise ValueError(f'depth.width={inner.width} must be that of the body, {body.width}.')
  if config.shared and not inner:
    raise ValueError('shared=True without an inner transformer would give all codes of a position '
                     'one distribution; set shared=False.')
  check_shares(label_dropout=config.label_dropout)


def _product(equation: str, y: Float[Array, '*b c'], kernel: Float[Array, 'c v']) -> Array:
  return jnp.einsum(equation, y.astype(kernel.dtype), kernel, preferred_element_type='float32')


def _places(depth: int) -> Int[Array, 'd 1']:
  return jnp.arange(depth)[:, None]
