"""Latent quantization: every latent is rounded to one of a few learned values of its own.

Hsu et al. 2023, "Disentanglement via Latent Quantization", arXiv 2305.18378: an image is m scalar
latents, and latent j takes one of n_v values, k_j = argmin_k |z_j - v_jk|. So few values, used by a
decoder under strong weight decay, are worth most when each means the same wherever it occurs. The
values follow the gradient, not moving averages, and are not decayed: neither is any `codebook`
here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.tokenizers.quantizer import (
  Quantized,
  Quantizer,
  QuantizerConfig,
  sg,
  straight_through,
)
from smalti.tokenizers.statistics import diversity, segment_count


@dataclasses.dataclass(kw_only=True, slots=True)
class LatentConfig(QuantizerConfig):
  """`latents` numbers, each one of `codes` learned values.

  Attributes:
    latents: m, positions of one channel; the paper takes twice the number of sources.
    codes: n_v, values of a latent, linspace(-0.5, 0.5, n_v) at the start; 10 in the paper.
    shared: one set of values for all latents, the paper's global codebook.
  """
  latents: int = 12
  codes: int = 10
  shared: bool = False

  def build(self, *, rngs: nnx.Rngs) -> 'Latent':
    del rngs  # nothing is drawn
    return Latent(self)


class Latent(Quantizer):
  """k = argmin_k |z_j - v_jk| with straight-through gradient; position n is latent n.

  Fewer positions than `latents` are the first ones. Losses: `codebook` = mean |q - sg z|^2 and
  `commitment` = mean |sg q - z|^2; the paper weights both by 0.01. State: `codebook` [m, n_v], a
  parameter.
  """

  order = 'set'

  def __init__(self, config: LatentConfig):
    if config.latents < 1 or config.codes < 2:
      raise ValueError(
          f'latents={config.latents} must be positive and codes={config.codes} 2 or more.')
    self.dim, self.vocab, self.latents = 1, (config.codes,), config.latents
    values = jnp.linspace(-0.5, 0.5, config.codes)
    self.codebook = nnx.Param(jnp.tile(values, (1 if config.shared else config.latents, 1)))

  def __call__(self, z: Float[Array, 'b n 1'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    del key, train  # nothing is drawn, and the values are learned by their gradient
    z = z.astype(jnp.float32)
    values = self.values(z.shape[1])
    tokens = jnp.argmin(jnp.abs(sg(z) - sg(values)), -1).astype(jnp.int32)[..., None]
    q = self.lookup(tokens)
    losses = {'commitment': jnp.mean(jnp.square(sg(q) - z)),
              'codebook': jnp.mean(jnp.square(q - sg(z)))}
    use = jax.vmap(lambda t: diversity(segment_count(t, *self.vocab)), 1)(tokens)
    metrics = {name: jnp.mean(value) for name, value in use.items()}  # over the latents
    return Quantized(straight_through(z, q), tokens, losses, metrics, statistics=None)

  def lookup(self, tokens: Int[Array, 'b n 1']) -> Float[Array, 'b n 1']:
    """The values of `tokens`, each from its own latent's."""
    values = jnp.broadcast_to(
        self.values(tokens.shape[1]), (*tokens.shape[:2], *self.vocab))
    return jnp.take_along_axis(values, tokens, -1)

  def values(self, positions: int) -> Float[Array, 'n v']:
    """The learned values of the first latents.

    Raises:
      ValueError: more positions than there are latents.
    """
    if positions > self.latents:
      raise ValueError(f'{positions} positions are more than latents={self.latents}; '
                       'build the quantizer with as many.')
    return jnp.broadcast_to(self.codebook[...], (self.latents, *self.vocab))[:positions]

  def soft_assign(self, z: Float[Array, 'b n 1'], tau: float = 1.0) -> Float[Array, 'b n v']:
    """log softmax(-|z - v|^2 / tau)."""
    return jax.nn.log_softmax(
        -jnp.square(z.astype(jnp.float32) - self.values(z.shape[1])) / tau, -1)
