"""LlamaGen's VQ-16 tokenizer of ImageNet at 256 px (arXiv 2406.06525).

  smalti train --config=imagenet256_llamagen_tokenizer --workdir=DIR --config.data.data_dir=TFDS

VQGAN's networks, 16,384 codes of 8 channels on a sphere; L2 and LPIPS, PatchGAN from step 20,000 at
a fixed weight. Without the weights of LPIPS: --config.model.perceptual=proxy, or none.
"""

from typing import Any

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    MeshConfig,
    OptimizerConfig,
    Published,
)
from smalti.networks.discriminator import PatchDiscriminatorConfig
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.vq import VQConfig

SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(image=16, width=16, multipliers=(1, 2), blocks=1, codes=64, batch_size=8, steps=2,
                  published=None, dim=16, perceptual='none', start=1,
                  discriminator=PatchDiscriminatorConfig(width=8, layers=1)),
    'base': dict(image=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, codes=16384,
                 batch_size=128, steps=400_000, published=71.9e6, dim=256, perceptual='lpips',
                 start=20_000, discriminator=PatchDiscriminatorConfig()),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  adam = OptimizerConfig(rate=1e-4, schedule='constant', weight_decay=0.05, betas=(0.9, 0.95))
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, channels=3, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'], attention=(16,),
          quantizer=ProjectedConfig(
              dim=options['dim'],
              quantizer=VQConfig(codes=options['codes'], dim=8, cosine=True, update='gradient',
                                 init='uniform', revival=0.0)),
          perceptual=options['perceptual'],
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], weight=0.5, start=options['start']),
          dtype='float32' if size == 'debug' else 'bfloat16'),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=adam,
      discriminator=adam,
      ema=0.9999,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=options['published'], tolerance=0.05e6 if options['published'] else 0.0,
          source='count of the official constructor; paper and README say 72M'))
