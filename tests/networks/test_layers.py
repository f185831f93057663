"""Laws of the shared layers: rotations, norms, tables, and what a mesh does to an activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P

from smalti.networks import layers


def positions(places, axes):
  return jnp.asarray(places, jnp.int32).reshape(-1, axes)


@pytest.mark.parametrize('axes, features', [(1, 16), (2, 16), (3, 20)])
def test_scores_depend_on_the_difference_of_coordinates(axes, features, key):
  query, other = jax.random.normal(key, (2, 1, 1, 1, features))

  def score(a, b):
    a, b = (layers.rotation(positions(p, axes), features) for p in (a, b))
    return float(jnp.sum(layers.rotate(query, a) * layers.rotate(other, b)))

  start, end, shift = np.arange(axes) + 1, np.arange(axes) * 3 + 4, np.arange(axes) * 2 + 5
  assert score(start + shift, end + shift) == pytest.approx(score(start, end), abs=1e-4)
  for axis in range(axes):  # every coordinate counts
    moved = end + shift + 2 * np.eye(axes, dtype=int)[axis]
    assert abs(score(start + shift, moved) - score(start, end)) > 1e-2


def test_the_origin_is_the_identity(key):
  x = jax.random.normal(key, (2, 3, 1, 12))
  np.testing.assert_array_equal(layers.rotate(x, layers.rotation(jnp.zeros((1, 2), int), 12)), x)


def test_angles_are_those_of_llamagen():
  """theta_j = 10000^(-2j / half) with half = f / 2 for two coordinates: rows, then columns."""
  features, row, column = 16, 3, 5
  theta = 10000.0 ** (-2 * np.arange(4) / 8)
  cos, sin = layers.rotation(positions([row, column], 2), features)
  angle = np.concatenate([row * theta, column * theta])
  np.testing.assert_allclose(cos[0], np.cos(angle), atol=1e-6)
  np.testing.assert_allclose(sin[0], np.sin(angle), atol=1e-6)


def test_rotation_pairs_the_halves():
  x = jnp.arange(1.0, 5.0)[None, None, None]
  cos, sin = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])
  np.testing.assert_array_equal(layers.rotate(x, (cos, sin))[0, 0, 0], [-3, 2, 1, 4])


def test_norm_is_unit_in_float32_for_bfloat16_input():
  x = (1000 * jnp.arange(1.0, 9.0)).astype(jnp.bfloat16)
  y = layers.RMSNorm(8)(x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(jnp.mean(jnp.square(y.astype(jnp.float32))), 1, atol=1e-2)
  np.testing.assert_allclose(layers.RMSNorm(2)(jnp.array([3.0, 4.0])),
                             np.array([3, 4]) / np.sqrt(12.5 + 1e-5), rtol=1e-6)


def test_linear_contracts_several_axes(key):
  linear = layers.Linear((2, 3), (4, 5), bias=True, rngs=nnx.Rngs(0))
  x = jax.random.normal(key, (7, 2, 3))
  expected = np.einsum('nab,abcd->ncd', x, linear.kernel[...])
  np.testing.assert_allclose(linear(x), expected, atol=1e-6)
  assert linear.kernel.shape == (2, 3, 4, 5) and linear.bias.shape == (4, 5)


def test_logits_are_float32_sums_of_bfloat16_products():
  linear = layers.Linear(4096, 1, std=0, dtype='bfloat16', result='float32', rngs=nnx.Rngs(0))
  linear.kernel[...] = jnp.ones((4096, 1))
  x = jnp.ones(4096).at[0].set(0)
  assert linear(x)[0] == 4095  # bfloat16 holds 4096, not 4095


def test_sinusoid_separates_close_times():
  embed = layers.TimeEmbedding(16, rngs=nnx.Rngs(0))
  assert embed(jnp.array([0.0, 0.5])).shape == (2, 16)
  waves = layers.sinusoid(jnp.array([0.0, 1.0]), 8)
  np.testing.assert_allclose(waves[0], [0] * 4 + [1] * 4, atol=1e-7)
  np.testing.assert_allclose(waves[1, 0], np.sin(1), atol=1e-6)


def test_dropout_keeps_the_mean_and_needs_a_key(key):
  x = jnp.ones((100, 100))
  np.testing.assert_allclose(layers.dropout(x, 0.25, key).mean(), 1, atol=0.03)
  np.testing.assert_array_equal(layers.dropout(x, 0.25, None), x)


def test_constrain_is_the_identity_without_a_mesh():
  x = jnp.ones((2, 3, 4))
  assert layers.constrain(x, 'b n c') is x


@pytest.mark.parametrize('shape, axes, expected', [
    ((8, 3, 4), 'b n c', P(('data', 'fsdp'))),
    ((8, 4, 3, 5), 'b k n f', P(('data', 'fsdp'), 'tensor')),
    ((2, 3, 5), 'b n v', P('data')),  # fsdp does not divide 2 / 2, tensor does not divide 5
])
def test_constrain_pins_the_layout_of_a_mesh(shape, axes, expected):
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: layers.constrain(x * 1, axes))(jnp.ones(shape))
  assert y.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, expected), len(shape))


def test_constrain_refuses_the_wrong_number_of_letters():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh), pytest.raises(ValueError):
    layers.constrain(jnp.ones((8, 3)), 'b n c')
