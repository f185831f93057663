"""The adversary of an image tokenizer: a discriminator, both players' losses, and LeCAM.

VQGAN (Esser et al. 2021, arXiv 2012.09841) and what came after it. Both players move in one step
and see the same images: the decoder is pushed along the gradient of its loss by the reconstruction,
the discriminator learns from that reconstruction as a constant. Unusual here: the logits of the
reconstruction are computed once for both, gradients are taken by hand and handed to autodiff by
`tied`, so that the tokenizer is differentiated once, and LeCAM's averages are codebook-like state,
written after the step and part of every checkpoint.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.augmentation import Augmentation, augment
from smalti.networks.discriminator import BlurDiscriminatorConfig, DiscriminatorConfig
from smalti.tokenizers.quantizer import Buffer, Statistics, sg

Loss = Literal['hinge', 'vanilla', 'nonsaturating', 'mixed']


@dataclasses.dataclass(kw_only=True, slots=True)
class AdversaryConfig:
  """A discriminator and how it plays. The experiment's `discriminator` is its optimizer.

  Attributes:
    discriminator: the network.
    loss: 'hinge' (VQGAN, LlamaGen, MaskBit, TiTok), 'vanilla' (BSQ: logistic, and the hinge's
      generator), 'nonsaturating' (MaskGIT), or 'mixed': nonsaturating generator, hinge
      discriminator (Open-MAGVIT2, SimVQ). See `generator_loss` and `discriminator_loss`.
    weight: of the generator's loss (Open-MAGVIT2 and MaskGIT 0.1, MaskBit 0.02, LlamaGen 0.5,
      VQGAN 0.8 with `adaptive`). At 0 the discriminator learns and the tokenizer does not feel it.
    adaptive: multiplies the weight by |g_rec| / (|g_gan| + 1e-4), the norms of both losses'
      gradients at the last layer's kernel (VQGAN, equation 7; the codes after 2023 gave it up).
    limit: the largest such ratio (VQGAN 1e4, BLD 1).
    start: the first step with an adversary (VQGAN 250,001; LlamaGen, MaskBit and TiTok 20,000).
    warm: steps from `start` on in which the discriminator learns and the generator does not feel
      it yet; 1,000 spare the jump of a discriminator that was never trained.
    lecam: weight of LeCAM (Tseng et al. 2021, arXiv 2104.03310) in the discriminator's loss
      (MaskBit and TiTok 0.001, Open-MAGVIT2 0.05); 0 keeps no averages.
    decay: of LeCAM's averages, per step.
    penalty: weight of R1 (Mescheder et al. 2018, arXiv 1801.04406) in the discriminator's loss,
      mean |d D(x) / dx|^2 over real images (MaskGIT 10; BSQ 5, as 80 at every 16th step).
    augment: what images go through before they are judged in training, real ones and others, see
      `augmentation.augment`: for few images (an option of BLD).
  """
  discriminator: DiscriminatorConfig = dataclasses.field(default_factory=BlurDiscriminatorConfig)
  loss: Loss = 'hinge'
  weight: float = 0.1
  adaptive: bool = False
  limit: float = 1e4
  start: int = 0
  warm: int = 0
  lecam: float = 0.0
  decay: float = 0.999
  penalty: float = 0.0
  augment: Augmentation = 'none'

  def __post_init__(self):
    for name in ('weight', 'limit', 'start', 'warm', 'lecam', 'penalty'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must be 0 or more.')
    if not 0 <= self.decay < 1:
      raise ValueError(f'decay={self.decay} must be in [0, 1).')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Round:
  """What one step of play gives.

  Attributes:
    generator: the generator's loss, unweighted.
    push: its gradient by the reconstruction.
    params, gradient: the discriminator's parameters, and the gradient of its loss by them.
    metrics: scalars to log.
    statistics: for `absorb`, or None.
  """
  generator: Array
  push: Float[Array, 'b h w c']
  params: Any
  gradient: Any
  metrics: dict[str, Array]
  statistics: dict[str, Any] | None


class Adversary(nnx.Module):
  """A discriminator network and how it plays; a tokenizer has it as `discriminator`."""

  def __init__(self, config: AdversaryConfig, *, size: tuple[int, int], channels: int, dtype: Any,
               rngs: nnx.Rngs):
    self.network: Any = config.discriminator.build(
        size=size, channels=channels, dtype=dtype, rngs=rngs)
    self.kind, self.base = config.loss, config.weight
    self.adaptive, self.limit = config.adaptive, config.limit
    self.start, self.warm = config.start, config.warm
    self.strength, self.penalty, self.augment = config.lecam, config.penalty, config.augment
    self.lecam = Lecam(config.decay) if config.lecam else None

  def play(self, x: Float[Array, 'b h w c'], y: Float[Array, 'b h w c'], step: Array, key: Array
           ) -> Round:
    """One step of both players on images and their reconstructions, as constants.

    Before `start` everything in it is zero. Accelerators then compute nothing; on CPUs it is
    computed and thrown away, because convolutions inside conditionals are 10-40 times slower there.
    """
    graph, *parts = nnx.split(self.network, nnx.Param, ...)
    params, rest = parts
    seen, other = jax.random.split(key)
    x, y = augment(sg(x), self.augment, seen), sg(y)

    def judge(params: Any, images: Array) -> Float[Array, 'b n']:
      return nnx.merge(graph, params, rest)(images)

    def play(params: Any, x: Array, y: Array) -> tuple:
      real, of_real = jax.vjp(lambda params: judge(params, x), params)
      fake, of_fake = jax.vjp(
          lambda params, y: judge(params, augment(y, self.augment, other)), params, y)
      generator, felt = jax.value_and_grad(lambda fake: generator_loss(self.kind, fake))(fake)
      _, push = of_fake(felt)
      (_, metrics), (d_real, d_fake) = jax.value_and_grad(
          self._loss, argnums=(0, 1), has_aux=True)(real, fake)
      gradient = jax.tree.map(jnp.add, of_real(d_real)[0], of_fake(d_fake)[0])
      if self.penalty:
        steep, steeper = jax.value_and_grad(lambda params: slope(judge, params, x))(params)
        gradient = jax.tree.map(lambda a, b: a + self.penalty * b, gradient, steeper)
        metrics['adversary/slope'] = steep
      statistics = None
      if self.lecam is not None:
        count = jnp.array([real.size, fake.size], jnp.float32)
        total = jnp.stack([jnp.sum(real), jnp.sum(fake)])[:, None]
        statistics = {'lecam': Statistics(count, total, jnp.zeros((2, 1)))}
      return generator, push, gradient, {'adversary/generator': generator, **metrics}, statistics

    generator, push, gradient, metrics, statistics = since(
        self.start, step, play, params, x, y)
    return Round(generator, push, params, gradient, metrics, statistics)

  def weight(self, step: Array, ratio: Array | float = 1.0) -> Array:
    """What the generator's loss is multiplied by; `ratio` is |g_rec| / (|g_gan| + 1e-4)."""
    felt = step >= self.start + self.warm
    return jnp.where(felt, self.base * jnp.clip(ratio, 0, self.limit), 0.0)

  def metrics(self, x: Float[Array, 'b h w c'], y: Float[Array, 'b h w c']) -> dict[str, Array]:
    """The discriminator's metrics on held-out images."""
    return self._loss(self.network(x), self.network(y))[1]

  def _loss(self, real: Float[Array, 'b n'], fake: Float[Array, 'b n']
            ) -> tuple[Array, dict[str, Array]]:
    loss = discriminator_loss(self.kind, real, fake)
    metrics = {'adversary/discriminator': loss, 'adversary/real': jnp.mean(real),
               'adversary/fake': jnp.mean(fake)}
    if self.lecam is not None:
      distance = self.lecam(real, fake)
      loss, metrics['adversary/lecam'] = loss + self.strength * distance, distance
    return loss, metrics


