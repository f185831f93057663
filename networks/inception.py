"""Inception-v3 as in the graph of 2015-12-05, whose features define FID, IS, KID and sFID.

Szegedy et al. 2015, arXiv 1512.00567; the graph itself is `classify_image_graph_def.pb`. It is not
the Inception-v3 of model zoos: average pools leave padding out of the mean, the last block has a
max pool in its pool branch, there are 1008 classes, and the weights are others. Modules carry the
names of the graph's scopes, so that the path of a parameter is its name there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.layers import Linear

SIDE, SMALLEST = 299, 75  # pixels that the metrics feed, and that leave one pixel at the end
FEATURES, CLASSES = 2048, 1008
SPATIAL = 7  # channels of the spatial tap; 17 * 17 * 7 = 2023 values at 299 pixels


class Taps(NamedTuple):
  """What the metrics read.

  Attributes:
    features: mean over pixels of the last block, 'pool_3', for FID, KID, precision and recall.
    spatial: the first 7 channels of 'mixed_6/conv', rows first, flattened, for sFID.
    logits: features times the weights of the classifier without its bias, which is what the
      Inception score takes.
  """
  features: Float[Array, 'b 2048']
  spatial: Float[Array, 'b s']
  logits: Float[Array, 'b 1008']


class Inception(nnx.Module):
  """The whole network; images are (level - 128) / 128, in [-1, 1)."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.conv = Unit(3, 32, (3, 3), strides=2, rngs=rngs)
    self.conv_1 = Unit(32, 32, (3, 3), rngs=rngs)
    self.conv_2 = Unit(32, 64, (3, 3), padding='SAME', rngs=rngs)
    self.conv_3 = Unit(64, 80, rngs=rngs)
    self.conv_4 = Unit(80, 192, (3, 3), rngs=rngs)
    self.mixed = BlockA(192, 32, rngs=rngs)
    self.mixed_1 = BlockA(256, 64, rngs=rngs)
    self.mixed_2 = BlockA(288, 64, rngs=rngs)
    self.mixed_3 = BlockB(rngs=rngs)
    self.mixed_4 = BlockC(128, rngs=rngs)
    self.mixed_5 = BlockC(160, rngs=rngs)
    self.mixed_6 = BlockC(160, rngs=rngs)
    self.mixed_7 = BlockC(192, rngs=rngs)
    self.mixed_8 = BlockD(rngs=rngs)
    self.mixed_9 = BlockE(1280, average_pool, rngs=rngs)
    self.mixed_10 = BlockE(2048, max_pool, rngs=rngs)  # max: an accident of the graph, kept
    self.softmax = Linear(FEATURES, CLASSES, bias=True, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w 3']) -> Taps:
    # FID moves with the default precision of GPUs and TPUs
    with jax.default_matmul_precision('highest'):
      x = self.conv_2(self.conv_1(self.conv(x)))
      x = max_pool(x, 2, 'VALID')
      x = self.conv_4(self.conv_3(x))
      x = max_pool(x, 2, 'VALID')
      x = self.mixed_2(self.mixed_1(self.mixed(x)))
      x = self.mixed_5(self.mixed_4(self.mixed_3(x)))
      x = self.mixed_6(x)
      spatial = x[..., :SPATIAL]  # the branch `mixed_6/conv` comes first, normalised and rectified
      x = self.mixed_8(self.mixed_7(x))
      x = self.mixed_10(self.mixed_9(x))
      features = jnp.mean(x, (1, 2))
      logits = features @ self.softmax.kernel[...]
    return Taps(features, spatial.reshape(len(x), -1), logits)


class BlockA(nnx.Module):
  """35 x 35: 1x1, 5x5, two 3x3, and an average pool projected to `pool` channels."""

  def __init__(self, inside: int, pool: int, *, rngs: nnx.Rngs):
    same = functools.partial(Unit, padding='SAME', rngs=rngs)
    self.conv = same(inside, 64)
    self.tower = Tower(same(inside, 48), same(48, 64, (5, 5)))
    self.tower_1 = Tower(same(inside, 64), same(64, 96, (3, 3)), same(96, 96, (3, 3)))
    self.tower_2 = Tower(same(inside, pool))

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w f']:
    return jnp.concatenate(
        [self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(average_pool(x))], -1)


class BlockB(nnx.Module):
  """35 x 35 to 17 x 17: 3x3, two 3x3, and a max pool."""

  def __init__(self, *, rngs: nnx.Rngs):
    unit = functools.partial(Unit, rngs=rngs)
    self.conv = unit(288, 384, (3, 3), strides=2)
    self.tower = Tower(unit(288, 64), unit(64, 96, (3, 3), padding='SAME'),
                       unit(96, 96, (3, 3), strides=2))

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y f']:
    return jnp.concatenate([self.conv(x), self.tower(x), max_pool(x, 2, 'VALID')], -1)


class BlockC(nnx.Module):
  """17 x 17: 1x1, a 7x7 and two 7x7 in rows and columns, and an average pool."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    same = functools.partial(Unit, padding='SAME', rngs=rngs)
    row, column = (1, 7), (7, 1)
    self.conv = same(768, 192)
    self.tower = Tower(same(768, width), same(width, width, row), same(width, 192, column))
    self.tower_1 = Tower(
        same(768, width), same(width, width, column), same(width, width, row),
        same(width, width, column), same(width, 192, row))
    self.tower_2 = Tower(same(768, 192))

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w f']:
    return jnp.concatenate(
        [self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(average_pool(x))], -1)


class BlockD(nnx.Module):
  """17 x 17 to 8 x 8: 3x3, a 7x7 with a 3x3, and a max pool."""

  def __init__(self, *, rngs: nnx.Rngs):
    unit = functools.partial(Unit, rngs=rngs)
    self.tower = Tower(unit(768, 192), unit(192, 320, (3, 3), strides=2))
    self.tower_1 = Tower(
        unit(768, 192), unit(192, 192, (1, 7), padding='SAME'),
        unit(192, 192, (7, 1), padding='SAME'), unit(192, 192, (3, 3), strides=2))

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y f']:
    return jnp.concatenate([self.tower(x), self.tower_1(x), max_pool(x, 2, 'VALID')], -1)


class BlockE(nnx.Module):
  """8 x 8: 1x1, a 3x3 and two 3x3 whose last splits into a row and a column, and a pool."""

  def __init__(self, inside: int, pool, *, rngs: nnx.Rngs):
    same = functools.partial(Unit, padding='SAME', rngs=rngs)
    self.conv = same(inside, 320)
    self.tower = Tower(same(inside, 384), split=Split(rngs=rngs))
    self.tower_1 = Tower(same(inside, 448), same(448, 384, (3, 3)), split=Split(rngs=rngs))
    self.tower_2 = Tower(same(inside, 192))
    self.pool = pool

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w f']:
    return jnp.concatenate(
        [self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(self.pool(x))], -1)


class Tower(nnx.Module):
  """Units one after the other, `conv`, `conv_1`, ..., and a split as the last where given."""

  def __init__(self, *units: 'Unit', split: 'Split | None' = None):
    self.names = tuple(f'conv_{i}' if i else 'conv' for i in range(len(units)))
    for name, unit in zip(self.names, units):
      setattr(self, name, unit)
    if split is not None:
      self.mixed = split
      self.names += ('mixed',)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y f']:
    for name in self.names:
      x = getattr(self, name)(x)
    return x


class Split(nnx.Module):
  """A row and a column of the same input, side by side."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.conv = Unit(384, 384, (1, 3), padding='SAME', rngs=rngs)
    self.conv_1 = Unit(384, 384, (3, 1), padding='SAME', rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w f']:
    return jnp.concatenate([self.conv(x), self.conv_1(x)], -1)


class Unit(nnx.Module):
  """relu(scale (conv(x) - mean) / sqrt(var + 1e-3) + bias), with the statistics of the file."""

  def __init__(self, inside: int, outside: int, size: tuple[int, int] = (1, 1), *,
               strides: int = 1, padding: str = 'VALID', rngs: nnx.Rngs):
    shape = (*size, inside, outside)
    self.kernel = nnx.Param(jax.nn.initializers.he_normal()(rngs.params(), shape))
    self.scale = nnx.Param(jnp.ones(outside))
    self.bias = nnx.Param(jnp.zeros(outside))
    self.mean = nnx.BatchStat(jnp.zeros(outside))
    self.var = nnx.BatchStat(jnp.ones(outside))
    self.strides, self.padding = (strides, strides), padding

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y f']:
    x = jax.lax.conv_general_dilated(x, self.kernel[...], self.strides, self.padding,
                                     dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    gain = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-3)
    return jax.nn.relu((x - self.mean[...]) * gain + self.bias[...])


def max_pool(x: Float[Array, 'b h w c'], strides: int = 1, padding: str = 'SAME'
             ) -> Float[Array, 'b x y c']:
  """The largest of 3 x 3 pixels."""
  return nnx.max_pool(x, (3, 3), (strides, strides), padding)


def average_pool(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  """The mean of 3 x 3 pixels, of those alone that lie within the image."""
  return nnx.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)
