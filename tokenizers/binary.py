"""Binary codes: the sign of every channel is a bit, and the bits of a vector are its code.

LFQ: lookup-free quantization of MAGVIT-v2 (Yu et al. 2023, arXiv 2310.05737, section 3.1;
TencentARC/SEED-Voken, markweberdev/maskbit). BSQ: binary spherical quantization (Zhao et al. 2024,
arXiv 2406.07548; zhaoyue-zephyrus/bsq-vit). The codebook is {-s, s}^n: nothing is looked up,
nothing learned, and an entropy term keeps the bits in use.

Bits are little-endian: bit i of a code belongs to channel i, as in the code of SEED-Voken and
maskbit (their comments say the opposite; bsq-vit is big-endian). Zero is -s. Codes are packed and
unpacked by integer shifts in groups that fit int32; never through floats, which round from 2^24 on.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers.entropy import bit_entropy_terms, check_group
from smalti.tokenizers.quantizer import (
  Quantized,
  Quantizer,
  QuantizerConfig,
  sg,
  straight_through,
)
from smalti.tokenizers.scalar import COUNTED
from smalti.tokenizers.statistics import diversity, segment_count
from smalti.tokenizers.vq import normalize

PACKED = 30  # bits of a code at most: alphabets stay below 2^31
EXACT = 14  # bits whose H_avg is exact by default; batches say little about more than log2 N bits


@dataclasses.dataclass(kw_only=True, slots=True)
class BinaryConfig(QuantizerConfig):
  """What LFQ and BSQ share: `bits` channels, read as `groups` codes of bits / groups bits each.

  Attributes:
    bits: n; 18 is published for both (2^18 codes), 10 to 18 for MaskBit, 36 for BSQ.
    groups: codes per position, a divisor of `bits`; `groups=bits` makes every bit a token. Open-
      MAGVIT2 predicts 18 bits as 2 groups. It changes tokens, never vectors or losses.
    sample, average: the term `entropy` is sample * H_sample - average * H_avg; 1 and 1 are
      published (gamma_0 and gamma of BSQ).
    entropy_group: bits whose joint distribution H_avg is formed of, see `bit_entropy_terms`; None
      is all bits up to 14, and above the largest divisor of `bits` up to 9 (FlowMo's, for 18).
  """
  bits: int = 18
  groups: int = 1
  sample: float = 1.0
  average: float = 1.0
  entropy_group: int | None = None


class Binary(Quantizer):
  """Packs signs into codes and unpacks them; the codes are {-scale, scale}^n."""

  def __init__(self, config: BinaryConfig, scale: float):
    n, groups = config.bits, config.groups
    if n < 1 or groups < 1 or n % groups or n // groups > PACKED:
      fitting = [g for g in range(1, n + 1) if n % g == 0 and n // g <= PACKED]
      raise ValueError(
          f'groups={groups} must divide bits={n} into codes of at most {PACKED} bits; '
          f'fitting are {fitting}.')
    self.entropy_group = config.entropy_group or (
        n if n <= EXACT else max(g for g in range(1, 10) if n % g == 0))
    check_group(n, self.entropy_group)
    self.dim, self.groups, self.scale = n, groups, scale
    self.vocab, self.factors = (2 ** (n // groups),) * groups, (2,) * (n // groups)
    self.sample, self.average = config.sample, config.average

  def lookup(self, tokens: Int[Array, 'b n d']) -> Float[Array, 'b n c']:
    """The vectors of `tokens`: scale where a bit is set, -scale where it is not."""
    return jnp.where(unpack(tokens, len(self.factors)), self.scale, -self.scale)

  def entropy(self, log_odds: Float[Array, 'b n c']) -> tuple[Array, dict[str, Array]]:
    """The term `entropy` in nats, and both entropies to log."""
    sample, average = bit_entropy_terms(log_odds, group=self.entropy_group)
    return self.sample * sample - self.average * average, {
        'sample_entropy': sample, 'average_entropy': average}


@dataclasses.dataclass(kw_only=True, slots=True)
class LFQConfig(BinaryConfig):
  """Signs of unbounded channels.

  Attributes:
    temperature: tau of the entropy term. At the published 0.01 a bit feels it only while |z| is
      below about 0.02; normalising just before the quantizer keeps channels there.
  """
  temperature: float = 0.01

  def build(self, *, rngs: nnx.Rngs) -> 'LFQ':
    del rngs  # nothing is learned
    return LFQ(self)


class LFQ(Binary):
  """q = sign(z), straight-through gradient.

  Losses: `commitment` = mean |z - sg q|^2 (weight 0.25), `entropy` of softmax(2 z . c / tau) over
  the codes (weight 0.1 in MAGVIT-v2 and Open-MAGVIT2, 0.02 in MaskBit, boosted at first).
  """

  def __init__(self, config: LFQConfig):
    if config.temperature <= 0:
      raise ValueError(f'temperature={config.temperature} must be positive; 0.01 is published.')
    super().__init__(config, 1.0)
    self.temperature = config.temperature

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    del key, train  # nothing is drawn and nothing learned
    z, bits = z.astype(jnp.float32), z > 0
    tokens = pack(bits, self.groups)
    q = self.lookup(tokens)
    entropy, metrics = self.entropy(4 / self.temperature * z)
    losses = {'commitment': jnp.mean(jnp.square(z - q)), 'entropy': entropy}
    power = jnp.mean(jnp.square(sg(z)))
    metrics |= {**code_use(tokens, self.vocab), **bit_use(bits), 'ratio': jnp.sqrt(power),
                'relative_commitment': sg(losses['commitment']) / (power + 1e-12)}
    return Quantized(straight_through(z, q), tokens, losses, metrics, statistics=None)


@dataclasses.dataclass(kw_only=True, slots=True)
class BSQConfig(BinaryConfig):
  """Signs on the unit sphere.

  Attributes:
    inverse_temperature: t of the entropy term, 1 in all released configurations; codes are 2 s
      apart on the sphere, so that bits stay undecided and feel the term.
    entropy_group: 1 in all released configurations: H_avg is the sum over bits.
  """
  inverse_temperature: float = 1.0
  entropy_group: int | None = 1

  def build(self, *, rngs: nnx.Rngs) -> 'BSQ':
    del rngs  # nothing is learned
    return BSQ(self)


class BSQ(Binary):
  """u = z / |z|, q = sign(u) / sqrt(n), on the unit sphere like u.

  The straight-through gradient is that of u / sqrt(n), as in the paper's equation and its code: the
  sign is passed through, then scaled. |u - q| <= sqrt(2 - 2 / sqrt(n)), so there is no commitment
  term (off in all released configurations). Loss: `entropy` / t with P(bit_i = 1) =
  sigmoid(4 t u_i / sqrt(n)), weight 0.1, three times that at step 0 and falling for 2,000 steps.
  """

  def __init__(self, config: BSQConfig):
    if config.inverse_temperature <= 0:
      raise ValueError(
          f'inverse_temperature={config.inverse_temperature} must be positive; 1 is published.')
    super().__init__(config, config.bits ** -0.5)
    self.inverse_temperature = config.inverse_temperature

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    del key, train  # nothing is drawn and nothing learned
    u, bits = normalize(z.astype(jnp.float32)), z > 0
    tokens = pack(bits, self.groups)
    q = self.lookup(tokens)
    t = self.inverse_temperature
    entropy, metrics = self.entropy(4 * t * self.scale * u)
    metrics |= {**code_use(tokens, self.vocab), **bit_use(bits),
                'relative_commitment': jnp.sum(jnp.mean(jnp.square(sg(u) - q), (0, 1)))}
    return Quantized(
        straight_through(self.scale * u, q), tokens, {'entropy': entropy / t}, metrics,
        statistics=None)


def pack(bits: Bool[Array, 'b n c'], groups: int) -> Int[Array, 'b n d']:
  """Bits as `groups` codes, each of as many consecutive bits, least significant first."""
  grouped = bits.reshape(*bits.shape[:-1], groups, -1).astype(jnp.int32)
  return jnp.sum(grouped << np.arange(grouped.shape[-1], dtype=np.int32), -1, dtype=jnp.int32)


def unpack(tokens: Int[Array, 'b n d'], bits: int) -> Bool[Array, 'b n c']:
  """The bits of codes that have `bits` each; the inverse of `pack`."""
  found = tokens[..., None] >> np.arange(bits, dtype=np.int32) & 1
  return found.reshape(*tokens.shape[:-1], -1) > 0


def code_use(tokens: Int[Array, 'b n d'], vocab: tuple[int, ...]) -> dict[str, Array]:
  """Perplexity and usage of the batch, the mean over groups with equal alphabets.

  Groups of several bits are also listed each by its number. Alphabets above `COUNTED` are not
  counted: `bit_use` says more about them, and `evaluation.codes` counts over a window.
  """
  if vocab[0] > COUNTED:
    return {}
  each = jax.vmap(lambda t: diversity(segment_count(t, vocab[0])), -1)(tokens)
  listed = len(vocab) > 1 and vocab[0] > 2
  return {name: jnp.mean(x) for name, x in each.items()} | {
      f'{name}_{i}': x[i] for name, x in each.items() for i in range(len(vocab)) if listed}


def bit_use(bits: Bool[Array, 'b n c']) -> dict[str, Array]:
  """How bits are used in this batch.

  `dead_bits` is the fraction of bits whose mean is below 0.01 or above 0.99, and `bit_entropy` the
  mean over bits of the entropy of that mean, in bits: 1 is a fair coin, 0 a constant.
  """
  p = jnp.mean(bits.astype(jnp.float32), (0, 1))
  log = lambda p: jnp.log2(jnp.where(p > 0, p, 1.0))  # noqa: E731
  return {'dead_bits': jnp.mean((p < 0.01) | (p > 0.99)),
          'bit_entropy': -jnp.mean(p * log(p) + (1 - p) * log(1 - p))}
