"""Schedules of masked generation: how much is masked and revealed, how strong the guidance is.

Time runs from t=0 (clean) to t=1 (all masked). alpha(t) is the probability that a token is still
visible; MD4 (arXiv 2406.04329) and MDLM (arXiv 2406.07524) write the bound as

  -ELBO = int_0^1 w(t) E[sum over masked -log p] dt,   w(t) = -alpha'(t) / (1 - alpha(t)).

Everything per step is an array over the T steps, made before the loop, so that step counts are
static and all floats may be traced.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Noise = Literal['linear', 'cosine', 'polynomial', 'geometric']
Ratio = Literal['cosine', 'arccos', 'linear']
Grid = Literal['uniform', 'cosine']
Guidance = Literal['constant', 'linear', 'power_cosine', 'interval']
Remask = Literal['cap', 'rescale', 'conf', 'loop']
Kept = Literal['linear', 'cosine', 'sigmoid']


class Schedule:
  """alpha(t) with its derivative and weight, each in the form that keeps digits at both ends."""

  def alpha(self, t: Float[Array, '*b']) -> Float[Array, '*b']:
    """The probability that a token is visible at time t."""
    return 1 - self.masked(t)

  def masked(self, t: Float[Array, '*b']) -> Float[Array, '*b']:
    """1 - alpha(t), without the cancellation near t=0."""
    raise TypeError(f'{type(self).__name__} does not say how much it masks.')

  def derivative(self, t: Float[Array, '*b']) -> Float[Array, '*b']:
    """alpha'(t), never positive."""
    raise TypeError(f'{type(self).__name__} has no derivative.')

  def weight(self, t: Float[Array, '*b']) -> Float[Array, '*b']:
    """w(t) = -alpha'(t) / (1 - alpha(t)); infinite or large at t=0, finite at t=1."""
    raise TypeError(f'{type(self).__name__} has no weight.')


@dataclasses.dataclass(frozen=True)
class Polynomial(Schedule):
  """alpha = 1 - t^power, w = power / t; power 1 is linear, which is MDLM's log-linear."""
  power: float = 1.0

  def masked(self, t):
    return t ** self.power

  def derivative(self, t):
    return -self.power * t ** (self.power - 1)

  def weight(self, t):
    return self.power / t


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
  """alpha = 1 - cos(pi/2 (1 - t)) of MD4, w = pi/2 tan(pi/2 (1 - t)); MaskGIT's at u = 1 - t."""

  def alpha(self, t):
    return 2 * jnp.sin(math.pi / 4 * (1 - t)) ** 2

  def masked(self, t):
    return jnp.sin(math.pi / 2 * t)

  def derivative(self, t):
    return -math.pi / 2 * jnp.sin(math.pi / 2 * (1 - t))

  def weight(self, t):
    return math.pi / 2 * jnp.sin(math.pi / 2 * (1 - t)) / jnp.sin(math.pi / 2 * t)


@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
  """alpha = exp(-sigma), sigma = low^(1-t) high^t, w = sigma' / expm1(sigma) (SEDD, MDLM).

  alpha(0) = exp(-low) and alpha(1) = exp(-high) are not quite 1 and 0; `Masked.elbo` accounts for
  both ends.
  """
  low: float = 1e-4  # the bounds of SEDD's configs (arXiv 2310.16834)
  high: float = 20.0

  def sigma(self, t: Float[Array, '*b']) -> Float[Array, '*b']:
    return self.low ** (1 - t) * self.high ** t

  def alpha(self, t):
    return jnp.exp(-self.sigma(t))

  def masked(self, t):
    return -jnp.expm1(-self.sigma(t))

  def derivative(self, t):
    return -math.log(self.high / self.low) * self.sigma(t) * self.alpha(t)

  def weight(self, t):
    sigma = self.sigma(t)
    return math.log(self.high / self.low) * sigma / jnp.expm1(sigma)


