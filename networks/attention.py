"""Attention over keys and values, which may be a cache, in floats or int8: [b, k, n, f]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from smalti.networks import int8
from smalti.networks.int8 import Int8

Entries = Float[Array, 'b k t f'] | Int8


def write(cache: Entries, entries: Float[Array, 'b k m f'], index: Array) -> Entries:
  """The cache with `entries` at `index`, a scalar or one place per row."""
  if isinstance(cache, Int8):
    return Int8(*(_place(c, e, index) for c, e in zip(cache, int8.quantize(entries))))
  return _place(cache, entries.astype(cache.dtype), index)


def _place(cache: Array, entries: Array, index: Array) -> Array:
  if index.ndim == 0:
    return jax.lax.dynamic_update_slice_in_dim(cache, entries, index, 2)
  place = jax.vmap(lambda c, e, i: jax.lax.dynamic_update_slice_in_dim(c, e, i, 1))
  return place(cache, entries, index)


def allowed(query: Array, key: Array | Int8, causal: bool, mask: Array | None, index: Array | None
            ) -> Bool[Array, '#b #k n t'] | None:
  """Which keys each query may see; query i sits at key `index` + i. None is all of them."""
  if not causal and mask is None:
    return None
  if mask is not None and mask.ndim == 4:
    return mask
  start = jnp.zeros((), jnp.int32) if index is None else index
  own = (start[..., None] + jnp.arange(query.shape[2]))[..., None]  # [*b, n, 1]
  keys = jnp.arange(key.shape[2])
  seen = keys <= own if causal else keys == keys + 0 * own
  seen = seen[:, None] if seen.ndim == 3 else seen
  if mask is not None:
    own = own[:, None] if own.ndim == 3 else own
    seen = seen & (mask[:, None, None] | (keys == own))
  return seen if seen.ndim == 4 else seen[None, None]


def attend(query: Float[Array, 'b k n f'], key: Float[Array, 'b j t f'] | Int8,
           value: Float[Array, 'b j t f'] | Int8, *, causal: bool, mask: Array | None,
           index: Array | None = None) -> Float[Array, 'b k n f']:
  """softmax(q k^T / sqrt(f)) v with float32 softmax; heads k share the j key heads in groups.

  The one place that chooses a kernel: cuDNN's flash attention where it can, and the heads-first
  product elsewhere (on CPU 1.3-1.5 times faster than `jax.nn.dot_product_attention`).
  """
  batch, heads, length, features = query.shape
  groups = heads // key.shape[1]
  # a causal pattern is a flag to cuDNN; any other mask is a bias, which needs even lengths
  flag = causal and mask is None and index is None
  seen = None if flag else allowed(query, key, causal, mask, index)
  if (not isinstance(key, Int8) and not isinstance(value, Int8)
      and jax.default_backend() == 'gpu' and query.dtype == jnp.bfloat16 and length > 1
      and features % 8 == 0 and features <= 128
      and (seen is None or length % 2 == key.shape[2] % 2 == 0)):
    query, key, value = (jnp.swapaxes(y, 1, 2) for y in (query, key, value))
    y = jax.nn.dot_product_attention(
        query, key, value, mask=seen, is_causal=flag, implementation='cudnn')
    return jnp.swapaxes(y, 1, 2)
  seen = allowed(query, key, causal, mask, index)
  query = (query * features ** -0.5).reshape(batch, key.shape[1], groups * length, features)
  score = int8.scores(query, key)
  if seen is not None:
    grouped = score.reshape(batch, key.shape[1], groups, length, -1)
    score = jnp.where(seen[:, :, None], grouped, -jnp.inf).reshape(score.shape)
  y = int8.mix(jax.nn.softmax(score, -1), value, query.dtype)
  return y.reshape(batch, heads, length, features)
