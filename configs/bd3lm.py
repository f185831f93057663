"""Block diffusion of text: BD3-LM, small, blocks of 4, 8 or 16 (arXiv 2503.09573, section 6).

  smalti train --config=bd3lm:16 --config.data.path=TOKENS --workdir=DIR [--init_from=RUN]

TOKENS is a token folder of GPT-2's 50,257 ids, rows of 1,024; docs/block.md says how to write one.
The paper trains one block of 1,024 for 850,000 steps first and the blocks for 150,000 from there:
`--config=bd3lm:1024`, then `--init_from` its run.
"""

from smalti.data.tokens import TokensConfig
from smalti.generators.block import BlockDiffusionConfig, BlockDiffusionSettings
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    Published,
)
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SMALL = dict(layers=12, width=768, heads=12, length=1024, vocab=50257, batch_size=512)
# The published training searches an interval of rates, .5 to .9 wide, by the variance of validation
# batches; here it is fixed, .5 wide and the higher the smaller the block.
SIZES = {
    'debug': dict(block_size=4, rates=(0.45, 0.95), steps=2, layers=1, width=32, heads=2, length=16,
                  vocab=32, batch_size=8),
    '4': dict(block_size=4, rates=(0.45, 0.95), steps=150_000, **SMALL),
    '8': dict(block_size=8, rates=(0.4, 0.9), steps=150_000, **SMALL),
    '16': dict(block_size=16, rates=(0.3, 0.8), steps=150_000, **SMALL),
    '1024': dict(block_size=1024, rates=(0.0, 1.0), steps=850_000, **SMALL),
}


def get_config(size: str = '16') -> Experiment:
  options = SIZES[size]
  debug = size == 'debug'
  return Experiment(
      model=BlockDiffusionConfig(
          block_size=options['block_size'], rates=options['rates'],
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              qk_norm=False, norm='affine', mlp='gelu', bias=True, dropout=0.1,
              dtype='float32' if debug else 'bfloat16')),
      data=TokensConfig(),
      settings=BlockDiffusionSettings(top_p=0.9),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(
          rate=3e-4, schedule='constant', warmup=2500, betas=(0.9, 0.999), weight_decay=0.0,
          clip=1.0),
      ema=0.9999,
      checkpoint=CheckpointConfig(every=10_000),
      eval=EvalConfig(every=10_000, batches=None if debug else 20),
      published=Published(
          source='kuleshov-group/bd3lms, configs; no count is published. Its adaLN is fed a '
          'constant time (sigma 0) and is left out here',
          spec=TokenSpec(grid=(options['length'],), vocab=(options['vocab'],))))
