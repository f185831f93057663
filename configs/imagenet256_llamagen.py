"""LlamaGen: class-conditional autoregression over VQ-16 tokens (arXiv 2406.06525, table 1).

  smalti train --config=imagenet256_llamagen:B --config.tokenizer=RUN --workdir=DIR

Published tokens are of ten crops of every image and their mirror images; here they are mirrored.
"""

from smalti.data.augment import AugmentConfig
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

# layers, width, heads and SwiGLU width (a multiple of 256) of the official size table; the counts
# are those of the official constructor, which the paper rounds to 111M, 343M, 775M, 1.4B and 3.1B.
SIZES = {
    'debug': dict(layers=2, width=32, heads=2, hidden=64, guidance=2.0, published=None),
    'B': dict(layers=12, width=768, heads=12, hidden=2048, guidance=2.0,
              published=(110.9e6, 0.05e6)),
    'L': dict(layers=24, width=1024, heads=16, hidden=2816, guidance=2.0,
              published=(342.9e6, 0.05e6)),
    'XL': dict(layers=36, width=1280, heads=20, hidden=3584, guidance=1.75,
               published=(774.7e6, 0.05e6)),
    'XXL': dict(layers=48, width=1536, heads=24, hidden=4096, guidance=1.75,
                published=(1.411e9, 0.0005e9)),
    '3B': dict(layers=24, width=3200, heads=32, hidden=8704, guidance=1.65,
               published=(3.097e9, 0.0005e9)),
}


def get_config(size: str = 'B') -> Experiment:
  options = SIZES[size]
  debug = size == 'debug'
  parameters, tolerance = options['published'] or (None, 0.0)
  return Experiment(
      model=AutoregressiveConfig(
          classes=1000, label_dropout=0.1, dropout=0.1,
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              hidden=options['hidden'], axes=2, qk_norm=False, dropout=0.1,
              dtype='float32' if debug else 'bfloat16')),
      data=TFDSConfig(name='imagenet2012', size=32 if debug else 256,
                      augment=AugmentConfig(flip=True)),
      tokenizer='runs/imagenet256_llamagen_tokenizer',
      settings=AutoregressiveSettings(guidance=options['guidance']),
      steps=2 if debug else 1_500_000,
      batch_size=8 if debug else 256,
      optimizer=OptimizerConfig(
          rate=1e-4, schedule='constant', warmup=0, betas=(0.9, 0.95), weight_decay=0.05),
      ema=None,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=parameters, tolerance=tolerance,
          source='arXiv 2406.06525, table 1; count of the official constructor',
          spec=TokenSpec(grid=(16, 16), vocab=(16384,))))
