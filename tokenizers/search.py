"""Nearest code: argmin of |z - e|^2, or argmax of z . e, without ever holding N x K scores.

Scores are formed for a chunk of rows at a time, so few that they stay in cache, and read once: for
the maxima of blocks of codes, of which only the winning one is searched for the index. On a CPU
this is several times faster than the obvious `argmin(x @ c.T)` (docs/benchmarks.md), and peak
memory does not grow with N x K. Ties go to the lowest index, as `jnp.argmin` has it.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from smalti.networks.categorical import first

HIGHEST = jax.lax.Precision.HIGHEST  # the default is bfloat16 on TPUs and TF32 on recent GPUs
# Scores per chunk and bounds of its rows: a cache's worth on a CPU (measured); on accelerators
# 256 MiB of memory and few launches (not measured).
SCORES, ROWS = 2**20, (8, 1024)
ACCELERATOR_SCORES, ACCELERATOR_ROWS = 2**26, (1024, 65536)
PIECE = 2**16  # codes searched at a time, a multiple of BLOCK: more would not stay in cache
BLOCK = 64  # codes whose maximum is taken first; 32 to 256 are equally fast


def chunk_rows(rows: int, codes: int) -> int:
  """Rows per chunk for `rows` vectors against `codes` codes, by backend.

  A divisor of `rows` is preferred to the ideal count: padding a sharded axis would move examples
  between devices.
  """
  cpu = jax.default_backend() == 'cpu'
  low, high = ROWS if cpu else ACCELERATOR_ROWS
  ideal = min(max((SCORES if cpu else ACCELERATOR_SCORES) // codes, low), high)
  if rows <= ideal:
    return rows
  divisors = [r for r in range(ideal, ideal // 4, -1) if rows % r == 0]
  return divisors[0] if divisors else ideal


def chunked(x: Shaped[Array, 'n *c'], rows: int) -> Shaped[Array, 'k r *c']:
  """Splits the leading axis into chunks of `rows`: chunk i holds rows i::k, zero-padded.

  Strided, so that with a batch-sharded array every device has its share of every chunk and no row
  changes device (a loop over contiguous chunks would run on one device at a time).
  """
  k = -(-x.shape[0] // rows)
  x = jnp.pad(x, ((0, k * rows - x.shape[0]),) + ((0, 0),) * (x.ndim - 1))
  return jnp.swapaxes(x.reshape(rows, k, *x.shape[1:]), 0, 1)


def unchunked(x: Shaped[Array, 'k r *c'], rows: int) -> Shaped[Array, 'n *c']:
  """The inverse of `chunked`, for an axis that had `rows`."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:rows]


def by_chunks(f: Callable[..., Any], rows: int, *arrays: Shaped[Array, 'n ...']) -> Any:
  """`f(*arrays)` for a function of rows that do not see each other, `rows` of them at a time."""
  count = arrays[0].shape[0]
  if rows >= count:
    return f(*arrays)
  found = jax.lax.map(lambda chunk: f(*chunk), tuple(chunked(x, rows) for x in arrays))
  return jax.tree.map(lambda x: unchunked(x, count), found)


def nearest(z: Float[Array, '*b c'], codes: Float[Array, 'v c'], *, rows: int | None = None,
            by: Literal['distance', 'product'] = 'distance') -> Int[Array, '*b']:
  """int32 index of the code nearest to every vector; the lowest one among equals.

  Args:
    z: vectors; computed in float32 whatever they come in.
    codes: the codebook.
    rows: vectors per chunk; None takes `chunk_rows`.
    by: the least |z - e|^2, or the largest z . e.
  """
  # No gradient passes an argmin; saying so keeps the loop out of the backward pass.
  z, codes = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (z, codes))
  flat = z.reshape(-1, z.shape[-1])
  flat = jnp.concatenate([flat, jnp.ones_like(flat[:, :1])], -1)
  size = min(-(-codes.shape[0] // BLOCK) * BLOCK, PIECE)
  tables = _tables(codes, by, size)
  rows = rows or chunk_rows(flat.shape[0], size)

  def search(best, piece):
    found, token = by_chunks(lambda z: _argmax(z, piece[0]), rows, flat)
    better = found > best[0]  # among equals the first piece
    return (jnp.where(better, found, best[0]), jnp.where(better, token + piece[1], best[1])), None

  if len(tables) == 1:
    tokens = by_chunks(lambda z: _argmax(z, tables[0])[1], rows, flat)
  else:
    start = jnp.full_like(flat[:, 0], -jnp.inf), jnp.zeros_like(flat[:, 0], jnp.int32)
    offsets = size * jnp.arange(len(tables), dtype=jnp.int32)
    tokens = jax.lax.scan(search, start, (tables, offsets))[0][1]
  # NaN equals nothing: without the bound such a row would point past the codebook
  return jnp.minimum(tokens, codes.shape[0] - 1).reshape(z.shape[:-1])


def _tables(codes: Float[Array, 'v c'], by: Literal['distance', 'product'], size: int
            ) -> Float[Array, 'p d k']:
  """[e, -|e|^2 / 2] as columns, so that [z, 1] times it is (|z|^2 - |z - e|^2) / 2; or [e, 0].

  With the norms inside the product nothing but the product touches the scores before their maxima.
  In pieces of `size` columns, of which those past the last code are never the best.
  """
  half = -0.5 * jnp.sum(jnp.square(codes), -1, keepdims=True) * (by == 'distance')
  table = jnp.concatenate([codes, half], -1)
  pad = -codes.shape[0] % size
  empty = jnp.zeros((pad, table.shape[1])).at[:, -1].set(-jnp.inf)
  return jnp.swapaxes(jnp.concatenate([table, empty]).reshape(-1, size, table.shape[1]), 1, 2)


def _argmax(z: Float[Array, 'r d'], table: Float[Array, 'd k']
            ) -> tuple[Float[Array, 'r'], Int[Array, 'r']]:
  """The largest score and its first place: first block with the maximum, then first inside it."""
  scores = jnp.matmul(z, table, precision=HIGHEST).reshape(z.shape[0], -1, BLOCK)
  maxima = jnp.max(scores, -1)
  best = jnp.max(maxima, -1, keepdims=True)
  block = first(maxima == best)
  inside = jnp.take_along_axis(scores, block[:, None, None], 1)[:, 0]
  return best[:, 0], block * BLOCK + first(inside == best)


def neighbours(z: Float[Array, '*b c'], codes: Float[Array, 'v c'], count: int
               ) -> Int[Array, '*b d']:
  """The `count` codes nearest to every vector, nearest first, the lowest index among equals."""
  z, codes = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (z, codes))
  flat = z.reshape(-1, z.shape[-1])
  find = lambda z: jax.lax.top_k(distance_scores(z, codes), count)[1]  # noqa: E731
  found = by_chunks(find, chunk_rows(flat.shape[0], codes.shape[0]), flat)
  return found.reshape(*z.shape[:-1], count)


def distance_scores(z: Float[Array, '*b c'], codes: Float[Array, 'v c']) -> Float[Array, '*b v']:
  """-|z - e|^2 up to a constant per vector, all N x K of them; differentiable."""
  products = jnp.matmul(z, codes.T, precision=HIGHEST)
  return 2 * products - jnp.sum(jnp.square(codes), -1)