def named(name: Noise, power: float = 2.0) -> Schedule:
  """The schedule of a config; `power` is read by 'polynomial' only.

  Raises:
    ValueError: an unknown name, or a power that is not positive.
  """
  known = {'linear': Polynomial(), 'cosine': Cosine(), 'polynomial': Polynomial(power),
           'geometric': Geometric()}
  if name not in known:
    raise ValueError(f'schedule={name!r} is not one of {", ".join(known)}.')
  if power <= 0:
    raise ValueError(f'power={power} must be positive.')
  return known[name]


def stratified(key: Array, size: int) -> Float[Array, 'b']:
  """(u + i/size) mod 1 for one u: low-discrepancy times of a batch, one in each stratum (MD4).

  Every row is uniform over [0, 1) by itself, so that a batch sorted by content has no bias; MDLM's
  (u_i + i)/size ties each row to its stratum.
  """
  return (jax.random.uniform(key) + jnp.arange(size) / size) % 1


def strata(batch: Mapping[str, Array], key: Array) -> Float[Array, 'b']:
  """A batch's entry `strata`, by which its micro-batches share those of the whole, or new ones."""
  return batch['strata'] if 'strata' in batch else stratified(key, len(batch['tokens']))


def ratio(name: Ratio, u: Float[Array, '*b'] | Float[np.ndarray, '*b']
          ) -> Float[Array, '*b'] | Float[np.ndarray, '*b']:
  """gamma(u), the fraction still masked at progress u in [0, 1] (arXiv 2202.04200); 1 to 0."""
  xp: Any = np if isinstance(u, np.ndarray) else jnp
  if name == 'cosine':
    return xp.cos(math.pi / 2 * u)
  if name == 'arccos':
    return xp.arccos(u) / (math.pi / 2)
  if name == 'linear':
    return 1 - u
  raise ValueError(f'ratio={name!r} is not one of cosine, arccos, linear.')


def _floor(count: Int[Array, '*b'], fraction: np.ndarray) -> Int[Array, 't *b']:
  """floor(fraction * count) for every fraction, in integers: float32 loses one in a thousand.

  Fractions are rounded to 36 bits first, so that 256 cos(pi/3) is 128; counts are below 2^19.
  """
  fixed = np.rint(fraction * 2.0**36).astype(np.int64)
  high, middle, low = (
      jnp.asarray((fixed >> shift) & mask, jnp.int32).reshape(-1, *(1,) * count.ndim)
      for shift, mask in ((24, -1), (12, 4095), (0, 4095)))
  return (count * high + ((count * middle + ((count * low) >> 12)) >> 12)) >> 12


def remaining(name: Ratio, steps: int, unknown: Int[Array, '*b'], *, rounding: str = 'masked'
              ) -> Int[Array, 't *b']:
  """How many of `unknown` are still masked after each of `steps` steps, exactly.

  Every step reveals at least one until none is left, and the last one reveals all (in MaskGIT's
  code one is masked again and its draw kept aside). Each row has its own count.

  Args:
    rounding: 'masked' floors the masked count (MaskGIT), 'revealed' the revealed one (Halton).
  """
  if steps < 1:
    raise ValueError(f'steps={steps} must be at least 1.')
  unknown = jnp.asarray(unknown, jnp.int32)
  step = jnp.arange(steps).reshape(-1, *(1,) * unknown.ndim)
  gamma: Any = ratio(name, np.arange(1, steps + 1) / steps)
  if rounding == 'masked':
    wanted = jnp.maximum(_floor(unknown, gamma), 1)
  else:
    wanted = unknown - _floor(unknown, 1 - gamma)
  # n_k = min(wanted_k, n_{k-1} - 1) with n_{-1} = unknown, in closed form
  wanted = jnp.minimum(wanted, unknown - 1 - step) + step
  left = jnp.maximum(jax.lax.cummin(wanted, axis=0) - step, 0)
  return left.at[-1].set(0)


