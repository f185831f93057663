"""Grouped quantization: groups of channels, each with its own quantizer.

Of a plain quantizer this is product quantization (Jegou et al. 2011), the multi-head VQ of
tokenizers; of Residual it is the group-residual VQ of HiFi-Codec (Yang et al. 2023, arXiv
2305.02765; yangdongchao/AcademiCodec). Groups of unequal energy cost accuracy: ProjectedConfig
around GroupedConfig learns a linear mix before the split and after it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers.quantizer import (
  Quantized,
  Quantizer,
  QuantizerConfig,
  check_inner,
  combine,
  sg,
)
from smalti.tokenizers.residual import numbered
from smalti.tokenizers.statistics import mean


@dataclasses.dataclass(kw_only=True, slots=True)
class GroupedConfig(QuantizerConfig):
  """`groups` copies of `quantizer`, each on its own channels.

  Attributes:
    quantizer: its `dim` is that of one group.
    groups: HiFi-Codec 2, of Residual with 2 levels; RepCONC 48 of plain codebooks.
    shared: one quantizer for all groups; without a loss that tells groups apart they then tend to
      carry the same thing.
  """
  quantizer: QuantizerConfig
  groups: int = 2
  shared: bool = False

  def build(self, *, rngs: nnx.Rngs) -> 'Grouped':
    return Grouped(self, rngs=rngs)


class Grouped(Quantizer):
  """vectors = concat_g Q_g(z_g); losses are means over groups.

  Codes go by stages, the codes of all groups together: [s0g0, s0g1, s1g0, s1g1], so that a prefix
  holds whole stages.
  """

  def __init__(self, config: GroupedConfig, *, rngs: nnx.Rngs):
    if config.groups < 1:
      raise ValueError(f'groups={config.groups} must be 1 or more.')
    copies: list[Any] = [
        config.quantizer.build(rngs=rngs) for _ in range(1 if config.shared else config.groups)]
    q = copies[0]
    if q.grid:
      raise ValueError(f'{type(q).__name__} has a token grid of its own; put the groups inside it.')
    check_inner(q)
    self.parts = nnx.List(copies)
    self.groups, self.dim = config.groups, q.dim * config.groups
    self.vocab = tuple(v for v in q.vocab for _ in range(config.groups))
    self.factors, self.order = q.factors, q.order
    self.apart = len(q.vocab) == 1  # else stages go before groups, and channels the other way
    self.budgets = tuple(n * config.groups for n in q.budgets)

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None, train: bool = False,
               valid: Bool[Array, 'b n'] | None = None) -> Quantized:
    z, keys = z.astype(jnp.float32), [key] * self.groups
    if key is not None and self.order == 'raster':
      keys = list(jax.random.split(key, self.groups))  # else drawn alike: whole stages drop out
    options: dict[str, Any] = {'train': train, **({} if valid is None else {'valid': valid})}
    outs, statistics = [], None
    for g, part in enumerate(jnp.split(z, self.groups, -1)):
      outs.append(self._part(g)(part, key=keys[g], **options))
      if outs[g].statistics is not None:
        name = str(g % len(self.parts))
        statistics = combine(statistics, {'parts': {name: outs[g].statistics}})
    vectors = jnp.concatenate([out.vectors for out in outs], -1)
    tokens = jnp.stack([out.tokens for out in outs], -1).reshape(*z.shape[:2], -1)
    losses = {name: jnp.mean(jnp.stack([out.losses[name] for out in outs]))
              for name in outs[0].losses}
    metrics = numbered([out.metrics for out in outs],
                       np.arange(len(self.vocab)).reshape(-1, self.groups).T)
    if 'relative_commitment' in metrics:  # of all channels, whose groups may differ in energy
      metrics['relative_commitment'] = mean(jnp.square(sg(z - vectors)), valid) / (
          mean(jnp.square(sg(z)), valid) + 1e-12)
    return Quantized(vectors, tokens, losses, metrics, statistics)

  def lookup(self, tokens: Int[Array, 'b n d'], **prefix: Bool[Array, 'b n d']
             ) -> Float[Array, 'b n c']:
    """The groups' vectors side by side; `mask` where the quantizer within takes one."""
    return jnp.concatenate([
        self._part(g).lookup(tokens[..., g::self.groups],
                             **{k: v[..., g::self.groups] for k, v in prefix.items()})
        for g in range(self.groups)], -1)

  def prepare(self, z: Float[Array, 'b n c'], *, key: Array) -> None:
    """Every quantizer on its own channels; a shared one on those of all groups."""
    parts = jnp.split(z.astype(jnp.float32), self.groups, -1)
    if len(self.parts) < self.groups:
      parts = [jnp.concatenate(parts, 1)]
    for q, part, k in zip(self.parts, parts, jax.random.split(key, len(parts))):
      q.prepare(part, key=k)

  def _part(self, g: int) -> Any:
    return self.parts[g % len(self.parts)]
