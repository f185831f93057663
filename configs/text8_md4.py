"""Masked diffusion of characters: MD4 on text8 (arXiv 2406.04329, table 4: at most 1.37 bits).

  smalti train --config=text8_md4 --config.data.path=TEXT8 --workdir=DIR

TEXT8 is the file `text8` of mattmahoney.net/dc/text8.zip. No tokenizer: characters are tokens.
"""

from smalti.data.text import TEXT8, TextConfig
from smalti.generators.masked import MaskedConfig, MaskedSettings
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    Published,
)
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SIZES = {
    'debug': dict(layers=1, width=32, heads=2, length=16, steps=2, batch_size=8),
    'base': dict(layers=12, width=768, heads=12, length=256, steps=1_000_000, batch_size=512),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  debug = size == 'debug'
  return Experiment(
      model=MaskedConfig(
          schedule='linear',  # of the published config; its 'cosine' are the rate and the samples
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              qk_norm=False, dtype='float32' if debug else 'bfloat16')),
      data=TextConfig(
          length=options['length'], alphabet=TEXT8, train=(0.0, 0.9), eval=(0.9, 0.95),
          stride=16),  # MD4 begins a window at every character; a sixteenth of their order fits
      settings=MaskedSettings(sampler='ancestral', grid='cosine', steps=1000),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(
          rate=3e-4, schedule='cosine', warmup=2000, betas=(0.9, 0.999), weight_decay=0.0,
          clip=None),
      ema=0.9999,
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=None if debug else 20),
      published=Published(
          source='google-deepmind/md4, configs/md4/text8.py; no count is published. MD4 tells its '
          'network the time by adaLN; ours is not told, on purpose: the best prediction depends on '
          'the visible characters alone, so one network serves every schedule and sampler',
          spec=TokenSpec(grid=(options['length'],), vocab=(27,))))
