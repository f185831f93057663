"""Bernoulli codes: every channel is the probability of a bit, which is drawn in training.

Binary Latent Diffusion (Wang et al. 2023, arXiv 2304.04820, section 3.1;
ZeWang95/BinaryLatentDiffusion). Bits are the tokens: 32 to 128 per position, never packed, read by
a decoder as the sum of learned vectors, one per set bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.convnet import kernel_init
from smalti.tokenizers.binary import bit_use, code_use
from smalti.tokenizers.quantizer import Quantized, Quantizer, QuantizerConfig, sg, straight_through
from smalti.tokenizers.search import HIGHEST


@dataclasses.dataclass(kw_only=True, slots=True)
class BernoulliConfig(QuantizerConfig):
  """`bits` bits between linear maps from and to `dim` channels.

  Attributes:
    bits: n; 64 and 128 are released (C64, C128).
    dim: channels of the vectors; 256 in the released models.
    signed: codes are -1 and 1 instead of 0 and 1 (the `tanh` option of the published code).
    stochastic: bits are drawn in evaluation too, which then needs keys, as the published code does
      by default; else a bit is set where its probability is above 1/2. Scores of the two
      differ: report both.
  """
  bits: int = 64
  dim: int = 256
  signed: bool = False
  stochastic: bool = False

  def build(self, *, rngs: nnx.Rngs) -> 'Bernoulli':
    return Bernoulli(self, rngs=rngs)


class Bernoulli(Quantizer):
  """y = sigmoid(W z + a), b ~ Bernoulli(y), vectors = b E with the gradient of y E.

  Loss: `code` = mean y (1 - y), which makes bits certain; its published weight is 0 (the published
  code takes the sigmoid of y once more before this, which pushes every y to 1 instead). E [n, dim]
  starts from N(0, 1), as torch's Embedding does; it has no bias, so the code of zeros is zero.

  `key` is one key for the batch, or an array of keys, one per example.
  """

  committed = apart = False

  def __init__(self, config: BernoulliConfig, *, rngs: nnx.Rngs):
    if config.bits < 1 or config.dim < 1:
      raise ValueError(f'bits={config.bits} and dim={config.dim} must be positive.')
    self.dim, self.vocab, self.factors = config.dim, (2,) * config.bits, (2,)
    self.signed, self.stochastic = config.signed, config.stochastic
    self.reduce = nnx.Linear(config.dim, config.bits, precision=HIGHEST, kernel_init=kernel_init,
                            rngs=rngs)
    self.expand = nnx.Linear(config.bits, config.dim, use_bias=False, precision=HIGHEST,
                            kernel_init=nnx.initializers.normal(1.0), rngs=rngs)

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    y = self.soft(z)
    drawn = train or self.stochastic
    if drawn and key is None:
      raise ValueError('key=None: Bernoulli codes are drawn in training, and in evaluation with '
                       'stochastic=True; pass a key, or one per example.')
    bits = y > (uniform(key, y.shape) if drawn else 0.5)
    vectors = self.embed(straight_through(y, bits.astype(jnp.float32)))
    tokens = bits.astype(jnp.int32)
    metrics = {**code_use(tokens, self.vocab), **bit_use(bits),
               'certainty': jnp.mean(jnp.abs(sg(y) - 0.5))}
    return Quantized(vectors, tokens, {'code': jnp.mean(y * (1 - y))}, metrics, statistics=None)

  def lookup(self, tokens: Int[Array, 'b n d']) -> Float[Array, 'b n c']:
    """b E, the decoder's input for `tokens`."""
    return self.embed(tokens.astype(jnp.float32))

  def soft(self, z: Float[Array, 'b n c']) -> Float[Array, 'b n d']:
    """y, the probability of every bit."""
    return jax.nn.sigmoid(self.reduce(z.astype(jnp.float32)))

  def embed(self, bits: Float[Array, 'b n d']) -> Float[Array, 'b n c']:
    """Vectors of bits, or of their probabilities."""
    return self.expand(2 * bits - 1 if self.signed else bits)


def uniform(key: Array, shape: tuple[int, ...]) -> Float[Array, '...']:
  """Uniform draws: one draw for a single key, else example i from key i, whatever the batch."""
  if key.ndim == 0:
    return jax.random.uniform(key, shape)
  return jax.vmap(lambda k: jax.random.uniform(k, shape[1:]))(key)
