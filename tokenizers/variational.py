"""KL-VAE: continuous latents of unit deviation, for the flows and diffusions that model them.

Kingma and Welling 2014, arXiv 1312.6114, with the weak prior of latent diffusion (Rombach et al.
2022, arXiv 2112.10752) and the sizes of FlexTok's stage 0 (arXiv 2502.13967). It has no tokens, so
it is no Tokenizer; `freeze` makes it a part of one.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smalti.networks.convnet import ConvDecoder, ConvEncoder
from smalti.networks.model import ModelConfig
from smalti.networks.pixels import to_float
from smalti.tokenizers.image import psnr
from smalti.tokenizers.quantizer import Buffer, Statistics

LOG_VARIANCE = -30.0, 20.0  # bounds of CompVis/latent-diffusion and diffusers
DECAY = 0.99  # of the moments behind the scale: about the last hundred steps


@dataclasses.dataclass(kw_only=True, slots=True)
class VAEConfig(ModelConfig):
  """Images of one size to a grid of latents, `2 ** (len(multipliers) - 1)` times smaller.

  Attributes:
    image_size: (height, width); the weights do not depend on it.
    channels: of the image.
    features: channels of the latents; FlexTok releases 4, 8 and 16.
    width, multipliers, blocks: of the convolutions, see `ConvEncoder`; FlexTok's f8 has 128,
      (1, 2, 4, 4) and 2.
    attention: resolutions (the shorter side, in features) with attention.
    kl: weight of the divergence from N(0, 1), a sum over the latents of an image, beside an error
      that is a mean (1e-6 as in TA-TiTok; latent diffusion sums the error too: divide its weights
      by height * width * channels).
    reconstruction: 'l1' (latent diffusion) or 'l2', a mean over pixels and channels.
    dtype: compute dtype of the convolutions; the posterior and the loss are float32.
  """
  image_size: tuple[int, int] = (32, 32)
  channels: int = 3
  features: int = 4
  width: int = 32
  multipliers: tuple[int, ...] = (1, 2, 2)
  blocks: int = 1
  attention: tuple[int, ...] = ()
  kl: float = 1e-6
  reconstruction: Literal['l1', 'l2'] = 'l1'
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def build(self, *, rngs: nnx.Rngs) -> 'VAE':
    return VAE(self, rngs=rngs)


class VAE(nnx.Module):
  """A Gaussian posterior per image; its mean, times a stored constant, is the latent.

  The constant is one over the deviation of the means over all latents of about the last hundred
  training batches: count, sum and sum of squares are buffers that `absorb` writes, so that it is
  stored with the weights and nobody types it. Latents are the posterior's mode always: the
  released FlexTok draws from the posterior, and its tokens of one image differ from call to call.

  Attributes:
    grid: (height, width) of the latents.
    features: their channels.
  """

  def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
    self.size, self.channels = tuple(config.image_size), config.channels
    self.features, self.kl = config.features, config.kl
    self.reconstruction = config.reconstruction
    side = 2 ** (len(config.multipliers) - 1)
    if not config.multipliers or len(self.size) != 2 or any(s < 1 or s % side for s in self.size):
      raise ValueError(f'image_size={self.size} must be a multiple of {side} on both sides, halved '
                       f'between the levels of multipliers={config.multipliers}.')
    if config.kl < 0:
      raise ValueError(f'kl={config.kl} must be 0 or more: it weighs a divergence.')
    resolutions = [min(self.size) // 2 ** i for i in range(len(config.multipliers))]
    if unknown := sorted(set(config.attention) - set(resolutions)):
      raise ValueError(f'attention={unknown} is at none of the resolutions {resolutions}.')
    self.grid = tuple(s // side for s in self.size)
    options: dict[str, Any] = dict(
        channels=config.channels, width=config.width, multipliers=tuple(config.multipliers),
        blocks=config.blocks, dtype=jnp.dtype(config.dtype), rngs=rngs,
        attention=tuple(i for i, r in enumerate(resolutions) if r in config.attention))
    self.encoder = ConvEncoder(features=2 * config.features, **options)
    self.decoder = ConvDecoder(features=config.features, **options)
    self.count, self.total = Buffer(jnp.zeros(1)), Buffer(jnp.zeros((1, 2)))

  def posterior(self, x: Array) -> tuple[Float[Array, 'b h w c'], Float[Array, 'b h w c']]:
    """(mean, log variance) of uint8 or float images, before the scale.

    Raises:
      ValueError: images of another size or number of channels.
    """
    if x.shape[1:] != (*self.size, self.channels):
      raise ValueError(
          f'Images of {x.shape[1:]} (height, width, channels) do not fit image_size={self.size}, '
          f'channels={self.channels}; convert them, or build the VAE with these.')
    mean, log_variance = jnp.split(self.encoder(to_float(x)), 2, -1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE)

  def scale(self) -> Float[Array, '']:
    """What latents are multiplied by; 1 before the first step."""
    count, (first, second) = self.count[0], self.total[0]
    seen = jnp.maximum(count, 1.0)
    variance = second / seen - jnp.square(first / seen)
    return jnp.where(count > 0, jax.lax.rsqrt(jnp.maximum(variance, 1e-12)), 1.0)

  def encode_latents(self, x: Array) -> Float[Array, 'b h w c']:
    """The latents of images: the posterior's mode, scaled to unit deviation."""
    return self.posterior(x)[0] * self.scale()

  def decode_latents(self, z: Float[Array, 'b h w c']) -> Float[Array, 'b _h _w _c']:
    """Images from latents, not clipped."""
    return self.decoder(z / self.scale())

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Reconstruction of a draw from the posterior (in evaluation its mode), and the divergence."""
    del step  # nothing is scheduled
    x = to_float(batch['image'])
    mean, log_variance = self.posterior(x)
    z = mean
    if train:
      noise = jax.random.normal(key, (mean.size,)).reshape(mean.shape)  # drawn flat: see convnet
      z = mean + jnp.exp(log_variance / 2) * noise
    y = self.decoder(z)
    error = jnp.abs(x - y) if self.reconstruction == 'l1' else jnp.square(x - y)
    variance = jnp.exp(log_variance)
    divergence = 0.5 * (jnp.square(mean) + variance - 1 - log_variance)
    terms = {'reconstruction': jnp.mean(error), 'kl': jnp.sum(divergence) / x.shape[0]}
    metrics = {**terms, 'mse': jnp.mean(jnp.square(x - jnp.clip(y, -1, 1))),
               'psnr': jnp.mean(psnr(x, y)), 'latent_std': jnp.std(mean * self.scale()),
               'noise': jnp.sqrt(jnp.mean(variance)) * self.scale()}
    statistics = None
    if train:
      moments = jnp.stack([jnp.sum(mean), jnp.sum(jnp.square(mean))])[None]
      statistics = jax.lax.stop_gradient(Statistics(
          jnp.full(1, mean.size, jnp.float32), moments, jnp.zeros((1, 2))))
    return terms['reconstruction'] + self.kl * terms['kl'], {
        'metrics': jax.lax.stop_gradient(metrics), 'weight': jnp.float32(x.shape[0]),
        'statistics': statistics}

  def absorb(self, statistics: Statistics) -> None:
    """Adds a step's count, sum and sum of squares to the moments; the old ones fade."""
    kept = jnp.where(jnp.sum(statistics.count) > 0, DECAY, 1.0)
    self.count[...] = kept * self.count[...] + statistics.count
    self.total[...] = kept * self.total[...] + statistics.total


def freeze(module: nnx.Module) -> nnx.Module:
  """Makes buffers of all parameters: no gradient, no optimizer and no averaging reaches them."""
  for _, part in nnx.iter_modules(module):
    for name, value in list(vars(part).items()):
      if isinstance(value, nnx.Param):
        setattr(part, name, Buffer(value[...]))
  return module
