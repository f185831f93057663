"""Distances between images in the features of image classifiers: the form of LPIPS v0.1.

Zhang et al. 2018, arXiv 1801.03924; constants from richzhang/PerceptualSimilarity, lpips/lpips.py.
With the published trunk and heads this is LPIPS. With any other weights, random ones included, it
is a perceptual distance of its own: a loss may use one, a table must not call it LPIPS.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.classifier import Classifier

Net = Literal['vgg', 'alex', 'squeeze']
CHANNELS: dict[Net, tuple[int, ...]] = {  # of each tap
    'vgg': (64, 128, 256, 512, 512),
    'alex': (64, 192, 384, 256, 256),
    'squeeze': (64, 128, 256, 384, 384, 512, 512),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's, for [-1, 1]
SMALLEST = 32  # pixels a side; AlexNet has nothing left below


class Perceptual(nnx.Module):
  """sum_k mean over pixels of w_k . (x_k / |x_k| - y_k / |y_k|)^2, over the taps k of the trunk.

  Heads w_k are non-negative weights of channels; they start at 1 / channels.
  """

  def __init__(self, net: Net, *, rngs: nnx.Rngs):
    self.trunk = Trunk(net, rngs=rngs)
    self.heads = nnx.List([Head(channels) for channels in CHANNELS[net]])

  def __call__(self, x: Float[Array, 'b h w 3'], y: Float[Array, 'b h w 3']) -> Float[Array, 'b']:
    """Distances of pairs of images in [-1, 1]."""
    # one pass for both, pairs side by side: over several devices, no row leaves its own
    taps = self.taps(jnp.stack([x, y], 1).reshape(-1, *x.shape[1:]))
    return compare([tap[::2] for tap in taps], [tap[1::2] for tap in taps], self.weights())

  def taps(self, x: Float[Array, 'b h w 3']) -> list[Float[Array, 'b _h _w _c']]:
    return self.trunk(x)

  def weights(self) -> list[Float[Array, '_c']]:
    return [head.scale[...] for head in self.heads]


class ClassifierTaps(nnx.Module):
  """The same distance in the features of a classifier, all channels weighing 1.

  Images need not have the size the classifier was trained at: its convolutions take any.
  """

  def __init__(self, classifier: Classifier):
    self.classifier = classifier

  def taps(self, x: Float[Array, 'b h w c']) -> list[Float[Array, 'b _h _w _c']]:
    return self.classifier.taps(x)

  def weights(self) -> list[Float[Array, '_c']]:
    return [jnp.ones(width) for width in self.classifier.widths]


class Judge(nnx.Module):
  """A distance as a loss: its gradient reaches the second image alone, and half the work is saved.

  Attributes:
    name: what its value may be called, such as 'lpips'.
    network: Perceptual or ClassifierTaps, frozen.
    channels: that the network takes; grey images are repeated.
  """

  def __init__(self, name: str, network: Any, *, channels: int = 3):
    self.name, self.network, self.channels = name, network, channels

  def __call__(self, x: Float[Array, 'b h w c'], y: Float[Array, 'b h w c']) -> Float[Array, 'b']:
    """Distances of pairs of images in [-1, 1]."""
    x, y = (jnp.repeat(z, self.channels // z.shape[3], 3) for z in (jax.lax.stop_gradient(x), y))
    weights = jax.lax.stop_gradient(self.network.weights())
    return compare(self.network.taps(x), self.network.taps(y), weights)


def compare(x: Sequence[Float[Array, 'b _h _w _c']], y: Sequence[Float[Array, 'b _h _w _c']],
            heads: Sequence[Float[Array, '_c']]) -> Float[Array, 'b']:
  """The distance of two lists of taps."""
  terms = [jnp.mean(jnp.square(unit(a) - unit(b)) @ w, (1, 2)) for a, b, w in zip(x, y, heads)]
  return jnp.sum(jnp.stack(terms), 0)


def unit(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  """x / (|x| + 1e-10) over channels; zero stays zero, with a finite gradient."""
  square = jnp.sum(x * x, -1, keepdims=True)
  norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
  return x / (norm + 1e-10)


class Head(nnx.Module):
  """Weights of the channels of one tap."""

  def __init__(self, channels: int):
    self.scale = nnx.Param(jnp.full(channels, 1 / channels))


class Trunk(nnx.Module):
  """The convolutions of VGG16, AlexNet or SqueezeNet 1.1 as in torchvision, tapped after ReLUs.

  `stages` end in a tap each; `pools` come before them.
  """

  def __init__(self, net: Net, *, rngs: nnx.Rngs):
    if net not in CHANNELS:
      raise ValueError(f'{net=} must be one of {", ".join(CHANNELS)}.')
    stages, self.pools = _NETS[net](rngs)
    self.stages = nnx.List([nnx.List(list(stage)) for stage in stages])

  def __call__(self, x: Float[Array, 'b h w 3']) -> list[Float[Array, 'b _h _w _c']]:
    if min(x.shape[1:3]) < SMALLEST:
      raise ValueError(f'Images of {x.shape[1]} x {x.shape[2]} are too small for these networks; '
                       f'{SMALLEST} pixels a side is the least.')
    taps = []
    with jax.default_matmul_precision('highest'):
      x = (x - jnp.array(SHIFT)) / jnp.array(SCALE)
      for stage, pool in zip(self.stages, self.pools):
        x = pool(x) if pool else x
        for layer in stage:
          x = layer(x)
        taps.append(x)
    return taps


def _pool(size: int, *, partial: bool = False) -> Callable[[Array], Array]:
  """Maxima of size x size pixels at every second one; `partial` windows at the end count too."""
  def pool(x: Float[Array, 'b h w c']) -> Float[Array, 'b x y c']:
    rest = [(0, (n - size) % 2 if partial else 0) for n in x.shape[1:3]]
    return nnx.max_pool(x, (size, size), (2, 2), rest)

  return pool


_HALF, _OVERLAPPING, _PARTIAL = _pool(2), _pool(3), _pool(3, partial=True)
Pool = Callable[[Array], Array] | None
Stages = tuple[Sequence[Sequence[nnx.Module]], Sequence[Pool]]


def _vgg(rngs: nnx.Rngs) -> Stages:
  stages: list[list[nnx.Module]] = []
  inside = 3
  for outside, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
    stages.append([Rectified(outside if i else inside, outside, 3, padding=1, rngs=rngs)
                   for i in range(count)])
    inside = outside
  return stages, (None, *[_HALF] * 4)


def _alex(rngs: nnx.Rngs) -> Stages:
  layers = [Rectified(3, 64, 11, strides=4, padding=2, rngs=rngs),
            Rectified(64, 192, 5, padding=2, rngs=rngs),
            Rectified(192, 384, 3, padding=1, rngs=rngs),
            Rectified(384, 256, 3, padding=1, rngs=rngs),
            Rectified(256, 256, 3, padding=1, rngs=rngs)]
  return [[layer] for layer in layers], (None, _OVERLAPPING, _OVERLAPPING, None, None)


def _squeeze(rngs: nnx.Rngs) -> Stages:
  def fire(inside: int, middle: int, outside: int) -> Fire:
    return Fire(inside, middle, outside, rngs=rngs)

  stages: list[list[nnx.Module]] = [
      [Rectified(3, 64, 3, strides=2, rngs=rngs)],
      [fire(64, 16, 64), fire(128, 16, 64)], [fire(128, 32, 128), fire(256, 32, 128)],
      [fire(256, 48, 192)], [fire(384, 48, 192)], [fire(384, 64, 256)], [fire(512, 64, 256)]]
  return stages, (None, *[_PARTIAL] * 3, None, None, None)


_NETS: dict[Net, Callable[[nnx.Rngs], Stages]] = {'vgg': _vgg, 'alex': _alex, 'squeeze': _squeeze}


class Rectified(nnx.Module):
  """relu(conv(x) + bias)."""

  def __init__(self, inside: int, outside: int, size: int, *, strides: int = 1, padding: int = 0,
               rngs: nnx.Rngs):
    shape = (size, size, inside, outside)
    self.kernel = nnx.Param(jax.nn.initializers.he_normal()(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros(outside))
    self.strides, self.padding = (strides, strides), ((padding, padding),) * 2

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y f']:
    x = jax.lax.conv_general_dilated(x, self.kernel[...], self.strides, self.padding,
                                     dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    return jax.nn.relu(x + self.bias[...])


class Fire(nnx.Module):
  """1x1 to few channels, then 1x1 and 3x3 to `outside` channels each, side by side."""

  def __init__(self, inside: int, middle: int, outside: int, *, rngs: nnx.Rngs):
    self.squeeze = Rectified(inside, middle, 1, rngs=rngs)
    self.expand1x1 = Rectified(middle, outside, 1, rngs=rngs)
    self.expand3x3 = Rectified(middle, outside, 3, padding=1, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w f']:
    x = self.squeeze(x)
    return jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], -1)
