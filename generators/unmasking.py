"""Samplers of masked models: from every token hidden to none, step by step.

A sampler decides how many hidden tokens a step reveals, and which: the most confident draws
(MaskGIT, arXiv 2202.04200; GenMol, arXiv 2501.06158), those of a random or a spread order, or each
by chance as the reverse of the diffusion has it. The model is a function of what is visible; any of
them serves any model.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from smalti.generators import logits as processing, schedules
from smalti.generators.generator import DrawSettings, GuidanceSettings, fold, rank, settings

Count = TypeVar('Count', int, Array)
TOKEN, CHOICE, ORDER, AGAIN, CONTEXT = range(5)  # purposes folded into a sample's keys


@settings
class UnmaskingSettings(DrawSettings, GuidanceSettings):
  """How tokens that are hidden together are revealed.

  Args:
    sampler: 'maskgit' reveals the most confident draws first; 'ancestral' reverses the diffusion;
      'first_hitting' reveals one random position per step, as many steps as codes, and is exact;
      'confidence' reveals the most confident draw of every step, or the first `reveal` (arXiv
      2501.06158); 'halton' spreads the revealed cells over a 2D grid (arXiv 2503.17076); 'remdm'
      masks revealed tokens again on the way (arXiv 2503.00307).
    steps: passes over the tokens; 'first_hitting' and 'confidence' take what they need.
    reveal: tokens per step of 'confidence'.
    ratio: of 'maskgit', the share of tokens that is left after a share of the steps, rounded down
      (TiTok, MaskBit: 'arccos').
    grid: of 'ancestral' and 'remdm'; 'cosine' is MD4's best for images.
    anneal: the temperature is multiplied by 0.5 + 0.8 (1 - r) at the end of a share r of the steps
      (TiTok; an option of MaskBit's code), of a row's own where the sampler takes one per code.
    choice_temperature: of 'maskgit' and 'confidence', Gumbel noise on the confidence, annealed to 0
      (MaskGIT's code: 4.5; GenMol's randomness: 0.5 from nothing, 1.2 to 3 around fragments).
    noise: of 'maskgit', what the noise is added to: 'choice', the log-probability of a draw, or
      'both', the logits before the draw too, and then the logit of what was drawn (TiTok).
  """
  sampler: Literal[
      'ancestral', 'maskgit', 'first_hitting', 'confidence', 'halton', 'remdm'] = 'maskgit'
  steps: int = 12
  reveal: int = 1
  ratio: schedules.Ratio = 'cosine'
  grid: schedules.Grid = 'cosine'
  anneal: bool = False
  choice_temperature: float = 4.5
  noise: Literal['choice', 'both'] = 'choice'


@settings
class MaskedSettings(UnmaskingSettings):
  """How to sample.

  Args:
    remask, strength: of 'remdm', see `schedules.remasking`: 'cap' with 0.04 up to 512 steps, 'loop'
      with 0.02 from 1,024 on (the paper's tables).
    context_guidance: w of GenMol's molecular context guidance, w good + (1 - w) poor (its code: 2),
      where the poor prediction does not see `context_share` of the visible tokens, others in every
      step; instead of `guidance`, and as expensive.
    cache: no pass in a step that reveals nothing: the same tokens, and fewer passes where there are
      more steps than tokens, or few tokens to fill in (MDLM's ddpm_cache, arXiv 2406.07524, which
      keeps a prediction instead). A step is left out if it reveals nothing in the whole batch.
    trace: keep the states on the way, -1 where masked.
  """
  remask: schedules.Remask = 'cap'
  strength: float = 0.04
  context_guidance: float | None = None
  context_share: float = 0.3
  cache: bool = False
  trace: bool = False


def passes(settings: UnmaskingSettings, length: Count) -> Count | int:
  """Steps that the sampler takes over so many positions; of each row's, where it needs as many.

  Raises:
    ValueError: there are none.
  """
  if settings.reveal < 1:
    raise ValueError(f'reveal={settings.reveal} must be at least 1.')
  if settings.sampler == 'first_hitting':
    return length
  if settings.sampler == 'confidence':
    return -(-length // settings.reveal)
  if settings.steps < 1:
    raise ValueError(f'steps={settings.steps} must be at least 1.')
  return settings.steps


def plan(settings: UnmaskingSettings, keys: Array, unknown: Bool[Array, 'b n'],
         grid: tuple[int, ...], *, first: int = 0
         ) -> tuple[dict[str, Array], Int[Array, 'b n'] | None]:
  """Per-step arrays, and the rank of every position where the order is fixed beforehand.

  Args:
    first: the step whose key draws the order.
  """
  if settings.noise not in ('choice', 'both'):
    raise ValueError(f'noise={settings.noise!r} is not one of choice, both.')
  total, length = unknown.sum(-1), unknown.shape[1]
  steps, own = passes(settings, length), passes(settings, total)
  step = jnp.arange(steps)
  plan, order = {'step': step}, None
  if settings.anneal:
    plan['heat'] = 0.5 + 0.8 * (1 - schedules.progress(step + 1, own))
  if settings.sampler == 'ancestral':
    plan['chance'] = jnp.asarray(schedules.unmasking(settings.grid, steps))
  elif settings.sampler == 'remdm' and isinstance(settings, MaskedSettings):
    plan['chance'], plan['again'] = schedules.remasking(
        settings.remask, settings.grid, steps, settings.strength)
  elif settings.sampler == 'maskgit':
    plan['left'] = schedules.remaining(settings.ratio, steps, total)
    plan['noise'] = settings.choice_temperature * (1 - (step + 1) / steps)
  elif settings.sampler == 'confidence':
    plan['left'] = jnp.maximum(total - settings.reveal * (step[:, None] + 1), 0)
    # each row has its own number of steps; the published one is that of the longest row, 2 or more
    plan['noise'] = settings.choice_temperature * (1 - schedules.progress(step, own - 1))
  elif settings.sampler == 'first_hitting':
    plan['left'] = jnp.maximum(total - 1 - step[:, None], 0)
    order = jax.vmap(lambda k: jax.random.permutation(k, length))(fold(fold(keys, first), ORDER))
  elif settings.sampler == 'halton' and isinstance(settings, MaskedSettings):
    if len(grid) != 2:
      raise ValueError(f"sampler='halton' needs a 2D grid, got {grid}; use 'maskgit'.")
    plan['left'] = schedules.remaining('arccos', steps, total, rounding='revealed')
    visit = np.argsort(schedules.halton(grid))  # the codes of a cell one after the other
    depth = length // visit.size
    visit = (visit[:, None] * depth + np.arange(depth)).reshape(-1)
    order = jnp.broadcast_to(length - 1 - visit, unknown.shape)
  else:
    more = ', halton, remdm' if isinstance(settings, MaskedSettings) else ''
    raise ValueError(f'sampler={settings.sampler!r} is not one of first_hitting, ancestral, '
                     f'maskgit, confidence{more}.')
  if order is not None:  # known positions rank last, so that counts are over unknown ones
    order = rank(jnp.where(unknown, order, length))
  return plan, order


def fated(now: dict[str, Array], order: Int[Array, 'b n'] | None, keys: Array,
          masked: Bool[Array, 'b n']) -> Bool[Array, 'b n'] | None:
  """What a step leaves masked, where that is known before anything is predicted.

  Args:
    now, order: the step's part of what `plan` returned.
    keys: of the step.
  """
  if 'chance' in now:
    return masked & (_each(keys, CHOICE, masked.shape, jax.random.uniform) >= now['chance'])
  return None if order is None else masked & (order < now['left'][:, None])


def reveal(settings: UnmaskingSettings, now: dict[str, Array], keys: Array,
           scores: Float[Array, 'b n v'], tokens: Int[Array, 'b n'], masked: Bool[Array, 'b n'],
           left: Bool[Array, 'b n'] | None
           ) -> tuple[Int[Array, 'b n'], Bool[Array, 'b n'], Float[Array, 'b n v']]:
  """Draws all masked tokens: the tokens, what stays masked, and the logits they are drawn from.

  Args:
    keys, left: of the step, and what `fated` says; without it the surest draws are kept.
  """
  warm, loud = settings.temperature * now.get('heat', 1.0), settings.noise == 'both'
  heat = warm * now['noise'] if loud and 'noise' in now else warm
  by_row = jax.vmap(processing.heat) if jnp.ndim(heat) else processing.heat
  heated = by_row(scores, heat)
  shaped = settings.process(heated, temperature=1.0)
  # known and revealed tokens are never touched
  tokens = jnp.where(masked, processing.draw(shaped, fold(keys, TOKEN)), tokens)
  if left is not None:
    return tokens, left, shaped
  if loud:
    sure = processing.pick(scores, tokens) / jnp.where(warm > 0, warm, 1.0)[..., None]
  else:  # among all codes: where truncation or temperature 0 leave one, it has probability 1
    sure = processing.log_prob(jnp.where(settings.temperature > 0, heated, scores), tokens)
  noise = _each(keys, CHOICE, masked.shape, jax.random.gumbel, mode='high')
  place = rank(jnp.where(masked, sure + now['noise'][..., None] * noise, jnp.inf))
  return tokens, masked & (place < now['left'][:, None]), shaped


def unmask(predict: Callable[..., Array], settings: MaskedSettings, plan: dict[str, Array],
           order: Int[Array, 'b n'] | None, *, keys: Array, given: Int[Array, 'b n'],
           unknown: Bool[Array, 'b n']
           ) -> tuple[Int[Array, 'b n'], Int[Array, 't b n'] | None, Int[Array, ''] | int]:
  """Draws the unknown tokens.

  Args:
    predict: `predict(tokens, masked, now)`, the scores [b, n, v] of every code, -inf where one
      cannot be; tokens at masked positions are not read. `now` is the step's part of the plan.
    plan, order: what `plan` returned.

  Returns:
    Tokens, the states on the way (-1 where masked) if traced, and the number of passes.
  """
  def step(state, now):
    tokens, masked, surety, passes = state
    draws = fold(keys, now['step'])
    left = fated(now, order, draws, masked)

    def draw(tokens, surety):
      scores = predict(tokens, masked, now)
      tokens, after, shaped = reveal(settings, now, draws, scores, tokens, masked, left)
      if surety is not None:  # of every token, in the law that it was drawn from
        surety = jnp.where(masked, jnp.exp(processing.log_prob(shaped, tokens)), surety)
      return tokens, after, surety

    if settings.cache:
      some = (masked.sum(-1) > (now['left'] if left is None else left.sum(-1))).any()
      tokens, after, surety = jax.lax.cond(
          some, draw, lambda tokens, surety: (tokens, masked, surety), tokens, surety)
      passes = passes + some
    else:
      tokens, after, surety = draw(tokens, surety)
    if 'again' in now:
      again = now['again']
      if surety is not None:
        again = again * jax.nn.softmax(jnp.where(masked | ~unknown, -1e9, -surety), -1)
      coin = _each(draws, AGAIN, masked.shape, jax.random.uniform)
      after = after | (unknown & ~masked & (coin < again))
    return ((tokens, after, surety, passes),
            jnp.where(after, -1, tokens) if settings.trace else None)

  sureties = settings.sampler == 'remdm' and settings.remask == 'conf'
  (tokens, _, _, passes), states = jax.lax.scan(
      step, (given, unknown, jnp.ones(given.shape) if sureties else None,
             jnp.zeros((), jnp.int32) if settings.cache else None), plan)
  return tokens, states, len(plan['step']) if passes is None else passes


def before_end(given: Int[Array, 'b n'], unknown: Bool[Array, 'b n'], eos: int
               ) -> Bool[Array, 'b n']:
  """Where a known EOS is still to come, and so no other."""
  end = ~unknown & (given == eos)
  return end.any(-1, keepdims=True) & (jnp.cumsum(end, 1) == 0)


def subset(noise: Float[Array, '*b n'], count: Int[Array, '*b'], among: Bool[Array, '*b n']
           ) -> Bool[Array, '*b n']:
  """`count` of the positions `among` in every row; noise is uniform in [0, 1)."""
  return (rank(jnp.where(among, noise, 2)) < count[..., None]) & among


def _each(keys: Array, purpose: int, shape: tuple[int, ...], draw: Callable[..., Array],
          **options: Any) -> Float[Array, 'b n']:
  """One number per position, from each row's own key."""
  return jax.vmap(lambda k: draw(k, shape[1:], **options))(fold(keys, purpose))
