"""VQGAN: 16 x 16 codes of ImageNet at 256 px (arXiv 2012.09841, CompVis/taming-transformers).

  smalti train --config=imagenet256_vqgan_tokenizer --workdir=DIR --config.data.data_dir=TFDS
  smalti train --config=imagenet256_vqgan_tokenizer:small --workdir=DIR    32 px, SMALTI_DATA_DIR

configs/imagenet_vqgan.yaml of that repository: L1 and LPIPS, PatchGAN from step 250,001 with the
adaptive weight, Adam at 4.5e-6 per image of the batch (12 per GPU; 8 GPUs here). The loss of the
codebook is the paper's, 1 and 0.25; the repository's default has the two exchanged. GroupNorm
stands for BatchNorm in the discriminator.
"""

from typing import Any

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
from smalti.data.downloads import CifarJpegConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    Published,
)
from smalti.networks.discriminator import PatchDiscriminatorConfig
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.vq import VQConfig

SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(image=8, width=8, multipliers=(1, 1), blocks=0, codes=16, dim=8, start=1,
                  discriminator=PatchDiscriminatorConfig(width=8, layers=1), perceptual='none',
                  batch_size=8, rate=1e-3, steps=2, published=None),
    'small': dict(image=32, width=64, multipliers=(1, 2, 2), blocks=1, codes=1024, dim=32,
                  start=4000, discriminator=PatchDiscriminatorConfig(width=32, layers=2),
                  perceptual='proxy', batch_size=64, rate=3e-4, steps=12_000, published=None),
    'base': dict(image=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, codes=1024, dim=256,
                 start=250_001, discriminator=PatchDiscriminatorConfig(), perceptual='lpips',
                 batch_size=96, rate=4.5e-6 * 96, steps=1_000_000, published=72.1e6),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  adam = OptimizerConfig(
      rate=options['rate'], schedule='constant', warmup=0, betas=(0.5, 0.9), clip=None)
  data: Any = CifarJpegConfig(augment=AugmentConfig(flip=True)) if size == 'small' else TFDSConfig(
      name='imagenet2012', size=options['image'])
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          attention=(16,) if size == 'base' else (),
          quantizer=ProjectedConfig(
              dim=options['dim'], quantizer=VQConfig(
                  codes=options['codes'], dim=options['dim'], update='gradient', init='uniform',
                  revival=0.0)),
          reconstruction='l1', perceptual=options['perceptual'], weights=LossWeights(),
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], weight=0.8, adaptive=True,
              start=options['start'])),
      data=data,
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=adam,
      discriminator=adam,
      ema=None if size == 'base' else 0.999,
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=options['published'], tolerance=0.05e6 if options['published'] else 0.0,
          source='count of the official constructor without its losses'))