class Lecam(nnx.Module):
  """mean relu(real - a_fake)^2 + mean relu(a_real - fake)^2, with moving averages a of both logits.

  Before the first step with a discriminator there are none, and that step's own means stand in:
  averages that start at 0, as in published code, pull all logits there for the first 1 / (1 -
  decay) steps. (MaskBit and TiTok take the means of the logits before the squares.)
  """

  def __init__(self, decay: float):
    self.decay = decay
    self.average = Buffer(jnp.zeros(2))  # of real and generated images
    self.count = Buffer(jnp.zeros(()))  # steps absorbed

  def __call__(self, real: Float[Array, 'b n'], fake: Float[Array, 'b n']) -> Float[Array, '']:
    own = sg(jnp.stack([jnp.mean(real), jnp.mean(fake)]))
    average = jnp.where(self.count[...] > 0, self.average[...], own)
    return jnp.mean(jnp.square(jax.nn.relu(real - average[1]))) + jnp.mean(
        jnp.square(jax.nn.relu(average[0] - fake)))

  def absorb(self, statistics: Statistics) -> None:
    """Moves the averages to the means of a step's logits; starts them with the first."""
    seen = statistics.count[0] > 0
    mean = statistics.total[:, 0] / jnp.maximum(statistics.count, 1)
    decay = jnp.where(self.count[...] > 0, self.decay, 0.0)
    average = decay * self.average[...] + (1 - decay) * mean
    self.average[...] = jnp.where(seen, average, self.average[...])
    self.count[...] = self.count[...] + seen


