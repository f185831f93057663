"""IBQ: 16 x 16 codes of ImageNet at 256 px, of up to 262,144, all learned (arXiv 2412.02692).

  smalti train --config=imagenet256_ibq_tokenizer:16k --workdir=DIR --config.data.data_dir=TFDS

VQGAN's networks with four blocks per level; the rest as Open-MAGVIT2 has it, of the same authors:
PatchGAN with a hinge against a nonsaturating generator from step 0, LeCAM. Two steps of the rate,
at epochs 250 and 300 of 330, are a cosine here.
"""

from typing import Any

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
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
from smalti.tokenizers.ibq import IBQConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.projected import ProjectedConfig

FULL: dict[str, Any] = dict(
    image=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=4, dim=256, perceptual='lpips',
    discriminator=PatchDiscriminatorConfig(), batch_size=256, steps=330 * 5005)
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(image=8, width=8, multipliers=(1, 1), blocks=0, dim=8, perceptual='none',
                  discriminator=PatchDiscriminatorConfig(width=8, layers=1), batch_size=8, steps=2,
                  codes=16, published=None),
    '1k': dict(**FULL, codes=1024, published=107.0e6),
    '8k': dict(**FULL, codes=8192, published=None),
    '16k': dict(**FULL, codes=16384, published=None),
    '262k': dict(**FULL, codes=262144, published=173.9e6),
}


def get_config(size: str = '16k') -> Experiment:
  options = SIZES[size]
  adam = OptimizerConfig(rate=1e-4, schedule='cosine', final=0.01, betas=(0.5, 0.9))
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          attention=() if size == 'debug' else (16,),
          quantizer=ProjectedConfig(dim=options['dim'], quantizer=IBQConfig(
              codes=options['codes'], dim=options['dim'])),
          reconstruction='l1', perceptual=options['perceptual'],
          weights=LossWeights(commitment=1.0, entropy=0.05),
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], loss='mixed', weight=0.1, lecam=0.05)),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=adam,
      discriminator=adam,
      ema=0.999,
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=options['published'], tolerance=0.06e6 if options['published'] else 0.0,
          source='count of the official constructor without its losses'))
