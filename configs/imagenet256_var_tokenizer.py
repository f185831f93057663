"""VAR's multi-scale tokenizer: 680 tokens in ten scales, of ImageNet at 256 px (arXiv 2404.02905).

  smalti train --config=imagenet256_var_tokenizer --workdir=DIR --config.data.data_dir=TFDS

A prefix is the first scales. The published tokenizer was trained on OpenImages; weights of its loss
were not published, and are those of VQGAN here.
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
from smalti.tokenizers.multiscale import MultiScaleConfig
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.vq import VQConfig

SIZES = {
    'debug': dict(image=16, width=8, multipliers=(1, 1), blocks=0, attention=(), codes=32, dim=8,
                  scales=(1, 2, 8), discriminator=PatchDiscriminatorConfig(width=8, layers=1),
                  perceptual='none', batch_size=8, steps=2, start=1),
    'base': dict(image=256, width=160, multipliers=(1, 1, 2, 2, 4), blocks=2, attention=(16,),
                 codes=4096, dim=32, scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                 discriminator=PatchDiscriminatorConfig(), perceptual='lpips',
                 batch_size=128, steps=400_000, start=20_000),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          attention=options['attention'],
          quantizer=ProjectedConfig(
              dim=options['dim'],
              quantizer=MultiScaleConfig(
                  quantizer=VQConfig(
                      codes=options['codes'], dim=options['dim'], update='gradient',
                      init='uniform', revival=0.0),
                  scales=options['scales'])),
          perceptual=options['perceptual'],
          weights=LossWeights(commitment=0.25),
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], weight=0.8, adaptive=True,
              start=options['start']),
          dtype='float32' if size == 'debug' else 'bfloat16'),
      data=TFDSConfig(name='imagenet2012', size=options['image']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=1e-4, schedule='constant', betas=(0.5, 0.9)),
      discriminator=OptimizerConfig(rate=1e-4, schedule='constant', betas=(0.5, 0.9)),
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(source='no count of the tokenizer alone was published'))
