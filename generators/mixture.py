"""Mixtures of Gaussians with means of low rank: densities, draws, guidance.

The head of ResGen (arXiv 2412.10208): its hundreds of components share directions, and their
densities are computed a chunk at a time, so that no array of all means is ever in memory.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smalti.generators import logits as processing
from smalti.generators.generator import DrawSettings, fold

HIGHEST = jax.lax.Precision.HIGHEST  # TF32 would move a mean by half of the narrowest deviation
CHUNK = 64  # components whose densities, [b, n, chunk, c] numbers, are in memory at once
COMPONENT, NOISE = range(2)  # purposes folded into a sample's keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """sum_m pi_m N(mu_m, diag sigma_m^2) at every position, linear in what guidance interpolates.

    mu_m = shift + low_m basis,   log sigma_mj = floor + softplus(spread_m + scale_j - floor)

  Attributes:
    weights: logits of the components.
    low, basis: a component's mean, and the directions that all components share.
    shift: added to all means.
    spread, scale: log deviations by component and by channel; their sum is bounded below, softly,
      so that a deviation at the floor can grow again.
    floor: the least log deviation.
  """

  weights: Float[Array, 'b n m']
  low: Float[Array, 'b n m r']
  spread: Float[Array, 'b n m']
  shift: Float[Array, 'b n c']
  scale: Float[Array, 'b n c']
  basis: Float[Array, 'r c']
  floor: float = dataclasses.field(default=-7.0, metadata={'static': True})

  def log_normal(self, z: Float[Array, 'b n c']) -> Float[Array, 'b n m']:
    """log N(z; mu_m, sigma_m^2) of every component, a chunk of them at a time."""

    @jax.checkpoint
    def one(component):
      low, spread = component
      log_sigma = self._log_sigma(spread, self.scale)
      error = (z - self._mean(low)) * jnp.exp(-log_sigma)
      return jnp.sum(-0.5 * error * error - log_sigma, -1)

    components = jnp.moveaxis(self.low, 2, 0), jnp.moveaxis(self.spread, 2, 0)
    found = jax.lax.map(one, components, batch_size=CHUNK)
    return jnp.moveaxis(found, 0, 2) - z.shape[-1] / 2 * math.log(2 * math.pi)

  def log_density(self, z: Float[Array, 'b n c']) -> Float[Array, 'b n']:
    return jax.nn.logsumexp(jax.nn.log_softmax(self.weights) + self.log_normal(z), -1)

  def confidence(self, z: Float[Array, 'b n c']) -> Float[Array, 'b n']:
    """log p(z) less what it would be at the centres of all components at once; at most 0.

    The density alone compares nothing: it depends on units, and on how narrow the mixture is.
    """
    log_sigma = self._log_sigma(self.spread, self.scale[:, :, None])
    peaks = -jnp.sum(log_sigma, -1) - z.shape[-1] / 2 * math.log(2 * math.pi)
    highest = jax.nn.logsumexp(jax.nn.log_softmax(self.weights) + peaks, -1)
    return self.log_density(z) - highest

  def draw(self, keys: Array, *, settings: DrawSettings | None = None,
           noise: Array | float = 1.0) -> Float[Array, 'b n c']:
    """A component by its (reshaped) weight, and a vector from it."""
    shaped = self.weights if settings is None else settings.process(self.weights)
    chosen = processing.draw(shaped, fold(keys, COMPONENT))[..., None]
    mean = self._mean(jnp.take_along_axis(self.low, chosen[..., None], 2)[:, :, 0])
    spread = jnp.take_along_axis(self.spread, chosen, 2)[..., 0]
    standard = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(fold(keys, NOISE))
    return mean + noise * jnp.exp(self._log_sigma(spread, self.scale)) * standard

  def guided(self, scale: Array) -> 'Mixture':
    """Of pairs [c0, u0, c1, u1, ...] of rows, u + scale (c - u) of logits, means, log deviations.

    Log deviations before their floor, which guidance does not break through.
    """
    mixed: dict[str, Any] = {}
    for field in ('weights', 'low', 'spread', 'shift', 'scale'):
      mixed[field] = processing.guide_pairs(getattr(self, field), scale)
    return dataclasses.replace(self, **mixed)

  def _mean(self, low: Float[Array, 'b n r']) -> Float[Array, 'b n c']:
    return self.shift + jnp.matmul(low, self.basis, precision=HIGHEST)

  def _log_sigma(self, spread: Float[Array, '*b'], scale: Float[Array, '*#b c']
                 ) -> Float[Array, '*b c']:
    return self.floor + jax.nn.softplus(spread[..., None] + scale - self.floor)
