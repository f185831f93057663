"""Tensors of other libraries as the state of a module of ours, checked one by one."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

Path = tuple[Any, ...]


def fill(build: Callable[[], nnx.Module], take: Callable[[Path], tuple[str, np.ndarray]]
         ) -> tuple[Any, Any]:
  """(graph, state) of what `build` makes, with the leaf at each path taken from a file.

  Args:
    build: makes the module; it is traced only, so that it draws no random numbers.
    take: the name of the tensor for a path, for messages, and its value in our layout. It raises
      KeyError with the name where there is none.

  Raises:
    ValueError: a tensor is missing, has another shape, or is no finite float.
  """
  graph, abstract = nnx.split(nnx.eval_shape(build))
  leaves = []
  for path, leaf in nnx.to_flat_state(abstract):
    try:
      name, value = take(path)
    except KeyError as error:
      raise ValueError(f'it lacks {error.args[0]}, and holds another network.') from error
    if value.shape != leaf.shape or value.dtype.kind != 'f':
      raise ValueError(f'{name}, turned to our layout, is {value.dtype}{list(value.shape)} instead '
                       f'of float32{list(leaf.shape)}: this is another network.')
    if not np.isfinite(value).all():
      raise ValueError(f'{name} is not finite; get the file again.')
    leaves.append((path, leaf.replace(jnp.asarray(value, jnp.float32))))
  return graph, nnx.from_flat_state(leaves)


def from_torch(value: np.ndarray) -> np.ndarray:
  """A kernel [out, in, height, width] or [out, in] in our layout, [height, width, in, out]."""
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_torch(value: np.ndarray) -> np.ndarray:
  """Inverts `from_torch`."""
  return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
