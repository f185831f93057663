"""Canvases of digits from captions: smalti train --config=captions_ar --workdir=runs/captions_ar.

Needs a tokenizer: smalti train --config=captions_vq --workdir=runs/captions_vq first, or name
another with --config.tokenizer=RUN. `base` reads a caption by cross-attention, `prefix` as tokens
before the codes; `base` takes minutes on two cores. Then:
smalti sample --workdir=runs/captions_ar --text="3 7 above 0 3".
"""

from smalti.data.captions import LONGEST, CaptionsConfig
from smalti.generators.autoregressive import AutoregressiveConfig
from smalti.generators.text import ByteEncoderConfig, TextConfig
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
    'debug': dict(layers=1, width=32, heads=2, reader=1, memory=32, steps=2, batch_size=8,
                  held_out=16),
    'base': dict(layers=3, width=64, heads=4, reader=2, memory=48, steps=1500, batch_size=64,
                 held_out=1000),
    'prefix': dict(layers=3, width=64, heads=4, reader=2, memory=None, steps=1500, batch_size=64,
                   held_out=1000),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  reader = ByteEncoderConfig(transformer=TransformerConfig(
      layers=options['reader'], width=options['memory'] or 48, heads=2, remat=False))
  return Experiment(
      model=AutoregressiveConfig(
          text=TextConfig(length=LONGEST, encoder=reader),
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'], axes=2,
              memory=options['memory'] or 0, remat=False)),
      data=CaptionsConfig(eval=options['held_out']),
      tokenizer='runs/captions_vq',
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=2e-3, warmup=100, weight_decay=0.05),
      ema=0.99,
      checkpoint=CheckpointConfig(every=500),
      log=LogConfig(every=50),
      eval=EvalConfig(every=500),
      published=Published(source='our own size for canvases of 16 x 16 pixels',
                          spec=TokenSpec(grid=(4, 4), vocab=(128,))))
