"""Masked diffusion of digits: smalti train --config=digits_masked --workdir=runs/digits_masked.

Needs a tokenizer: smalti train --config=digits_vq --workdir=runs/digits_vq first, or name another
with --config.tokenizer=RUN.
"""

from smalti.data.digits import DigitsConfig
from smalti.generators.masked import MaskedConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    LogConfig,
    OptimizerConfig,
    Published,
)
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SIZES = {
    'debug': dict(layers=2, width=32, heads=2, steps=2, batch_size=16),
    'base': dict(layers=3, width=64, heads=4, steps=800, batch_size=64),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=MaskedConfig(
          classes=10,
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'], axes=2,
              dropout=0.3)),
      data=DigitsConfig(),
      tokenizer='runs/digits_vq',
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=2e-3, warmup=100, weight_decay=0.1),
      ema=0.99,
      checkpoint=CheckpointConfig(every=100, best='eval/bits_per_token'),
      log=LogConfig(every=50),
      eval=EvalConfig(every=100),
      published=Published(source='our own size for 8 x 8 digits',
                          spec=TokenSpec(grid=(4, 4), vocab=(16,))))
