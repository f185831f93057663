"""Styled: an image as a few latents without places, decoded by a network that each modulates.

Three models of one network, which differ in the bottleneck alone, as Hsu et al. 2023 (arXiv
2305.18378) compare them. `StyledConfig` keeps the latents as they are: an autoencoder, continuous,
so it has no tokens and is no Tokenizer. `StyledTokenizerConfig` quantizes them: with `LatentConfig`
each is one of a few values of its own (the paper's QLAE), with `VQConfig` a row of one codebook of
vectors (its VQ-VAE baseline).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.model import ModelConfig
from smalti.networks.pixels import to_float
from smalti.networks.styled import StyleDecoder, StyleEncoder
from smalti.tokenizers.image import ImageTokenizer, LossWeights, psnr
from smalti.tokenizers.latent import LatentConfig
from smalti.tokenizers.quantizer import QuantizerConfig
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.tokenizer import TokenizerConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class StyledConfig(ModelConfig):
  """The plain autoencoder: `latents` real numbers.

  Attributes:
    image_size: (height, width), multiples of `patch * 2 ** (len(widths) - 1)`.
    channels: of the image.
    patch: side of the patches that the first layer projects.
    widths: channels per resolution, the finest first.
    hidden: width of the dense layers.
    latents: m; the paper takes twice the number of factors.
    dtype: compute dtype of the network; quantizer and losses are float32.
  """
  image_size: tuple[int, int] = (64, 64)
  channels: int = 3
  patch: int = 4
  widths: tuple[int, ...] = (32, 64, 128)
  hidden: int = 128
  latents: int = 12
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def build(self, *, rngs: nnx.Rngs) -> 'Styled':
    return Styled(self, dim=1, rngs=rngs)


@dataclasses.dataclass(kw_only=True, slots=True)
class StyledTokenizerConfig(StyledConfig, TokenizerConfig):
  """Each latent is quantized: `latents` tokens without an order.

  Attributes:
    quantizer: takes one vector per latent.
    weights: of reconstruction, codebook and commitment; the paper has 1, 0.01, 0.01 for QLAE and
      1, 1, 0.25 for VQ-VAE.
  """
  quantizer: QuantizerConfig = dataclasses.field(default_factory=LatentConfig)
  weights: LossWeights = dataclasses.field(
      default_factory=lambda: LossWeights(codebook=0.01, commitment=0.01))

  def build(self, *, rngs: nnx.Rngs) -> 'StyledTokenizer':
    return StyledTokenizer(self, rngs=rngs)


class Styled(nnx.Module):
  """Encoder and decoder, and nothing between them.

  The loss is the cross-entropy in nats of pixels as probabilities in [0, 1], a mean over pixels and
  channels. It is never below the pixels' own entropy.
  """

  def __init__(self, config: StyledConfig, *, dim: int, rngs: nnx.Rngs):
    if config.latents < 1:
      raise ValueError(f'latents={config.latents} must be positive.')
    self.size, self.channels = tuple(config.image_size), config.channels
    self.positions, self.dim = config.latents, dim
    options: dict[str, Any] = dict(
        size=self.size, channels=config.channels, patch=config.patch, widths=tuple(config.widths),
        hidden=config.hidden, features=config.latents * dim, dtype=jnp.dtype(config.dtype),
        rngs=rngs)
    self.encoder, self.decoder = StyleEncoder(**options), StyleDecoder(**options)

  def latents(self, x: Array, **_: Any) -> Float[Array, 'b n c']:
    """One vector per latent, for uint8 or float images.

    Raises:
      ValueError: images of another size or number of channels.
    """
    if x.shape[1:] != (*self.size, self.channels):
      raise ValueError(
          f'Images of {x.shape[1:]} (height, width, channels) do not fit image_size={self.size}, '
          f'channels={self.channels}; convert them, or build the model with these.')
    return self.encoder(to_float(x)).reshape(-1, self.positions, self.dim)

  def decode_latents(self, vectors: Float[Array, 'b n f']) -> Float[Array, 'b h w c']:
    """Images in [-1, 1] from vectors, which need not be codes."""
    return to_image(self.logits(vectors))

  def logits(self, vectors: Float[Array, 'b n f']) -> Float[Array, 'b h w c']:
    """What `decode_latents` squashes."""
    return self.decoder(vectors.reshape(vectors.shape[0], -1))

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Cross-entropy of `batch['image']`, a mean over examples."""
    del step, key, train  # nothing is scheduled or drawn
    x = to_float(batch['image'])
    terms, metrics = self.terms(x, self.latents(x))
    return terms['reconstruction'], {
        'metrics': jax.lax.stop_gradient({**terms, **metrics}), 'weight': jnp.float32(x.shape[0]),
        'statistics': None}

  def terms(self, x: Float[Array, 'b h w c'], vectors: Float[Array, 'b n f']
            ) -> tuple[dict[str, Array], dict[str, Array]]:
    """(loss terms, metrics) of decoding `vectors`."""
    logits, p = self.logits(vectors), (x + 1) / 2
    # -p log s - (1 - p) log(1 - s), s = sigmoid(logits)
    error = jax.nn.softplus(logits) - p * logits
    y = to_image(logits)
    return {'reconstruction': jnp.mean(error)}, {
        'mse': jnp.mean(jnp.square(x - y)), 'psnr': jnp.mean(psnr(x, y))}


class StyledTokenizer(Styled, ImageTokenizer):
  """Styled with a quantizer; tokens are the latents, in no order."""

  def __init__(self, config: StyledTokenizerConfig, *, rngs: nnx.Rngs):
    q: Any = config.quantizer.build(rngs=rngs)
    if getattr(q, 'latents', config.latents) != config.latents:
      raise ValueError(f'latents={config.latents}, and the quantizer has {q.latents}; '
                       'they are the same latents.')
    super().__init__(config, dim=q.dim, rngs=rngs)
    self.quantizer = q
    self.weights = tuple(dataclasses.asdict(config.weights).items())
    self.spec = TokenSpec(grid=(config.latents,), vocab=q.vocab, factors=q.factors, order='set')

  def decode_latents(self, vectors: Float[Array, 'b n f'], **_: Any) -> Float[Array, 'b h w c']:
    """Images in [-1, 1] from vectors, which need not be codes."""
    return Styled.decode_latents(self, vectors)

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Weighted cross-entropy and quantizer terms of `batch['image']`, a mean over examples."""
    x = to_float(batch['image'])
    q = self.quantizer(self.latents(x), key=key, train=train)
    terms, metrics = self.terms(x, q.vectors)
    terms = {**terms, **q.losses}
    loss = LossWeights(**dict(self.weights)).total(terms, step, train=train)
    statistics = None if q.statistics is None else {'quantizer': q.statistics}
    return loss, {'metrics': jax.lax.stop_gradient({**terms, **metrics, **q.metrics}),
                  'weight': jnp.float32(x.shape[0]), 'statistics': statistics}


def to_image(logits: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  """2 sigmoid(logits) - 1."""
  return jnp.tanh(logits / 2)
