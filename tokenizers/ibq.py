"""Index backpropagation: the gradient of the chosen code reaches every code, through a softmax.

Shi et al. 2024, arXiv 2412.02692; TencentARC/SEED-Voken. k = argmax_j z . c_j, and the one-hot row
of k has the gradient of p = softmax(C z): o = onehot(k) + p - sg(p), q = o C. So every code learns
from every vector. Unusual here: N x K numbers are never held. Published code keeps several copies
of p (1.07 GB each for 1,024 vectors and 2^18 codes); here the value is a gather and the gradient is
formed by chunks of rows. Its forward value o C differs from C[k] by rounding; ours is C[k].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.tokenizers.entropy import EntropyConfig
from smalti.tokenizers.quantizer import Quantized, Quantizer, QuantizerConfig, checked, sg
from smalti.tokenizers.search import HIGHEST, chunk_rows, chunked, nearest, unchunked
from smalti.tokenizers.statistics import diversity, fit, segment_count


@dataclasses.dataclass(kw_only=True, slots=True)
class IBQConfig(QuantizerConfig):
  """`codes` codes with `dim` channels, all of which move at every step.

  Attributes:
    codes: K, the alphabet; 1,024 to 262,144 in the paper, of which 99% to 84% were used.
    dim: channels of a code; 256 in the paper.
    beta: |q - sg z|^2 beside |q_soft - z|^2 within the `codebook` loss; 0.25 in the published code.
    entropy: the entropy term on logits z . c; the published weight is 0.05. None leaves it out.
  """
  codes: int = 16384
  dim: int = 256
  beta: float = 0.25
  entropy: EntropyConfig | None = dataclasses.field(default_factory=EntropyConfig)

  def build(self, *, rngs: nnx.Rngs) -> 'IBQ':
    return IBQ(self, rngs=rngs)


class IBQ(Quantizer):
  """k = argmax_j z . c_j; value C[k], gradient of softmax(C z)^T C and of C[k].

  Losses: `codebook` = mean |q_soft - z|^2 + beta mean |q - sg z|^2, where q_soft has the value C[k]
  and both gradients; `commitment` = mean |sg q - z|^2; `entropy`. The paper's loss is codebook + 1
  commitment + 0.05 entropy: set the tokenizer's weights so. State: `codebook` [K, d] ~ N(0, 1).
  """

  def __init__(self, config: IBQConfig, *, rngs: nnx.Rngs):
    if config.codes < 2 or config.dim < 1:
      raise ValueError(f'codes={config.codes} must be 2 or more and dim={config.dim} positive.')
    self.dim, self.vocab, self.beta = config.dim, (config.codes,), config.beta
    self.entropy = checked(config.entropy)
    draw = jax.random.normal(rngs.params(), (config.codes * config.dim,))
    self.codebook = nnx.Param(draw.reshape(config.codes, config.dim))  # see `kernel_init`

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    del key, train  # nothing is drawn, and the codes are learned by their gradient
    z, codes = z.astype(jnp.float32), self.codes()
    tokens = nearest(z, codes, by='product')
    hard = jnp.take(codes, tokens, axis=0)
    soft = hard + softmax_gradient(z.reshape(-1, self.dim), codes).reshape(z.shape)
    losses = {'commitment': jnp.mean(jnp.square(sg(hard) - z)),
              'codebook': jnp.mean(jnp.square(soft - z))
              + self.beta * jnp.mean(jnp.square(hard - sg(z)))}
    length = jnp.linalg.norm(sg(codes), axis=-1)
    metrics = {**diversity(segment_count(tokens, *self.vocab)), **fit(sg(z), sg(hard), sg(codes)),
               'chosen_length': jnp.mean(length[tokens]) / (jnp.mean(length) + 1e-12)}
    if self.entropy is not None:
      losses['entropy'], entropies = self.entropy.loss(z, codes, 'product')
      metrics.update(entropies)
    return Quantized(soft, tokens[..., None], losses, metrics, statistics=None)

  def lookup(self, tokens: Int[Array, 'b n 1']) -> Float[Array, 'b n c']:
    return jnp.take(self.codes(), tokens[..., 0], axis=0)

  def codes(self) -> Float[Array, 'v c']:
    return self.codebook[...]

  def soft_assign(self, z: Float[Array, 'b n c'], tau: float = 1.0) -> Float[Array, 'b n v']:
    """log softmax(z . c / tau); it holds N x K numbers."""
    z = z.astype(jnp.float32)
    return jax.nn.log_softmax(jnp.matmul(z, self.codes().T, precision=HIGHEST) / tau, -1)


@jax.custom_vjp
def softmax_gradient(z: Float[Array, 'n c'], codes: Float[Array, 'v c']) -> Float[Array, 'n c']:
  """Zeros, with the gradient of softmax(z C^T) sg(C) for `z` and `codes`.

  With g the gradient of the result and p the softmax: s = p (g C^T - p . g C^T), and z gets s C,
  C gets s^T z. A chunk of rows at a time, so that memory does not grow with N x K.
  """
  del codes
  return jnp.zeros_like(z)


def _forward(z: Array, codes: Array) -> tuple[Array, tuple[Array, Array]]:
  return softmax_gradient(z, codes), (z, codes)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  z, codes = saved
  rows = chunk_rows(z.shape[0], codes.shape[0])

  def add(total, chunk):  # padding has g = 0
    z, g = chunk
    p = jax.nn.softmax(jnp.matmul(z, codes.T, precision=HIGHEST), -1)
    s = jnp.matmul(g, codes.T, precision=HIGHEST)
    s = p * (s - jnp.sum(p * s, -1, keepdims=True))
    return (total + jnp.matmul(s.T, z, precision=HIGHEST),
            jnp.matmul(s, codes, precision=HIGHEST))

  total, by_z = jax.lax.scan(
      add, jnp.zeros_like(codes), (chunked(z, rows), chunked(g, rows)))
  return unchunked(by_z, z.shape[0]), total


softmax_gradient.defvjp(_forward, _backward)
