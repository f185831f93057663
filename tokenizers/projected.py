"""Projected quantization: linear to few channels, any quantizer, linear back.

The factorised codes of ViT-VQGAN (Yu et al. 2021, arXiv 2110.04627, section 3.2); `quant_conv` and
`post_quant_conv` in the VQGAN family. Everything between the two products is float32.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.convnet import kernel_init
from smalti.tokenizers.quantizer import Quantized, Quantizer, QuantizerConfig
from smalti.tokenizers.search import HIGHEST


@dataclasses.dataclass(kw_only=True, slots=True)
class ProjectedConfig(QuantizerConfig):
  """`quantizer` between linear maps from and to `dim` channels."""
  quantizer: QuantizerConfig
  dim: int = 256

  def build(self, *, rngs: nnx.Rngs) -> 'Projected':
    return Projected(self, rngs=rngs)


class Projected(Quantizer):
  """vectors = expand(q(reduce(z))); tokens, losses, metrics are those of the quantizer within."""

  committed = apart = False

  def __init__(self, config: ProjectedConfig, *, rngs: nnx.Rngs):
    if config.dim < 1:
      raise ValueError(f'dim={config.dim} must be positive.')
    q: Any = config.quantizer.build(rngs=rngs)
    self.quantizer = q
    self.dim, self.vocab, self.factors = config.dim, q.vocab, q.factors
    self.order, self.budgets = q.order, q.budgets
    self.grid, self.stochastic = q.grid, q.stochastic
    self.reduce = nnx.Linear(config.dim, q.dim, precision=HIGHEST, kernel_init=kernel_init,
                            rngs=rngs)
    self.expand = nnx.Linear(q.dim, config.dim, precision=HIGHEST, kernel_init=kernel_init,
                            rngs=rngs)

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    q = self.quantizer(self.reduce(z.astype(jnp.float32)), key=key, train=train)
    statistics = None if q.statistics is None else {'quantizer': q.statistics}
    return dataclasses.replace(q, vectors=self.expand(q.vectors), statistics=statistics)

  def lookup(self, tokens: Int[Array, 'b n d'], **prefix: Any) -> Float[Array, 'b m c']:
    return self.expand(self.quantizer.lookup(tokens, **prefix))

  def soft_assign(self, z: Float[Array, 'b n c'], tau: float = 1.0) -> Float[Array, 'b n v']:
    """`soft_assign` of the quantizer within, where it has one."""
    return self.quantizer.soft_assign(self.reduce(z.astype(jnp.float32)), tau)

  def fits(self, grid: tuple[int, ...]) -> None:
    self.quantizer.fits(grid)

  def prepare(self, z: Float[Array, 'b n c'], *, key: Array) -> None:
    self.quantizer.prepare(self.reduce(z.astype(jnp.float32)), key=key)
