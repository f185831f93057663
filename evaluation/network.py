"""A trained classifier as a feature extractor: its pooled last layer, and its logits.

A proxy where the FID Inception network's weights are not to be had: a distance between its features
is named `fd_<network>_<hash>` and compares with nothing else. Its untrained twin is the control: a
measure that the twin gives as well owes nothing to what the network learned.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from smalti.evaluation.features import Given, Outputs
from smalti.networks.classifier import Classifier, ClassifierConfig
from smalti.networks.pixels import to_float

BATCH = 128  # rows of one program; NumPy images are cut and filled up to it


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """uint8 images to 'features' and 'logits'.

  A colour network takes grey images too, three times the same channel. A grey one refuses colours:
  what it cannot see would not count. Images of the network's size are taken as they are, larger
  ones averaged over areas to it, both sides for themselves; smaller ones are refused.

  NumPy images are computed in batches of one size whatever size they come in, and give the same
  bits. A jax.Array is computed as it is, on the devices that hold its rows.

  Attributes:
    name: says what it was trained on, such as 'cifar10net'.
    config, model: the network.
    sha256: of the file it is from, or of its weights.
    classes: what the logits are of, in their order; () where that is not known.
  """
  name: str
  config: ClassifierConfig
  model: Classifier
  sha256: str
  classes: tuple[str, ...] = ()

  @property
  def dim(self) -> int:
    return self.model.features

  @property
  def resize(self) -> str:
    return 'box_{}x{}'.format(*self.model.size)

  def random(self, seed: int = 0) -> 'Network':
    """The same network with untrained weights."""
    model = self.config.build(rngs=nnx.Rngs(seed))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(model)):
      digest.update(np.asarray(leaf, '<f4').tobytes())
    return Network(f'random_{self.name}', self.config, model, digest.hexdigest())

  def __call__(self, images: Given) -> Outputs:
    self._check(images)
    if isinstance(images, jax.Array):
      return _named(self._program(self._weights, images))
    parts = []
    for start in range(0, len(images), BATCH):
      part = images[start:start + BATCH]
      filled = np.concatenate([part, np.zeros((BATCH - len(part), *part.shape[1:]), np.uint8)])
      parts.append([x[:len(part)] for x in _named(self._program(self._weights, filled)).values()])
    if not parts:
      raise ValueError('No images to extract features from; give at least one.')
    features, logits = (np.concatenate(part) for part in zip(*parts))
    return {'features': features, 'logits': logits}

  @functools.cached_property
  def _weights(self) -> Any:
    return nnx.split(self.model)[1]

  @functools.cached_property
  def _program(self) -> Any:
    graph = nnx.split(self.model)[0]
    (height, width), channels = self.model.size, self.model.channels

    def program(weights: Any, images: Array) -> tuple[Array, Array]:
      x = to_float(images)
      x = jnp.repeat(x, channels // x.shape[3], 3)
      return nnx.merge(graph, weights)(averaged(x, height, width))

    return jax.jit(program)

  def _check(self, images: Given) -> None:
    (height, width), channels = self.model.size, self.model.channels
    h, w, c = images.shape[1:]
    if images.dtype != np.uint8 or h < height or w < width or c not in (1, channels):
      raise ValueError(
          f'Images of {images.dtype}{[h, w, c]} must be uint8, {height}x{width} or larger and grey'
          f'{" or colour" if channels == 3 else ""}: {self.name} sees no others.')


def averaged(x: Float[Array, 'b h w c'], height: int, width: int) -> Float[Array, 'b y x c']:
  """The mean over the area that each of the fewer pixels covers, shares of pixels included."""
  if x.shape[1:3] == (height, width):
    return x
  rows, columns = _shares(x.shape[1], height), _shares(x.shape[2], width)
  return jnp.einsum('yh,bhwc,xw->byxc', rows, x, columns, precision='highest')


def _shares(size: int, smaller: int) -> Float[np.ndarray, 'y h']:
  """What share pixel h is of the area of pixel y."""
  edges = np.arange(smaller + 1) * (size / smaller)
  pixel = np.arange(size)
  overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
  return (np.maximum(overlap, 0) * (smaller / size)).astype(np.float32)


def _named(outputs: tuple[Any, Any]) -> Outputs:
  features, logits = outputs
  return {'features': np.asarray(features), 'logits': np.asarray(logits)}
