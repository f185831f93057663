"""Sparse codes: a vector is the sum of the k codes most similar to it, coarse first.

Tamkin et al. 2023, "Codebook Features", arXiv 2310.17230: similarity is the cosine, the sum has no
weights, and the loss |q - sg z|^2 moves the codes alone. Codes are ordered by similarity, so that
the first k' of them are a coarser vector. The original interprets language models; as an image
tokenizer it costs k codes per position.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers.quantizer import (
  Quantized,
  Quantizer,
  QuantizerConfig,
  sg,
  straight_through,
)
from smalti.tokenizers.search import HIGHEST, neighbours
from smalti.tokenizers.statistics import diversity, fit, segment_count, spare_rows
from smalti.tokenizers.vq import normalize


@dataclasses.dataclass(kw_only=True, slots=True)
class SparseConfig(QuantizerConfig):
  """`active` of `codes` codes with `dim` channels at every position.

  Attributes:
    codes: K, the alphabet of each code.
    dim: channels of a code.
    active: k, codes per position.
  """
  codes: int = 1024
  dim: int = 32
  active: int = 8

  def build(self, *, rngs: nnx.Rngs) -> 'Sparse':
    return Sparse(self, rngs=rngs)


class Sparse(Quantizer):
  """The k largest cosines of z and the codes; q is the sum of these codes, straight-through.

  Losses: `codebook` = mean |q - sg z|^2, and `commitment` = mean |sg q - z|^2, which the paper does
  without. State: `codebook` [K, d], a parameter; it starts at vectors of the first batch, divided
  by k.
  """

  order = 'depth'

  def __init__(self, config: SparseConfig, *, rngs: nnx.Rngs):
    if not 1 <= config.active <= config.codes or config.codes < 2 or config.dim < 1:
      raise ValueError(f'active={config.active} must be in 1..codes, codes={config.codes} be 2 or '
                       f'more and dim={config.dim} positive.')
    self.dim, self.vocab = config.dim, (config.codes,) * config.active
    draw = jax.random.normal(rngs.params(), (config.codes * config.dim,)) / config.active
    self.codebook = nnx.Param(draw.reshape(config.codes, config.dim))  # see `kernel_init`

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    del key, train  # nothing is drawn, and the codes are learned by their gradient
    z, codes = z.astype(jnp.float32), self.codes()
    # against codes of one length the nearest is the one of largest cosine, whatever the vector's
    tokens = neighbours(z, normalize(codes), len(self.vocab))
    q = self.lookup(tokens)
    losses = {'commitment': jnp.mean(jnp.square(sg(q) - z)),
              'codebook': jnp.mean(jnp.square(q - sg(z)))}
    metrics = {**diversity(segment_count(tokens, self.vocab[0])), **fit(sg(z), sg(q), sg(codes))}
    return Quantized(straight_through(z, q), tokens, losses, metrics, statistics=None)

  def lookup(self, tokens: Int[Array, 'b n d'], mask: Bool[Array, 'b n d'] | None = None
             ) -> Float[Array, 'b n c']:
    """The sum of the codes of `tokens`, of those only where `mask` holds."""
    q, codes = jnp.zeros((*tokens.shape[:-1], self.dim)), self.codes()
    for i in range(tokens.shape[-1]):  # in this order in every program: sums depend on it
      code = jnp.take(codes, tokens[..., i], axis=0)
      q += code if mask is None else jnp.where(mask[..., i, None], code, 0.0)
    return q

  def codes(self) -> Float[Array, 'v c']:
    return self.codebook[...]

  def soft_assign(self, z: Float[Array, 'b n c'], tau: float = 1.0) -> Float[Array, 'b n v']:
    """log softmax(cosine / tau); it holds N x K numbers."""
    z, codes = normalize(z.astype(jnp.float32)), normalize(self.codes())
    return jax.nn.log_softmax(jnp.matmul(z, codes.T, precision=HIGHEST) / tau, -1)

  def prepare(self, z: Float[Array, 'b n c'], *, key: Array) -> None:
    """Rows of the first batch, each a k-th of its length: k of them make up a vector."""
    rows = spare_rows(z.astype(jnp.float32).reshape(-1, self.dim), self.vocab[0], key)
    self.codebook[...] = rows / len(self.vocab)
