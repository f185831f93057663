"""Binary latent diffusion: bits are flipped at random, and a network turns them back.

Wang et al. 2023, arXiv 2304.04820 (ZeWang95/BinaryLatentDiffusion), for tokens that are made of
bits (Bernoulli codes, LFQ, BSQ). Forward, bit by bit, q(z_t = 1 | z_0) = k_t z_0 + (1 - k_t) / 2
with k_0 = 1 and k_T = 0: at T nothing is left. Backward, with p = p_theta(z_0 = 1 | z_t),

    p_theta(z_s = 1 | z_t) = p q(z_s = 1 | z_t, z_0 = 1) + (1 - p) q(z_s = 1 | z_t, z_0 = 0),

the mixture that the paper states. What it then prints, and its code computes, is a product,
~ q(z_t | z_s) (k_s p + (1 - k_s) / 2), and p at s=0: another distribution, biased even with a
perfect network (a bit that is 1 with 0.9 is drawn so with 0.81 in 16 steps and 0.77 in 64).
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.generators import logits as processing, schedules
from smalti.generators.bodies import check_axes
from smalti.generators.flips import (
    NEVER,
    Reverse,
    check_reverse,
    flip,
    posterior,
    reverse,
    reverse_logs,
)
from smalti.generators.generator import (
    Generator,
    GeneratorConfig,
    GuidanceSettings,
    Sample,
    check_floats,
    check_request,
    check_shares,
    drop_labels,
    read_labels,
    settings,
)
from smalti.networks.layers import Embedding, Linear, TimeEmbedding
from smalti.networks.transformer import Transformer, TransformerConfig
from smalti.tokenizers.spec import TokenSpec

ENUMERABLE = 8  # bits whose states `elbo` may enumerate


@dataclasses.dataclass(kw_only=True, slots=True)
class BinaryConfig(GeneratorConfig):
  """A bidirectional transformer over positions, whose input and output are all bits of one.

  Args:
    transformer: with `modulated` time and class enter by adaLN, otherwise as tokens of their own
      (published); `axes` is 0, 1 (the raster index) or the number of axes of the grid.
    classes: number of labels; 0 is unconditional.
    label_dropout: chance per example of training on the null label (the published code drops the
      labels of a whole batch).
    steps: T (64).
    schedule: k_t, see `schedules.kept`.
    predict: what the network's logits are about: 'flip', that a bit is not what it was, or 'clean',
      what it was. Flips are the published choice (arXiv 2410.14672 measures 3.17 against 4.39).
    reverse: what the bound is of; 'product' is the published code's.
    vlb: weight of the bound beside the cross-entropy of the clean bits, both in nats per bit
      (0.1). Negative is refused.
  """
  transformer: TransformerConfig
  classes: int = 0
  label_dropout: float = 0.1
  steps: int = 64
  schedule: schedules.Kept = 'linear'
  predict: Literal['flip', 'clean'] = 'flip'
  reverse: Reverse = 'mixture'
  vlb: float = 0.1

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'Binary':
    return Binary(self, spec, rngs=rngs)


@settings
class BinarySettings(GuidanceSettings):
  """How to sample; the published guidance, (1 + w) c - w u with w = 10, is 11 here.

  Args:
    steps: passes, over a subset of the trained times; None is all of them.
    reverse: see the module; 'product' repeats published samples.
    temperature: divides the network's logits (published 0.9); 0 takes the likelier value.
    last: how bits become clean ones: 'draw', exact, or 'threshold', the likelier value (published).
    clamp: known bits on the way: 'clean', as they are (published), or 'renoise', with the noise of
      the step, which is what the network was trained on.
    trace: keep the states on the way.
  """
  steps: int | None = None
  reverse: Reverse = 'mixture'
  temperature: float = 1.0
  last: Literal['draw', 'threshold'] = 'draw'
  clamp: Literal['clean', 'renoise'] = 'renoise'
  trace: bool = False

  def __post_init__(self):
    check_floats(self, 'temperature', above=0)


class Binary(Generator):
  """p(z_0 | z_t, label) bit by bit, the bound of the diffusion, and its samplers.

  Inside, tokens are the bits of the spec, [b, n, k], k of one position seen by one token of the
  transformer.
  """

  settings = BinarySettings

  def __init__(self, config: BinaryConfig, spec: TokenSpec, *, rngs: nnx.Rngs):
    if not (set(spec.vocab) == {2} or set(spec.factors) == {2}):
      raise ValueError(
          f'vocab={spec.vocab} with factors={spec.factors}: the codes of this tokenizer are not '
          'made of bits; take Bernoulli, LFQ or BSQ codes, or another generator.')
    self.spec, self.bits, self.classes = spec, spec.view('bits'), config.classes
    self.label_dropout, self.vlb = config.label_dropout, config.vlb
    self.steps, self.predict, self.reverse = config.steps, config.predict, config.reverse
    self.kept = tuple(schedules.kept(config.schedule, config.steps).tolist())
    if config.predict not in ('flip', 'clean'):
      raise ValueError(f'predict={config.predict!r} is not one of flip, clean.')
    check_reverse(config.reverse)
    check_shares(label_dropout=config.label_dropout)
    if config.vlb < 0:
      raise ValueError(f'vlb={config.vlb} must not be negative.')
    body, depth = config.transformer, self.bits.depth
    check_axes(body, spec.grid)
    self.input = Linear(depth, body.width, bias=True, dtype=body.dtype, rngs=rngs)
    self.place = Embedding(spec.length, body.width, dtype=body.dtype, rngs=rngs)
    self.time = TimeEmbedding(body.width, rngs=rngs)
    self.label = Embedding(  # the last row is the null label
        config.classes + 1, body.width, dtype=body.dtype, rngs=rngs) if config.classes else None
    self.transformer = Transformer(body, rngs=rngs)
    self.head = Linear(body.width, depth, bias=True, std=0, dtype=body.dtype, result='float32',
                       rngs=rngs)

  def logits(self, z: Int[Array, 'b n k'], t: Int[Array, 'b'], labels: Int[Array, 'b'] | None, *,
             key: Array | None = None, train: bool = False) -> Float[Array, 'b n k']:
    """log p(z_0 = 1 | z_t) / p(z_0 = 0 | z_t) of every bit."""
    x, where = self._inputs(z, t, labels)
    y = self.head(self.transformer(x, **where, key=key, train=train)[:, -self.spec.length:])
    return y * (1 - 2 * z) if self.predict == 'flip' else y

  def _inputs(self, z: Int[Array, 'b n k'], t: Int[Array, 'b'], labels: Int[Array, 'b'] | None
              ) -> tuple[Float[Array, 'b m c'], dict[str, Any]]:
    x = self.input(2.0 * z - 1) + self.place(jnp.arange(self.spec.length))
    extra = [self.time(t / self.steps)]
    if self.label is not None:
      extra.append(self.label(labels).astype(jnp.float32))
    positions = np.arange(self.spec.length)[:, None]
    if self.transformer.axes > 1:
      positions = self.spec.coordinates()
    if self.transformer.modulated:
      return x, {'positions': jnp.asarray(positions), 'modulation': sum(extra)}
    # tokens at coordinate 0, which does not rotate
    x = jnp.concatenate([jnp.stack(extra, 1).astype(x.dtype), x], 1)
    positions = np.concatenate([np.zeros_like(positions[:1])] * len(extra) + [positions])
    return x, {'positions': jnp.asarray(positions)}

  def hidden(self, tokens: Int[Array, 'b n d'], *, blocks: tuple[int, ...], keys: Array,
             noise: float | Array = 0.0) -> list[Float[Array, 'b n c']]:
    """What the numbered blocks (1 the first) hold at every position, for probes.

    Args:
      noise: the share of T, rounded to a step, at which bits are seen, flipped by an example's own
        key. The label is never told.
    """
    bits = self.spec.to('bits', jnp.asarray(tokens, jnp.int32))
    t = jnp.clip(jnp.rint(noise * self.steps).astype(jnp.int32), 1, self.steps)
    keep = jnp.where(noise > 0, jnp.asarray(self.kept, jnp.float32)[t], 1.0)
    z = flip(bits, jax.vmap(lambda key: jax.random.uniform(key, bits.shape[1:]))(keys), keep)
    labels = None if self.label is None else jnp.full(len(bits), self.classes)
    x, where = self._inputs(z, jnp.broadcast_to(t, len(bits)), labels)
    return [y[:, -self.spec.length:]
            for y in self.transformer.hidden(x, blocks=blocks, **where)]

  # ---- training and likelihood

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Mean nats per bit of the cross-entropy of the clean bits, and `vlb` times the bound.

    `metrics`: `nll`, the bound in nats per token of the spec (unbiased), `bits_per_token`,
    `cross_entropy` in nats per bit, and `accuracy` of the clean bits. Held-out batches return the
    bound, without label dropout.
    """
    del step
    bits, labels = self._read(batch)
    drop, time, noise, inner = jax.random.split(key, 4)
    if train:
      labels = drop_labels(self, labels, drop)
    u = schedules.strata(batch, time)
    t = 1 + jnp.minimum((u * self.steps).astype(jnp.int32), self.steps - 1)
    kept = jnp.asarray(self.kept, jnp.float32)
    z = flip(bits, jax.random.uniform(noise, bits.shape), kept[t])
    logits = self.logits(z, t, labels, key=inner, train=train)
    entropy = jnp.mean(_cross_entropy(logits, bits))
    step_bound = self.steps * self._divergence(z, bits, logits, kept[t - 1], kept[t])
    per_bit = jnp.mean(step_bound)
    nll = per_bit * self.bits.depth / self.spec.depth
    metrics = {'nll': nll, 'bits_per_token': nll / math.log(2), 'cross_entropy': entropy,
               'accuracy': jnp.mean((logits > 0) == (bits == 1))}
    value = entropy + self.vlb * per_bit if train else nll
    return value, {'metrics': metrics, 'weight': jnp.float32(len(bits)), 'statistics': None}

  def elbo(self, batch: dict[str, Array], *, key: Array | None = None,
           mode: Literal['mc', 'enumerate'] = 'mc', samples: int = 8, steps: int | None = None,
           reverse: Reverse | None = None) -> Float[Array, 'b']:
    """A lower bound of log p(tokens | label) per example, in nats, all constants included.

    Args:
      key: for 'mc'.
      mode: 'mc' draws a step and its flips, stratified over `samples`; 'enumerate' is exact, for
        few bits.
      steps: of a chain that visits a subset of the trained times; None is all.
      reverse: of the chain; None is the one that was trained.

    Raises:
      ValueError: no key, or too many bits to enumerate.
    """
    bits, labels = self._read(batch)
    times = self._times(steps)
    kept = jnp.asarray(self.kept, jnp.float32)

    def term(z, i):  # nats of the i-th step, from times[i] to times[i + 1]
      t, s = times[i], times[i + 1]
      logits = self.logits(z, t, labels)
      return jnp.sum(self._divergence(z, bits, logits, kept[s], kept[t], reverse), (1, 2))

    if mode == 'enumerate':
      size = math.prod(bits.shape[1:])
      if size > ENUMERABLE:
        raise ValueError(f"mode='enumerate' is for {ENUMERABLE} bits at most, got {size}; "
                         "use 'mc'.")
      states = jnp.arange(2**size)[:, None] >> jnp.arange(size) & 1
      states = states.reshape(-1, *bits.shape[1:])

      def add(total, x):
        z, i = x
        i = jnp.full(len(bits), i)
        same = jnp.sum(z == bits, (1, 2))
        keep = kept[times[i]]
        chance = ((1 + keep) / 2) ** same * ((1 - keep) / 2) ** (size - same)
        return total + chance * term(jnp.broadcast_to(z, bits.shape), i), None

      pairs = jnp.indices((len(states), len(times) - 1)).reshape(2, -1)
      total, _ = jax.lax.scan(add, jnp.zeros(len(bits)), (states[pairs[0]], pairs[1]))
      return -total
    if mode != 'mc' or key is None:
      raise ValueError(f'mode={mode!r} is not one of mc (with a key), enumerate.')

    def draw(total, j):
      time, noise = jax.random.split(jax.random.fold_in(key, j))
      u = (j + jax.random.uniform(time, (len(bits),))) / samples
      count = len(times) - 1
      i = jnp.minimum((u * count).astype(jnp.int32), count - 1)
      z = flip(bits, jax.random.uniform(noise, bits.shape), kept[times[i]])
      return total + count * term(z, i) / samples, None

    total, _ = jax.lax.scan(draw, jnp.zeros(len(bits)), jnp.arange(samples))
    return -total

  def nats(self, batch, *, key, settings=None):
    """The bound of the chain that is walked: its steps, its reverse."""
    chain = {} if settings is None else {'steps': settings.steps, 'reverse': settings.reverse}
    return self.elbo(batch, key=key, **chain)

  def _divergence(self, z: Int[Array, 'b n k'], bits: Int[Array, 'b n k'],
                  logits: Float[Array, 'b n k'], keep_s: Float[Array, 'b'],
                  keep_t: Float[Array, 'b'], reverse: Reverse | None = None
                  ) -> Float[Array, 'b n k']:
    """KL(q(z_s | z_t, z_0) | p_theta(z_s | z_t)) of every bit; at s=0, -log p_theta(z_0 | z_t)."""
    keep_s, keep_t = keep_s[:, None, None], keep_t[:, None, None]
    want = posterior(z, bits, keep_s, keep_t)
    one, zero = reverse_logs(z, logits, keep_s, keep_t, reverse or self.reverse)
    return (jax.scipy.special.xlogy(want, want) + jax.scipy.special.xlogy(1 - want, 1 - want)
            - want * one - (1 - want) * zero)

  def _times(self, steps: int | None) -> Int[Array, 's']:
    """Trained times from T to 0: T, ..., 1, 0, or `steps` + 1 of them, evenly."""
    steps = self.steps if steps is None else steps
    if not 1 <= steps <= self.steps:
      raise ValueError(f'{steps=} must be within 1..{self.steps}, the steps of training.')
    visited = [i * (self.steps - 1) // max(steps - 1, 1) + 1 for i in range(steps)]
    return jnp.array([0, *visited[:-1], self.steps][::-1], jnp.int32)

  def _read(self, batch: dict[str, Array]) -> tuple[Int[Array, 'b n k'], Int[Array, 'b'] | None]:
    bits = self.spec.to('bits', jnp.asarray(batch['tokens'], jnp.int32))
    if 'keep' in batch:
      raise ValueError('keep: binary diffusion has no prefixes; give whole token arrays.')
    return bits, read_labels(self.classes, batch, len(bits))

  # ---- sampling

  def sample(self, condition: dict[str, Array] | None, *, keys: Array, settings: BinarySettings,
             known: Int[Array, 'b n d'] | None = None,
             known_mask: Bool[Array, 'b n d'] | None = None) -> Sample:
    """Draws tokens, given `label` and any known tokens, which come back unchanged.

    With known tokens the draw is an approximation of the conditional (`exact` is False): bits are
    turned back beside clamped ones, and what was drawn first is not reconsidered.
    """
    size = keys.shape[0]
    check_request(self, condition, known, known_mask, settings.guidance)
    for name, value, choices in (('last', settings.last, ('draw', 'threshold')),
                                 ('clamp', settings.clamp, ('clean', 'renoise'))):
      if value not in choices:
        raise ValueError(f'{name}={value!r} is not one of {", ".join(choices)}.')
    check_reverse(settings.reverse)
    labels, shape = read_labels(self.classes, condition, size), (self.spec.length, self.bits.depth)
    times = self._times(settings.steps)
    kept = jnp.asarray(self.kept, jnp.float32)
    fixed = clean = None
    if known is not None:
      clean = self.spec.to('bits', jnp.asarray(known, jnp.int32))
      count = self.bits.depth // self.spec.depth
      fixed = jnp.repeat(jnp.asarray(known_mask, bool), count, -1)
    plan = {'t': times[:-1], 's': times[1:], 'step': jnp.arange(1, len(times))}
    if settings.guidance is not None:
      plan['guidance'] = settings.scales(len(times) - 1)

    def uniform(step):  # two numbers of every bit, from each example's own key
      return jnp.moveaxis(jax.vmap(lambda key: jax.random.uniform(
          jax.random.fold_in(key, step), (2, *shape)))(keys), 1, 0)

    def clamped(z, u, s):
      if fixed is None:
        return z
      noisy = clean if settings.clamp == 'clean' else flip(clean, u, kept[s])
      return jnp.where(fixed, noisy, z)

    def step(z, now):
      u, other = uniform(now['step'])
      t = jnp.full(size, now['t'])
      logits = self._guided(z, t, labels, now.get('guidance'))
      cold = jnp.where(logits > 0, -NEVER, NEVER)
      logits = jnp.where(settings.temperature > 0, logits / jnp.maximum(
          settings.temperature, jnp.finfo(jnp.float32).tiny), cold)
      p = jax.nn.sigmoid(logits)
      chance = reverse(z, p, kept[now['s']], kept[now['t']], settings.reverse)
      if settings.last == 'threshold':
        chance = jnp.where(now['s'] == 0, p > 0.5, chance)
      z = clamped((u < chance).astype(jnp.int32), other, now['s'])
      return z, z if settings.trace else None

    u, other = uniform(0)
    z = clamped((u < 0.5).astype(jnp.int32), other, times[0])
    z, states = jax.lax.scan(step, z, plan)
    tokens = self.spec.back('bits', z)
    exact = jnp.full(size, True)
    if fixed is not None:
      tokens = jnp.where(known_mask, known, tokens)
      exact = ~jnp.any(fixed, (1, 2)) | jnp.all(fixed, (1, 2))
    trace = None if states is None else jax.vmap(lambda z: self.spec.back('bits', z))(states)
    return Sample(tokens=tokens, nfe=(len(times) - 1) * (1 if settings.guidance is None else 2),
                  exact=exact, steps=trace)

  def _guided(self, z: Array, t: Array, labels: Array | None, scale: Array | None
              ) -> Float[Array, 'b n k']:
    """Logits, guided in one pass over [c0, u0, c1, u1, ...]."""
    if scale is None:
      return self.logits(z, t, labels)
    both = self.logits(jnp.repeat(z, 2, 0), jnp.repeat(t, 2, 0),
                       processing.pair(labels, jnp.full_like(labels, self.classes)))
    return processing.guide_pairs(both, scale)


def _cross_entropy(logits: Array, bits: Array) -> Array:
  return jax.nn.softplus(logits) - bits * logits
