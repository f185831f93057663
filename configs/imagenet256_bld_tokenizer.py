"""The binary autoencoder of Binary Latent Diffusion: 16 x 16 positions of 64 or 128 bits.

  smalti train --config=imagenet256_bld_tokenizer --workdir=DIR --config.data.data_dir=TFDS

Wang et al. 2023, arXiv 2304.04820; ZeWang95/BinaryLatentDiffusion. c64 and c128 are the released
ones (there of 600 million images of LAION); c128's decoder has three times the residual blocks
(`gen_mul`). Averages there move by 0.005 every ten steps.
"""

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
from smalti.tokenizers.bernoulli import BernoulliConfig

SIZES = {
    'debug': dict(image=16, width=8, multipliers=(1, 2), blocks=1, bits=8, dim=8, extra=0,
                  published=None),
    'c64': dict(image=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, bits=64, dim=256,
                extra=0, published=65_551_174 - 2_348_928 - 147_971),
    'c128': dict(image=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, bits=128, dim=256,
                 extra=4, published=102_201_222 - 4_057_984 - 147_971),
}


def get_config(size: str = 'c64') -> Experiment:
  options, debug = SIZES[size], size == 'debug'
  rate = dict(rate=4.5e-6 * 32, schedule='constant', warmup=0, betas=(0.9, 0.999), clip=None)
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'], attention=(16,),
          layers=ConvOptions(extra=options['extra'], first=True),
          quantizer=BernoulliConfig(bits=options['bits'], dim=options['dim']),
          reconstruction='l1', perceptual='none' if debug else 'lpips',
          adversary=None if debug else AdversaryConfig(
              discriminator=PatchDiscriminatorConfig(), weight=1.0, adaptive=True, limit=1.0,
              start=30_001),
          dtype='float32' if debug else 'bfloat16'),
      data=TFDSConfig(name='imagenet2012', eval='validation', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      steps=2 if debug else 1_500_000,
      batch_size=8 if debug else 32,
      optimizer=OptimizerConfig(**rate),
      discriminator=None if debug else OptimizerConfig(**rate, start=30_001),
      ema=0.9995,
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=options['published'],
          source='count of the official constructor, less its 1x1 convolutions that are never used '
                 'and a variance head for likelihoods'))
