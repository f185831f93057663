"""RQ-VAE: 8 x 8 positions of four codes each, of ImageNet at 256 px (arXiv 2203.01941).

  smalti train --config=imagenet256_rvq_tokenizer --workdir=DIR --config.data.data_dir=TFDS

One codebook of 16,384 codes for all depths; a prefix is the first depths. The published net is
VQGAN's with one more halving.
"""

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
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.vq import VQConfig

SIZES = {
    'debug': dict(image=16, width=8, multipliers=(1, 1), blocks=0, attention=(), codes=32, dim=8,
                  discriminator=PatchDiscriminatorConfig(width=8, layers=1), perceptual='none',
                  batch_size=8, steps=2),
    'base': dict(image=256, width=128, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(8,),
                 codes=16384, dim=256, discriminator=PatchDiscriminatorConfig(), perceptual='lpips',
                 batch_size=128, steps=100_000),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  rate = dict(rate=4e-5, schedule='constant', betas=(0.5, 0.9), clip=None)
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          attention=options['attention'],
          quantizer=ResidualConfig(
              quantizer=VQConfig(codes=options['codes'], dim=options['dim']), levels=4,
              shared=True),
          perceptual=options['perceptual'],
          weights=LossWeights(commitment=0.25),
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], weight=0.75, adaptive=True),
          dtype='float32' if size == 'debug' else 'bfloat16'),
      data=TFDSConfig(name='imagenet2012', size=options['image']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(**rate),
      discriminator=OptimizerConfig(**rate),
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(source='no count of the tokenizer alone was published'))
