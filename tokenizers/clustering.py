"""Clustering re-initialisation (CVQ): codes move to their nearest vectors, the more the less used.

Zheng and Vedaldi 2023, arXiv 2307.15139; in TA-TiTok (bytedance/1d-tokenizer). With p_k the moving
average of the use of code k, a_k = exp(-p_k K s / (1 - g) - 1e-3) and e_k <- (1 - a_k) e_k + a_k
z_k, where the anchor z_k is the vector of the batch nearest to e_k. A code of average use has
a = exp(-1000): only codes that are all but dead move.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from smalti.tokenizers.search import nearest


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)  # an attribute of modules
class ClusteringConfig:
  """Clustering re-initialisation of a codebook that follows its gradient.

  Attributes:
    strength: s; 10 in both papers' code.
  """
  strength: float = 10.0

  def anchors(self, z: Float[Array, 'n c'], codes: Float[Array, 'v c'],
              valid: Bool[Array, 'n'] | None = None) -> Float[Array, 'v c']:
    """The vector nearest to each code, among those that count."""
    if valid is not None:
      z = jnp.where(valid[:, None], z, z[jnp.argmax(valid)])
    return z[nearest(codes, z)]

  def pull(self, codes: Float[Array, 'v c'], use: Float[Array, 'v'], decay: float,
           anchors: Float[Array, 'v c']) -> Float[Array, 'v c']:
    """The codes after a step; `use` are the p_k."""
    a = jnp.exp(-use * use.size * self.strength / (1 - decay) - 1e-3)[:, None]
    return (1 - a) * codes + a * anchors
