"""Open-MAGVIT2: 16 x 16 codes of 18 bits of ImageNet at 256 px (arXiv 2409.04410).

  smalti train --config=imagenet256_lfq_tokenizer --workdir=DIR --config.data.data_dir=TFDS

LFQ between MAGVIT-v2's networks for images: four blocks per level, depth-to-space, and a norm that
sees the latents of the whole image before each level of the decoder. PatchGAN with a hinge against
a nonsaturating generator from step 0, LeCAM. Two steps of the rate, at epochs 200 and 250 of 270,
are a cosine here.
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
from smalti.networks.discriminator import PatchDiscriminatorConfig
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.binary import LFQConfig
from smalti.tokenizers.image import LossWeights

SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(image=8, width=8, multipliers=(1, 1), blocks=1, middle=2, bits=6,
                  discriminator=PatchDiscriminatorConfig(width=8, layers=1), perceptual='none',
                  batch_size=8, steps=2, published=None),
    'base': dict(image=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=4, middle=4, bits=18,
                 discriminator=PatchDiscriminatorConfig(), perceptual='lpips', batch_size=256,
                 steps=270 * 5005, published=115.1e6),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  adam = OptimizerConfig(rate=1e-4, schedule='cosine', final=0.01, betas=(0.5, 0.9))
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          layers=ConvOptions(bias=False, middle=options['middle'], extra=0, pointwise=True,
                             up='shuffle', adaptive=True),
          quantizer=LFQConfig(bits=options['bits']),
          reconstruction='l1', perceptual=options['perceptual'],
          weights=LossWeights(commitment=0.25, entropy=0.1),
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
          parameters=options['published'], tolerance=0.05e6 if options['published'] else 0.0,
          source='count of the official constructor without its losses'))