def generator_loss(kind: Loss, fake: Float[Array, 'b n']) -> Float[Array, '']:
  """-mean logit, or softplus(-logit) of each image's mean logit (as Open-MAGVIT2 has it)."""
  if kind in ('hinge', 'vanilla'):
    return -jnp.mean(fake)
  return jnp.mean(jax.nn.softplus(-jnp.mean(fake, -1)))


def discriminator_loss(kind: Loss, real: Float[Array, 'b n'], fake: Float[Array, 'b n']
                       ) -> Float[Array, '']:
  """Half of each margin or cross-entropy per logit; 'nonsaturating' the whole of each image's."""
  if kind in ('hinge', 'mixed'):
    return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2
  if kind == 'vanilla':
    return (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))) / 2
  return jnp.mean(jax.nn.softplus(-jnp.mean(real, -1))) + jnp.mean(
      jax.nn.softplus(jnp.mean(fake, -1)))


def slope(judge: Callable[[Any, Array], Array], params: Any, x: Float[Array, 'b h w c']
          ) -> Float[Array, '']:
  """R1: the squared gradient of an image's summed logits by its pixels, a mean over images."""
  gradient = jax.grad(lambda x: jnp.sum(judge(params, x)))(x)
  return jnp.mean(jnp.sum(jnp.square(gradient), (1, 2, 3)))


def since(start: int, step: Array, function: Callable[..., Any], *arguments: Any) -> Any:
  """`function(*arguments)` from step `start` on, zeros of the same shapes before it."""
  if start == 0:
    return function(*arguments)
  if jax.default_backend() == 'cpu':
    return jax.tree.map(lambda x: jnp.where(step >= start, x, jnp.zeros_like(x)),
                        function(*arguments))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))
  return jax.lax.cond(step >= start, function, lambda *_: zeros, *arguments)


@jax.custom_vjp
def tied(value: Array, x: Any, gradient: Any) -> Array:
  """`value`, whose gradient by `x` is `gradient` and by anything else zero."""
  del x, gradient
  return value


tied.defvjp(lambda value, x, gradient: (value, gradient),
            lambda gradient, g: (None, jax.tree.map(lambda d: g * d, gradient), None))
