"""Nearest-code search: the indices of a brute-force argmin, however rows are chunked or sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smalti.tokenizers import search
from smalti.tokenizers.search import chunk_rows, chunked, nearest


def brute(z, codes):
  """argmin |z - e|^2 in float64."""
  z, codes = np.asarray(z, np.float64), np.asarray(codes, np.float64)
  return np.argmin(np.square(z[..., None, :] - codes).sum(-1), -1)


@pytest.mark.parametrize('rows', [None, 1, 7, 32, 96, 1000])
def test_chunks_find_what_brute_force_finds(key, rows):
  a, b = jax.random.split(key)
  z, codes = jax.random.normal(a, (4, 24, 5)), jax.random.normal(b, (50, 5))
  tokens = nearest(z, codes, rows=rows)
  assert tokens.dtype == jnp.int32
  np.testing.assert_array_equal(tokens, brute(z, codes))


def test_ties_go_to_the_lowest_index():
  codes = jnp.array([[2.0, 0], [1, 0], [-1, 0], [1, 0], [0, 1], [-1, 0]])  # small integers: exact
  z = jnp.array([[1.0, 0], [0, 0], [-1, 0], [0, -1]])
  for rows in (None, 1, 2, 3):
    np.testing.assert_array_equal(nearest(z, codes, rows=rows), [1, 1, 2, 1])


@pytest.mark.parametrize('size', [1, 63, 64, 65, 200])
def test_equal_codes_far_apart_are_one(key, size):
  """Ties over the ends of blocks, and codebooks that fill no whole number of them."""
  a, b = jax.random.split(key)
  codes = jnp.tile(jax.random.normal(a, (size, 3)), (3, 1))
  z = jax.random.normal(b, (40, 3))
  np.testing.assert_array_equal(nearest(z, codes), brute(z, codes[:size]))


def test_the_largest_product(key):
  a, b = jax.random.split(key)
  z, codes = jax.random.normal(a, (40, 5)), jax.random.normal(b, (65, 5))
  want = np.argmax(np.asarray(z, np.float64) @ np.asarray(codes, np.float64).T, -1)
  for rows in (None, 7):
    got = nearest(z, jnp.tile(codes, (2, 1)), rows=rows, by='product')  # equals: the lowest
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('piece', [64, 2**16])
def test_rows_that_are_not_numbers_stay_in_range(piece, monkeypatch):
  monkeypatch.setattr(search, 'PIECE', piece)
  z = jnp.array([[jnp.nan, 0.0], [jnp.inf, 0], [-jnp.inf, jnp.inf]])
  tokens = nearest(z, jnp.tile(jnp.eye(2), (35, 1)))
  assert np.all((tokens >= 0) & (tokens < 70))


def test_no_gradient_passes(key):
  z = jax.random.normal(key, (3, 2))
  gradient = jax.grad(lambda z: jnp.sum(z[nearest(z, z)] ** 2))(z)
  np.testing.assert_allclose(gradient, 2 * z)


def test_eight_devices_find_the_same_codes_and_move_no_vector(key):
  a, b = jax.random.split(key)
  z, codes = jax.random.normal(a, (64, 16, 8)), jax.random.normal(b, (4096, 8))
  assert chunk_rows(64 * 16, 4096) < 64 * 16  # the search does loop
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  place = NamedSharding(mesh, PartitionSpec('data'))
  search = jax.jit(nearest, in_shardings=(place, None), out_shardings=place)
  np.testing.assert_array_equal(search(z, codes), nearest(z, codes))
  text = search.lower(z, codes).compile().as_text()
  for collective in ('all-gather', 'all-to-all', 'collective-permute', 'all-reduce'):
    assert f' {collective}(' not in text, collective


@pytest.mark.parametrize('by,piece', [('distance', 64), ('product', 2**16)])
def test_ties_are_the_same_whole_in_parts_and_on_eight_devices(key, by, piece, monkeypatch):
  """Equal codes and vectors between codes, of small integers: every score is exact."""
  a, b = jax.random.split(key)
  codes = jnp.tile(jax.random.randint(a, (70, 2), -3, 4), (2, 1)).astype(jnp.float32)
  z = jax.random.randint(b, (16, 8, 2), -3, 4).astype(jnp.float32) / 2
  scores = np.asarray(z) @ np.asarray(codes).T
  scores = scores if by == 'product' else scores - np.square(codes).sum(-1) / 2
  want = np.argmax(scores, -1)
  assert np.mean(np.sum(scores == scores.max(-1, keepdims=True), -1) > 2) > 0.2
  np.testing.assert_array_equal(nearest(z, codes, rows=128, by=by), want)
  monkeypatch.setattr(search, 'ROWS', (32, 32))  # four chunks
  monkeypatch.setattr(search, 'PIECE', piece)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  found = jax.jit(lambda z, codes: nearest(z, codes, by=by))
  for place in (PartitionSpec(), PartitionSpec('data')):
    np.testing.assert_array_equal(found(jax.device_put(z, NamedSharding(mesh, place)), codes), want)


def test_scores_are_never_all_in_memory(key):
  def temporary(rows, codes):
    shapes = [jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (rows, codes)]
    return jax.jit(nearest).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  small, large = temporary(2**13, 2**13), temporary(2**16, 2**13)
  assert large < 2 * 4 * (2**16 + 2**13) * 8 + 3 * 4 * search.SCORES  # not N x K
  assert large - small < 4 * (2**16 - 2**13) * 8 * 2 + 2**16


@pytest.mark.parametrize('rows,codes', [
    (4096, 1024), (4096, 8192), (4096, 65536), (4100, 1024), (4099, 1024), (7, 10**6),
    (8 * 65, 16384)])
def test_chunk_rows_divide_where_a_divisor_is_near(rows, codes):
  got = chunk_rows(rows, codes)
  assert 1 <= got <= rows and got <= 1024
  if rows in (4096, 4100):
    assert rows % got == 0
  x = jnp.arange(float(rows))
  chunks = chunked(x, got)
  np.testing.assert_array_equal(jnp.swapaxes(chunks, 0, 1).reshape(-1)[:rows], x)