def visible(grid: Grid, steps: int) -> np.ndarray:
  """alpha at the steps + 1 times t_0=1 > ... > t_K=0 of a linear schedule; from 0 to 1.

  'cosine' is t = cos(pi/2 u) on the linear schedule, MD4's choice for images, and the same as the
  cosine schedule on a uniform grid; the two are therefore one choice here and cannot be combined
  into a double warp.
  """
  if steps < 1:
    raise ValueError(f'steps={steps} must be at least 1.')
  u = np.arange(steps + 1) / steps
  if grid == 'uniform':
    return u
  if grid == 'cosine':
    return 2 * np.sin(math.pi / 4 * u) ** 2
  raise ValueError(f'grid={grid!r} is not one of uniform, cosine.')


def unmasking(grid: Grid, steps: int) -> np.ndarray:
  """(alpha_s - alpha_t) / (1 - alpha_t) of each step: the chance to reveal a masked token."""
  alpha = visible(grid, steps)
  chance = np.diff(alpha) / (1 - alpha[:-1])
  chance[-1] = 1.0  # exactly: nothing stays masked
  return chance.astype(np.float32)


def remasking(name: Remask, grid: Grid, steps: int, strength: Float[Array, ''] | float, *,
              on: float = 0.55, off: float = 0.05, level: float = 0.9
              ) -> tuple[Float[Array, 't'], Float[Array, 't']]:
  """Chances of each step to reveal a masked token and to mask a revealed one again (ReMDM).

  Wang et al. 2025, arXiv 2503.00307: whatever the chance sigma <= min(1, (1 - alpha_s) / alpha_t)
  to mask again, a masked token that is revealed with (alpha_s - (1 - sigma) alpha_t) / (1 -
  alpha_t) keeps the share of visible tokens at alpha, so any masked model serves. 'cap' is the
  smaller of `strength` and that bound, 'rescale' `strength` times it. 'conf' is the bound itself,
  which the sampler spreads over the revealed tokens, the least sure most; masked ones are revealed
  as without it. 'loop' reveals up to `level` between times 1 and `on`, stays there masking with
  `strength` until `off`, and reveals the rest; it has a uniform grid of its own.

  Args:
    strength: eta, may be traced; not read by 'conf'.
  """
  if name not in ('cap', 'rescale', 'conf', 'loop'):
    raise ValueError(f'remask={name!r} is not one of cap, rescale, conf, loop.')
  alpha, within = visible(grid, steps), np.ones(steps, bool)
  if name == 'loop':
    if not 0 < off < on < 1 or not 0 < level < 1:
      raise ValueError(f'{off=} < {on=} and {level=} must be within 0..1.')
    t = 1 - np.arange(steps + 1) / steps
    alpha = np.where(t > on, (1 - t) * level / (1 - on),
                     np.where(t > off, level, 1 - t * (1 - level) / off))
    within = (t[:-1] <= on) & (t[1:] >= off)
  now, after = alpha[:-1], alpha[1:]
  bound = np.minimum(1, np.divide(1 - after, now, out=np.ones(steps), where=now > 0))
  sigma: Any
  if name == 'conf':
    sigma = np.zeros(steps)
  elif name == 'rescale':
    sigma = strength * bound
  else:
    sigma = jnp.where(within, jnp.minimum(strength, bound), 0.0)
  reveal = (after - (1 - sigma) * now) / (1 - now)
  again = bound if name == 'conf' else sigma
  reveal = jnp.clip(jnp.asarray(reveal, jnp.float32), 0, 1)
  return reveal.at[-1].set(1.0), jnp.asarray(again, jnp.float32)


