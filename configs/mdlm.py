"""Masked diffusion of text: MDLM, small (arXiv 2406.07524, section 5.1; OpenWebText, <= 23.21 ppl).

  smalti train --config=mdlm --config.data.path=TOKENS --workdir=DIR

TOKENS is a token folder of GPT-2's 50,257 ids, rows of 1,024; docs/block.md says how to write one.
"""

from smalti.data.tokens import TokensConfig
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
    'debug': dict(layers=1, width=32, heads=2, length=16, vocab=32, steps=2, batch_size=8),
    'small': dict(layers=12, width=768, heads=12, length=1024, vocab=50257, steps=1_000_000,
                  batch_size=512),
}


def get_config(size: str = 'small') -> Experiment:
  options = SIZES[size]
  debug = size == 'debug'
  return Experiment(
      model=MaskedConfig(
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              qk_norm=False, norm='affine', mlp='gelu', bias=True, dropout=0.1,
              dtype='float32' if debug else 'bfloat16')),
      data=TokensConfig(),
      settings=MaskedSettings(sampler='ancestral', grid='uniform', steps=1000),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(
          rate=3e-4, schedule='constant', warmup=2500, betas=(0.9, 0.999), weight_decay=0.0,
          clip=1.0),
      ema=0.9999,
      checkpoint=CheckpointConfig(every=10_000),
      eval=EvalConfig(every=10_000, batches=None if debug else 20),
      published=Published(
          source='kuleshov-group/mdlm, configs; no count is published. Its adaLN is fed a constant '
          'time (sigma 0) and is left out here',
          spec=TokenSpec(grid=(options['length'],), vocab=(options['vocab'],))))
