"""REPA: hidden features of a flow decoder are drawn to those of a frozen network.

Yu et al. 2024, arXiv 2410.06940; sihyun-yu/REPA. A perceptron maps what patches are after a block
of the decoder to features of the same patches of the clean image; the loss is minus their cosine.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.layers import Linear, deviation
from smalti.tokenizers.vq import normalize

Teacher = Literal['dinov2_small', 'dinov2_base', 'dinov2_large', 'cifar10', 'mnist']
FEATURES: dict[Teacher, int] = {
    'dinov2_small': 384, 'dinov2_base': 768, 'dinov2_large': 1024, 'cifar10': 128, 'mnist': 128}


@dataclasses.dataclass(kw_only=True, slots=True)
class AlignmentConfig:
  """What the features are drawn to, and where; `LossWeights.alignment` says how strongly.

  Attributes:
    teacher: DINOv2 with its published weights, from the file that SMALTI_DINOV2 names (FlexTok has
      the large one, REPA the base one), or a classifier trained here, of colours from 32 x 32 on or
      of grey 28 x 28. Whoever trains puts it into the batch, as `teacher`.
    block: of the decoder, 1 the first and not the last (REPA: 8 of 24 or 28; FlexTok's is not
      published).
    hidden: units of the perceptron's two layers (REPA: 2048).
  """
  teacher: Teacher = 'dinov2_large'
  block: int = 8
  hidden: int = 2048


class Alignment(nnx.Module):
  """The perceptron, of two layers of SiLU; not part of the released tokenizer."""

  def __init__(self, config: AlignmentConfig, width: int, *, dtype: str = 'float32',
               rngs: nnx.Rngs):
    if config.teacher not in FEATURES:
      raise ValueError(f'teacher={config.teacher!r} must be one of {", ".join(FEATURES)}.')
    self.block = config.block
    sizes = [width, config.hidden, config.hidden, FEATURES[config.teacher]]
    self.layers = nnx.List([
        Linear(n, m, bias=True, std=deviation(n, m), dtype=dtype, rngs=rngs)
        for n, m in zip(sizes, sizes[1:])])

  def __call__(self, x: Float[Array, 'b n c'], features: Float[Array, 'b n f']
               ) -> Float[Array, '']:
    """Minus the mean cosine: -1 is aligned."""
    for layer in self.layers[:-1]:
      x = jax.nn.silu(layer(x))
    x, y = (normalize(z.astype(jnp.float32)) for z in (
        self.layers[-1](x), jax.lax.stop_gradient(features)))
    return -jnp.mean(jnp.sum(x * y, -1))
