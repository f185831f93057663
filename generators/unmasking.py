"""Samplers of masked models: from every token hidden to none, step by step.

A sampler decides how many hidden tokens a step reveals, and which: the most confident draws
(MaskGIT, arXiv 2202.04200), those of a random or a spread order, or each by chance as the reverse
of the diffusion has it. The model is a function of what is visible; any of them serves any model.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from smalti.generators import logits as processing, schedules
from smalti.generators.generator import Settings, settings

TOKEN, CHOICE, ORDER, AGAIN = range(4)  # purposes folded into a sample's keys


@settings
class MaskedSettings(Settings):
  """How to sample.

  Args:
    sampler: 'maskgit' reveals the most confident draws first; 'ancestral' reverses the diffusion;
      'first_hitting' reveals one random position per step, as many steps as codes, and is exact;
      'halton' spreads the revealed cells over a 2D grid (arXiv 2503.17076); 'remdm' masks revealed
      tokens again on the way (arXiv 2503.00307).
    steps: passes over the tokens; not read by 'first_hitting'.
    grid: of 'ancestral' and 'remdm'; 'cosine' is MD4's best for images.
    remask, strength: of 'remdm', see `schedules.remasking`: 'cap' with 0.04 up to 512 steps, 'loop'
      with 0.02 from 1,024 on (the paper's tables).
    temperature: divides the logits; 0 takes the likeliest token.
    choice_temperature: of 'maskgit', Gumbel noise on the confidence, annealed to 0 (its code: 4.5).
    top_k, top_p: truncation of every draw; None is off.
    guidance: s in u + s (c - u), 1 is unguided; None is one pass without the null label.
    guidance_schedule: see `schedules.guidance`, with its power, start and stop.
    trace: keep the states on the way, -1 where masked.
  """
  sampler: Literal['ancestral', 'maskgit', 'first_hitting', 'halton', 'remdm'] = 'maskgit'
  steps: int = 12
  grid: Literal['uniform', 'cosine'] = 'cosine'
  remask: schedules.Remask = 'cap'
  strength: float = 0.04
  temperature: float = 1.0
  choice_temperature: float = 4.5
  top_k: int | None = None
  top_p: float | None = None
  guidance: float | None = None
  guidance_schedule: Literal['constant', 'linear', 'power_cosine', 'interval'] = 'constant'
  guidance_power: float = 1.0
  guidance_start: float = 0.0
  guidance_stop: float = 1.0
  trace: bool = False


def plan(settings: MaskedSettings, keys: Array, unknown: Bool[Array, 'b n'], grid: tuple[int, ...]
         ) -> tuple[dict[str, Array], Int[Array, 'b n'] | None]:
  """Per-step arrays, and the rank of every position where the order is fixed beforehand."""
  total, length = unknown.sum(-1), unknown.shape[1]
  steps = length if settings.sampler == 'first_hitting' else settings.steps
  if steps < 1:
    raise ValueError(f'{steps=} must be at least 1.')
  plan, order = {'step': jnp.arange(steps)}, None
  if settings.guidance is not None:
    plan['guidance'] = schedules.guidance(
        settings.guidance_schedule, settings.guidance, steps, power=settings.guidance_power,
        start=settings.guidance_start, stop=settings.guidance_stop)
  if settings.sampler == 'ancestral':
    plan['chance'] = jnp.asarray(schedules.unmasking(settings.grid, steps))
  elif settings.sampler == 'remdm':
    plan['chance'], plan['again'] = schedules.remasking(
        settings.remask, settings.grid, steps, settings.strength)
  elif settings.sampler == 'maskgit':
    plan['left'] = schedules.remaining('cosine', steps, total)
    plan['anneal'] = 1 - jnp.arange(1, steps + 1) / steps
  elif settings.sampler == 'first_hitting':
    plan['left'] = jnp.maximum(total - 1 - jnp.arange(steps)[:, None], 0)
    order = jax.vmap(lambda k: jax.random.permutation(k, length))(fold(fold(keys, 0), ORDER))
  elif settings.sampler == 'halton':
    if len(grid) != 2:
      raise ValueError(f"sampler='halton' needs a 2D grid, got {grid}; use 'maskgit'.")
    plan['left'] = schedules.remaining('arccos', steps, total, rounding='revealed')
    visit = np.argsort(schedules.halton(grid))  # the codes of a cell one after the other
    depth = length // visit.size
    visit = (visit[:, None] * depth + np.arange(depth)).reshape(-1)
    order = jnp.broadcast_to(length - 1 - visit, unknown.shape)
  else:
    raise ValueError(f'sampler={settings.sampler!r} is not one of ancestral, maskgit, '
                     'first_hitting, halton, remdm.')
  if order is not None:  # known positions rank last, so that counts are over unknown ones
    order = rank(jnp.where(unknown, order, length))
  return plan, order


def unmask(predict: Callable[..., Array], settings: MaskedSettings, plan: dict[str, Array],
           order: Int[Array, 'b n'] | None, *, keys: Array, given: Int[Array, 'b n'],
           unknown: Bool[Array, 'b n']
           ) -> tuple[Int[Array, 'b n'], Int[Array, 't b n'] | None, int]:
  """Draws the unknown tokens.

  Args:
    predict: `predict(tokens, masked, now)`, the scores [b, n, v] of every code, -inf where one
      cannot be; tokens at masked positions are not read. `now` is the step's part of the plan.
    plan, order: what `plan` returned.

  Returns:
    Tokens, the states on the way (-1 where masked) if traced, and the number of passes.
  """
  size, length = given.shape

  def step(state, now):
    tokens, masked, surety = state
    draws = fold(keys, now['step'])
    scores = predict(tokens, masked, now)
    shaped = processing.process(scores, temperature=settings.temperature, top_k=settings.top_k,
                                top_p=settings.top_p)
    fresh = processing.draw(shaped, fold(draws, TOKEN))
    tokens = jnp.where(masked, fresh, tokens)  # known and revealed tokens are never touched
    if settings.sampler in ('ancestral', 'remdm'):
      coin, other = (jax.vmap(lambda k: jax.random.uniform(k, (length,)))(
          fold(draws, purpose)) for purpose in (CHOICE, AGAIN))
      left = masked & (coin >= now['chance'])
      if settings.sampler == 'remdm':
        again = now['again']
        if surety is not None:  # of every token, when it was drawn
          surety = jnp.where(masked, jnp.exp(log_prob(shaped, tokens)), surety)
          again = again * jax.nn.softmax(jnp.where(masked | ~unknown, -1e9, -surety), -1)
        left = left | (unknown & ~masked & (other < again))
      masked = left
    else:
      if order is None:
        # at temperature 0 every drawn token has probability 1: fall back on the raw one
        sure = log_prob(jnp.where(settings.temperature > 0, shaped, scores), tokens)
        noise = jax.vmap(lambda k: jax.random.gumbel(k, (length,), mode='high'))(
            fold(draws, CHOICE))
        place = rank(jnp.where(
            masked, sure + settings.choice_temperature * now['anneal'] * noise, jnp.inf))
      else:
        place = order
      masked = masked & (place < now['left'][:, None])
    return (tokens, masked, surety), jnp.where(masked, -1, tokens) if settings.trace else None

  sureties = settings.sampler == 'remdm' and settings.remask == 'conf'
  (tokens, _, _), states = jax.lax.scan(
      step, (given, unknown, jnp.ones((size, length)) if sureties else None), plan)
  return tokens, states, len(plan['step'])


def fold(keys: Array, data: Array | int) -> Array:
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def rank(score: Float[Array, 'b n'] | Int[Array, 'b n']) -> Int[Array, 'b n']:
  """The place of every entry when the row is sorted; ties have places of their own."""
  return jnp.argsort(jnp.argsort(score, -1), -1)


def pick(scores: Float[Array, 'b n v'], tokens: Int[Array, 'b n']) -> Float[Array, 'b n']:
  return jnp.take_along_axis(scores, tokens[..., None], -1)[..., 0]


def log_prob(scores: Float[Array, 'b n v'], tokens: Int[Array, 'b n']) -> Float[Array, 'b n']:
  """log softmax(scores) at the tokens, without a second array of [b, n, v]."""
  return pick(scores, tokens) - jax.nn.logsumexp(scores, -1)