def hidden(low: float, high: float, size: int
           ) -> tuple[Float[np.ndarray, 'm'], Float[np.ndarray, 'm']]:
  """How many of `size` tokens a rate t ~ U[low, high] hides: P(m), and E[1/t; m], m = 0..size.

  The clipped rates of block diffusion (arXiv 2503.09573, section 5). The second over the first is
  the mean of the linear schedule's weight 1/t given the count; over [0, 1] they are 1 / (size + 1)
  and 1/m. Both integrands are polynomials in t, which Gauss-Legendre integrates exactly. E is 0
  for m = 0, where nothing is hidden.
  """
  node, share = np.polynomial.legendre.leggauss(size // 2 + 1)
  t = np.clip(low + (high - low) * (node + 1) / 2, 0, 1)[:, None]
  m = np.arange(size + 1)
  choose = np.array([math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
                     for k in m])
  with np.errstate(divide='ignore', invalid='ignore'):  # t = 1 hides all
    log = choose + m * np.log(t) + np.where(m < size, (size - m) * np.log1p(-t), 0)
  chance = share[:, None] / 2 * np.exp(log)
  inverse = np.where(m > 0, chance / t, 0)
  return chance.sum(0), inverse.sum(0)


def kept(name: Kept, steps: int) -> Float[np.ndarray, 't']:
  """k_t at t = 0..steps of binary diffusion, float64: what of a bit is left; 1 to exactly 0.

  'linear' is 1 - t/T, 'cosine' (1 + cos(pi t/T)) / 2, 'sigmoid' the logistic function of -3 t/T at
  a temperature of 0.8, between its ends (ZeWang95/BinaryLatentDiffusion).
  """
  if steps < 1:
    raise ValueError(f'steps={steps} must be at least 1.')
  u = np.arange(steps + 1) / steps
  if name == 'linear':
    k = 1 - u
  elif name == 'cosine':
    k = (1 + np.cos(math.pi * u)) / 2
  elif name == 'sigmoid':
    curve = 1 / (1 + np.exp(-3 * u / 0.8))
    k = (curve[-1] - curve) / (curve[-1] - curve[0])
  else:
    raise ValueError(f'schedule={name!r} is not one of linear, cosine, sigmoid.')
  k[-1] = 0.0
  return k


def progress(step: Int[Array, 't'], steps: int | Int[Array, 'b']) -> Float[Array, 't *b']:
  """i/T, the share of the steps that is over; rows may have a T of their own, and 1 after it."""
  if jnp.ndim(steps):
    step, steps = step[:, None], jnp.maximum(steps, 1)
  return jnp.minimum(step / steps, 1)


def guidance(name: Guidance, scale: Float[Array, ''] | float, progress: Float[Array, 't *b'], *,
             power: Float[Array, ''] | float = 1.0, start: Float[Array, ''] | float = 0.0,
             stop: Float[Array, ''] | float = 1.0) -> Float[Array, 't *b']:
  """The scale s_i of every step, for u + s (c - u): 1 is conditional, 0 unconditional.

  'linear' is 1 + (s - 1) i/T (TiTok's and MaskBit's 4.5 is 5.5 here: they write (1 + w) c - w u);
  'power_cosine' is 1 + (s - 1) (1 - cos(pi (i/T)^power)) / 2 (RAR; power 0 is constant);
  'interval' is s for start <= i/T < stop and 1 elsewhere.

  Args:
    scale: s, may be traced, as may all floats here.
    progress: i/T, the share of the steps that is over.
  """
  progress = jnp.asarray(progress)
  if name == 'constant':
    shape = jnp.ones_like(progress)
  elif name == 'linear':
    shape = progress
  elif name == 'power_cosine':
    shape = (1 - jnp.cos(math.pi * progress ** jnp.asarray(power, jnp.float32))) / 2
  elif name == 'interval':
    shape = ((progress >= start) & (progress < stop)).astype(jnp.float32)
  else:
    raise ValueError(
        f'guidance_schedule={name!r} is not one of constant, linear, power_cosine, interval.')
  return 1 + (scale - 1) * shape


def halton(grid: tuple[int, int]) -> np.ndarray:
  """int32[N]: the cells of a 2D grid in the order the Halton sequence (2, 3) first visits them.

  Halton-MaskGIT (arXiv 2503.17076): points n = 1, 2, ... at (floor(h phi_2(n)), floor(w phi_3(n))).
  """
  height, width = grid
  order, seen, n = [], set(), 0
  while len(order) < height * width:
    n += 1
    cell = int(height * _radical(n, 2)) * width + int(width * _radical(n, 3))
    if cell not in seen:
      seen.add(cell)
      order.append(cell)
  return np.array(order, np.int32)


def _radical(n: int, base: int) -> float:
  """The digits of n mirrored at the radix point."""
  value, place = 0.0, 1.0
  while n:
    place /= base
    n, digit = divmod(n, base)
    value += digit * place
  return value
