"""Tensors of other libraries: layouts and refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.evaluation import conversion

WEIGHT = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
TENSORS = {'kernel': WEIGHT, 'bias': np.zeros(5, np.float32)}


def build():
  return nnx.Linear(3, 5, rngs=nnx.Rngs(0))


def take(**changes):
  tensors = {**TENSORS, **changes}
  return lambda path: (path[-1], conversion.from_torch(tensors[path[-1]])
                       if tensors[path[-1]].ndim > 1 else tensors[path[-1]])


def test_a_module_computes_with_the_tensors():
  module = nnx.merge(*conversion.fill(build, take()))
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  np.testing.assert_allclose(module(jnp.asarray(x)), x @ WEIGHT.T, rtol=1e-5)


@pytest.mark.parametrize('shape', [(7, 5, 3, 2), (7, 5)])
def test_layouts(shape):
  x = np.arange(np.prod(shape)).reshape(shape)
  ours = conversion.from_torch(x)
  assert ours.shape == (*shape[2:], shape[1], shape[0])
  np.testing.assert_array_equal(conversion.to_torch(ours), x)


@pytest.mark.parametrize(('change', 'reason'), [
    (dict(kernel=WEIGHT.T), r"kernel.* is float32\[5, 3\] instead of float32\[3, 5\]"),
    (dict(bias=np.zeros(5, int)), 'is int64'),
    (dict(bias=np.full(5, np.nan, np.float32)), 'bias is not finite'),
])
def test_refusals(change, reason):
  with pytest.raises(ValueError, match=reason):
    conversion.fill(build, take(**change))


def test_a_missing_tensor_is_named():
  with pytest.raises(ValueError, match="it lacks bias"):
    conversion.fill(build, lambda path: (path[-1], {'kernel': WEIGHT.T}[path[-1]]))
