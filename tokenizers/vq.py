"""Vector quantization: each vector becomes the index of the nearest row of a learned codebook.

van den Oord et al. 2017, arXiv 1711.00937: the codebook follows a gradient (section 3.2) or moving
averages of the vectors assigned to it (appendix A.1). Unusual here: nothing is written in the
forward pass (`absorb` is the only writer), and dead codes really move: published code resets only
the row e, and the next e = m / n puts the dead row back; ours resets e, m and n.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.tokenizers.assignment import AssignmentConfig
from smalti.tokenizers.clustering import ClusteringConfig
from smalti.tokenizers.entropy import EntropyConfig
from smalti.tokenizers.perturbation import PerturbationConfig
from smalti.tokenizers.quantizer import (
  Buffer,
  Quantized,
  Quantizer,
  QuantizerConfig,
  Statistics,
  checked,
  sg,
  straight_through,
)
from smalti.tokenizers.rotation import rotate
from smalti.tokenizers.search import distance_scores, nearest
from smalti.tokenizers.statistics import (
  diversity,
  fit,
  mean,
  segment_count,
  segment_sums,
  spare_rows,
)

DEAD = 0.03  # of the average use: less counts as dead, revived or not


@dataclasses.dataclass(kw_only=True, slots=True)
class VQConfig(QuantizerConfig):
  """A codebook of `codes` rows with `dim` channels; small `dim` is the main lever for usage.

  Attributes:
    codes: K, the alphabet.
    dim: channels of a code (LlamaGen 8, 4M 32, MaskGIT 256).
    update: 'ema' moves rows to the mean of their vectors, 'gradient' leaves them to the optimizer.
    decay: of the moving averages n and m; for 'gradient', of the usage count.
    epsilon: Laplace smoothing of n (arXiv 1711.00937, appendix A.1).
    init: 'data' takes rows of the first batch, 'kmeans' refines them by Lloyd's algorithm;
      'uniform' is U(-1/K, 1/K) (VQGAN), 'normal' N(0, 1).
    iterations: of Lloyd's algorithm (Encodec: 10 to 50).
    cosine: compares directions; vectors and codes are l2-normalised (ViT-VQGAN, arXiv 2110.04627).
    revival: codes used less than this fraction of the average move to a vector of the batch; 0 is
      off. Relative, because absolute thresholds change meaning with the batch size.
    estimator: the gradient of a vector is that of its code as it is, 'straight', or turned and
      scaled as the vector was, 'rotation' (`rotation.rotate`).
    entropy: a term for sure assignments and even use, with logits -|z - e|^2 (MaskGIT).
    clustering: re-initialisation of little used codes of a 'gradient' codebook, instead of revival.
    assignment: how vectors choose codes in training, `SinkhornConfig` or `StochasticConfig`.
    perturbation: replaces tokens in training, after the losses (RobustTok).
  """
  codes: int = 1024
  dim: int = 32
  update: Literal['gradient', 'ema'] = 'ema'
  decay: float = 0.99
  epsilon: float = 1e-5
  init: Literal['data', 'kmeans', 'uniform', 'normal'] = 'data'
  iterations: int = 10
  cosine: bool = False
  revival: float = DEAD
  estimator: Literal['straight', 'rotation'] = 'straight'
  entropy: EntropyConfig | None = None
  clustering: ClusteringConfig | None = None
  assignment: AssignmentConfig | None = None
  perturbation: PerturbationConfig | None = None

  def build(self, *, rngs: nnx.Rngs) -> 'VQ':
    return VQ(self, rngs=rngs)


class VQ(Quantizer):
  """k = argmin_j |z - e_j|^2, straight-through gradient.

  Losses: `commitment` = mean |sg q - z|^2, and `codebook` = mean |q - sg z|^2 for 'gradient'.
  State: the rows e (`codebook`: a parameter for 'gradient', a buffer for 'ema'), the moving count n
  of their uses, for 'ema' the moving sum m of their vectors, and for an assignment that is annealed
  the steps so far, `age`.

  On Adam's moments when `absorb` revives a row of a 'gradient' codebook: it replaces the row after
  the optimizer's update and leaves the moments alone. A row of average use is dead
  log(revival) / log(decay) steps after its last one (350 by default), and its first moment has
  shrunk by 0.9 ** 350; one that was used rarely dies a few steps after its last use, and what is
  left of its moments then moves the new row by up to some ten times the rate (8 in a trial with one
  use in a hundred steps). The first gradient after revival moves it (1 - b1) / sqrt(1 - b2) times
  the rate, 3.2 times for (0.9, 0.999), 0.45 times for (0.9, 0.95). Averaged weights follow at their
  own decay.
  """

  def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
    if config.codes < 2 or config.dim < 1:
      raise ValueError(f'codes={config.codes} must be 2 or more and dim={config.dim} positive.')
    if not 0 <= config.decay < 1:
      raise ValueError(f'decay={config.decay} must be in [0, 1); 0.99 is usual, 0.8 for tiny runs.')
    if not 0 <= config.revival < 1:
      raise ValueError(f'revival={config.revival} is a fraction of the average use, in [0, 1).')
    if config.clustering and (config.update == 'ema' or config.revival):
      raise ValueError('clustering= moves codes by itself: it needs update=gradient and revival=0.')
    if config.estimator == 'rotation' and config.dim == 1:
      raise ValueError("estimator=rotation needs dim=2 or more: numbers only turn by their sign; "
                       "use 'straight'.")
    self.dim, self.vocab = config.dim, (config.codes,)
    self.update, self.decay, self.epsilon = config.update, config.decay, config.epsilon
    self.init, self.iterations = config.init, config.iterations
    self.cosine, self.revival, self.estimator = config.cosine, config.revival, config.estimator
    self.entropy, self.clustering, self.assignment, self.perturbation = map(checked, (
        config.entropy, config.clustering, config.assignment, config.perturbation))
    size = config.codes * config.dim
    if config.init == 'normal':
      codes = jax.random.normal(rngs.params(), (size,))
    else:
      codes = jax.random.uniform(rngs.params(), (size,), minval=-1, maxval=1) / config.codes
    codes = codes.reshape(config.codes, config.dim)  # see `kernel_init` on drawing flat
    self.codebook = nnx.Param(codes) if config.update == 'gradient' else Buffer(codes)
    # clustering moves what was not used from the first step on
    self.count = Buffer(jnp.full(config.codes, 0.0 if config.clustering else 1.0))
    if config.update == 'ema':
      self.total = Buffer(codes + 0)  # a buffer of its own: donated arrays must not be shared
    if config.assignment and config.assignment.steps:
      self.age = Buffer(jnp.zeros(()))

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None, train: bool = False,
               valid: Bool[Array, 'b n'] | None = None) -> Quantized:
    z = self._metric(z.astype(jnp.float32))
    codes, rows = self.codes(), sg(z).reshape(-1, self.dim)
    some = None if valid is None else valid.reshape(-1)
    if train and key is None and (self.revival or self.assignment or self.perturbation):
      raise ValueError('key=None: revival and other draws of training need one; pass a key, or '
                       'build with revival=0.')
    choose = disturb = key
    if train and (self.assignment or self.perturbation):
      key, choose, disturb = jax.random.split(key, 3)
    tokens, metrics = nearest(rows, codes), {}
    if train and self.assignment:
      age = self.age[...] if self.assignment.steps else 0.0
      tokens, metrics = self.assignment.mix(
          rows, sg(codes), tokens, age=age, key=choose, valid=some)
    q = jnp.take(codes, tokens, axis=0).reshape(z.shape)
    losses = {'commitment': mean(jnp.square(sg(q) - z), valid)}
    if self.update == 'gradient':  # before straight-through cuts it off
      losses['codebook'] = mean(jnp.square(q - sg(z)), valid)
    if self.entropy:
      losses['entropy'], entropies = self.entropy.loss(z, codes, 'distance', valid)
      metrics |= entropies
    # past the last code: not counted
    counted = tokens if some is None else jnp.where(some, tokens, self.vocab[0])
    statistics = self._statistics(rows, counted, key, some) if train else None
    count = statistics.count if train else segment_count(counted, *self.vocab)
    metrics |= {
        **diversity(count),
        **fit(rows, sg(q).reshape(rows.shape), sg(codes), some),
        'dead': jnp.sum(self._dead(self.count[...], self.revival or DEAD)).astype(jnp.float32),
    }
    tokens = tokens.reshape(z.shape[:-1])
    if train and self.perturbation:
      tokens = self.perturbation.disturb(tokens, z, codes, disturb)
      q = jnp.take(codes, tokens, axis=0)
    estimate = rotate if self.estimator == 'rotation' else straight_through
    return Quantized(estimate(z, q), tokens[..., None], losses, metrics, statistics)

  def lookup(self, tokens: Int[Array, 'b n 1']) -> Float[Array, 'b n c']:
    """The codes of `tokens`, normalised for cosine: what the decoder was trained on."""
    return jnp.take(self.codes(), tokens[..., 0], axis=0)

  def codes(self) -> Float[Array, 'v c']:
    """The codebook as it is compared and looked up."""
    return self._metric(self.codebook[...])

  def soft_assign(self, z: Float[Array, 'b n c'], tau: float = 1.0) -> Float[Array, 'b n v']:
    """log softmax(-|z - e|^2 / tau); it holds N x K numbers."""
    z = self._metric(z.astype(jnp.float32))
    return jax.nn.log_softmax(distance_scores(z, self.codes()) / tau, -1)

  def absorb(self, statistics: Statistics) -> None:
    """Moves the codebook by the global statistics of a step; without any vectors, does nothing.

    n <- g n + (1 - g) c and m <- g m + (1 - g) s, then e = m / n~ with the smoothed
    n~ = (n + eps) / (sum n + K eps) sum n. A dead code k, n_k < revival * mean(n), becomes
    e_k = v_k, m_k = v_k n0, n_k = n0 with v_k the spare row and n0 = max(1, twice the threshold),
    so that it outlives the next steps even unused. Clustering moves codes by its own rule instead.
    """
    g, seen = self.decay, jnp.sum(statistics.count) > 0
    count = g * self.count[...] + (1 - g) * statistics.count
    dead = self._dead(count, self.revival)
    fresh = jnp.maximum(1.0, 2 * self.revival * jnp.mean(count))
    codes = self.codebook[...]
    if self.update == 'ema':
      total = g * self.total[...] + (1 - g) * statistics.total
      n = jnp.sum(count)
      codes = total / ((count + self.epsilon) / (n + count.size * self.epsilon) * n)[:, None]
      total = jnp.where(dead[:, None], statistics.spare * fresh, total)
      self.total[...] = jnp.where(seen, total, self.total[...])
    codes = jnp.where(dead[:, None], statistics.spare, codes)
    if self.clustering:
      use = count / jnp.maximum(jnp.sum(statistics.count), 1)
      codes = self.clustering.pull(codes, use, g, statistics.spare)
    self.codebook[...] = jnp.where(seen, codes, self.codebook[...])
    self.count[...] = jnp.where(seen, jnp.where(dead, fresh, count), self.count[...])
    if self.assignment and self.assignment.steps:
      self.age[...] += seen

  def prepare(self, z: Float[Array, 'b n c'], *, key: Array) -> None:
    """Rows of the first batch, or their k-means centres, as the codebook ('data', 'kmeans')."""
    if self.init not in ('data', 'kmeans'):
      return
    rows = self._metric(z.astype(jnp.float32)).reshape(-1, self.dim)
    codes = spare_rows(rows, self.vocab[0], key)
    if self.init == 'kmeans':
      codes = kmeans(rows, codes, self.iterations)
    self.codebook[...] = codes
    if not self.clustering:
      self.count[...] = jnp.full(self.vocab, rows.shape[0] / self.vocab[0], jnp.float32)
    if self.update == 'ema':
      self.total[...] = codes * self.count[...][:, None]

  def _metric(self, x: Float[Array, '*b c']) -> Float[Array, '*b c']:
    return normalize(x) if self.cosine else x

  def _dead(self, count: Float[Array, 'v'], share: float) -> Array:
    return count < share * jnp.mean(count)

  def _statistics(self, z: Float[Array, 'n c'], tokens: Int[Array, 'n'], key: Array | None,
                  valid: Bool[Array, 'n'] | None) -> Statistics:
    codes, zero = self.vocab[0], jnp.zeros((*self.vocab, self.dim), jnp.float32)
    if self.update == 'ema':
      count, total = segment_sums(z, tokens, codes)
    else:
      count, total = segment_count(tokens, codes), zero
    spare = zero
    if self.clustering:
      spare = self.clustering.anchors(z, sg(self.codes()), valid)
    elif self.revival:
      assert key is not None
      spare = spare_rows(z, codes, key, valid)
    return Statistics(count, total, spare)


def normalize(x: Float[Array, '*b c']) -> Float[Array, '*b c']:
  """x / |x|, with a finite gradient at zero (x / (norm + eps) has NaN there)."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


def kmeans(z: Float[Array, 'n c'], codes: Float[Array, 'v c'], iterations: int
           ) -> Float[Array, 'v c']:
  """Lloyd's algorithm from `codes`; a centre without rows stays where it is."""
  def move(_, codes):
    count, total = segment_sums(z, nearest(z, codes), codes.shape[0])
    return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1)[:, None], codes)

  return jax.lax.fori_loop(0, iterations, move, codes)
