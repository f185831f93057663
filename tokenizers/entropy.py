"""Entropy terms: each vector sure of its code, all vectors together spread over the codebook.

MAGVIT-v2 (Yu et al. 2023, arXiv 2310.05737, section 3.1), also in MaskGIT's tokenizer, IBQ and BSQ.
With p_n = softmax(logits_n / tau) over K codes, in nats:
  sample  = mean_n H(p_n)        small: the assignment is certain
  average = H(mean_n p_n)        large: the codes are all used
and the loss is w_s sample - w_a average, negative by design, at least -w_a log K. The mean in
`average` is over the global batch, so a micro-batch of N vectors cannot show more than log N.

Published code holds N x K logits (4.3 GB for 4096 vectors and 2^18 codes, per copy). Here rows come
in chunks, recomputed in the backward pass, and sums alone leave a chunk. Codes made of bits need no
table: p factorises over bits, so `sample` costs n instead of 2^n, exactly; `average` does not, but
p is an outer product of two halves, so that mean_n p_n is one matrix product of 2^(n/2) columns.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from smalti.tokenizers.search import HIGHEST, chunk_rows, chunked

Logits = Literal['distance', 'product']

GROUP = 20  # bits of which the joint distribution is formed at most: 4 MiB


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)  # an attribute of modules
class EntropyConfig:
  """The entropy term of a codebook, `sample` H_sample - `average` H_avg at a temperature.

  1, 1 and 0.01 in MaskGIT's tokenizer (weighted by 0.1) and IBQ (by 0.05).
  """
  sample: float = 1.0
  average: float = 1.0
  temperature: float = 0.01

  def __post_init__(self):
    if self.temperature <= 0:
      raise ValueError(f'temperature={self.temperature} must be positive; 0.01 is usual.')

  def loss(self, z: Float[Array, '*b c'], codes: Float[Array, 'v c'], logits: Logits,
           valid: Bool[Array, '*b'] | None = None) -> tuple[Float[Array, ''], dict[str, Array]]:
    """The unweighted term, and both entropies to log."""
    sample, average = entropy_terms(
        z, codes, logits=logits, temperature=self.temperature, valid=valid)
    return self.sample * sample - self.average * average, {
        'sample_entropy': sample, 'average_entropy': average}


def entropy_terms(z: Float[Array, '*b c'], codes: Float[Array, 'v c'], *,
                  logits: Logits = 'distance', temperature: float = 0.01,
                  valid: Bool[Array, '*b'] | None = None, rows: int | None = None
                  ) -> tuple[Float[Array, ''], Float[Array, '']]:
  """(sample, average) of softmax(logits / temperature) over a codebook, exactly.

  Args:
    z: vectors, with gradient.
    codes: the codebook, with gradient.
    logits: 'distance' is -|z - e|^2 (MaskGIT, MAGVIT, LlamaGen), 'product' is z . e (IBQ); the
      2 z . e of LFQ is 'product' at half the temperature.
    temperature: tau; 0.01 in all of these.
    valid: the vectors that count; None is all of them.
    rows: vectors per chunk; None takes `search.chunk_rows`.
  """
  z, codes = z.astype(jnp.float32).reshape(-1, z.shape[-1]), codes.astype(jnp.float32)
  weight, bias = codes / temperature, jnp.zeros(codes.shape[0])
  if logits == 'distance':  # without |z|^2, which no softmax sees
    weight, bias = 2 * weight, -jnp.sum(jnp.square(codes), -1) / temperature

  def sums(z, real):
    log_p = jax.nn.log_softmax(jnp.matmul(z, weight.T, precision=HIGHEST) + bias)
    p = jnp.exp(log_p) * real[:, None]
    return -jnp.sum(p * log_p), jnp.sum(p, 0)

  real = jnp.ones(z.shape[0]) if valid is None else valid.reshape(-1).astype(jnp.float32)
  sample, p = _over_rows(sums, z, rows or chunk_rows(z.shape[0], codes.shape[0]), real)
  count = jnp.maximum(jnp.sum(real), 1)
  return sample / count, _entropy(p / count)


def bit_entropy_terms(log_odds: Float[Array, '*b n'], *, group: int = 1, rows: int | None = None
                      ) -> tuple[Float[Array, ''], Float[Array, '']]:
  """(sample, average) of codes of n independent bits, P(bit_i = 1) = sigmoid(log_odds_i).

  For codes {-1, +1}^n and logits 2 z . c / tau the log odds are 4 z_i / tau.

  Args:
    log_odds: of every bit.
    group: bits whose joint distribution enters `average`: n is exact, less is an upper bound that
      loosens as groups shrink (the entropies of parts add up to the joint one or more). It divides
      n and is at most `GROUP`.
    rows: vectors per chunk; None takes `search.chunk_rows`.
  """
  s = log_odds.astype(jnp.float32).reshape(-1, log_odds.shape[-1])
  n = s.shape[-1]
  check_group(n, group)
  half = group // 2

  def sums(s, real):
    p = jax.nn.sigmoid(s)
    sample = -jnp.sum((p * jax.nn.log_sigmoid(s) + (1 - p) * jax.nn.log_sigmoid(-s)).T * real)
    s = s.reshape(-1, n // group, group)
    low, high = _patterns(s[..., :half]) * real[:, None, None], _patterns(s[..., half:])
    return sample, jnp.einsum('ngi,ngj->gij', low, high, precision=HIGHEST)

  columns = n // group * 2 ** (group - half)
  sample, p = _over_rows(sums, s, rows or chunk_rows(s.shape[0], columns), jnp.ones(s.shape[0]))
  return sample / s.shape[0], _entropy(p / s.shape[0])


def check_group(bits: int, group: int) -> None:
  """Raises ValueError where groups of `group` bits do not make up `bits`, or are too large."""
  if group < 1 or group > GROUP or bits % group:
    fitting = [g for g in range(1, GROUP + 1) if bits % g == 0]
    raise ValueError(f'Entropy over groups of {group} bits must divide {bits} bits and be at most '
                     f'{GROUP}, such as {fitting}.')


def _over_rows(sums: Callable[[Array, Array], Any], x: Float[Array, 'n c'], rows: int,
               real: Float[Array, 'n']) -> Any:
  """`sums(x, real)`, a chunk of rows at a time; the backward pass computes chunks again.

  `sums` weighs each row by its second argument, which is 0 for padding. Additions stay outside
  what is recomputed: they need no operands in the backward pass, so no running sum is kept.
  """
  if rows >= x.shape[0]:
    return sums(x, real)
  again = jax.checkpoint(sums)
  add = lambda total, chunk: (jax.tree.map(jnp.add, total, again(*chunk)), None)  # noqa: E731
  zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(sums, x, real))
  return jax.lax.scan(add, zero, (chunked(x, rows), chunked(real, rows)))[0]


def _entropy(p: Float[Array, '*v']) -> Float[Array, '']:
  """-sum p log p with 0 log 0 = 0, finite in value and gradient."""
  return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)))


def _patterns(s: Float[Array, 'n g b']) -> Float[Array, 'n g k']:
  """The probabilities of all patterns of b bits with log odds s, little-endian."""
  bits = s.shape[-1]
  signs = (np.arange(2**bits)[:, None] >> np.arange(bits) & 1).astype(np.float32) * 2 - 1
  # sum_i log sigmoid(c_i s_i) of a pattern c in {-1, 1}^b, up to a constant
  return jax.nn.softmax(jnp.matmul(s, signs.T / 2, precision=HIGHEST))
