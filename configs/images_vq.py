"""Your own images: smalti train --config=images_vq --config.data.path=DIR --workdir=runs/images_vq.

Look first at what is in the folder: smalti data --path=DIR --size=64.
"""

from smalti.data.folder import FolderConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    Published,
)
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.vq import VQConfig

SIZES = {
    'debug': dict(image=16, width=8, multipliers=(1, 1), blocks=1, codes=32, steps=2, batch_size=8),
    'base': dict(image=64, width=64, multipliers=(1, 2, 2), blocks=2, codes=1024, steps=20_000,
                 batch_size=32),
    '256': dict(image=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, codes=1024,
                steps=200_000, batch_size=32),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, channels=3, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          quantizer=VQConfig(codes=options['codes'], dim=16)),
      data=FolderConfig(path='images', size=options['image']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=3e-4, warmup=500),
      ema=0.999,
      checkpoint=CheckpointConfig(every=1000, best='eval/mse'),
      eval=EvalConfig(every=1000, batches=8),
      published=Published(source='our own sizes'))
