"""The shapes that signatures state are checked in every test: a wrong one is refused."""

import os

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from smalti.networks import pixels
from smalti.tokenizers.quantizer import Statistics

pytestmark = pytest.mark.skipif(
    os.environ.get('SMALTI_TYPECHECK') == '0', reason='SMALTI_TYPECHECK=0 turns the checks off')


@pytest.mark.parametrize('image', [
    jnp.zeros((8, 8), jnp.float32),  # no channel axis
    np.zeros((8, 8), np.float32),
    jnp.zeros((8, 8, 3), jnp.int32),  # no pixels
])
def test_a_wrong_array_is_refused(image):
  with pytest.raises(jaxtyping.TypeCheckError):
    pixels.to_uint8(image)
  with pytest.raises(jaxtyping.TypeCheckError):
    jax.jit(pixels.to_uint8)(image)  # under a trace too


def test_numpy_stands_for_jax():
  assert pixels.to_uint8(np.zeros((8, 8, 3), np.float32)).dtype == jnp.uint8


def test_pytrees_are_rebuilt_with_any_leaves():
  tree = Statistics(count=jnp.zeros(3), total=jnp.zeros((3, 2)), spare=jnp.zeros((3, 2)))
  assert jax.eval_shape(lambda x: x, tree).count.shape == (3,)
  assert jax.tree.map(lambda _: 'a name', tree).count == 'a name'


def test_checks_can_be_turned_off(unchecked):
  del unchecked
  assert pixels.to_uint8(jnp.zeros((8, 8), jnp.float32)).dtype == jnp.uint8
