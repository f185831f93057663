"""Rectified flow: noise to data along straight lines, whatever network learns the velocity.

Liu et al. 2022, arXiv 2209.03003; the times of Esser et al. 2024, arXiv 2403.03206. At time t in
[0, 1] an example is x_t = t eps + (1 - t) x, t = 1 is noise, and a network learns the mean of
v = eps - x given x_t. Guidance is adaptive projected guidance, Sadat et al. 2024, arXiv 2410.02416,
as FlexTok (arXiv 2502.13967) decodes with.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Times = Literal['logit_normal', 'uniform']
Field = Callable[[Array, Array], Array]

NOISE = 0  # purpose folded into an example's key
LEVELS = 4  # groups of examples by noise level, in metrics


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('guidance', 'momentum', 'threshold', 'shift'), meta_fields=('steps', 'projected'))
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSettings:
  """How to follow a flow from noise; an argument of `decode`.

  Args:
    steps: of Euler's method, each one pass of the network, two where guided. FlexTok's pipeline has
      25, its README 20.
    guidance: w; velocities become v_c + (w - 1) d, so 1 is unguided. None does without the second
      pass. FlexTok's README has 7.5.
    projected: d is what `guide` makes of v_c - v_u (adaptive projected guidance); else v_c - v_u
      itself, which oversaturates where w is large.
    momentum: what the last step's d adds to this one's, before it is cut; negative pushes away.
    threshold: longest d, over all values of an example. 2.5 is FlexTok's for 16,384 latent values
      of unit deviation; a length grows like the root of their number.
    shift: s of t' = s t / (1 + (s - 1) t), more steps near the noise above 1; 1 is even steps.
  """
  steps: int = 25
  guidance: float | None = None
  projected: bool = True
  momentum: float = -0.5
  threshold: float = 2.5
  shift: float = 1.0

  def __post_init__(self):
    if isinstance(self.steps, int) and self.steps < 1:
      raise ValueError(f'steps={self.steps} must be 1 or more.')


def draw_times(key: Array, batch: int, law: Times = 'logit_normal', *, location: float = 0.0,
               stratified: bool = False, strata: Float[Array, 'b'] | None = None
               ) -> Float[Array, 'b']:
  """Noise levels in [0, 1]: sigmoid(N(location, 1)), or U(0, 1).

  `stratified` draws the i-th of the batch from the i-th of as many equally likely ranges, which
  lowers the variance of the loss; `strata`, uniform over [0, 1), are taken instead where given.
  """
  if law not in ('logit_normal', 'uniform'):
    raise ValueError(f'times={law!r} must be logit_normal or uniform.')
  u = jax.random.uniform(key, (batch,))
  if stratified:
    u = (jnp.arange(batch) + u) / batch if strata is None else strata
  return u if law == 'uniform' else jax.nn.sigmoid(location + jax.scipy.special.ndtri(u))


def mix(x: Float[Array, 'b *s'], noise: Float[Array, 'b *s'], t: Float[Array, 'b']
        ) -> Float[Array, 'b *s']:
  """x_t = t noise + (1 - t) x."""
  t = t.reshape(t.shape + (1,) * (x.ndim - 1))
  return t * noise + (1 - t) * x


def draw_noise(keys: Array, shape: tuple[int, ...]) -> Float[Array, 'b *s']:
  """N(0, 1) of `shape` for every example, from its own key: it depends on no neighbour."""
  def one(key):
    flat = jax.random.normal(jax.random.fold_in(key, NOISE), (math.prod(shape),))
    return flat.reshape(shape)

  return jax.vmap(one)(keys)


def euler(field: Field, noise: Float[Array, 'b *s'], settings: FlowSettings,
          null: Field | None = None) -> Float[Array, 'b *s']:
  """Data from noise: x <- x + (t' - t) v(x, t) over `steps` times from 1 to 0.

  Args:
    field: (x_t, t[b]) to the velocity.
    null: the same without the condition; called if `settings.guidance` is set.

  Raises:
    ValueError: guidance, and nothing to guide away from.
  """
  if settings.guidance is not None and null is None:
    raise ValueError(f'guidance={settings.guidance} needs a decoder trained without its condition '
                     'now and then: train with null > 0, or leave guidance out.')
  times = jnp.linspace(1.0, 0.0, settings.steps + 1)
  times = settings.shift * times / (1 + (settings.shift - 1) * times)

  def step(carry, span):
    (x, running), (t, after) = carry, span
    each = jnp.broadcast_to(t, x.shape[:1])
    velocity = field(x, each)
    if settings.guidance is not None:
      velocity, running = guide(velocity, null(x, each), running, settings)
    return (x + (after - t) * velocity, running), None

  running = jnp.zeros_like(noise) if settings.guidance is not None else None
  (x, _), _ = jax.lax.scan(step, (noise, running), (times[:-1], times[1:]))
  return x


def guide(conditional: Float[Array, 'b *s'], null: Float[Array, 'b *s'],
          running: Float[Array, 'b *s'], settings: FlowSettings
          ) -> tuple[Float[Array, 'b *s'], Float[Array, 'b *s']]:
  """(guided velocity, running difference for the next step).

  d = v_c - v_u + momentum * running, cut to `threshold`, without its part along v_c. That part is
  what oversaturates (arXiv 2410.02416, section 4).
  """
  difference, weight = conditional - null, settings.guidance - 1
  if not settings.projected:
    return conditional + weight * difference, running
  running = difference + settings.momentum * running
  difference = running * jnp.minimum(1.0, settings.threshold / _norm(running))
  direction = conditional / _norm(conditional)
  along = jnp.sum(difference * direction, _axes(direction), keepdims=True)
  return conditional + weight * (difference - along * direction), running


def by_level(error: Float[Array, 'b'], t: Float[Array, 'b']) -> dict[str, Array]:
  """Mean errors of the examples with the least noise, ..., the most: 'velocity_1of4' and on.

  Groups are of equal size whatever the times, so no mean is over nothing; a batch of fewer than
  four examples has none.
  """
  size = error.shape[0] // LEVELS
  if not size:
    return {}
  ordered = error[jnp.argsort(t)]
  return {f'velocity_{i + 1}of{LEVELS}': jnp.mean(
      ordered[i * size:(i + 1) * size if i < LEVELS - 1 else None]) for i in range(LEVELS)}


def _axes(x: Array) -> tuple[int, ...]:
  return tuple(range(1, x.ndim))


def _norm(x: Array) -> Array:
  return jnp.sqrt(jnp.maximum(jnp.sum(x * x, _axes(x), keepdims=True), 1e-12))
