"""A convolution with a gradient of its own is the one of XLA, and so are its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smalti.networks.convolution import LAYOUT, convolve

SAME, TAMING, TORCH = 'SAME', ((0, 1), (0, 1)), ((1, 1), (1, 1))
PLAIN = dict(lhs_dilation=(1, 1), rhs_dilation=None, feature_group_count=1)


def ours(strides, padding):
  return lambda x, k: convolve(x, k, strides, padding, **PLAIN)


def native(strides, padding):
  return lambda x, k: jax.lax.conv_general_dilated(
      x, k, strides, padding, dimension_numbers=LAYOUT)


def arrays(key, outputs=32, size=3, dtype='float32'):
  x, k = jax.random.split(key)
  return (jax.random.normal(x, (2, 8, 6, 32), dtype),
          jax.random.normal(k, (size, size, 32, outputs), dtype))


@pytest.mark.parametrize('outputs', [1, 32])  # a narrow one takes XLA's gradient
@pytest.mark.parametrize('size, strides, padding', [
    (3, (1, 1), SAME), (1, (1, 1), SAME), (3, (2, 2), TAMING), (4, (2, 2), TORCH),
    (4, (1, 1), TORCH), (5, (2, 1), SAME), (3, (1, 1), 'VALID')])
def test_gradients_are_those_of_xla(key, size, strides, padding, outputs):
  x, k = arrays(key, outputs, size)

  def gradients(f):
    return jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(f(strides, padding)(x, k))), (0, 1)))(x, k)

  for got, want in zip(gradients(ours), gradients(native)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4)


def test_a_penalty_on_the_gradient_of_the_input_has_a_gradient(key):
  x, k = arrays(key)

  def gradient(f):
    return jax.grad(lambda k: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(f(x, k))))(x) ** 2))(k)

  got, want = (gradient(f((1, 1), SAME)) for f in (ours, native))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)


def test_a_bfloat16_gradient_is_rounded_once(key):
  x, k = arrays(key, dtype='bfloat16')

  def gradient(f, x, k):
    return jax.grad(lambda k: jnp.sum(f((1, 1), SAME)(x, k).astype('float32')))(k)

  got, exact = gradient(ours, x, k), gradient(native, x.astype('float32'), k.astype('float32'))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype('float32'), exact, rtol=2**-8, atol=1e-6)


def test_the_gradient_of_a_kernel_is_no_convolution_on_a_cpu(key):
  x, k = arrays(key)

  def count(f):
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(jnp.sin(f((1, 1), SAME)(x, k)))))
    return gradient.lower(k).compile().as_text().count(' convolution(')

  assert count(ours) == 1 < count(native)


@pytest.mark.parametrize('wrong', [dict(lhs_dilation=(2, 2)), dict(rhs_dilation=(2, 2)),
                                   dict(feature_group_count=2)])
def test_what_it_does_not_compute_is_refused(key, wrong):
  with pytest.raises(ValueError, match='takes jax.lax.conv_general_dilated'):
    convolve(*arrays(key), (1, 1), SAME, **{**PLAIN, **wrong})


def test_a_batch_on_eight_devices_has_the_gradient_of_the_whole(key):
  x, k = arrays(key)
  x = jnp.concatenate([x, 2 * x, -x, x + 1])  # one example per device
  gradient = jax.jit(jax.grad(lambda k, x: jnp.sum(jnp.sin(ours((1, 1), SAME)(x, k)))))
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  parted = jax.device_put(x, jax.NamedSharding(mesh, jax.P('data')))
  np.testing.assert_allclose(gradient(k, parted), gradient(k, x), rtol=1e-4, atol=1e-3)
