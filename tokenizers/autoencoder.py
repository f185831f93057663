"""Autoencoder: convolutional encoder, any quantizer, convolutional decoder.

VQGAN's first stage (Esser et al. 2021, arXiv 2012.09841) without its adversary; the quantizer's
config selects the rest. LlamaGen's VQ-16 is width 128, multipliers (1, 1, 2, 2, 4), 2 blocks,
attention at 16 and ProjectedConfig(VQConfig(codes=16384, dim=8, cosine=True), dim=256).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.convnet import ConvDecoder, ConvEncoder
from smalti.networks.pixels import to_float
from smalti.tokenizers.quantizer import QuantizerConfig
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.tokenizer import Tokenizer, TokenizerConfig
from smalti.tokenizers.vq import VQConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class LossWeights:
  """What each term is multiplied by; a quantizer's terms come unweighted.

  Attributes:
    reconstruction: of the mean error per pixel and channel.
    codebook: of |q - sg z|^2, for codebooks that follow a gradient.
    commitment: of |sg q - z|^2 (beta; arXiv 1711.00937 has 0.25).
    entropy: of the entropy terms of binary and softmax codes (Open-MAGVIT2 0.1, MaskBit 0.02).
  """
  reconstruction: float = 1.0
  codebook: float = 1.0
  commitment: float = 0.25
  entropy: float = 0.1


@dataclasses.dataclass(kw_only=True, slots=True)
class AutoencoderConfig(TokenizerConfig):
  """Images of one size to a grid of codes, `patch * 2 ** (len(multipliers) - 1)` times smaller.

  Attributes:
    image_size: (height, width); the weights do not depend on it.
    channels: of the image.
    width, multipliers, blocks: of the convolutions, see `ConvEncoder`.
    attention: resolutions (the shorter side, in features) with attention, such as (16,).
    patch: 1 for a 3x3 stem, else the side of linearly projected patches.
    quantizer: its vectors have the channels of the encoder's output.
    dropout: in the residual blocks.
    reconstruction: 'l1' (taming, Open-MAGVIT2) or 'l2' (LlamaGen, MaskGIT, TiTok).
    dtype: compute dtype of the convolutions; quantizer, norms and losses are float32.
  """
  image_size: tuple[int, int] = (32, 32)
  channels: int = 3
  width: int = 32
  multipliers: tuple[int, ...] = (1, 2, 2)
  blocks: int = 1
  attention: tuple[int, ...] = ()
  patch: int = 1
  quantizer: QuantizerConfig = dataclasses.field(default_factory=VQConfig)
  dropout: float = 0.0
  reconstruction: Literal['l1', 'l2'] = 'l2'
  weights: LossWeights = dataclasses.field(default_factory=LossWeights)
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def build(self, *, rngs: nnx.Rngs) -> 'Autoencoder':
    return Autoencoder(self, rngs=rngs)


class Autoencoder(Tokenizer):
  """Encoder, quantizer and decoder; tokens are row-major over the grid."""

  def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
    self.size = tuple(config.image_size)
    self.channels, self.reconstruction = config.channels, config.reconstruction
    self.weights = tuple(sorted(dataclasses.asdict(config.weights).items()))
    sides = [config.patch * 2 ** i for i in range(len(config.multipliers))]  # pixels per feature
    if not sides or len(self.size) != 2 or any(s < 1 or s % sides[-1] for s in self.size):
      raise ValueError(
          f'image_size={self.size} must be a multiple of {sides[-1:]} on both sides: patch='
          f'{config.patch}, halved between the levels of multipliers={config.multipliers}.')
    resolutions = [min(self.size) // s for s in sides]
    if unknown := sorted(set(config.attention) - set(resolutions)):
      raise ValueError(f'attention={unknown} is at none of the resolutions {resolutions}.')
    q: Any = config.quantizer.build(rngs=rngs)
    self.quantizer = q
    options: dict[str, Any] = dict(
        channels=config.channels, features=q.dim, width=config.width,
        multipliers=tuple(config.multipliers), blocks=config.blocks, patch=config.patch,
        attention=tuple(i for i, r in enumerate(resolutions) if r in config.attention),
        dropout=config.dropout, dtype=jnp.dtype(config.dtype), rngs=rngs)
    self.encoder, self.decoder = ConvEncoder(**options), ConvDecoder(**options)
    self.spec = TokenSpec(grid=tuple(s // sides[-1] for s in self.size), vocab=q.vocab,
                          factors=q.factors, order=q.order, budgets=q.budgets)

  def latents(self, x: Array, *, key: Array | None = None, train: bool = False
              ) -> Float[Array, 'b n c']:
    """What the quantizer is given, for uint8 or float images.

    Raises:
      ValueError: images of another size or number of channels.
    """
    if x.shape[1:] != (*self.size, self.channels):
      raise ValueError(
          f'Images of {x.shape[1:]} (height, width, channels) do not fit image_size={self.size}, '
          f'channels={self.channels}; convert them, or build the tokenizer with these.')
    z = self.encoder(to_float(x), key=key, train=train)
    return z.reshape(z.shape[0], -1, z.shape[-1])

  def encode(self, x: Array, *, keys: Array | None = None) -> Int[Array, 'b n d']:
    del keys  # nothing is drawn
    return self.quantizer(self.latents(x)).tokens

  def lookup(self, tokens: Int[Array, 'b n d']) -> Float[Array, 'b n c']:
    """The quantized vectors of `tokens`: `decode(t)` is `decode_latents(lookup(t))`, clipped."""
    return self.quantizer.lookup(tokens)

  def decode(self, tokens: Int[Array, 'b n d'], *, keep: Int[Array, 'b'] | None = None,
             keys: Array | None = None, settings: Any = None) -> Float[Array, 'b h w c']:
    """Images in [-1, 1]. `keep` cuts to a prefix per example, for quantizers with an order.

    Raises:
      ValueError: `keep` for raster tokens, which have no prefixes.
    """
    del keys, settings  # deterministic
    prefix = {} if keep is None else {'mask': self.spec.mask(keep)}
    return jnp.clip(self.decode_latents(self.quantizer.lookup(tokens, **prefix)), -1, 1)

  def decode_latents(self, vectors: Float[Array, 'b n f'], *, key: Array | None = None,
                     train: bool = False) -> Float[Array, 'b h w c']:
    """Images from vectors, which need not be codes; not clipped, as the loss wants them."""
    grid = vectors.reshape(vectors.shape[0], *self.spec.grid, vectors.shape[-1])
    return self.decoder(grid, key=key, train=train)

  def soft_assign(self, x: Array, tau: float = 1.0) -> Float[Array, 'b n v']:
    """Log-probabilities of the codes at every position, where the quantizer has them."""
    return self.quantizer.soft_assign(self.latents(x), tau)

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Weighted reconstruction and quantizer terms of `batch['image']`, a mean over examples."""
    del step  # nothing is scheduled
    x = to_float(batch['image'])
    down, quantize, up = jax.random.split(key, 3)
    q = self.quantizer(self.latents(x, key=down, train=train), key=quantize, train=train)
    y = self.decode_latents(q.vectors, key=up, train=train)
    error = jnp.abs(x - y) if self.reconstruction == 'l1' else jnp.square(x - y)
    terms = {'reconstruction': jnp.mean(error), **q.losses}
    weights = dict(self.weights)
    if unknown := sorted(set(terms) - set(weights)):
      raise ValueError(f'No weight for the terms {unknown}; known are {sorted(weights)}.')
    loss = sum(weights[name] * term for name, term in terms.items())
    metrics = {**terms, **q.metrics, 'mse': jnp.mean(jnp.square(x - jnp.clip(y, -1, 1))),
               'psnr': jnp.mean(psnr(x, y))}
    statistics = None if q.statistics is None else {'quantizer': q.statistics}
    return loss, {'metrics': jax.lax.stop_gradient(metrics), 'weight': jnp.float32(x.shape[0]),
                  'statistics': statistics}

  def prepare(self, batch: dict[str, Array], *, key: Array) -> None:
    """Data-dependent initialisation of the codebooks, from the encoder's first output."""
    self.quantizer.prepare(self.latents(batch['image']), key=key)


def psnr(x: Float[Array, 'b h w c'], y: Float[Array, 'b h w c']) -> Float[Array, 'b']:
  """Peak signal-to-noise ratio in dB of each image, on rounded levels 0..255; 100 at most."""
  levels = [jnp.clip(jnp.rint(127.5 * (v + 1)), 0, 255) for v in (x, y)]
  error = jnp.mean(jnp.square(levels[0] - levels[1]), (1, 2, 3)) / 255**2
  return -10 * jnp.log10(jnp.maximum(error, 1e-10))  # an exact copy must not log infinity
