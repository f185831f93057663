"""FSQ tokens of 8 x 8 digits: smalti train --config=digits_fsq --workdir=runs/digits_fsq."""

from smalti.data.digits import DigitsConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    LogConfig,
    OptimizerConfig,
    Published,
)
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.scalar import FSQConfig

SIZES = {
    'debug': dict(width=8, multipliers=(1, 1), blocks=1, steps=2, batch_size=16),
    'base': dict(width=24, multipliers=(1, 2), blocks=1, steps=600, batch_size=64),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=AutoencoderConfig(
          image_size=(8, 8), channels=1, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          quantizer=FSQConfig(levels=(4, 4))),
      data=DigitsConfig(),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=2e-3, warmup=50),
      ema=0.99,
      checkpoint=CheckpointConfig(every=300, best='eval/mse'),
      log=LogConfig(every=50),
      eval=EvalConfig(every=150),
      published=Published(source='our own size for 8 x 8 digits'))
