"""VQ tokens of canvases: smalti train --config=captions_vq --workdir=runs/captions_vq.

The tokenizer of `captions_ar`; the captions are not read.
"""

from smalti.data.captions import CaptionsConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    LogConfig,
    OptimizerConfig,
    Published,
)
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.vq import VQConfig

SIZES = {
    'debug': dict(width=8, multipliers=(1, 1, 1), steps=2, batch_size=16, held_out=32),
    'base': dict(width=16, multipliers=(1, 2, 2), steps=800, batch_size=32, held_out=1000),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=AutoencoderConfig(
          image_size=(16, 16), channels=1, width=options['width'],
          multipliers=options['multipliers'], blocks=1, quantizer=VQConfig(codes=128, dim=8)),
      data=CaptionsConfig(eval=options['held_out']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=2e-3, warmup=50),
      ema=0.99,
      checkpoint=CheckpointConfig(every=400, best='eval/mse'),
      log=LogConfig(every=50),
      eval=EvalConfig(every=400),
      published=Published(source='our own size for canvases of 16 x 16 pixels'))
