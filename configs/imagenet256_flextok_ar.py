"""Autoregression over FlexTok's ordered registers (arXiv 2502.13967, section 4.3).

  smalti train --config=imagenet256_flextok_ar:d18 --config.tokenizer=RUN --workdir=DIR
  smalti sample --workdir=DIR --settings.keep=32      # 32 registers, the first of every length

The model learns all 256 registers in order, so that one model draws any number of them: the first
32 are the same whether 32 or 256 are asked for, and the decoder makes an image of either. The
authors' repository has the tokenizer alone; widths here are 64 per layer, as all of theirs, of
which d28 is next to the 1.33B of their headline results (1.86 at 32 registers without guidance).
"""

from typing import Any

from smalti.data.catalogue import TFDSConfig
from smalti.generators.autoregressive import AutoregressiveConfig, AutoregressiveSettings
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    MeshConfig,
    OptimizerConfig,
    Published,
)
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(layers=2, width=32, heads=2),
    **{f'd{layers}': dict(layers=layers, width=64 * layers, heads=layers)
       for layers in (12, 18, 28)},
}


def get_config(size: str = 'd18') -> Experiment:
  debug = size == 'debug'
  return Experiment(
      model=AutoregressiveConfig(
          classes=1000,
          transformer=TransformerConfig(
              **SIZES[size], dropout=0.1, dtype='float32' if debug else 'bfloat16')),
      data=TFDSConfig(name='imagenet2012', size=32 if debug else 256),
      tokenizer='runs/imagenet256_flextok_tokenizer',
      settings=AutoregressiveSettings(keep=None if debug else 32),
      steps=2 if debug else 250_000,
      batch_size=8 if debug else 1024,
      optimizer=OptimizerConfig(
          rate=2e-4, warmup=0 if debug else 5000, betas=(0.9, 0.95), weight_decay=0.05),
      ema=None if debug else 0.9999,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          source='sizes, rate and batch are ours: the paper publishes 1.33B alone, and its code '
                 'has no generator',
          spec=TokenSpec(grid=(256,), vocab=(64000,), factors=(8, 8, 8, 5, 5, 5), order='nested',
                         budgets=(1, 2, 4, 8, 16, 32, 64, 128, 256))))
