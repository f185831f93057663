"""MaskGIT's tokenizer: 16 x 16 codes of ImageNet at 256 px (arXiv 2202.04200).

  smalti train --config=imagenet256_maskgit_tokenizer --workdir=DIR --config.data.data_dir=TFDS

VQGAN without attention, with means for strides and without biases in its blocks; L2, the entropy of
the codes, and StyleGAN's discriminator with R1. Its perceptual loss is on pooled features of a
ResNet-50; LPIPS stands for it, at the same weight.
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
from smalti.networks.convnet import ConvOptions
from smalti.networks.discriminator import PatchDiscriminatorConfig, StyleDiscriminatorConfig
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.entropy import EntropyConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.vq import VQConfig

VQ: dict[str, Any] = dict(
    update='gradient', init='uniform', revival=0.0, entropy=EntropyConfig())
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(image=8, width=8, multipliers=(1, 1), blocks=0, perceptual='none', penalty=10.0,
                  discriminator=PatchDiscriminatorConfig(width=8, layers=1), batch_size=8, steps=2,
                  quantizer=VQConfig(codes=16, dim=8, **VQ), published=None),
    'base': dict(image=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, perceptual='lpips',
                 penalty=10.0, discriminator=StyleDiscriminatorConfig(), batch_size=256,
                 steps=1_000_000, quantizer=VQConfig(codes=1024, dim=256, **VQ),
                 published=54_515_587 - 81_920),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  adam = OptimizerConfig(rate=1e-4, schedule='constant', betas=(0.0, 0.99))
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          layers=ConvOptions(bias=False, extra=0, pointwise=True, down='pool'),
          quantizer=options['quantizer'], perceptual=options['perceptual'],
          weights=LossWeights(perceptual=0.1, entropy=0.1),
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], loss='nonsaturating', weight=0.1,
              penalty=options['penalty'])),
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
          parameters=options['published'],
          source='count of the official constructor, whose shortcuts where channels change are '
                 'convolutions of the block\'s output, 81,920 weights more than of its input'))
