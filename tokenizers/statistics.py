"""What a batch tells a codebook: counts and sums per code, spare rows, and how many codes live.

All of it is over the global batch: plain reductions of batch-sharded arrays, which the compiler
turns into one all-reduce.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers.search import HIGHEST, chunk_rows, chunked


def mean(x: Float[Array, '*b c'], valid: Bool[Array, '*b'] | None = None) -> Float[Array, '']:
  """The mean over all elements of the vectors that count; 0 where none does."""
  if valid is None:
    return jnp.mean(x)
  count = jnp.maximum(jnp.sum(valid), 1) * x.shape[-1]
  return jnp.sum(jnp.where(valid[..., None], x, 0.0)) / count


def segment_sums(z: Float[Array, 'n c'], tokens: Int[Array, 'n'], codes: int, *,
                 method: Literal['scatter', 'matmul'] | None = None
                 ) -> tuple[Float[Array, 'v'], Float[Array, 'v c']]:
  """(count, total): how many rows chose each code, and their sum, in float32.

  Rows whose token is `codes`, one past the last, are left out.

  `method` None scatters on a CPU (2-3 times faster there) and multiplies by one-hot rows, a chunk
  at a time, elsewhere (a fixed order of additions, which atomic scatters on a GPU lack).
  """
  if method is None:
    method = 'scatter' if jax.default_backend() == 'cpu' else 'matmul'
  z = z.astype(jnp.float32)
  if method == 'scatter':
    count = jnp.zeros(codes, jnp.float32).at[tokens].add(1.0)
    return count, jnp.zeros((codes, z.shape[-1]), jnp.float32).at[tokens].add(z)

  def add(sums, chunk):
    z, tokens = chunk
    hot = jax.nn.one_hot(tokens, codes, dtype=jnp.float32)  # a row of zeros for the padding's -1
    total = jnp.matmul(hot.T, z, precision=HIGHEST)
    return (sums[0] + jnp.sum(hot, 0), sums[1] + total), None

  rows = chunk_rows(z.shape[0], codes)
  zero = jnp.zeros(codes, jnp.float32), jnp.zeros((codes, z.shape[-1]), jnp.float32)
  return jax.lax.scan(add, zero, (chunked(z, rows), chunked(tokens + 1, rows) - 1))[0]


def segment_count(tokens: Int[Array, '*b'], codes: int) -> Float[Array, 'v']:
  """How often each code occurs, in float32; tokens equal to `codes` are left out."""
  return jnp.zeros(codes, jnp.float32).at[tokens.reshape(-1)].add(1.0)


def spare_rows(z: Float[Array, 'n c'], codes: int, key: Array,
               valid: Bool[Array, 'n'] | None = None) -> Float[Array, 'v c']:
  """`codes` random rows of `z` without replacement, for dead codes to move to; only `valid` ones.

  With fewer rows than codes they repeat, with noise of 1% of the batch's deviation so that no two
  codes coincide (kakaobrain/rq-vae-transformer adds 0.01 / sqrt(c) whatever the scale of z).
  """
  pick, noise = jax.random.split(key)
  order = jax.random.permutation(pick, z.shape[0])
  if valid is None:
    if z.shape[0] >= codes:
      return z[order[:codes]]
    rows = z[order[jnp.arange(codes) % z.shape[0]]]
    return rows + 0.01 * jnp.std(z) * jax.random.normal(noise, rows.shape)
  order = order[jnp.argsort(~valid[order])]  # a stable sort: valid rows come first
  count = jnp.clip(jnp.sum(valid), 1, z.shape[0])
  rows = z[order[jnp.arange(codes) % count]]
  deviation = jnp.sqrt(mean(jnp.square(z - mean(z, valid)), valid))
  scale = jnp.where(jnp.sum(valid) >= codes, 0.0, 0.01 * deviation)
  return rows + scale * jax.random.normal(noise, rows.shape)


def diversity(count: Float[Array, 'v']) -> dict[str, Array]:
  """Perplexity exp(H(count / N)) of this batch, and the fraction of codes it used."""
  p = count / jnp.maximum(jnp.sum(count), 1.0)
  entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)))
  return {'perplexity': jnp.exp(entropy), 'usage': jnp.mean(count > 0)}


def fit(z: Float[Array, '*b c'], q: Float[Array, '*b c'], codes: Float[Array, 'v c'],
        valid: Bool[Array, '*b'] | None = None) -> dict[str, Array]:
  """How well vectors and a codebook of one space fit each other.

  `relative_commitment` is mean |z - q|^2 / mean |z|^2, and `ratio` rms(z) / rms(codes): far from 1,
  vectors and codes have drifted apart.
  """
  power = mean(jnp.square(z), valid)
  return {'relative_commitment': mean(jnp.square(z - q), valid) / (power + 1e-12),
          'ratio': jnp.sqrt(power / (jnp.mean(jnp.square(codes)) + 1e-12))}
