"""Image tokenizers with a deterministic decoder: what convolutions, patches and registers share.

A subclass brings the network in three pieces, `latents` before the quantizer, `trunk` and `paint`
after it; encoding, decoding, the weighted loss and its metrics are here. `paint` is the last layer
alone, where the weight of an adversary is measured (Esser et al. 2021, arXiv 2012.09841, eq. 7).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.pixels import to_float
from smalti.tokenizers.adversary import Adversary, AdversaryConfig, Round, tied
from smalti.tokenizers.quantizer import Quantizer, QuantizerConfig, sg
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.tokenizer import Tokenizer, TokenizerConfig
from smalti.tokenizers.vq import VQConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class LossWeights:
  """What each term is multiplied by; a quantizer's terms come unweighted.

  Attributes:
    reconstruction: of the mean error per pixel and channel.
    perceptual: of the mean distance in the features of a frozen network, where there is one.
    codebook: of |q - sg z|^2, for codebooks that follow a gradient.
    commitment: of |sg q - z|^2 (beta; arXiv 1711.00937 has 0.25).
    entropy: of the entropy terms of binary and softmax codes (Open-MAGVIT2 0.1, MaskBit 0.02).
    code: of mean y (1 - y), the uncertainty of Bernoulli codes (Binary Latent Diffusion: 0).
    alignment: of minus the cosine to a frozen network's features, where there is one (REPA: 0.5).
    entropy_boost, entropy_steps: at step 0 the entropy terms weigh `entropy_boost` times that,
      falling linearly to once at `entropy_steps` (MaskBit and BSQ: 3 over 2,000 steps).
  """
  reconstruction: float = 1.0
  perceptual: float = 1.0
  codebook: float = 1.0
  commitment: float = 0.25
  entropy: float = 0.1
  code: float = 0.0
  alignment: float = 0.5
  entropy_boost: float = 1.0
  entropy_steps: int = 2000

  def __post_init__(self):
    if self.entropy_steps < 1:
      raise ValueError(f'entropy_steps={self.entropy_steps} must be 1 or more.')

  def total(self, terms: dict[str, Array], step: Array, *, train: bool) -> Array:
    """The weighted sum of named terms at a step.

    Raises:
      ValueError: a term without a weight.
    """
    known = sorted({f.name for f in dataclasses.fields(self)} - {'entropy_boost', 'entropy_steps'})
    if unknown := sorted(set(terms) - set(known)):
      raise ValueError(f'No weight for the terms {unknown}; known are {known}.')
    weights = {name: getattr(self, name) for name in terms}
    if 'entropy' in weights and train and self.entropy_boost != 1:
      left = jnp.maximum(0.0, 1 - step / self.entropy_steps)
      weights['entropy'] *= 1 + (self.entropy_boost - 1) * left
    return sum((weights[name] * term for name, term in terms.items()), jnp.zeros(()))


@dataclasses.dataclass(kw_only=True, slots=True)
class ImageTokenizerConfig(TokenizerConfig):
  """Base of the configs of image tokenizers.

  Attributes:
    image_size: (height, width).
    channels: of the image.
    quantizer: its vectors have the channels of the encoder's output.
    reconstruction: 'l1' (taming, Open-MAGVIT2) or 'l2' (LlamaGen, MaskGIT, TiTok).
    perceptual: a distance in the features of a frozen network, which whoever trains puts into the
      batch as `perceptual`: 'lpips' needs its published weights, 'proxy' is a classifier trained on
      small images, 'auto' the first of these that there is, or none.
    weights: of the terms of the loss.
    adversary: a discriminator to play against; not part of the released tokenizer.
    dtype: compute dtype of the network; quantizer, norms and losses are float32.
  """
  image_size: tuple[int, int] = (32, 32)
  channels: int = 3
  quantizer: QuantizerConfig = dataclasses.field(default_factory=VQConfig)
  reconstruction: Literal['l1', 'l2'] = 'l2'
  perceptual: Literal['auto', 'lpips', 'proxy', 'none'] = 'none'
  weights: LossWeights = dataclasses.field(default_factory=LossWeights)
  adversary: AdversaryConfig | None = None
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def released(self) -> 'ImageTokenizerConfig':
    return dataclasses.replace(self, adversary=None)


class ImageTokenizer(Tokenizer):
  """Encoder, quantizer and decoder.

  A subclass calls `setup`, and defines `features`, `trunk` and `paint`; where its positions have an
  order of their own, also `budget`, and `trunk` obeys `keep`.

  Attributes:
    last: the path of the kernel of the last layer, which `paint` is.
  """

  quantizer: Any
  weights: tuple[tuple[str, Any], ...]
  last: tuple[str, ...] = ('decoder', 'output', 'kernel')

  def setup(self, config: ImageTokenizerConfig, quantizer: Quantizer, grid: tuple[int, ...], *,
            order: str | None = None, budgets: tuple[int, ...] = (), rngs: nnx.Rngs) -> None:
    """Sets what all image tokenizers have; call it last.

    Args:
      grid: of the vectors; a quantizer with a `grid` has another one for its tokens.
      order, budgets: of the positions, where a prefix runs along them; else the quantizer's.
      rngs: what encoder, decoder and quantizer have drawn from, so that they start as they would
        without an adversary.
    """
    quantizer.fits(grid)
    self.size, self.channels = tuple(config.image_size), config.channels
    self.reconstruction, self.perceptual = config.reconstruction, config.perceptual
    self.discriminator: Any = config.adversary and Adversary(
        config.adversary, size=config.image_size, channels=config.channels,
        dtype=jnp.dtype(config.dtype), rngs=rngs)
    self.weights = tuple(dataclasses.asdict(config.weights).items())  # hashable, for jit
    self.grid, self.quantizer = grid, quantizer
    self.spec = TokenSpec(
        grid=getattr(quantizer, 'grid', None) or grid, vocab=quantizer.vocab,
        factors=quantizer.factors, order=order or quantizer.order,  # type: ignore[arg-type]
        budgets=budgets or quantizer.budgets)

  def features(self, x: Float[Array, 'b h w c'], *, key: Array | None, train: bool
               ) -> Float[Array, 'b n f']:
    """What the quantizer is given."""
    raise TypeError(f'{type(self).__name__} has no encoder.')

  def trunk(self, vectors: Float[Array, 'b n f'], *, keep: Int[Array, 'b'] | None = None,
            key: Array | None = None, train: bool = False) -> Array:
    """The decoder without its last layer."""
    raise TypeError(f'{type(self).__name__} has no decoder.')

  def paint(self, features: Array) -> Float[Array, 'b h w c']:
    """The decoder's last layer: an image, not clipped."""
    raise TypeError(f'{type(self).__name__} has no decoder.')

  def budget(self, key: Array, batch: int) -> Int[Array, 'b'] | None:
    """How many positions each training example keeps; None is all of them."""
    del key, batch
    return None

  def latents(self, x: Array, *, key: Array | None = None, train: bool = False
              ) -> Float[Array, 'b n f']:
    """What the quantizer is given, for uint8 or float images.

    Raises:
      ValueError: images of another size or number of channels.
    """
    if x.shape[1:] != (*self.size, self.channels):
      raise ValueError(
          f'Images of {x.shape[1:]} (height, width, channels) do not fit image_size={self.size}, '
          f'channels={self.channels}; convert them, or build the tokenizer with these.')
    return self.features(to_float(x), key=key, train=train)

  def encode(self, x: Array, *, keys: Array | None = None) -> Int[Array, 'b n d']:
    """Tokens of images; `keys`, one per example, where the quantizer is `stochastic`."""
    keys = keys if self.quantizer.stochastic else None  # else nothing is drawn
    return self.quantizer(self.latents(x), key=keys).tokens

  def lookup(self, tokens: Int[Array, 'b n d'], *, keep: Int[Array, 'b'] | None = None
             ) -> Float[Array, 'b m f']:
    """The quantized vectors of `tokens`, or of the first `keep` codes or scales of each."""
    if keep is None or self.quantizer.order == 'raster':
      return self.quantizer.lookup(tokens)
    return self.quantizer.lookup(tokens, mask=self.spec.mask(keep))

  def decode(self, tokens: Int[Array, 'b n d'], *, keep: Int[Array, 'b'] | None = None,
             keys: Array | None = None, settings: Any = None) -> Float[Array, 'b h w c']:
    """Images in [-1, 1]. `keep` cuts to a prefix per example, where the tokens have an order.

    Raises:
      ValueError: `keep` for raster tokens or a set, which have no prefixes.
    """
    del keys, settings  # deterministic
    if keep is not None:
      self.spec.mask(keep)  # says why not
    return jnp.clip(self.decode_latents(self.lookup(tokens, keep=keep), keep=keep), -1, 1)

  def decode_latents(self, vectors: Float[Array, 'b n f'], *, keep: Int[Array, 'b'] | None = None,
                     key: Array | None = None, train: bool = False) -> Float[Array, 'b h w c']:
    """Images from vectors, which need not be codes; not clipped, as the loss wants them."""
    return self.paint(self.trunk(vectors, keep=keep, key=key, train=train))

  def soft_assign(self, x: Array, tau: float = 1.0) -> Float[Array, 'b n v']:
    """Log-probabilities of the codes at every position, where the quantizer has them."""
    return self.quantizer.soft_assign(self.latents(x), tau)

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Weighted terms of `batch['image']`, a mean over examples.

    With an adversary its generator's loss is one of them, from its first step on in training, and
    the scalar carries the discriminator's gradient too, though not the value of its loss.

    Raises:
      ValueError: the batch lacks the frozen network of a perceptual distance that was asked for.
    """
    x = to_float(batch['image'])
    down, quantize, up, cut = jax.random.split(key, 4)
    q = self.quantizer(self.latents(x, key=down, train=train), key=quantize, train=train)
    keep = self.budget(cut, x.shape[0]) if train else None
    h = self.trunk(q.vectors, keep=keep, key=up, train=train)
    y = self.paint(h)
    weights = LossWeights(**dict(self.weights))
    judge: Any = batch.get('perceptual')
    if judge is None and self.perceptual in ('lpips', 'proxy'):
      raise ValueError(f'perceptual={self.perceptual!r} needs its frozen network in the batch, as '
                       "'perceptual'; smalti train puts it there.")

    def likeness(y: Array) -> tuple[Array, dict[str, Array]]:
      terms = {'reconstruction': jnp.mean(
          jnp.abs(x - y) if self.reconstruction == 'l1' else jnp.square(x - y))}
      if judge is not None:
        terms['perceptual'] = jnp.mean(judge(x, y))
      return weights.total(terms, step, train=train), terms

    if self.discriminator is None:
      loss, terms = likeness(y)
      play, statistics = {}, None
    elif not train:
      loss, terms = likeness(y)
      play, statistics = self.discriminator.metrics(x, y), None
    else:
      loss, terms, play, statistics = self._against(
          x, y, h, likeness, step, jax.random.fold_in(key, 4))  # beside the four above
    loss = loss + weights.total(q.losses, step, train=train)
    if judge is not None:
      terms[judge.name] = terms.pop('perceptual')
    metrics = {**terms, **q.losses, **q.metrics, **play,
               'mse': jnp.mean(jnp.square(x - jnp.clip(y, -1, 1))), 'psnr': jnp.mean(psnr(x, y))}
    found = {'quantizer': q.statistics, 'discriminator': statistics}
    return loss, {'metrics': jax.lax.stop_gradient(metrics), 'weight': jnp.float32(x.shape[0]),
                  'statistics': {k: v for k, v in found.items() if v is not None} or None}

  def _against(self, x: Float[Array, 'b h w c'], y: Float[Array, 'b h w c'], h: Array,
               likeness: Callable[[Array], tuple[Array, dict[str, Array]]], step: Array,
               key: Array) -> tuple:
    """The loss with its adversary, terms, metrics and statistics of a step of training.

    Both players' gradients are taken at the image, weighed there, and go through the decoder
    together: one backward pass, whatever the weight depends on.
    """
    (value, terms), toward = jax.value_and_grad(likeness, has_aux=True)(sg(y))
    play: Round = self.discriminator.play(x, y, step, key)
    ratio: Any = 1.0
    if self.discriminator.adaptive:
      ours, theirs = (self._pull(sg(h), push) for push in (toward, play.push))
      ratio = ours / (theirs + 1e-4)
    weight = self.discriminator.weight(step, ratio)
    loss = tied(value + weight * play.generator, (y, play.params),
                (toward + weight * play.push, play.gradient))
    return loss, terms, {**play.metrics, 'adversary/weight': weight}, play.statistics

  def _pull(self, h: Array, push: Float[Array, 'b h w c']) -> Float[Array, '']:
    """The norm of an image's gradient, taken on to the kernel of the last layer."""
    graph, *parts = nnx.split(self, lambda path, _: tuple(map(str, path)) == self.last, ...)
    kernel, rest = parts
    _, back = jax.vjp(lambda kernel: nnx.merge(graph, kernel, rest).paint(h), kernel)
    return jnp.linalg.norm(jax.tree.leaves(back(push)[0])[0])

  def prepare(self, batch: dict[str, Array], *, key: Array) -> None:
    """Data-dependent initialisation of the codebooks, from the encoder's first output."""
    self.quantizer.prepare(self.latents(batch['image']), key=key)


def psnr(x: Float[Array, 'b h w c'], y: Float[Array, 'b h w c']) -> Float[Array, 'b']:
  """Peak signal-to-noise ratio in dB of each image, on rounded levels 0..255; 100 at most."""
  levels = [jnp.clip(jnp.rint(127.5 * (v + 1)), 0, 255) for v in (x, y)]
  error = jnp.mean(jnp.square(levels[0] - levels[1]), (1, 2, 3)) / 255**2
  return -10 * jnp.log10(jnp.maximum(error, 1e-10))  # an exact copy must not log infinity
