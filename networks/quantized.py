"""Transformers with int8 weights: what is large in a block, at a quarter of float32.

A scale per output channel (arXiv 2208.07339, section 2) leaves the product: x W = (x codes) scale.
Embeddings, norms, adaLN projections and heads stay as trained: they are small, or the model is
sensitive to them.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from smalti.networks import int8
from smalti.networks.layers import Linear, contract
from smalti.networks.transformer import Transformer

Module = TypeVar('Module', bound=nnx.Module)
KINDS = ('int8',)
KEPT = ('modulation',)  # what modulates a block stays as trained


class Int8Linear(nnx.Module):
  """A `Linear` whose kernel is int8, with a scale for every output."""

  def __init__(self, linear: Linear, *, stacked: bool):
    """
    Args:
      stacked: the kernel has a leading axis of layers.
    """
    axes = tuple(range(stacked, stacked + linear.inputs))
    kernel = int8.quantize(linear.kernel[...], axes)
    self.kernel = nnx.Variable(kernel.codes)  # no parameters: nothing here is trained
    self.scale = nnx.Variable(jnp.squeeze(kernel.scale, axes))
    self.bias = linear.bias
    self.inputs, self.dtype, self.result = linear.inputs, linear.dtype, linear.result

  def __call__(self, x: Array) -> Array:
    x = x.astype(self.dtype)
    # out of a loop over tokens XLA would take the conversion, and read floats for every token
    codes, x = jax.lax.optimization_barrier((self.kernel[...], x))
    y = contract(x, codes.astype(self.dtype), self.inputs, 'float32') * self.scale[...]
    return (y if self.bias is None else y + self.bias[...]).astype(self.result)


def quantized(model: Module, kind: str = 'int8') -> Module:
  """A copy of the model whose transformers have int8 weights; `model` itself stays as it is.

  Under jit the copy is made once per call, outside any loop; made outside jit, the float kernels
  need not be kept. A copy of a copy is the same.

  Raises:
    ValueError: an unknown kind, or a model without a transformer.
  """
  if kind not in KINDS:
    raise ValueError(f'weights={kind!r} is not one of {", ".join(KINDS)}; None is as trained.')
  model = nnx.merge(*nnx.split(model))
  trunks = [node for _, node in nnx.iter_modules(model) if isinstance(node, Transformer)]
  if not trunks:
    raise ValueError(f'{type(model).__name__} has no transformer whose weights could be {kind}.')
  for trunk in trunks:
    for owner, name, linear in list(_kernels(trunk.blocks)):
      setattr(owner, name, Int8Linear(linear, stacked=True))
  return model


def nbytes(model: nnx.Module) -> int:
  """Bytes of all arrays of the blocks of a model's transformers."""
  return sum(leaf.size * leaf.dtype.itemsize for _, node in nnx.iter_modules(model)
             if isinstance(node, Transformer) for leaf in jax.tree.leaves(nnx.state(node.blocks)))


def _kernels(blocks: nnx.Module) -> Iterator[tuple[Any, str, Linear]]:
  for _, owner in nnx.iter_modules(blocks):
    for name, child in vars(owner).items():
      if isinstance(child, Linear) and name not in KEPT:
        yield owner, name, child
