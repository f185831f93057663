"""Gumbel-softmax quantization: codes are drawn in training, with the gradient of a soft draw.

Jang et al. 2016, arXiv 1611.01144; DALL-E's tokenizer (Ramesh et al. 2021, arXiv 2102.12092) and
taming-transformers. A linear map gives K scores per vector; training takes the argmax of scores +
Gumbel noise, with the gradient of softmax((scores + noise) / tau) C, and evaluation the argmax of
the scores. Published code decodes the soft mixture in training, which no token stands for; here the
value is always that of a code. Rows are drawn in chunks: N x K numbers are never held.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.convnet import kernel_init
from smalti.tokenizers.quantizer import (
  Buffer,
  Quantized,
  Quantizer,
  QuantizerConfig,
  Statistics,
  straight_through,
)
from smalti.tokenizers.search import HIGHEST, by_chunks, chunk_rows
from smalti.tokenizers.statistics import diversity, segment_count


@dataclasses.dataclass(kw_only=True, slots=True)
class GumbelConfig(QuantizerConfig):
  """`codes` codes with `dim` channels, chosen by `codes` scores of a vector with `dim` channels.

  Attributes:
    codes: K, the alphabet (DALL-E and taming 8,192).
    dim: channels of vectors and codes (taming 256).
    start, end, steps: tau falls from start to end over so many steps, as a cosine (DALL-E: 1 to
      1/16 over 150,000).
  """
  codes: int = 8192
  dim: int = 256
  start: float = 1.0
  end: float = 1 / 16
  steps: int = 150_000

  def build(self, *, rngs: nnx.Rngs) -> 'Gumbel':
    return Gumbel(self, rngs=rngs)


class Gumbel(Quantizer):
  """k = argmax(scores + noise), gradient of softmax((scores + noise) / tau) C.

  Losses: `entropy` = mean KL(softmax(scores) | uniform), which spreads the choices; the published
  weight is 5e-4 (taming). State: `scores`, a linear map; `codebook` [K, d] ~ N(0, 1), a parameter;
  `age`, the steps so far, which tau follows.
  """

  committed = False

  def __init__(self, config: GumbelConfig, *, rngs: nnx.Rngs):
    if config.codes < 2 or config.dim < 1:
      raise ValueError(f'codes={config.codes} must be 2 or more and dim={config.dim} positive.')
    if min(config.start, config.end) <= 0 or config.steps < 1:
      raise ValueError(f'start={config.start} and end={config.end} must be positive, and '
                       f'steps={config.steps} 1 or more.')
    self.dim, self.vocab = config.dim, (config.codes,)
    self.start, self.end, self.steps = config.start, config.end, config.steps
    self.scores = nnx.Linear(config.dim, config.codes, precision=HIGHEST, kernel_init=kernel_init,
                             rngs=rngs)
    draw = jax.random.normal(rngs.params(), (config.codes * config.dim,))
    self.codebook = nnx.Param(draw.reshape(config.codes, config.dim))  # see `kernel_init`
    self.age = Buffer(jnp.zeros(()))

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    if train and key is None:
      raise ValueError('key=None: training draws codes; pass a key.')
    codes, tau = self.vocab[0], self.temperature()

    @jax.checkpoint
    def draw(z, row):
      scores = self.scores(z)
      log_p = jax.nn.log_softmax(scores, -1)
      if train:  # of the row's own key: whatever the chunks; mode='low' ends at 15.94
        scores += jax.vmap(lambda i: jax.random.gumbel(
            jax.random.fold_in(key, i), (codes,), mode='high'))(row)
      soft = jnp.matmul(jax.nn.softmax(scores / tau, -1), self.codes(), precision=HIGHEST)
      return (jnp.argmax(scores, -1).astype(jnp.int32), soft,
              jnp.log(codes) + jnp.sum(jnp.exp(log_p) * log_p, -1))

    flat = z.astype(jnp.float32).reshape(-1, self.dim)
    tokens, soft, divergence = by_chunks(
        draw, chunk_rows(flat.shape[0], codes), flat, jnp.arange(flat.shape[0]))
    tokens, soft = tokens.reshape(*z.shape[:-1], 1), soft.reshape(z.shape)
    count = segment_count(tokens, codes)
    empty = jnp.zeros((codes, 0))
    return Quantized(
        straight_through(soft, self.lookup(tokens)), tokens, {'entropy': jnp.mean(divergence)},
        {**diversity(count), 'temperature': tau},
        Statistics(count, empty, empty) if train else None)

  def temperature(self) -> Float[Array, '']:
    """tau at the steps so far."""
    done = jnp.minimum(self.age[...] / self.steps, 1)
    return self.end + (self.start - self.end) * (1 + jnp.cos(jnp.pi * done)) / 2

  def lookup(self, tokens: Int[Array, 'b n 1']) -> Float[Array, 'b n c']:
    return jnp.take(self.codes(), tokens[..., 0], axis=0)

  def codes(self) -> Float[Array, 'v c']:
    return self.codebook[...]

  def soft_assign(self, z: Float[Array, 'b n c'], tau: float = 1.0) -> Float[Array, 'b n v']:
    """log softmax(scores / tau); it holds N x K numbers."""
    return jax.nn.log_softmax(self.scores(z.astype(jnp.float32)) / tau, -1)

  def absorb(self, statistics: Statistics) -> None:
    """Counts the step, if it had any vectors."""
    self.age[...] += jnp.sum(statistics.count) > 0
