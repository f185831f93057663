"""Frozen networks that give a vector for every patch of an image, to align others with.

DINOv2 (Oquab et al. 2023, arXiv 2304.07193; facebookresearch/dinov2), with its published weights
(`evaluation/dinov2.py`), or a classifier trained here.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.classifier import Classifier
from smalti.networks.perceptual import SCALE, SHIFT
from smalti.networks.transformer import Transformer, TransformerConfig
from smalti.networks.vision import Grid, Patches, plain

PATCH, TABLE = 14, (37, 37)  # pixels of a patch; the published table of places is of 518 pixels


class DINOv2(nnx.Module):
  """Images to one vector per patch, after the last norm.

  Published networks scale what attention and MLP add by learned vectors (LayerScale), which are
  part of the kernels here.

  Args:
    layers, width: 12 x 384 (S), 12 x 768 (B), 24 x 1024 (L); heads have 64 channels.
    registers: positions without a patch beside the class token: 0, or 4 (arXiv 2309.16588).
    dtype: of products and activations.
  """

  def __init__(self, layers: int, width: int, *, registers: int = 0, dtype: str = 'float32',
               rngs: nnx.Rngs):
    if width % 64:
      raise ValueError(f'{width=} must be a multiple of 64, the channels of a head.')
    config: TransformerConfig = plain(
        layers, width, width // 64, epsilon=1e-6, remat=False, dtype=dtype)
    self.width, self.registers = width, registers
    self.patches = Patches(
        config, channels=3, patch=PATCH, grid=TABLE, positions='learned', rngs=rngs)
    self.first = nnx.Param(jnp.zeros((1 + registers, width)))  # the class token, at its place
    self.transformer = Transformer(config, rngs=rngs)

  def __call__(self, x: Float[Array, 'b h w c'], grid: Grid) -> Float[Array, 'b n f']:
    """Vectors of a grid of patches, row-major, of images in [-1, 1], which are resized to it.

    Bicubic and smoothed, as the table of places is.
    """
    x = jax.image.resize(x, (len(x), PATCH * grid[0], PATCH * grid[1], x.shape[3]), 'cubic')
    y = self.patches((x - jnp.array(SHIFT)) / jnp.array(SCALE))  # grey is repeated
    first = jnp.broadcast_to(self.first[...].astype(y.dtype), (len(y), *self.first.shape))
    y = self.transformer(jnp.concatenate([first, y], 1))
    return y[:, first.shape[1]:].astype(jnp.float32)


class ClassifierPatches(nnx.Module):
  """The same of a classifier: its last level, interpolated linearly to the grid."""

  def __init__(self, classifier: Classifier):
    self.classifier, self.width = classifier, classifier.features

  def __call__(self, x: Float[Array, 'b h w c'], grid: Grid) -> Float[Array, 'b n f']:
    y = self.classifier.taps(jnp.broadcast_to(x, (*x.shape[:3], self.classifier.channels)))[-1]
    y = jax.image.resize(y, (len(y), *grid, y.shape[3]), 'linear')
    return y.reshape(len(y), -1, y.shape[3])
