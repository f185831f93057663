"""The layers every network shares: linear maps, norms, tables, rotations, and `constrain`.

Parameters are float32; the matmuls run in the layer's compute dtype, norms in float32. Sharding and
weight decay are rules on leaf names: `kernel`, `bias`, `scale`, `embedding`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

# Axis letter -> mesh axes; letters that are not here are replicated.
MESH_AXES = {'b': ('data', 'fsdp'), 'k': ('tensor',), 'v': ('tensor',)}


def constrain(x: Array, axes: str) -> Array:
  """Pins the layout of an activation, `constrain(x, 'b n c')`; the identity without a mesh.

  The mesh is the one of `jax.set_mesh`. A mesh axis that does not divide its dimension is left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = []
  for size, letter in zip(x.shape, axes.split(), strict=True):
    names = []
    for name in MESH_AXES.get(letter, ()):
      if name in mesh.shape and size % mesh.shape[name] == 0:
        names.append(name)
        size //= mesh.shape[name]
    spec.append(tuple(names) or None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def normal(key: Array, shape: tuple[int, ...]) -> Array:
  """N(0, 1), drawn flat: the same numbers, and a tenth of the time to compile on a CPU."""
  return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


class Linear(nnx.Module):
  """An affine map over the last axes: kernel [*inputs, *outputs], N(0, std), optional zero bias.

  Several output (or input) axes keep heads an axis of their own, so that a mesh can split it.
  `result` is the dtype of the output where it is not `dtype`: float32 for logits.
  """

  def __init__(self, inputs: int | tuple[int, ...], outputs: int | tuple[int, ...], *,
               bias: bool = False, std: float = 0.02, dtype: str = 'float32',
               result: str | None = None, rngs: nnx.Rngs):
    inputs = (inputs,) if isinstance(inputs, int) else inputs
    outputs = (outputs,) if isinstance(outputs, int) else outputs
    shape = (*inputs, *outputs)
    self.kernel = nnx.Param(std * normal(rngs.params(), shape) if std else jnp.zeros(shape))
    self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
    self.inputs, self.dtype, self.result = len(inputs), dtype, result or dtype

  def __call__(self, x: Array, equation: str | None = None) -> Array:
    """Contracts the last axes of x; an einsum `equation` may name another layout."""
    x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
    if equation is None:
      y = contract(x, kernel, self.inputs, self.result)
    else:
      y = jnp.einsum(equation, x, kernel, preferred_element_type=self.result)
    return y if self.bias is None else y + self.bias[...].astype(self.result)


def contract(x: Array, kernel: Array, inputs: int, result: str) -> Array:
  """The last `inputs` axes of x with the first of the kernel, in the dtype `result`."""
  # one row per position: with more axes the gradient of the kernel copies transposes on CPU
  leading = x.shape[:x.ndim - inputs]
  y = jnp.tensordot(x.reshape(-1, *x.shape[len(leading):]), kernel, inputs,
                    preferred_element_type=result)
  return y.reshape(*leading, *y.shape[1:])


class Embedding(nnx.Module):
  """A table of `size` rows of `width`, N(0, std)."""

  def __init__(self, size: int, width: int, *, std: float = 0.02, dtype: str = 'float32',
               rngs: nnx.Rngs):
    self.embedding = nnx.Param(std * normal(rngs.params(), (size, width)))
    self.dtype = dtype

  def __call__(self, ids: Int[Array, '*b']) -> Float[Array, '*b c']:
    return self.embedding[...].astype(self.dtype)[ids]


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32."""

  def __init__(self, width: int, *, gain: bool = True, epsilon: float = 1e-5):
    self.scale, self.epsilon = nnx.Param(jnp.ones(width)) if gain else None, epsilon

  def __call__(self, x: Float[Array, '*b c']) -> Float[Array, '*b c']:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.epsilon)
    return (y if self.scale is None else y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(variance + epsilon) over the last axis, in float32.

  With a `width` it is then multiplied by `scale` and shifted by `bias`.
  """

  def __init__(self, width: int | None = None, *, epsilon: float = 1e-5):
    self.epsilon = epsilon
    self.scale = None if width is None else nnx.Param(jnp.ones(width))
    self.bias = None if width is None else nnx.Param(jnp.zeros(width))

  def __call__(self, x: Float[Array, '*b c']) -> Float[Array, '*b c']:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.epsilon)
    return (y if self.scale is None else y * self.scale[...] + self.bias[...]).astype(x.dtype)


