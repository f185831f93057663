"""From logits to ids: guidance, truncation in a fixed order, and the one categorical draw.

The order is guidance, support, repetition, temperature, top-k, typical, top-p, min-p, draw. Every
function acts on the last axis in float32, keeps at least one id and never returns only -inf.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from smalti.networks import categorical
from smalti.networks.categorical import first

Scalar = Float[Array, ''] | float


def guide(conditional: Float[Array, '*b v'], unconditional: Float[Array, '*b v'],
          scale: Scalar | Float[Array, '*#b #v']) -> Float[Array, '*b v']:
  """u + scale (c - u): 1 is conditional, 0 unconditional, exactly. Mask ids only after it."""
  return scale * conditional + (1 - scale) * unconditional


def pair(conditional: Shaped[Array, 'b *n'], unconditional: Shaped[Array, 'b *n']
         ) -> Shaped[Array, '_ *n']:
  """The doubled batch of guidance, [c0, u0, c1, u1, ...]: a mesh keeps both rows of an example."""
  return jnp.stack([conditional, unconditional], 1).reshape(-1, *conditional.shape[1:])


def guide_pairs(both: Float[Array, '_ *n'], scale: Scalar | Float[Array, 'b']
                ) -> Float[Array, 'b *n']:
  """`guide` of the rows of a doubled batch, see `pair`; rows may have scales of their own."""
  both = both.reshape(-1, 2, *both.shape[1:])
  if jnp.ndim(scale):
    scale = jnp.expand_dims(scale, range(1, both.ndim - 1))
  return guide(both[:, 0], both[:, 1], scale)


def restrict(logits: Float[Array, '*b v'], support: Bool[Array, '*#b v']) -> Float[Array, '*b v']:
  """-inf where `support` (such as `spec.support()`) has no id."""
  return jnp.where(support, logits.astype(jnp.float32), -jnp.inf)


def possible(tokens: Int[Array, '*b n'], masked: Bool[Array, '*b n'], vocab: int, eos: int,
             ended: Bool[Array, '*b'] | bool = False) -> Bool[Array, '*b n v']:
  """Which ids a string that ends can hold: EOS alone after a visible one, none before other codes.

  Args:
    ended: whether there is an EOS before all of these tokens.
  """
  is_eos = jnp.arange(vocab) == eos
  after = jnp.cumsum(~masked & (tokens == eos), -1) > 0
  after = after | jnp.asarray(ended)[..., None]
  before = jnp.cumsum((~masked & ~after)[..., ::-1], -1)[..., ::-1] > 0
  return jnp.where(after[..., None], is_eos, ~(is_eos & before[..., None]))


def penalize(logits: Float[Array, '*b v'], seen: Bool[Array, '*b v'], penalty: Scalar
             ) -> Float[Array, '*b v']:
  """Logits of ids that were there before, divided by `penalty` where positive, else multiplied.

  CTRL's rule (Keskar et al. 2019, arXiv 1909.05858, section 4.1; 1.2 there, 1 is off) as it is
  used, for logits of either sign. For codes of images leave it off: they repeat.
  """
  logits = logits.astype(jnp.float32)
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def process(logits: Float[Array, '*b v'], *, temperature: Scalar = 1.0, top_k: int | None = None,
            typical: Scalar | None = None, top_p: Scalar | None = None,
            min_p: Scalar | None = None) -> Float[Array, '*b v']:
  """Logits of the distribution that is sampled; None means off.

  Args:
    temperature: divides the logits; 0 keeps the first largest alone. Traced: one program for all.
    top_k: keeps the k largest, by rank: of equal ones, the first. Static.
    typical: keeps the smallest set of the most typical ids with at least this mass.
    top_p: keeps the smallest set of the most probable ids with at least this mass.
    min_p: keeps ids with at least this fraction of the largest probability.
  """
  logits = heat(logits, temperature)
  if top_k is not None:
    logits = keep_k(logits, top_k)
  if typical is not None:
    logits = keep_typical(logits, typical)
  if top_p is not None:
    logits = keep_p(logits, top_p)
  if min_p is not None:
    logits = keep_min(logits, min_p)
  return logits


def heat(logits: Float[Array, '*b v'], temperature: Scalar) -> Float[Array, '*b v']:
  """logits / temperature up to a constant per row; at 0, the first largest and -inf elsewhere."""
  logits = logits.astype(jnp.float32)
  below = logits - jnp.max(logits, -1, keepdims=True)  # 0 stays 0 for the smallest temperature
  cold = jnp.arange(logits.shape[-1]) == first(below == 0)[..., None]
  temperature = jnp.asarray(temperature, jnp.float32)
  tiny = jnp.finfo(jnp.float32).tiny
  return jnp.where(temperature > 0, below / jnp.maximum(temperature, tiny),
                   jnp.where(cold, 0.0, -jnp.inf))


def keep_k(logits: Float[Array, '*b v'], k: int) -> Float[Array, '*b v']:
  """The k largest; of those equal to the k-th, the first ones, so that exactly k stay."""
  if k < 1:
    raise ValueError(f'top_k={k} must be 1 or more; None turns it off.')
  if k >= logits.shape[-1]:
    return logits
  threshold = jax.lax.top_k(logits, k)[0][..., -1:]
  above, equal = logits > threshold, logits == threshold
  room = k - jnp.sum(above, -1, keepdims=True)
  return jnp.where(above | (equal & (jnp.cumsum(equal, -1) <= room)), logits, -jnp.inf)


def keep_p(logits: Float[Array, '*b v'], p: Scalar) -> Float[Array, '*b v']:
  """The smallest set {p_i >= t} with mass >= p; ids as probable as the last one kept stay too.

  Bisection on the bit pattern of t, which orders positive floats, finds the largest such t exactly
  in 30 passes, 3-4 times faster on CPU than a sort.
  """
  probability = jax.nn.softmax(logits.astype(jnp.float32), -1)
  pattern = jax.lax.bitcast_convert_type(probability, jnp.int32)
  top = jnp.max(pattern, -1, keepdims=True)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) // 2
    mass = jnp.sum(jnp.where(pattern >= middle, probability, 0), -1, keepdims=True)
    enough = mass >= p
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  # mass(low) >= p > mass(high) holds throughout; 1.0 has the pattern 0x3f800000 < 2^30
  low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(top), top + 1))
  low = jnp.where(jnp.asarray(p) >= 1, 0, low)  # rounding must not make p = 1 drop the tail
  return jnp.where(pattern >= low, logits, -jnp.inf)


def keep_typical(logits: Float[Array, '*b v'], mass: Scalar) -> Float[Array, '*b v']:
  """The ids whose surprise is nearest to the entropy, until their mass is enough.

  Locally typical sampling (Meister et al. 2022, arXiv 2202.00666; 0.2 for stories, 0.95 for
  summaries there). The likeliest id may go. Ids as typical as the last one kept stay too; found
  by bisection, as in `keep_p`.
  """
  log = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
  probability = jnp.exp(log)
  entropy = -jnp.sum(jnp.where(probability > 0, probability * log, 0), -1, keepdims=True)
  distance = jnp.where(probability > 0, jnp.abs(log + entropy), jnp.inf)
  pattern = jax.lax.bitcast_convert_type(distance, jnp.int32)
  last = jnp.max(jnp.where(jnp.isfinite(distance), pattern, -1), -1, keepdims=True)
  mass = jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)  # 0 keeps the most typical id

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    enough = jnp.sum(jnp.where(pattern <= middle, probability, 0), -1, keepdims=True) >= mass
    return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

  # mass(low) < mass <= mass(high) holds throughout, up to rounding at a mass of 1
  _, high = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(last, -1), last))
  return jnp.where(pattern <= high, logits, -jnp.inf)


def keep_min(logits: Float[Array, '*b v'], fraction: Scalar) -> Float[Array, '*b v']:
  """Ids with p_i >= fraction * max p (arXiv 2407.01082)."""
  top = jnp.max(logits, -1, keepdims=True)
  return jnp.where(logits >= top + jnp.log(jnp.minimum(fraction, 1.0)), logits, -jnp.inf)


def draw(logits: Float[Array, 'b *n v'], keys: Array) -> Int[Array, 'b *n']:
  """One id per row, see `categorical.draw`.

  Args:
    keys: one key per example; an example's draws depend on its own key and logits alone.
  """
  uniform = jax.vmap(lambda key: jax.random.uniform(key, logits.shape[1:-1]))(keys)
  return categorical.draw(logits, uniform)


def pick(logits: Float[Array, '*b v'], tokens: Int[Array, '*b']) -> Float[Array, '*b']:
  """The logit of each token."""
  return jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]


def log_prob(logits: Float[Array, '*b v'], tokens: Int[Array, '*b']) -> Float[Array, '*b']:
  """log softmax(logits) at the tokens in float32, without a second array of the logits' shape."""
  logits = logits.astype(jnp.float32)
  return pick(logits, tokens) - jax.nn.logsumexp(logits, -1)
