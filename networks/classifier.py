"""A small residual convolutional classifier, whose pooled last layer serves as a feature extractor.

Pre-activation residual blocks (He et al. 2016, arXiv 1603.05027) with GroupNorm, so that an image's
features do not depend on the other images of its batch. The first layer works on patches and
resolution is halved by merging 2 x 2 pixels: at full resolution convolutions of few channels run
at a third of the speed on CPUs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.convnet import Level, Norm, conv, linear, space_to_depth
from smalti.networks.model import ModelConfig
from smalti.networks.pixels import to_float


@dataclasses.dataclass(kw_only=True, slots=True)
class ClassifierConfig(ModelConfig):
  """Images of one size to logits.

  Attributes:
    image_size: (height, width), a multiple of `patch * 2 ** (len(multipliers) - 1)`.
    channels: of the image.
    classes: how many labels there are.
    width, multipliers: level i has `width * multipliers[i]` channels, the last one the features'.
    blocks: residual blocks per level.
    patch: the side of the patches that the first convolution sees as its pixels.
    dropout: in the residual blocks.
    smoothing: share of the target that is spread over all classes (arXiv 1512.00567, section 7).
  """
  image_size: tuple[int, int] = (32, 32)
  channels: int = 3
  classes: int = 10
  width: int = 32
  multipliers: tuple[int, ...] = (1, 2, 4)
  blocks: int = 1
  patch: int = 2
  dropout: float = 0.0
  smoothing: float = 0.1

  def build(self, *, rngs: nnx.Rngs) -> 'Classifier':
    return Classifier(self, rngs=rngs)


class Classifier(nnx.Module):
  """A convolution over patches, levels of residual blocks, the mean over pixels, a linear map."""

  def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
    self.size, self.channels = tuple(config.image_size), config.channels
    self.classes, self.smoothing = config.classes, config.smoothing
    self.patch = config.patch
    widths = [config.width * m for m in config.multipliers]
    factor = config.patch * 2 ** (len(widths) - 1)
    if not widths or any(side % factor for side in self.size):
      raise ValueError(
          f'image_size={self.size} must be a multiple of {factor}: patch={config.patch}, halved '
          f'between the levels of multipliers={config.multipliers}.')
    if config.classes < 2 or not 0 <= config.smoothing < 1:
      raise ValueError(f'classes={config.classes} must be 2 or more, and smoothing='
                       f'{config.smoothing} in [0, 1).')
    self.features, self.widths = widths[-1], tuple(widths)
    self.input = conv(config.patch ** 2 * config.channels, widths[0], dtype=jnp.float32, rngs=rngs)
    self.levels = nnx.List([
        Level(width, width, blocks=config.blocks, attention=False, dropout=config.dropout,
              resize=Merge(width, after, rngs=rngs) if after else None,
              dtype=jnp.float32, rngs=rngs)
        for width, after in zip(widths, [*widths[1:], 0])])
    self.norm = Norm(self.features, rngs=rngs)
    self.output = linear(self.features, config.classes, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: Array, *, key: Array | None = None, train: bool = False
               ) -> tuple[Float[Array, 'b c'], Float[Array, 'b v']]:
    """(features, logits) of uint8 or float images.

    Raises:
      ValueError: images of another size or number of channels.
    """
    if x.shape[1:] != (*self.size, self.channels):
      raise ValueError(f'Images of {x.shape[1:]} (height, width, channels) do not fit image_size='
                       f'{self.size}, channels={self.channels}; convert them.')
    y = self.input(space_to_depth(to_float(x), self.patch))
    for i, level in enumerate(self.levels):
      y = level(y, key=None if key is None else jax.random.fold_in(key, i), train=train)
    features = jnp.mean(self.norm(y), (1, 2))
    return features, self.output(features)

  def taps(self, x: Float[Array, 'b h w c']) -> list[Float[Array, 'b _h _w _c']]:
    """What the blocks of each level give, the last normalised; images of any multiple of factor.

    Raises:
      ValueError: images of another number of channels, or whose sides are no such multiple.
    """
    factor = self.patch * 2 ** (len(self.widths) - 1)
    if x.shape[3] != self.channels or any(side % factor for side in x.shape[1:3]):
      raise ValueError(f'Images of {x.shape[1:]} (height, width, channels) must have sides of a '
                       f'multiple of {factor} and channels={self.channels}; crop or convert them.')
    y, taps = self.input(space_to_depth(x, self.patch)), []
    for level in self.levels:
      for block in level.blocks:
        y = block(y, key=None, train=False)
      taps.append(y)
      y = y if level.resize is None else level.resize(y)
    return [*taps[:-1], self.norm(y)]

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Smoothed cross-entropy of `batch['label']` in nats, a mean over examples."""
    del step  # nothing is scheduled
    _, logits = self(batch['image'], key=key, train=train)
    log_p, label = jax.nn.log_softmax(logits), batch['label']
    nll = -jnp.take_along_axis(log_p, label[:, None], -1)[:, 0]
    loss = jnp.mean((1 - self.smoothing) * nll - self.smoothing * jnp.mean(log_p, -1))
    metrics = {'nll': jnp.mean(nll), 'accuracy': jnp.mean(jnp.argmax(logits, -1) == label)}
    return loss, {'metrics': jax.lax.stop_gradient(metrics),
                  'weight': jnp.float32(label.shape[0]), 'statistics': None}


class Merge(nnx.Module):
  """Half the resolution: 2 x 2 pixels to one by a linear map, the matrix product it is."""

  def __init__(self, inside: int, outside: int, *, rngs: nnx.Rngs):
    self.merge = linear(4 * inside, outside, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b x y d']:
    return self.merge(space_to_depth(x, 2))

