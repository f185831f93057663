"""Latent perturbation: some tokens become one of their vector's nearest codes.

Qiu et al. 2025, RobustTok, arXiv 2503.08354; lxa9867/ImageFolder. Generators make such mistakes; a
decoder trained on them forgives them. It acts after the losses of the quantizer, so that only the
reconstruction sees it. The same operation in evaluation measures robustness (pFID). Published code
disturbs the first images of a batch; here each image is drawn.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smalti.tokenizers.search import neighbours


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)  # an attribute of modules
class PerturbationConfig:
  """What is replaced, and by which codes; (0.5, 0.1, 100) in the published example.

  Attributes:
    alpha: probability of a token of a chosen image to be replaced.
    beta: probability of an image to be chosen.
    delta: how many nearest codes the replacement is drawn from, the token's own among them.
  """
  alpha: float = 0.5
  beta: float = 0.1
  delta: int = 100

  def __post_init__(self):
    if not 0 <= self.alpha <= 1 or not 0 <= self.beta <= 1 or self.delta < 1:
      raise ValueError(f'alpha={self.alpha} and beta={self.beta} must be in [0, 1] and '
                       f'delta={self.delta} 1 or more.')

  @functools.partial(jax.jit, static_argnums=0)  # its loop compiles once outside jit, too
  def disturb(self, tokens: Int[Array, 'b n'], z: Float[Array, 'b n c'],
              codes: Float[Array, 'v c'], key: Array) -> Int[Array, 'b n']:
    """Tokens of `z`, some of them replaced."""
    image, token, rank = jax.random.split(key, 3)
    chosen = jax.random.uniform(image, (tokens.shape[0], 1)) < self.beta
    chosen &= jax.random.uniform(token, tokens.shape) < self.alpha
    delta = min(self.delta, codes.shape[0])
    rank = jax.random.randint(rank, (*tokens.shape, 1), 0, delta)
    other = jnp.take_along_axis(neighbours(z, codes, delta), rank, -1)[..., 0]
    return jnp.where(chosen, other, tokens)
