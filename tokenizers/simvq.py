"""SimVQ: a frozen Gaussian basis seen through one learned linear map: all codes move at once.

Zhu et al. 2024, arXiv 2411.02038; youngsheen/SimVQ. The gradient of a chosen code reaches W, and W
moves every code: none is left behind, however many there are. Published code looks tokens up in the
basis A instead of A W^T, so that decoding from tokens is wrong; here `lookup` reads the table that
was searched.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.tokenizers.quantizer import (
  Buffer,
  Quantized,
  Quantizer,
  QuantizerConfig,
  sg,
  straight_through,
)
from smalti.tokenizers.search import HIGHEST, distance_scores, nearest
from smalti.tokenizers.statistics import diversity, fit, segment_count


@dataclasses.dataclass(kw_only=True, slots=True)
class SimVQConfig(QuantizerConfig):
  """`codes` codes with `dim` channels, all of them linear images of a frozen basis.

  Attributes:
    codes: K, the alphabet; the paper goes from 1,024 to 262,144 at 128 pixels.
    dim: channels of a code (the paper: 128); the map has dim^2 weights.
    bias: a learned offset of all codes: in the published code; other libraries leave it out.
  """
  codes: int = 65536
  dim: int = 128
  bias: bool = True

  def build(self, *, rngs: nnx.Rngs) -> 'SimVQ':
    return SimVQ(self, rngs=rngs)


class SimVQ(Quantizer):
  """k = argmin_j |z - W a_j|^2, straight-through gradient.

  Losses: `commitment` = mean |sg q - z|^2 and `codebook` = mean |q - sg z|^2; the paper weights
  them 0.25 and 1. State: `basis` [K, d] ~ N(0, 1/d), a buffer nobody writes; `scale` [d, d], the
  transposed W, and `bias` [d], both drawn as torch's Linear has them, U(-1/sqrt(d), 1/sqrt(d)).

  W is called `scale` because weight decay must not reach it (it passes by that name): decay would
  shrink the whole codebook towards one point.
  """

  def __init__(self, config: SimVQConfig, *, rngs: nnx.Rngs):
    if config.codes < 2 or config.dim < 1:
      raise ValueError(f'codes={config.codes} must be 2 or more and dim={config.dim} positive.')
    self.dim, self.vocab = config.dim, (config.codes,)
    deviation = config.dim ** -0.5
    draw = jax.random.normal(rngs.params(), (config.codes * config.dim,))  # drawn flat:
    self.basis = Buffer(deviation * draw.reshape(config.codes, config.dim))  # see `kernel_init`
    draw = jax.random.uniform(rngs.params(), (config.dim ** 2,), minval=-1, maxval=1)
    self.scale = nnx.Param(deviation * draw.reshape(config.dim, config.dim))
    self.bias = nnx.Param(deviation * jax.random.uniform(
        rngs.params(), (config.dim,), minval=-1, maxval=1)) if config.bias else None

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    del key, train  # nothing is drawn, and the map is learned by its gradient
    z, codes = z.astype(jnp.float32), self.codes()
    tokens = nearest(z, codes)
    q = jnp.take(codes, tokens, axis=0)
    losses = {'commitment': jnp.mean(jnp.square(sg(q) - z)),
              'codebook': jnp.mean(jnp.square(q - sg(z)))}
    metrics = {**diversity(segment_count(tokens, *self.vocab)), **fit(sg(z), sg(q), sg(codes))}
    return Quantized(straight_through(z, q), tokens[..., None], losses, metrics, statistics=None)

  def lookup(self, tokens: Int[Array, 'b n 1']) -> Float[Array, 'b n c']:
    """The codes of `tokens`: rows of the table that was searched, not of the basis."""
    return jnp.take(self.codes(), tokens[..., 0], axis=0)

  def codes(self) -> Float[Array, 'v c']:
    """A W^T + b. K d^2 products: little beside the N K d of the search."""
    codes = jnp.matmul(self.basis[...], self.scale[...], precision=HIGHEST)
    return codes if self.bias is None else codes + self.bias[...]

  def soft_assign(self, z: Float[Array, 'b n c'], tau: float = 1.0) -> Float[Array, 'b n v']:
    """log softmax(-|z - W a|^2 / tau); it holds N x K numbers."""
    return jax.nn.log_softmax(distance_scores(z.astype(jnp.float32), self.codes()) / tau, -1)
