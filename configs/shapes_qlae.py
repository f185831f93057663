"""Latents of rendered rooms: smalti train --config=shapes_qlae --workdir=runs/shapes_qlae.

Hsu et al. 2023, arXiv 2305.18378, on our own factor set, at a size for CPUs: `base` is QLAE, `ae`
and `vq` the paper's baselines with the same network, data and steps. The paper's settings (its code
kylehkhsu/latent_quantization): twice as many latents as factors, 10 values each, weights 0.01; for
VQ-VAE 512 codes of 64 channels, weights 1 and 0.25; AdamW with rate 1e-3, decay 0.1 on kernels
alone, gradients clipped element by element; batches of 128, 200,000 steps, images of 64 pixels.
Ours differ in size: 32 pixels, batches of 64, 3,000 steps. Both codebooks follow the gradient; the
VQ one starts from vectors of the first batch (the paper's from noise).
"""

from smalti.data.factors import Shapes3DLikeConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    LogConfig,
    OptimizerConfig,
    Published,
)
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.latent import LatentConfig
from smalti.tokenizers.styled import StyledConfig, StyledTokenizerConfig
from smalti.tokenizers.vq import VQConfig

SIZES = {
    'debug': dict(model='qlae', size=16, widths=(8, 8), hidden=16, steps=2, batch_size=16),
    'base': dict(model='qlae', size=32, widths=(16, 32, 64), hidden=128, steps=3000, batch_size=64),
    'ae': dict(model='ae', size=32, widths=(16, 32, 64), hidden=128, steps=3000, batch_size=64),
    'vq': dict(model='vq', size=32, widths=(16, 32, 64), hidden=128, steps=3000, batch_size=64),
}
LATENTS = 12  # twice the factors


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  network = dict(
      image_size=(options['size'],) * 2, patch=2, widths=options['widths'],
      hidden=options['hidden'], latents=LATENTS)
  if options['model'] == 'ae':
    model = StyledConfig(**network)
  elif options['model'] == 'vq':
    model = StyledTokenizerConfig(
        **network, quantizer=VQConfig(codes=512, dim=64, update='gradient', revival=0.0),
        weights=LossWeights(codebook=1.0, commitment=0.25))
  else:
    model = StyledTokenizerConfig(
        **network, quantizer=LatentConfig(latents=LATENTS, codes=10),
        weights=LossWeights(codebook=0.01, commitment=0.01))
  return Experiment(
      model=model,
      data=Shapes3DLikeConfig(size=options['size']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(
          rate=1e-3, schedule='constant', warmup=0, betas=(0.9, 0.999), weight_decay=0.1,
          clip=None, clip_each=1.0),
      ema=None,
      checkpoint=CheckpointConfig(every=1000),
      log=LogConfig(every=100),
      eval=EvalConfig(every=1000, batches=20),
      published=Published(source='our own size for CPUs'))
