"""How vectors choose codes in training, other than the nearest; evaluation always takes that one.

Losses and statistics of the quantizer are then of the codes chosen so. `agreement`, the fraction of
vectors whose choice is the nearest code, says how far training is from evaluation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smalti.networks import categorical
from smalti.tokenizers.search import by_chunks, chunk_rows, distance_scores
from smalti.tokenizers.statistics import mean


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)  # an attribute of modules
class AssignmentConfig:
  """Base of the ways to choose; the type selects.

  Attributes:
    probability: of a vector choosing so at step 0; the others take the nearest code.
    steps: over how many steps that falls linearly to nothing; 0 keeps it.
  """
  probability: float = 1.0
  steps: int = 0

  def __post_init__(self):
    if not 0 <= self.probability <= 1 or self.steps < 0:
      raise ValueError(f'probability={self.probability} must be in [0, 1], steps={self.steps} 0 or '
                       'more.')

  def choose(self, z: Float[Array, 'n c'], codes: Float[Array, 'v c'], *, key: Array,
             valid: Bool[Array, 'n'] | None) -> Int[Array, 'n']:
    """The code of every vector, had all of them to choose so; `valid` are those that count."""
    raise TypeError(f'{type(self).__name__} does not say how it chooses.')

  @functools.partial(jax.jit, static_argnums=0)  # its loops compile once outside jit, too
  def mix(self, z: Float[Array, 'n c'], codes: Float[Array, 'v c'], nearest: Int[Array, 'n'], *,
          age: Float[Array, ''] | float, key: Array, valid: Bool[Array, 'n'] | None
          ) -> tuple[Int[Array, 'n'], dict[str, Array]]:
    """The codes to train with at step `age`, and metrics."""
    draw, pick = jax.random.split(key)
    chosen = self.choose(z, codes, key=draw, valid=valid)
    metrics = {'agreement': mean((chosen == nearest).astype(jnp.float32)[:, None], valid)}
    p = self.probability * (jnp.maximum(0.0, 1 - age / self.steps) if self.steps else 1.0)
    return jnp.where(jax.random.uniform(pick, nearest.shape) < p, chosen, nearest), metrics


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class StochasticConfig(AssignmentConfig):
  """A draw from softmax(-|z - e|^2 / temperature), for decoders and generators that must be robust.

  The same distribution as Gumbel noise on the scores and their argmax, from one uniform number per
  vector instead of K. RQ-VAE (arXiv 2203.01941) draws so at 0.5 when its generator is trained.
  """
  temperature: float = 0.5

  def __post_init__(self):
    AssignmentConfig.__post_init__(self)
    if self.temperature <= 0:
      raise ValueError(f'temperature={self.temperature} must be positive; small is near argmin.')

  def choose(self, z: Float[Array, 'n c'], codes: Float[Array, 'v c'], *, key: Array,
             valid: Bool[Array, 'n'] | None) -> Int[Array, 'n']:
    del valid  # vectors do not see each other

    def draw(z, uniform):
      return categorical.draw(distance_scores(z, codes) / self.temperature, uniform)

    uniform = jax.random.uniform(key, (z.shape[0],))
    return by_chunks(draw, chunk_rows(z.shape[0], codes.shape[0]), z, uniform)
