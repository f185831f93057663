"""Residual codes by a pattern of delays: RQ-VAE's 8 x 8 x 4 in 67 steps (arXiv 2306.05284).

  smalti train --config=imagenet256_delay:L --config.tokenizer=RUN --workdir=DIR

The pattern is MusicGen's, the transformer LlamaGen's, the tokens those of RQ-Transformer
(`imagenet256_rqtransformer`), which takes 64 deep passes and 256 small ones.
"""

from typing import Any

from smalti.data.catalogue import TFDSConfig
from smalti.generators.delay import DelayConfig, DelaySettings
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
    'B': dict(layers=12, width=768, heads=12),
    'L': dict(layers=24, width=1024, heads=16),
}


def get_config(size: str = 'B') -> Experiment:
  options, debug = SIZES[size], size == 'debug'
  return Experiment(
      model=DelayConfig(
          classes=1000,
          transformer=TransformerConfig(
              **options, dropout=0.1, dtype='float32' if debug else 'bfloat16')),
      data=TFDSConfig(name='imagenet2012', size=32 if debug else 256),
      tokenizer='runs/imagenet256_rvq_tokenizer',
      settings=DelaySettings(guidance=2.0),
      steps=2 if debug else 400_000,
      batch_size=8 if debug else 512,
      optimizer=OptimizerConfig(rate=2e-4, warmup=0 if debug else 5000, weight_decay=0.05),
      ema=0.999,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          source='our own sizes: the pattern is published for sound',
          spec=TokenSpec(grid=(8, 8), vocab=(16384,) * 4, order='depth')))
