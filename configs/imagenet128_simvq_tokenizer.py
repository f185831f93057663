"""SimVQ: 16 x 16 codes of ImageNet at 128 px, of up to 262,144 (arXiv 2411.02038).

  smalti train --config=imagenet128_simvq_tokenizer:65k --workdir=DIR --config.data.data_dir=TFDS

VQGAN's networks and one linear map for all codes; L1, LPIPS, PatchGAN with a hinge against a
nonsaturating generator from step 0, no LeCAM, a constant rate for 50 epochs: youngsheen/SimVQ.
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
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.simvq import SimVQConfig

FULL: dict[str, Any] = dict(
    image=128, width=128, multipliers=(1, 2, 2, 4), blocks=2, dim=128, perceptual='lpips',
    discriminator=PatchDiscriminatorConfig(), batch_size=256, steps=250_250)
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(image=8, width=8, multipliers=(1, 1), blocks=0, dim=8, perceptual='none',
                  discriminator=PatchDiscriminatorConfig(width=8, layers=1), batch_size=8, steps=2,
                  codes=32),
    '1k': dict(**FULL, codes=1024),
    '8k': dict(**FULL, codes=8192),
    '65k': dict(**FULL, codes=65536),
    '262k': dict(**FULL, codes=262144),
}


def get_config(size: str = '65k') -> Experiment:
  options = SIZES[size]
  adam = OptimizerConfig(rate=1e-4, schedule='constant', betas=(0.5, 0.9))
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          attention=() if size == 'debug' else (16,),
          quantizer=SimVQConfig(codes=options['codes'], dim=options['dim']),
          reconstruction='l1', perceptual=options['perceptual'], weights=LossWeights(),
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], loss='mixed', weight=0.1)),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=adam,
      discriminator=adam,
      ema=0.999,
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(source='no count of the tokenizer alone was published'))
