"""Sinkhorn-constrained assignment: every code gets the same share of the batch.

Zhan et al. 2022, RepCONC, arXiv 2110.05789; jingtaozhan/RepCONC. Distances d, rescaled to [-1, 1]
by their global extremes, make Q = exp(-d / epsilon); its rows and columns are brought to sums 1/K
per code and 1/B per vector, and a vector takes the argmax of its column. Published code needs
float64, because exp(-1 / 0.003) is 0 in float32. Here Q = exp(-d / epsilon + f_k + g_n), and only
the potentials f and g are held: an iteration is one pass over the distances in chunks.

Balanced sums do not mean balanced argmaxes: at epsilon 0.05 the sums converge in 10 iterations and
counts still differ several times; at 0.003 it takes about 100 iterations. The constraint forces
uniform use on data that is not uniform: anneal it (`steps`), and watch `agreement`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers.assignment import AssignmentConfig
from smalti.tokenizers.quantizer import sg
from smalti.tokenizers.search import chunk_rows, chunked, distance_scores, unchunked

NEVER = -1e30  # the logarithm of no mass; an infinity would make NaN of differences
TINY = 1e-30  # for the sum over a batch without vectors


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class SinkhornConfig(AssignmentConfig):
  """Balanced assignment in training; the batch should have four vectors per code or more.

  Attributes:
    epsilon: of exp(-d / epsilon), for d in [-1, 1]; 0.003 in RepCONC.
    iterations: 100 in RepCONC.
  """
  epsilon: float = 0.003
  iterations: int = 100

  def __post_init__(self):
    AssignmentConfig.__post_init__(self)
    if self.epsilon <= 0 or self.iterations < 1:
      raise ValueError(f'epsilon={self.epsilon} must be positive and iterations={self.iterations} '
                       '1 or more.')

  def choose(self, z: Float[Array, 'n c'], codes: Float[Array, 'v c'], *, key: Array,
             valid: Bool[Array, 'n'] | None) -> Int[Array, 'n']:
    del key  # nothing is drawn
    return Balance(z, codes, self.epsilon, valid).tokens(self.iterations)


class Balance:
  """The scores -d / epsilon of a batch, chunk by chunk, and what brings them into balance."""

  def __init__(self, z: Float[Array, 'n c'], codes: Float[Array, 'v c'], epsilon: float,
               valid: Bool[Array, 'n'] | None = None, *, rows: int | None = None):
    z, self.codes = sg(z.astype(jnp.float32)), sg(codes.astype(jnp.float32))
    self.count, self.size = z.shape[0], codes.shape[0]
    valid = jnp.ones(self.count, bool) if valid is None else valid
    rows = rows or chunk_rows(self.count, self.size)
    self.chunks = chunked(z, rows), chunked(valid, rows)  # padding is not valid
    self.mass = -jnp.log(jnp.maximum(jnp.sum(valid), 1))  # log 1/B

    def extremes(found, chunk):
      d, real = self._distances(chunk[0]), chunk[1][:, None]
      low = jnp.minimum(found[0], jnp.min(jnp.where(real, d, jnp.inf)))
      return (low, jnp.maximum(found[1], jnp.max(jnp.where(real, d, -jnp.inf)))), None

    start = jnp.float32(jnp.inf), jnp.float32(-jnp.inf)
    (low, high), _ = jax.lax.scan(extremes, start, self.chunks)
    self.middle = (high + low) / 2
    self.scale = 1 / ((high - self.middle + 1e-5) * epsilon)

  def tokens(self, iterations: int) -> Int[Array, 'n']:
    """argmax_k Q of every vector."""
    f = self.potentials(iterations)
    pick = lambda chunk: jnp.argmax(self._scores(chunk[0]) + f, -1).astype(jnp.int32)  # noqa: E731
    return unchunked(jax.lax.map(pick, self.chunks), self.count)

  def plan(self, iterations: int) -> Float[Array, 'n v']:
    """Q, with columns of sum 1/B; it holds N x K numbers."""
    f = self.potentials(iterations)
    rows = lambda chunk: jax.nn.softmax(self._scores(chunk[0]) + f, -1)  # noqa: E731
    return unchunked(jax.lax.map(rows, self.chunks), self.count) * jnp.exp(self.mass)

  def potentials(self, iterations: int) -> Float[Array, 'v']:
    """f after `iterations` of: codes to 1/K, vectors to 1/B. The last step gives g alone."""
    return jax.lax.fori_loop(0, iterations - 1, lambda _, f: self._balanced(f), self._first())

  def _first(self) -> Float[Array, 'v']:
    """f that brings exp(scores + f) to sums of 1/K per code."""
    def add(total, chunk):
      scores = jnp.where(chunk[1][:, None], self._scores(chunk[0]), NEVER)
      top = jnp.maximum(total[0], jnp.max(scores, 0))
      return (top, total[1] * jnp.exp(total[0] - top) + jnp.sum(jnp.exp(scores - top), 0)), None

    start = jnp.full(self.size, NEVER), jnp.zeros(self.size)
    (top, summed), _ = jax.lax.scan(add, start, self.chunks)
    return -jnp.log(self.size) - top - jnp.log(summed)

  def _balanced(self, f: Float[Array, 'v']) -> Float[Array, 'v']:
    """f that brings codes to 1/K again, after vectors were brought to 1/B under the old f.

    A code's sum of Q is the sum of softmaxes over codes, so one exponential serves both. It cannot
    underflow: the old f made the code's sum 1/K and every entry at most that, so in the row of its
    largest entry the code is within a factor B of the row's largest.
    """
    def add(total, chunk):
      shares = jax.nn.softmax(self._scores(chunk[0]) + f, -1)
      return total + jnp.sum(jnp.where(chunk[1][:, None], shares, 0), 0), None

    total, _ = jax.lax.scan(add, jnp.zeros(self.size), self.chunks)
    return f - self.mass - jnp.log(self.size) - jnp.log(jnp.maximum(total, TINY))

  def _distances(self, z: Float[Array, 'r c']) -> Float[Array, 'r v']:
    return jnp.sum(jnp.square(z), -1, keepdims=True) - distance_scores(z, self.codes)

  def _scores(self, z: Float[Array, 'r c']) -> Float[Array, 'r v']:
    return (self.middle - self._distances(z)) * self.scale
