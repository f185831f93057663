"""ResGen: masked diffusion over residual codes, which predicts sums of their vectors.

Kim et al. 2024, arXiv 2412.10208. A position has D codes, coarse first, and its vector is the sum
of theirs. Hidden are always the deepest k_i codes of position i, with k drawn from a multivariate
hypergeometric law; a bidirectional transformer reads the sum of the visible vectors and predicts
the sum of the hidden ones, as a mixture of Gaussians: one draw for all hidden codes of a position,
so that the number of passes depends neither on positions nor on depth. The drawn sum is quantized
again, greedily, into the hidden codes, and the surest of them are kept.

What the model has is a density of sums, in nats per channel (`nll_z_per_dim`). It is not a
likelihood of codes, which would be its integral over their cells: there is no `elbo`, no
`log_prob`, and nothing in bits. No code was published; what the paper leaves open is listed in
docs/resgen.md.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.generators import logits as processing, schedules
from smalti.generators.bodies import check_body, labelled
from smalti.generators.generator import (
    DrawSettings,
    Generator,
    GeneratorConfig,
    GuidanceSettings,
    Sample,
    check_request,
    check_shares,
    drop_labels,
    fold,
    rank,
    read_labels,
    settings,
)
from smalti.generators.mixture import HIGHEST, Mixture
from smalti.generators.sums import change_rate, hidden, requantise
from smalti.networks.layers import Embedding, Linear, constrain
from smalti.networks.transformer import Transformer, TransformerConfig
from smalti.tokenizers.spec import TokenSpec

CHOICE = 2  # a purpose folded into a sample's keys, beside those of a draw from a mixture


@dataclasses.dataclass(kw_only=True, slots=True)
class ResGenConfig(GeneratorConfig):
  """A bidirectional transformer with a mixture of Gaussians at every position.

  Args:
    transformer: with `modulated` the class enters by adaLN, otherwise as a prefix token; `axes` is
      0, 1 (the raster index) or the number of axes of the grid.
    channels: c, of the tokenizer's code vectors, which training copies into the model.
    components: M, Gaussians of a mixture; not published.
    rank: numbers that say a component's mean, in a basis of so many directions; not published.
    classes: number of labels; 0 is unconditional.
    label_dropout: chance per example of training on the null label, which guidance needs.
    objective: 'exact' is -log of the mixture's density, 'split' a bound of it (published) that pays
      every component for its own distance, which keeps all of them alive.
    ratio: hidden share of the codes at u ~ U(0, 1).
    floor: of log sigma, in standardised units: sums of codes are points, whose density has no
      upper bound.
  """
  transformer: TransformerConfig
  channels: int
  components: int = 1024
  rank: int = 64
  classes: int = 0
  label_dropout: float = 0.1
  objective: Literal['exact', 'split'] = 'exact'
  ratio: schedules.Ratio = 'cosine'
  floor: float = -7.0

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'ResGen':
    return ResGen(self, spec, rngs=rngs)


@settings
class ResGenSettings(DrawSettings, GuidanceSettings):
  """How to sample: a draw is of a component, guidance also of means and log deviations.

  Args:
    steps: passes over the tokens (published: 63 for 64 positions of 16 codes).
    ratio: hidden share of the codes over the steps.
    noise: multiplies the deviations of the drawn component; 0 draws its mean.
    choice_temperature: Gumbel noise on the confidence, annealed to 0. Large values draw the counts
      from the reverse of the masking; 4.5 is MaskGIT's.
    trace: keep the states on the way, -1 where hidden.
  """
  steps: int = 16
  ratio: schedules.Ratio = 'cosine'
  noise: float = 1.0
  choice_temperature: float = 4.5
  trace: bool = False


class ResGen(Generator):
  """p(sum of hidden code vectors | visible codes, label), and its sampler.

  The vectors of the codes are the buffer `vectors`, NaN until `prepare` has them from the
  tokenizer, so that a model without them has no finite loss. Sums are standardised by mean and
  deviation of the codebooks they are made of: the last k of D.
  """

  settings = ResGenSettings

  def __init__(self, config: ResGenConfig, spec: TokenSpec, *, rngs: nnx.Rngs):
    if spec.depth < 2 or spec.order != 'depth':
      raise ValueError(
          f'order={spec.order!r} with {spec.depth} codes per position: these are not residual '
          'codes of depth 2 or more, whose vectors add up from coarse to fine; take a tokenizer '
          'with ResidualConfig, or a masked generator.')
    if config.objective not in ('exact', 'split'):
      raise ValueError(f'objective={config.objective!r} is not one of exact, split.')
    check_shares(label_dropout=config.label_dropout)
    if min(config.channels, config.components, config.rank) < 1:
      raise ValueError(f'channels={config.channels}, components={config.components} and '
                       f'rank={config.rank} must be 1 or more.')
    schedules.ratio(config.ratio, np.ones(1))
    body = config.transformer
    check_body(body, config.classes, spec.grid)
    self.spec, self.classes, self.label_dropout = spec, config.classes, config.label_dropout
    self.objective, self.ratio, self.floor = config.objective, config.ratio, config.floor
    width, dtype, channels = body.width, body.dtype, config.channels
    self.vectors = nnx.Variable(jnp.full((spec.depth, max(spec.vocab), channels), jnp.nan))
    self.input = Linear(channels, width, dtype=dtype, rngs=rngs)
    self.hidden_count = Embedding(spec.depth + 1, width, dtype=dtype, rngs=rngs)
    self.place = Embedding(spec.length, width, dtype=dtype, rngs=rngs)
    self.label = Embedding(  # the last row is the null label
        config.classes + 1, width, dtype=dtype, rngs=rngs) if config.classes else None
    self.transformer = Transformer(body, rngs=rngs)
    # float32: what bfloat16 rounds off would move means by more than the narrowest deviation
    self.head = Linear(width, config.components, bias=True, std=0, rngs=rngs)
    self.spread = Linear(width, config.components, bias=True, std=0, rngs=rngs)
    self.affine = Linear(width, (2, channels), bias=True, std=0, rngs=rngs)
    self.components = Linear(width, (config.components, config.rank), std=0, rngs=rngs)
    # what differs: equal components would have equal gradients for ever; see `prepare`
    self.centre = Embedding(config.components, config.rank, std=1.0, rngs=rngs)
    self.basis = Linear(config.rank, channels, std=config.rank ** -0.5, rngs=rngs)

  def prepare(self, batch: dict[str, Array], *, key: Array) -> None:
    """Before step 0: takes the tokenizer's code vectors, `vectors` [D, V, c] of the batch.

    Components start at sums of the batch's codes, in the directions in which these differ most:
    from random means few of them ever reach a sum, and the others are lost. Around a sum that was
    drawn more than once they scatter by exp(`floor`). They are as wide as the nearest of them are
    apart, but no wider than 1 and no narrower than `floor`.

    Raises:
      ValueError: there are no vectors, or they are of another shape.
    """
    if 'vectors' not in batch:
      raise ValueError('ResGen needs the code vectors of its tokenizer, `vectors` [D, V, c].')
    found, wanted = batch['vectors'].shape, self.vectors[...].shape
    if found != wanted:
      raise ValueError(f'The tokenizer has code vectors {found}, and the generator is built for '
                       f'{wanted}; set channels={found[-1]}.')
    self.vectors[...] = batch['vectors'].astype(jnp.float32)
    (number, room), depth = self.centre.embedding.shape, self.spec.depth
    first, second, third = jax.random.split(key, 3)
    codes = jax.random.choice(first, jnp.asarray(batch['tokens']).reshape(-1, depth), (number, 1))
    z = self._standard(codes, jax.random.randint(second, (number, 1), 1, depth + 1))[:, 0]
    # equal ones would have equal gradients for ever, and sums may be fewer than components
    z = z + jnp.exp(self.floor) * jax.random.normal(third, z.shape)
    directions = jnp.linalg.svd(z, full_matrices=False)[2][:room]
    n = len(directions)  # a rank above the channels leaves the rest of the basis as it is
    self.basis.kernel[...] = self.basis.kernel[...].at[:n].set(directions)
    self.centre.embedding[...] = jnp.pad(z @ directions.T, [(0, 0), (0, room - n)])
    # wide at first, all deviations would shrink together, and by far the fastest through a
    # constant that takes over the transformer's output: little else is learned beside it
    size = jnp.mean(z * z, -1)
    apart = size[:, None] + size - 2 / z.shape[-1] * jnp.matmul(z, z.T, precision=HIGHEST)
    nearest = jnp.mean(jnp.min(jnp.where(jnp.eye(number, dtype=bool), jnp.inf, apart), -1))
    # sums have variance 1, which is all that one component alone can go by
    above = jnp.maximum(jnp.log(jnp.clip(nearest, 1e-30, 1)) / 2 - self.floor, 0.05)
    self.spread.bias[...] = jnp.full(  # softplus(bias - floor) = above
        number, self.floor + above + jnp.log(-jnp.expm1(-above)))

  def mixture(self, tokens: Int[Array, 'b n d'], count: Int[Array, 'b n'],
              labels: Int[Array, 'b'] | None, *, key: Array | None = None, train: bool = False
              ) -> Mixture:
    """The law of the standardised sum of the last `count` codes of every position."""
    visible, _ = self.sums(tokens, count)
    _, deviation = self.moments()
    x = self.input(visible / deviation[-1])
    x = x + self.hidden_count(count) + self.place(jnp.arange(self.spec.length))
    label = None if self.label is None else self.label(labels)
    x, where = labelled(self.transformer, self.spec, x, label)
    y = self.transformer(x, **where, key=key, train=train)[:, -self.spec.length:]
    shift, scale = jnp.moveaxis(self.affine(y), -2, 0)
    return Mixture(
        weights=constrain(self.head(y), 'b n c'), spread=self.spread(y),
        low=self.components(y) + self.centre.embedding[...], shift=shift, scale=scale,
        basis=self.basis.kernel[...], floor=self.floor)

  def sums(self, tokens: Int[Array, 'b n d'], count: Int[Array, 'b n']
           ) -> tuple[Float[Array, 'b n c'], Float[Array, 'b n c']]:
    """The sums of the visible code vectors and of the hidden ones, the last `count`."""
    vectors = self.vectors[...][jnp.arange(self.spec.depth), tokens]
    seen = ~hidden(count, self.spec.depth)[..., None]
    return jnp.where(seen, vectors, 0).sum(2), jnp.where(seen, 0, vectors).sum(2)

  def moments(self) -> tuple[Float[Array, 'k c'], Float[Array, 'k c']]:
    """Mean and deviation of the sum of the last k = 0..D codes, were all equally frequent."""
    vectors, there = self.vectors[...], jnp.asarray(self.spec.support())[..., None]
    mean = jnp.mean(vectors, 1, where=there)
    variance = jnp.var(vectors, 1, where=there)
    mean, variance = (jnp.cumsum(jnp.pad(x[::-1], [(1, 0), (0, 0)]), 0) for x in (mean, variance))
    return mean, jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1)

  # ---- training

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Mean nats per channel of the objective, over positions with hidden codes.

    `metrics`: `nll_z_per_dim`, -log density of the standardised sum, per channel; `bound_z_per_dim`
    of the split objective; `components`, the perplexity of their use. Held-out batches return the
    exact density, without label dropout, and say `recoded` (see `change_rate`).
    """
    del step
    tokens, labels = self._read(batch)
    drop, mask, inner = jax.random.split(key, 3)
    if train:
      labels = drop_labels(self, labels, drop)
    first, second = jax.random.split(mask)
    total = self.spec.length * self.spec.depth
    share = schedules.ratio(self.ratio, schedules.strata(batch, first))
    left = jnp.clip(jnp.ceil(share * total).astype(jnp.int32), 1, total)
    count = deepest(jax.random.uniform(second, tokens.shape), jnp.ones(tokens.shape, bool), left)
    z, found = self._standard(tokens, count), self.mixture(tokens, count, labels, key=inner,
                                                           train=train)
    normal, log_weight = found.log_normal(z), jax.nn.log_softmax(found.weights)
    joint = log_weight + normal
    some = count > 0
    size = some.sum() * z.shape[-1]
    nll = jnp.where(some, -jax.nn.logsumexp(joint, -1), 0).sum() / size
    use = jnp.where(some[..., None], jax.nn.softmax(joint), 0).sum((0, 1)) / some.sum()
    metrics = {'nll_z_per_dim': nll, 'components': jnp.exp(jax.scipy.special.entr(use).sum())}
    value = nll
    if train and self.objective == 'split':
      # proportional to the densities alone, as if all weights were equal
      share = jax.nn.softmax(jax.lax.stop_gradient(normal))
      value = jnp.where(some, split(log_weight, normal, share), 0).sum() / size
      metrics['bound_z_per_dim'] = value
    if not train:
      metrics['recoded'] = jnp.mean(change_rate(
          self.vectors[...], tokens, jnp.asarray(self.spec.support())))
    return value, {'metrics': metrics, 'weight': some.sum(), 'statistics': None}

  def _standard(self, tokens: Int[Array, 'b n d'], count: Int[Array, 'b n']
                ) -> Float[Array, 'b n c']:
    """The sum of the hidden code vectors, standardised."""
    _, z = self.sums(tokens, count)
    mean, deviation = self.moments()
    return (z - mean[count]) / deviation[count]

  def _read(self, batch: dict[str, Array]) -> tuple[Int[Array, 'b n d'], Int[Array, 'b'] | None]:
    if 'keep' in batch:
      raise ValueError('keep: ResGen hides codes itself; give whole token arrays.')
    tokens = jnp.asarray(batch['tokens'], jnp.int32)
    return tokens, read_labels(self.classes, batch, len(tokens))

  # ---- sampling

  def sample(self, condition: dict[str, Array] | None, *, keys: Array, settings: ResGenSettings,
             known: Int[Array, 'b n d'] | None = None,
             known_mask: Bool[Array, 'b n d'] | None = None) -> Sample:
    """Draws tokens, given `label` and any known tokens, which come back unchanged.

    The first codes of a position, or all, can be known; they are visible from the start. A known
    code below an unknown one cannot be shown to the model, which sees the first codes of a position
    or none: it is written, and seen, once the codes above it are drawn, and the codes after it are
    quantized with it in place.

    `exact` is True where the draw is from the model's own conditional: where at most one code is
    unknown, and none below it is known.
    """
    size, depth = keys.shape[0], self.spec.depth
    shape = (size, self.spec.length, depth)
    check_request(self, condition, known, known_mask, settings.guidance)
    labels = read_labels(self.classes, condition, size)
    given = (jnp.zeros(shape, jnp.int32) if known is None
             else jnp.asarray(known, jnp.int32).reshape(shape))
    fixed = (jnp.zeros(shape, bool) if known_mask is None
             else jnp.asarray(known_mask, bool).reshape(shape))
    start = depth - jnp.cumprod(fixed, -1).sum(-1)
    plan = self._plan(settings, start.sum(-1))
    mean, deviation = self.moments()
    support = jnp.asarray(self.spec.support())

    def step(state, now):
      tokens, count = state
      draws = fold(keys, now['step'])
      found = self._guided(tokens, count, labels, now.get('guidance'))
      z = found.draw(draws, settings=settings, noise=settings.noise)
      fresh = requantise(self.vectors[...], z * deviation[count] + mean[count], support, count,
                         given, fixed)
      noise = jax.vmap(lambda key: jax.random.gumbel(key, shape[1:], mode='high'))(
          fold(draws, CHOICE))
      sure = found.confidence(z)[..., None]
      sure = sure + settings.choice_temperature * now['anneal'] * noise
      left = deepest(sure, hidden(count, depth), now['left'])
      drawn = hidden(count, depth) & ~hidden(left, depth)
      tokens = jnp.where(drawn, fresh, tokens)  # known and revealed codes are never touched
      state = jnp.where(hidden(left, depth), -1, tokens) if settings.trace else None
      return (tokens, left), state

    (tokens, _), states = jax.lax.scan(step, (given, start), plan)
    below = (fixed & hidden(start, depth)).any((1, 2))
    exact = ((~fixed).sum((1, 2)) <= 1) & ~below
    passes = settings.steps * (1 if settings.guidance is None else 2)
    return Sample(tokens=tokens, nfe=passes, exact=exact, steps=states)

  def _plan(self, settings: ResGenSettings, total: Int[Array, 'b']) -> dict[str, Array]:
    """Per-step arrays; counts are over the codes that are hidden at the start."""
    steps = settings.steps
    plan = {'step': jnp.arange(steps), 'anneal': 1 - jnp.arange(1, steps + 1) / steps,
            'left': schedules.remaining(settings.ratio, steps, total, rounding='revealed')}
    if settings.guidance is not None:
      plan['guidance'] = settings.scales(steps)
    return plan

  def _guided(self, tokens: Array, count: Array, labels: Array | None, scale: Array | None
              ) -> Mixture:
    """The mixture, guided in one pass over [c0, u0, c1, u1, ...]."""
    if scale is None:
      return self.mixture(tokens, count, labels)
    both = processing.pair(labels, jnp.full_like(labels, self.classes))
    return self.mixture(jnp.repeat(tokens, 2, 0), jnp.repeat(count, 2, 0), both).guided(scale)


def deepest(score: Float[Array, 'b n d'], masked: Bool[Array, 'b n d'], left: Int[Array, 'b']
            ) -> Int[Array, 'b n']:
  """How many codes of every position are among the `left` masked ones of least score.

  Of scores that know nothing of their place the counts are multivariate hypergeometric: of all
  codes, MVHG(left; D, .., D), the forward process; of codes of which k_i are masked,
  MVHG(left; k), its exact reverse. Which codes of a position they are does not matter: it hides its
  deepest.
  """
  order = rank(jnp.where(masked, score, jnp.inf).reshape(len(score), -1)).reshape(score.shape)
  return (masked & (order < left[:, None, None])).sum(-1)


def split(log_weight: Float[Array, '*b m'], normal: Float[Array, '*b m'],
          share: Float[Array, '*b m']) -> Float[Array, '*b']:
  """KL(share | weight) - sum share log N: a bound of -log sum weight N for every share (Jensen).

  Equal to it where `share` is the posterior of the components, softmax(log_weight + normal).
  """
  return -(jax.scipy.special.entr(share) + share * (log_weight + normal)).sum(-1)