class TimeEmbedding(nnx.Module):
  """A time in [0, 1] to a vector: sinusoids of 1000 t, then two linear maps (as in MD4).

  The lowest frequency is 1000 / `base`: 10,000 in MD4 and DiT, 256 in FlexTok, whose kernels are
  `xavier` too.
  """

  def __init__(self, width: int, *, features: int = 256, base: float = 10000.0,
               xavier: bool = False, rngs: nnx.Rngs):
    self.features, self.base = features, base
    std = [deviation(n, width) if xavier else 0.02 for n in (features, width)]
    self.hidden = Linear(features, width, bias=True, std=std[0], rngs=rngs)
    self.out = Linear(width, width, bias=True, std=std[1], rngs=rngs)

  def __call__(self, t: Float[Array, 'b']) -> Float[Array, 'b c']:
    waves = sinusoid(1000 * t, self.features, self.base)
    return self.out(jax.nn.silu(self.hidden(waves)))


def deviation(inputs: int, outputs: int) -> float:
  """sqrt(2 / (inputs + outputs)): Xavier's deviation (Glorot and Bengio 2010, equation 16)."""
  return math.sqrt(2 / (inputs + outputs))


def sinusoid(x: Float[Array, '*b'], features: int, base: float = 10000.0) -> Float[Array, '*b c']:
  """[sin(x base^(-j/h)), cos(x base^(-j/h))] for j = 0..h-1, h = features / 2."""
  frequency = jnp.exp(-math.log(base) * jnp.arange(features // 2) / (features // 2))
  angle = jnp.asarray(x, jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


def grid_sinusoid(grid: tuple[int, ...], width: int) -> np.ndarray:
  """float32[h w, c]: a fixed table of positions, row-major; half the channels are of the row.

  [sinusoid(row), sinusoid(column)] with base 10,000, as in MAE (arXiv 2111.06377).
  """
  frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
  angle = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), -1)[..., None] * frequency
  table = np.concatenate([np.sin(angle), np.cos(angle)], -1)
  return table.reshape(math.prod(grid), -1).astype(np.float32)


def rotation(positions: Int[Array, '*b n a'], features: int, base: float = 10000.0
             ) -> tuple[Float[Array, '*b n f'], Float[Array, '*b n f']]:
  """(cos, sin) of the rotary angles of `a` coordinates, features / 2 of them (arXiv 2104.09864).

  Each coordinate owns an equal share of m = features // (2 a) pairs, with theta_j = base^(-j/m),
  which for two coordinates are the angles of LlamaGen; pairs left over are not rotated. Coordinate
  0 is the identity, which is what prefix tokens get (LlamaGen zeroes them instead: their queries
  and keys vanish).
  """
  coordinates = positions.shape[-1]
  pairs = features // (2 * coordinates)
  theta = base ** (-jnp.arange(pairs) / pairs)
  angle = positions[..., None].astype(jnp.float32) * theta
  angle = angle.reshape(*positions.shape[:-1], coordinates * pairs)
  rest = features // 2 - coordinates * pairs
  angle = jnp.pad(angle, [(0, 0)] * (angle.ndim - 1) + [(0, rest)])
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, 'b k n f'], table: tuple[Array, Array]) -> Float[Array, 'b k n f']:
  """Rotates pairs (j, j + f/2) of the last axis, the half-split form, in float32.

  LlamaGen's checkpoints use neighbouring pairs (2j, 2j + 1): weights do not carry over unpermuted.
  """
  cos, sin = (t[:, None] if t.ndim == 3 else t for t in table)
  left, right = jnp.split(x.astype(jnp.float32), 2, -1)
  y = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
  return y.astype(x.dtype)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """Zeroes entries with probability `rate` and rescales the rest; no key, no dropout."""
  if not rate or key is None:
    return x
  keep: Bool[Array, '...'] = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0)
