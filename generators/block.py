"""Block diffusion: blocks of codes one after the other, the codes of a block in any order.

BD3-LM (Arriola et al. 2025, arXiv 2503.09573). With the codes in blocks x^1, x^2, ... of L' each,

  log p(x) >= sum_b ELBO(x^b | x^<b),

every term the bound of masked diffusion (`masked`) given the clean blocks before. L' = 1 is
autoregression with an exact likelihood, L' = N masked diffusion. All terms come from one pass over
a clean and a noisy copy of the codes: a noisy block sees itself and the clean blocks before it, a
clean block itself and those before. The clean copy of the last block has no reader and is left out.

Sampling writes each finished block into a cache of keys and values, as autoregression does with
each code, so that length costs no passes over what is there already.
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
from smalti.generators.bodies import check_body
from smalti.generators.generator import (
    Generator,
    GeneratorConfig,
    Sample,
    check_request,
    check_shares,
    drop_labels,
    fold,
    read_labels,
    settings,
)
from smalti.generators.unmasking import UnmaskingSettings
from smalti.networks.layers import Embedding, Linear, constrain
from smalti.networks.transformer import Cache, Transformer, TransformerConfig
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class BlockDiffusionConfig(GeneratorConfig):
  """A transformer over blocks of codes, causal between blocks and bidirectional inside.

  Args:
    transformer: with `modulated` the class enters by adaLN, otherwise as a prefix token; `axes` is
      0, 1 (the raster index) or the number of axes of the flat grid.
    block_size: L', a divisor of the number of codes; 4, 8 and 16 in the paper.
    rates: the range from which training draws the share of a block to hide. (0, 1) trains the
      bound itself; a clipped range trains less of it with less variance, and (1, 1) is plain
      autoregression where block_size is 1.
    classes: number of labels; 0 is unconditional.
    label_dropout: chance per example of training on the null label, which guidance needs.
  """
  transformer: TransformerConfig
  block_size: int = 4
  rates: tuple[float, float] = (0.0, 1.0)
  classes: int = 0
  label_dropout: float = 0.1

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'BlockDiffusion':
    return BlockDiffusion(self, spec, rngs=rngs)


@settings
class BlockDiffusionSettings(UnmaskingSettings):
  """How to sample a block; blocks come one after the other, guidance runs over all their passes.

  Args:
    steps: passes per block; 'first_hitting' and 'confidence' take what they need.
    top_p: of every draw (0.9 in the paper's samples).
  """
  sampler: Literal['ancestral', 'maskgit', 'first_hitting', 'confidence'] = 'first_hitting'
  steps: int = 4
  grid: schedules.Grid = 'uniform'


class BlockDiffusion(Generator):
  """p(hidden codes of a block | its visible ones, the blocks before, label).

  Inside, all codes are one row of N * D positions (the flat view of the spec). With an EOS the
  bound is over all positions, so that the length is paid for, and two facts are built in: after an
  EOS there are only EOS, before a visible code of the block that is not EOS there is none.
  """

  settings = BlockDiffusionSettings

  def __init__(self, config: BlockDiffusionConfig, spec: TokenSpec, *, rngs: nnx.Rngs):
    self.spec, self.flat, self.classes = spec, spec.view('flat'), config.classes
    self.block_size, self.label_dropout = config.block_size, config.label_dropout
    _check(config, self.flat)
    self.rates = tuple(config.rates)
    self.blocks = self.flat.length // self.block_size
    body = config.transformer
    vocab, width, dtype = self.flat.vocab[0], body.width, body.dtype
    self.token = Embedding(vocab + 1, width, dtype=dtype, rngs=rngs)  # the last row is MASK
    # rotations are relative: where a whole block is hidden, only this tells positions apart
    self.place = Embedding(self.flat.length, width, dtype=dtype, rngs=rngs)
    self.label = Embedding(  # the last row is the null label
        config.classes + 1, width, dtype=dtype, rngs=rngs) if config.classes else None
    self.transformer = Transformer(body, rngs=rngs)
    self.head = Linear(
        width, vocab, bias=True, std=0, dtype=dtype, result='float32', rngs=rngs)

  def logits(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n'],
             labels: Int[Array, 'b'] | None, *, key: Array | None = None, train: bool = False
             ) -> Float[Array, 'b n v']:
    """The scores of every code, given the codes of its block outside `masked` and all before it.

    Tokens at masked positions are read by later blocks, never by their own or earlier ones.
    """
    length, clean = self.flat.length, self.flat.length - self.block_size
    places = np.concatenate([np.arange(clean), np.arange(length)])
    x = jnp.concatenate([self._embed(tokens[:, :clean], False, places[:clean]),
                         self._embed(tokens, masked, places[clean:])], 1)
    block, positions = places // self.block_size, self._coordinates()[places]
    if self._prefixed:  # a block of its own before all others, at coordinate 0: no rotation
      x = jnp.concatenate([self.label(labels)[:, None], x], 1)
      block = np.concatenate([[-1], block])
      positions = np.concatenate([np.zeros_like(positions[:1]), positions])
    y = self.transformer(
        x, positions=jnp.asarray(positions), modulation=self._modulation(labels),
        mask=pattern(jnp.asarray(block), jnp.arange(len(block)) >= len(block) - length),
        key=key, train=train)
    return self.head(y[:, -length:])

  def scores(self, tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n'],
             labels: Int[Array, 'b'] | None, *, key: Array | None = None, train: bool = False
             ) -> Float[Array, 'b n v']:
    """`logits`, with -inf where a code is impossible."""
    scores = self.logits(tokens, masked, labels, key=key, train=train)
    scores = constrain(scores, 'b n v')
    if self.flat.eos is None:
      return scores
    inside = self._split(tokens)
    stops = (inside == self.flat.eos).any(-1)
    ended = jnp.cumsum(stops, -1) - stops > 0
    possible = processing.possible(
        inside, self._split(masked), self.flat.vocab[0], self.flat.eos, ended)
    return processing.restrict(scores, possible.reshape(scores.shape))

  # ---- training and likelihood

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Mean nats per valid token of the bound, with the weights of `rates` in training.

    `metrics`: `nll`, an unbiased estimate of the bound whatever `rates` are, `bits_per_token`, and
    `accuracy` on hidden tokens. Held-out batches return the bound by the estimator of least
    variance, without label dropout; for block_size 1 it is exact.
    """
    del step
    tokens, labels = self._read(batch)
    drop, times, hide, inner = jax.random.split(key, 4)
    if train:
      labels = drop_labels(self, labels, drop)
    # strata over batch and blocks, those of one row far apart; every block has each of them in turn
    turn = jax.random.randint(jax.random.fold_in(times, 1), (), 0, self.blocks)
    place = (jnp.arange(self.blocks) + turn) % self.blocks
    u = (schedules.strata(batch, times)[:, None] + place) / self.blocks
    if train:
      masked, weight, unbiased = masking.by_rate(hide, u, self.block_size, self.rates)
    else:
      masked, weight = self._count_mask(hide, u)
      unbiased = weight
    masked = masked.reshape(tokens.shape)
    scores = self.scores(tokens, masked, labels, key=inner, train=train)
    nll = jnp.where(masked, -processing.log_prob(scores, tokens), 0)
    hits = masked & (processing.pick(scores, tokens) >= jnp.max(scores, -1))
    each = self._split(nll).sum(-1)
    valid = self.flat.valid(tokens[..., None]).sum()
    value, bound = ((w * each).sum() / valid for w in (weight, unbiased))
    metrics = {'nll': bound, 'bits_per_token': bound / math.log(2),
               'accuracy': hits.sum() / jnp.maximum(masked.sum(), 1)}
    return value, {'metrics': metrics, 'weight': valid, 'statistics': None}

  def elbo(self, batch: dict[str, Array], *, key: Array | None = None,
           mode: Literal['count', 'enumerate'] = 'count', samples: int = 8) -> Float[Array, 'b']:
    """A lower bound of log p(tokens | label) per example, in nats; log p itself for block_size 1.

    Args:
      key: for 'count', whose draws are stratified over `samples`.
      mode: 'count' hides m ~ U{1..L'} codes of every block, weight L' / m; 'enumerate' is exact,
        by 2^L' - 1 passes, for block_size <= 12.
    """
    tokens, labels = self._read(batch)
    if mode not in ('count', 'enumerate'):
      raise ValueError(f'mode={mode!r} is not one of count, enumerate.')
    if mode == 'count' and key is None:
      raise ValueError(f'mode={mode!r} draws masks: give it a key.')
    shape = (len(tokens), self.blocks, self.block_size)

    def add(total, draw):
      if mode == 'enumerate':  # one pass serves all blocks: none sees another one's mask
        pattern, weight = draw
        masked = jnp.broadcast_to(pattern, shape).reshape(tokens.shape)
      else:
        first, second = jax.random.split(jax.random.fold_in(key, draw))
        u = (draw + jax.random.uniform(first, shape[:2])) / samples
        masked, weight = self._count_mask(second, u)
        masked, weight = masked.reshape(tokens.shape), weight / samples
      logp = processing.log_prob(self.scores(tokens, masked, labels), tokens)
      each = self._split(jnp.where(masked, logp, 0)).sum(-1)
      return total + (weight * each).sum(-1), None

    draws = self._enumerated() if mode == 'enumerate' else jnp.arange(samples)
    return jax.lax.scan(add, jnp.zeros(len(tokens)), draws)[0]

  def _read(self, batch: dict[str, Array]) -> tuple[Int[Array, 'b n'], Int[Array, 'b'] | None]:
    """Flat tokens and labels."""
    if 'keep' in batch:
      raise ValueError('Blocks of a prefix are not all whole: train on batches without `keep`, or '
                       'use Masked.')
    tokens = jnp.asarray(batch['tokens'], jnp.int32)
    flat = tokens.reshape(len(tokens), self.flat.length)
    return flat, read_labels(self.classes, batch, len(tokens))

  def _count_mask(self, key: Array, u: Float[Array, 'b m']
                  ) -> tuple[Bool[Array, 'b m l'], Float[Array, 'b m']]:
    """Hides m ~ U{1..L'} codes of each block; weight L' / m."""
    return masking.by_count(key, u, jnp.ones((*u.shape, self.block_size), bool))

  def _enumerated(self) -> tuple[Bool[Array, 'm l'], Float[Array, 'm']]:
    """All masks of a block but the empty one, and their weights."""
    masks, weights = masking.every(jnp.ones((1, self.block_size), bool), None, None)
    return masks, weights[:, 0]

  # ---- sampling

  def sample(self, condition: dict[str, Array] | None, *, keys: Array,
             settings: BlockDiffusionSettings, known: Int[Array, 'b n d'] | None = None,
             known_mask: Bool[Array, 'b n d'] | None = None) -> Sample:
    """Draws block by block, given `label` and any known tokens, which come back unchanged.

    `exact` is True where the draw is from the model's own conditional given the known tokens (with
    each prediction reshaped by temperature, truncation and guidance): no block is known in part
    after an earlier one was unknown in part, and each was drawn with 'first_hitting' or has one
    unknown code at most. A known EOS that forbids an earlier one is not exact either. A block
    without unknown codes costs one pass, and nothing is drawn once every row has its EOS.
    """
    size, length, width = keys.shape[0], self.flat.length, self.block_size
    check_request(self, condition, known, known_mask, settings.guidance)
    guided = settings.guidance is not None
    labels = read_labels(self.classes, condition, size)
    if guided:
      labels = processing.pair(labels, jnp.full_like(labels, self.classes))
    given = (jnp.zeros((size, length), jnp.int32) if known is None
             else jnp.asarray(known, jnp.int32).reshape(size, length))
    unknown = (jnp.ones((size, length), bool) if known_mask is None
               else ~jnp.asarray(known_mask, bool).reshape(size, length))
    given = jnp.where(unknown, 0, given)
    endless = self._endless(given, unknown)
    steps = unmasking.passes(settings, width)
    scales = settings.scales(self.blocks * steps)
    layers = self.transformer.unstack()
    rotations = self.transformer.rotations(self._slots())

    def double(x):
      return jnp.repeat(x, 2, 0) if guided else x

    def run_block(state):
      b, tokens, cache, ended, passes = state
      cut = lambda x, b=b: jax.lax.dynamic_slice_in_dim(x, b * width, width, 1)  # noqa: E731
      draws, codes, masked = fold(keys, b), cut(tokens), cut(unknown)
      if self.flat.eos is not None:  # whatever is unknown after an EOS is one, and needs no pass
        codes = jnp.where(masked & ended[:, None], self.flat.eos, codes)
        masked = masked & ~ended[:, None]
      no_end = None if endless is None else cut(endless)
      plan, order = unmasking.plan(settings, draws, masked, (width,), first=steps)

      def run_pass(step, cache, codes, masked, previous=None):
        logits, cache = self.advance(
            cache, double(codes), double(masked), labels, b, layers=layers, rotations=rotations,
            previous=None if previous is None else double(previous))
        if guided:
          logits = processing.guide_pairs(logits, scales[b * steps + step])
        if no_end is not None:
          vocab, eos = logits.shape[-1], self.flat.eos
          there = processing.possible(codes, masked, vocab, eos)
          there &= ~(no_end[..., None] & (jnp.arange(vocab) == eos))
          logits = processing.restrict(logits, there)
        now, own = jax.tree.map(lambda x: x[step], plan), fold(draws, step)
        left = unmasking.fated(now, order, own, masked)
        codes, masked, _ = unmasking.reveal(settings, now, own, logits, codes, masked, left)
        return cache, codes, masked

      cache, codes, masked = run_pass(0, cache, codes, masked, cut(tokens, b - 1))

      def again(state):
        step, cache, codes, masked = state
        return step + 1, *run_pass(step, cache, codes, masked)

      taken = jnp.asarray(1)
      if steps > 1:
        taken, cache, codes, _ = jax.lax.while_loop(
            lambda state: (state[0] < steps) & jnp.any(state[3]), again,
            (taken, cache, codes, masked))
      tokens = jax.lax.dynamic_update_slice_in_dim(tokens, codes, b * width, 1)
      if self.flat.eos is not None:
        ended = ended | (codes == self.flat.eos).any(-1)
      return b + 1, tokens, cache, ended, passes + taken

    rows = len(double(given))
    cache = self.transformer.cache(rows, width)
    state = (jnp.asarray(0), given, cache, jnp.zeros(size, bool), jnp.asarray(0))
    for end in sorted({-(-e // width) for e in self.transformer.segments(rows, 0, length)}):
      cache = self.transformer.grow(state[2], (end + 1) * width)

      def unfinished(state, end=end):  # nothing is left to do once every row has its EOS
        return (state[0] < end) & ~jnp.all(state[3])

      state = jax.lax.while_loop(unfinished, run_block, (*state[:2], cache, *state[3:]))
    _, tokens, _, _, passes = state
    tokens = self.flat.canonical(tokens[..., None])[..., 0]
    tokens = jnp.where(unknown, tokens, given)
    return Sample(tokens=tokens.reshape(size, self.spec.length, self.spec.depth),
                  nfe=passes * (2 if guided else 1), exact=self._exact(settings, given, unknown))

  def advance(self, cache: Cache, tokens: Int[Array, 'b l'], masked: Bool[Array, 'b l'],
              labels: Int[Array, 'b'] | None, b: Int[Array, ''], *,
              previous: Int[Array, 'b l'] | None = None, layers: list | None = None,
              rotations: Any = None) -> tuple[Float[Array, 'b l v'], Cache]:
    """Logits of block b, given its visible codes and the cache, which holds the blocks before.

    Args:
      cache: `transformer.cache(b, N + L')` at first, then what the call before returned.
      previous: the codes of block b - 1, to be written into the cache: for the first call of a
        block. Block 0 writes the label instead.
      layers, rotations: `transformer.unstack()` and the rotations of all slots, made once.
    """
    size = self.block_size
    place = b * size + jnp.arange(size)
    x, entries = self._embed(tokens, masked, place), size
    if previous is not None:
      start = jnp.zeros_like(x)
      if self._prefixed:
        start = start.at[:, 0].set(self.label(labels))
      before = self._embed(previous, False, jnp.maximum(place - size, 0))
      x, entries = jnp.concatenate([jnp.where(b == 0, start, before), x], 1), 2 * size
    # the slots of block b are (b + 1) L' on: those of the label are a block before all others
    index = (b + 2) * size - entries
    if rotations is None:
      rotations = self.transformer.rotations(self._slots())
    own, slots = index + jnp.arange(entries)[:, None], jnp.arange(cache[0][0].shape[2])
    real = (slots >= size) | ((slots == 0) & self._prefixed)
    seen = (slots == own) | (real & (slots // size <= own // size))
    y, cache = self.transformer.extend(
        x, cache, index=index, mask=seen[None, None], layers=layers,
        positions=jax.tree.map(
            lambda r: jax.lax.dynamic_slice_in_dim(r, index, entries), rotations),
        modulation=self._modulation(labels))
    return constrain(self.head(y[:, -size:]), 'b n c'), cache

  def _endless(self, given: Array, unknown: Array) -> Bool[Array, 'b n'] | None:
    """Where a known code further on says that the string has not ended yet."""
    if self.flat.eos is None:
      return None
    ends = jnp.cumsum(~unknown & (given == self.flat.eos), 1) > 0
    later = jnp.cumsum(~unknown[:, ::-1], 1)[:, ::-1] > 0
    return later & ~ends

  def _exact(self, settings: BlockDiffusionSettings, given: Array, unknown: Array
             ) -> Bool[Array, 'b']:
    holes = self._split(unknown)
    open_ = jnp.cumsum(holes.any(-1), -1) > 0  # up to and including this block
    ignored = (~holes[:, 1:]).any(-1) & open_[:, :-1]
    exact = ~ignored.any(-1)
    if settings.sampler != 'first_hitting':
      exact &= (holes.sum(-1) <= 1).all(-1)
    if self.flat.eos is not None:
      exact &= ~(unknown & unmasking.before_end(given, unknown, self.flat.eos)).any(-1)
    return exact

  # ---- layout

  @property
  def _prefixed(self) -> bool:
    return self.label is not None and not self.transformer.modulated

  def _split(self, x: Array) -> Array:
    """[b, n] to [b, blocks, l]."""
    return x.reshape(len(x), self.blocks, self.block_size)

  def _embed(self, tokens: Int[Array, 'b m'], masked: Bool[Array, 'b m'] | bool,
             places: Int[Array, 'm'] | np.ndarray) -> Float[Array, 'b m c']:
    x = self.token(jnp.where(masked, self.flat.vocab[0], tokens))
    return x + self.place(jnp.asarray(places))

  def _modulation(self, labels: Int[Array, 'b'] | None) -> Float[Array, 'b c'] | None:
    return self.label(labels) if self.transformer.modulated else None

  def _coordinates(self) -> Int[np.ndarray, 'n a']:
    """Of the codes, for rotations."""
    if self.transformer.axes > 1:
      return self.flat.coordinates()
    return np.arange(self.flat.length)[:, None]

  def _slots(self) -> Int[Array, 'm a']:
    """Of the slots of the cache: a block at coordinate 0, then the codes."""
    places = self._coordinates()
    return jnp.asarray(np.concatenate([np.zeros_like(places[:self.block_size]), places]))


def pattern(block: Int[Array, 'n'], noisy: Bool[Array, 'n']) -> Bool[Array, '1 1 n n']:
  """Which keys (last) every query sees, from each slot's block and whether it is a noisy copy."""
  query, key = block[:, None], block[None]
  clean = (key < query) | ((key == query) & ~noisy[:, None])
  return jnp.where(noisy[None], (key == query) & noisy[:, None], clean)[None, None]


def _check(config: BlockDiffusionConfig, flat: TokenSpec) -> None:
  """Raises ValueError for a config that makes no model over the flat view."""
  size, (low, high), body = config.block_size, config.rates, config.transformer
  if size < 1 or flat.length % size:
    divisors = [d for d in range(1, flat.length + 1) if flat.length % d == 0]
    nearest = min(divisors, key=lambda d: abs(d - size))
    raise ValueError(
        f'block_size={size} must divide the {flat.length} codes; the nearest is {nearest}.')
  if not 0 <= low <= high <= 1 or not high:
    raise ValueError(f'rates={config.rates} must be a range within 0..1.')
  if low == 1 and size > 1:
    raise ValueError(f'rates={config.rates} never show a code of a block, and block_size={size} '
                     'needs to learn from them; (1, 1) is for blocks of 1.')
  check_shares(label_dropout=config.label_dropout)
  check_body(body, config.classes, flat.grid)
