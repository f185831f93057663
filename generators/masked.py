"""Masked discrete diffusion and MaskGIT: predict hidden tokens from the visible ones, in any order.

MD4 (arXiv 2406.04329) and MDLM (arXiv 2406.07524) hide each token with probability 1 - alpha(t) and
bound log p(x) by a weighted cross-entropy on the hidden ones; MaskGIT (arXiv 2202.04200) trains the
same network without the weight and reveals the most confident tokens first. The network is not told
the time: the best prediction depends on what is visible only, so any sampler below serves any
trained model, whatever its schedule. MASK is a row of the embedding and never a column of the head.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.generators import logits as processing, masking, schedules, unmasking
from smalti.generators.bodies import check_body, labelled
from smalti.generators.generator import (
    Generator,
    GeneratorConfig,
    Sample,
    check_request,
    check_shares,
    drop_labels,
    fold,
    rank,
    read_labels,
)
from smalti.generators.unmasking import MaskedSettings
from smalti.networks.layers import Embedding, Linear, constrain
from smalti.networks.transformer import Transformer, TransformerConfig
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class MaskedConfig(GeneratorConfig):
  """A bidirectional transformer that fills in hidden tokens.

  Args:
    transformer: with `modulated` the class enters by adaLN, otherwise as a prefix token; `axes` is
      0, 1 (the raster index) or the number of axes of the flat grid.
    classes: number of labels; 0 is unconditional.
    label_dropout: chance per example of training on the null label, which guidance needs.
    objective: 'elbo' is the likelihood bound, 'maskgit' plain cross-entropy on hidden tokens.
    schedule: alpha(t) of 'elbo'; any choice has the same bound and another variance.
    power: of the 'polynomial' schedule.
    ratio: masked fraction at u ~ U(0, 1) of 'maskgit' (TiTok, MaskBit, Halton: 'arccos').
    counts: tokens that 'maskgit' hides of N: 'ceil' of ratio times N, 'round' of it, one or more
      (TiTok), or each with that chance, 'bernoulli' (MaskBit, Halton).
    label_smoothing: of 'maskgit' (0.1 in its paper).
    visible: of 'maskgit', weight of the cross-entropy of visible tokens beside hidden ones (0.1 in
      TiTok's code, 1 in MaskBit's and Halton's).
  """
  transformer: TransformerConfig
  classes: int = 0
  label_dropout: float = 0.1
  objective: Literal['elbo', 'maskgit'] = 'elbo'
  schedule: schedules.Noise = 'linear'
  power: float = 2.0
  ratio: schedules.Ratio = 'cosine'
  counts: masking.Counts = 'ceil'
  label_smoothing: float = 0.1
  visible: float = 0.0

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'Masked':
    return Masked(self, spec, rngs=rngs)


class Masked(Generator):
  """p(hidden tokens | visible tokens, label), its likelihood bound and its samplers.

  Inside, all codes are one row of N * D (the flat view of the spec), and each has a slot of the
  transformer; subclasses read several codes in a slot. With an EOS the bound is over all positions,
  so that the length is paid for, and two facts are built in: after a visible EOS there are only
  EOS, before a visible code that is not EOS there is none.
  """

  settings = MaskedSettings

  def __init__(self, config: MaskedConfig, spec: TokenSpec, *, rngs: nnx.Rngs):
    self.spec, self.slots, self.classes = spec, self._slots(config, spec), config.classes
    grid = self.slots.grid if self.slots.depth == 1 else (*self.slots.grid, self.slots.depth)
    self.flat = TokenSpec(grid=grid, vocab=(max(self.slots.vocab),), eos=spec.eos)
    self.objective, self.ratio, self.counts = config.objective, config.ratio, config.counts
    self.label_dropout, self.label_smoothing = config.label_dropout, config.label_smoothing
    self.visible, self.schedule = config.visible, schedules.named(config.schedule, config.power)
    schedules.ratio(config.ratio, np.ones(1))
    if config.counts not in ('ceil', 'round', 'bernoulli'):
      raise ValueError(f'counts={config.counts!r} is not one of ceil, round, bernoulli.')
    if config.visible < 0:
      raise ValueError(f'visible={config.visible} must not be negative.')
    if config.objective not in ('elbo', 'maskgit'):
      raise ValueError(f'objective={config.objective!r} is not one of elbo, maskgit.')
    check_shares(label_dropout=config.label_dropout)
    if not 0 <= config.label_smoothing < 1:
      raise ValueError(f'label_smoothing={config.label_smoothing} must be at least 0 and below 1.')
    self._network(config, rngs)

  def _network(self, config: Any, rngs: nnx.Rngs) -> None:
    """Builds what `_outputs` runs."""
    body = config.transformer
    check_body(body, config.classes, self.slots.grid)
    width, dtype = body.width, body.dtype
    self.token = self._input(width, dtype, rngs)
    # rotations are relative: where all tokens are hidden, only this tells positions apart
    self.place = Embedding(self.slots.length, width, dtype=dtype, rngs=rngs)
    self.label = Embedding(  # the last row is the null label
        config.classes + 1, width, dtype=dtype, rngs=rngs) if config.classes else None
    self.transformer = Transformer(body, rngs=rngs)
    self.head = Linear(  # the columns of one code of a slot after the other's
        width, sum(self.slots.vocab), bias=True, std=0, dtype=dtype, result='float32', rngs=rngs)

  # ---- what a slot is: these say it for one code

  def _slots(self, config: Any, spec: TokenSpec) -> TokenSpec:
    """The codes inside; its positions are the slots of the transformer."""
    del config  # of subclasses
    return spec.view('flat')

  def _input(self, width: int, dtype: Any, rngs: nnx.Rngs) -> Any:
    return Embedding(self.flat.vocab[0] + 1, width, dtype=dtype, rngs=rngs)  # the last is MASK

  def _embed(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n']) -> Float[Array, 'b s c']:
    return self.token(jnp.where(masked, self.flat.vocab[0], tokens))

  def _codes(self, tokens: Int[Array, 'b n d']) -> Int[Array, 'b m']:
    """Tokens of the spec as the row of codes inside."""
    return tokens.reshape(len(tokens), self.flat.length)

  def _tokens(self, codes: Int[Array, 'b m']) -> Int[Array, 'b n d']:
    """The inverse of `_codes`."""
    return codes.reshape(-1, self.spec.length, self.spec.depth)

  def _inside(self, mask: Bool[Array, 'b n d']) -> Bool[Array, 'b m']:
    """The codes inside of which `mask` holds all."""
    return mask.reshape(len(mask), self.flat.length)

  def _outside(self, masked: Bool[Array, 'b m']) -> Bool[Array, 'b n d']:
    """The tokens of the spec of which `masked` holds a part."""
    return masked.reshape(-1, self.spec.length, self.spec.depth)

  def _narrowed(self, known: Int[Array, 'b n d'], known_mask: Bool[Array, 'b n d']
                ) -> tuple[Bool[Array, 'b m v'] | None, Bool[Array, 'b']]:
    """Which codes known tokens leave possible, beyond what the network is told, and for whom.

    A known EOS further on says that the string has not ended yet.
    """
    unknown, given = ~self._inside(known_mask), self._codes(known)
    if self.flat.eos is None:
      return None, jnp.zeros(len(known), bool)
    before = unmasking.before_end(given, unknown, self.flat.eos)
    possible = ~before[..., None] | (jnp.arange(self.flat.vocab[0]) != self.flat.eos)
    return possible, (before & unknown).any(-1)

  # ---- the network

  def logits(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n'],
             labels: Int[Array, 'b'] | None, *, key: Array | None = None, train: bool = False
             ) -> Float[Array, 'b n v']:
    """The scores of every code at every position; tokens at masked positions are not read."""
    y = self._outputs(tokens, masked, labels, key=key, train=train)
    sizes = np.array(self.slots.vocab)
    if len(set(self.slots.vocab)) > 1:  # columns that a shorter alphabet lacks repeat its last one
      first = np.cumsum(sizes) - sizes
      y = y[..., first[:, None] + np.minimum(np.arange(sizes.max()), sizes[:, None] - 1)]
    return y.reshape(len(tokens), self.flat.length, -1)

  def _outputs(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n'],
               labels: Int[Array, 'b'] | None, *, key: Array | None, train: bool
               ) -> Float[Array, 'b s v']:
    """All columns of every slot, those of its first code first."""
    x, where = self._inputs(tokens, masked, labels)
    y = self.transformer(x, **where, key=key, train=train)
    return self.head(y[:, -self.slots.length:])

  def hidden(self, tokens: Int[Array, 'b n d'], *, blocks: tuple[int, ...], keys: Array,
             noise: float | Array = 0.0) -> list[Float[Array, 'b m c']]:
    """What the numbered blocks (1 the first) hold of every slot, for probes of representations.

    Args:
      noise: the share of codes that is hidden, rounded to a number of codes; which ones is drawn
        from an example's own key. The label is never told.
    """
    flat = self._codes(jnp.asarray(tokens, jnp.int32))
    order = jax.vmap(lambda key: jax.random.uniform(key, (self.flat.length,)))(keys)
    masked = rank(order) < jnp.rint(noise * self.flat.length)
    labels = None if self.label is None else jnp.full(len(flat), self.classes)
    x, where = self._inputs(flat, masked, labels)
    states = self.transformer.hidden(x, blocks=blocks, **where)
    return [y[:, -self.slots.length:] for y in states]

  def _inputs(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n'],
              labels: Int[Array, 'b'] | None) -> tuple[Float[Array, 'b m c'], dict[str, Any]]:
    """What the transformer is given: vectors, their positions, and the label where it modulates."""
    x = self._embed(tokens, masked) + self.place(jnp.arange(self.slots.length))
    label = None if self.label is None else self.label(labels)
    return labelled(self.transformer, self.slots, x, label)

  def allowed(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n']
              ) -> Bool[Array, 'b n v']:
    """Which codes a position can hold, given the visible ones."""
    if self.flat.eos is None:
      there = np.tile(self.slots.support(), (self.slots.length, 1))
      return jnp.broadcast_to(there, (*tokens.shape, self.flat.vocab[0]))
    return processing.possible(tokens, masked, self.flat.vocab[0], self.flat.eos)

  def scores(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n'],
             labels: Int[Array, 'b'] | None, *, key: Array | None = None, train: bool = False
             ) -> Float[Array, 'b n v']:
    """Logits of every code at every masked position, given the visible tokens; -inf is never."""
    scores = self.logits(tokens, masked, labels, key=key, train=train)
    return processing.restrict(constrain(scores, 'b n v'), self.allowed(tokens, masked))

  # ---- training and likelihood

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Mean nats per valid token of the bound, or of MaskGIT's cross-entropy per hidden token.

    `metrics`: `nll`, the bound in nats per valid token (unbiased; too low for MaskGIT's objective
    and accumulate > 1, which weighs it by hidden tokens), `bits_per_token`, and `accuracy` on
    hidden tokens. Held-out batches always return the bound, by the estimator of least variance,
    without label dropout or smoothing.
    """
    del step
    tokens, real, labels = self._read(batch)
    drop, mask, inner = jax.random.split(key, 3)
    if train:
      labels = drop_labels(self, labels, drop)
    first, second = jax.random.split(mask)
    u = schedules.strata(batch, first)
    if not train:
      masked, weight = masking.by_count(second, u, real)
    elif self.objective == 'elbo':
      masked, weight = masking.by_time(second, u, real, self.schedule)
    else:
      masked, weight = masking.by_ratio(second, u, real, self.ratio, self.counts)
    scores = self.scores(tokens, masked | ~real, labels, key=inner, train=train)
    each = -processing.log_prob(scores, tokens)
    nll = jnp.where(masked, each, 0)
    hits = masked & (processing.pick(scores, tokens) >= jnp.max(scores, -1))
    hidden = jnp.maximum(masked.sum(), 1)
    valid = (self.flat.valid(tokens[..., None])[..., 0] & real).sum()
    # of the spec, whatever is inside
    valid = valid * (self.spec.length * self.spec.depth / self.flat.length)
    bound = (weight * nll.sum(-1)).sum() / valid
    metrics = {'nll': bound, 'bits_per_token': bound / math.log(2), 'accuracy': hits.sum() / hidden}
    value, weight = bound, valid
    if train and self.objective == 'maskgit':
      possible = jnp.isfinite(scores)
      even = jnp.where(possible, scores, 0).sum(-1) / possible.sum(-1)
      even = jax.nn.logsumexp(scores, -1) - even
      smoothed = (1 - self.label_smoothing) * each + self.label_smoothing * even
      share = jnp.where(masked, 1.0, self.visible * real)
      weight = jnp.maximum(share.sum(), 1)
      value = jnp.where(share > 0, share * smoothed, 0).sum() / weight
    return value, {'metrics': metrics, 'weight': weight, 'statistics': None}

  def elbo(self, batch: dict[str, Array], *, key: Array | None = None,
           mode: Literal['count', 'mc', 'enumerate'] = 'count', samples: int = 8,
           steps: int | None = None) -> Float[Array, 'b']:
    """A lower bound of log p(tokens | label) per example, in nats, all constants included.

    Args:
      key: for 'count' and 'mc'; draws are stratified over `samples`.
      mode: 'count' hides m ~ U{1..N} tokens, weight N / m (low variance; the same for all
        schedules); 'mc' draws a time of the model's schedule; 'enumerate' is exact, for N <= 12.
      steps: the bound of a diffusion of so many discrete steps on a uniform grid of times, 'mc' and
        'enumerate' only; None is the continuous limit, the tightest.
    """
    tokens, real, labels = self._read(batch)
    if mode not in ('count', 'mc', 'enumerate') or (mode == 'count' and steps is not None):
      raise ValueError(
          f'mode={mode!r} with steps={steps} is not one of count (without steps), mc, enumerate.')
    if mode != 'enumerate' and key is None:
      raise ValueError(f'mode={mode!r} draws masks: give it a key.')
    constant = jnp.zeros(len(tokens))
    if mode == 'mc' or steps is not None:
      # what the schedule leaves visible at t=1 costs log V each; 0 but for 'geometric'
      rest = self.schedule.alpha(jnp.ones(()))
      constant = rest * (real * np.tile(np.log(self.slots.vocab), self.slots.length)).sum(-1)
    if mode == 'enumerate':
      masks, weights = masking.every(real, self.schedule, steps)
    else:
      masks, weights = (jnp.arange(samples), None)

    def draw(i):
      first, second = jax.random.split(jax.random.fold_in(key, i))
      u = (i + jax.random.uniform(first, (len(tokens),))) / samples
      if mode == 'count':
        return masking.by_count(second, u, real)
      return masking.by_time(second, u, real, self.schedule, steps)

    def add(total, x):
      if mode == 'enumerate':
        masked, weight = jnp.broadcast_to(x[0], tokens.shape), x[1]
      else:
        masked, weight = draw(x[0])
        weight = weight / samples
      logp = processing.log_prob(self.scores(tokens, masked | ~real, labels), tokens)
      return total - weight * jnp.where(masked, logp, 0).sum(-1), None

    total, _ = jax.lax.scan(add, constant, (masks, weights))
    return -total

  def _read(self, batch: dict[str, Array]) -> tuple[Array, Array, Array | None]:
    """The codes inside, which of them are real (all, without `keep`), and labels."""
    tokens = jnp.asarray(batch['tokens'], jnp.int32)
    real = jnp.ones(tokens.shape, bool)
    if 'keep' in batch:
      real = jnp.broadcast_to(self.spec.mask(batch['keep']), tokens.shape)
    return self._codes(tokens), self._inside(real), read_labels(self.classes, batch, len(tokens))

  # ---- sampling

  def sample(self, condition: dict[str, Array] | None, *, keys: Array, settings: MaskedSettings,
             known: Int[Array, 'b n d'] | None = None,
             known_mask: Bool[Array, 'b n d'] | None = None) -> Sample:
    """Draws tokens, given `label` and any known tokens, which come back unchanged.

    `exact` is True where the draw is from the model's own conditional given the known tokens (with
    each prediction reshaped by temperature, truncation and guidance): with 'first_hitting', or
    where one token or none is unknown, unless a known EOS forbids an earlier one.
    """
    size, length = keys.shape[0], self.flat.length
    check_request(self, condition, known, known_mask, settings.guidance)
    scale = settings.context_guidance
    if settings.guidance is not None and scale is not None:
      raise ValueError('guidance and context_guidance are each a second pass; leave one at none.')
    labels = read_labels(self.classes, condition, size)
    possible = None
    if known is None:
      given, unknown = jnp.zeros((size, length), jnp.int32), jnp.ones((size, length), bool)
    else:
      known, known_mask = jnp.asarray(known, jnp.int32), jnp.asarray(known_mask, bool)
      given, unknown = self._codes(known), ~self._inside(known_mask)
      possible, beyond = self._narrowed(known, known_mask)
    steps, order = unmasking.plan(settings, keys, unknown, self.slots.grid)
    if settings.guidance is not None:
      steps['guidance'] = settings.scales(
          len(steps['step']), unmasking.passes(settings, unknown.sum(-1)))

    def predict(tokens, masked, now):
      poor = None
      if scale is not None:
        draws = fold(fold(keys, now['step']), unmasking.CONTEXT)
        poor = masked | self._context(draws, tokens, masked, settings.context_share)
      scores = self._guided(tokens, masked, labels, now.get('guidance', scale), poor)
      scores = processing.restrict(scores, self.allowed(tokens, masked))
      return scores if possible is None else processing.restrict(scores, possible)

    codes, states, passes = unmasking.unmask(
        predict, settings, steps, order, keys=keys, given=given, unknown=unknown)
    codes = self.flat.canonical(codes[..., None])[..., 0]
    tokens = self._tokens(codes)
    exact = (unknown.sum(-1) <= 1) | (settings.sampler == 'first_hitting')
    if known is not None:  # also where they contradict an EOS
      tokens, exact = jnp.where(known_mask, known, tokens), exact & ~beyond
    if states is not None:
      states = jax.vmap(lambda state: jnp.where(
          self._outside(state < 0), -1, self._tokens(jnp.maximum(state, 0))))(states)
    double = scale is not None or settings.guidance is not None
    return Sample(tokens=tokens, nfe=passes * (2 if double else 1), exact=exact, steps=states)

  def _guided(self, tokens: Array, masked: Array, labels: Array | None, scale: Array | None,
              poor: Bool[Array, 'b n'] | None = None) -> Float[Array, 'b n v']:
    """Logits, guided in one pass over [c0, u0, c1, u1, ...], whole on every device.

    Every u is told the null label, or with `poor` the label and what that leaves visible.
    """
    if scale is None:
      return constrain(self.logits(tokens, masked, labels), 'b n c')
    other = labels if labels is None or poor is not None else jnp.full_like(labels, self.classes)
    both = self.logits(
        jnp.repeat(tokens, 2, 0),
        processing.pair(masked, masked if poor is None else poor),
        None if labels is None else processing.pair(labels, other))
    return processing.guide_pairs(constrain(both, 'b n c'), scale)

  def _context(self, keys: Array, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n'],
               share: Array | float) -> Bool[Array, 'b n']:
    """floor(share n) of the n visible codes of every row; an EOS and what repeats it stay."""
    seen = ~masked if self.flat.eos is None else ~masked & (tokens != self.flat.eos)
    noise = jax.vmap(lambda key: jax.random.uniform(key, seen.shape[1:]))(keys)
    count = jnp.floor(share * seen.sum(-1) + 1e-4).astype(jnp.int32)  # 0.29 * 100 is 29
    return unmasking.subset(noise, count, seen)
