"""RQ-Transformer: 8 x 8 positions of four residual codes of ImageNet at 256 px (arXiv 2203.01941).

  smalti train --config=imagenet256_rqtransformer:1.4B --config.tokenizer=RUN --workdir=DIR

kakaobrain/rq-vae-transformer: 42 blocks over positions and 6 over depth, one classifier, learned
positions, top-p 0.92 and no guidance. There codes are the vectors of the tokenizer's codebook, and
targets are soft: the codes near a residual by their distance, drawn anew at every step. A generator
here knows tokens alone: vectors are learned, one table per depth, and targets are the codes. The
body has a norm of its own at its end, and the classifier no bias.
"""

from typing import Any

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
from smalti.generators.depth import DepthConfig, DepthSettings
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

BIG: dict[str, Any] = dict(codes=16384, code_width=256, image=256, batch_size=2048,
                           steps=62_500, dtype='bfloat16')  # 100 epochs
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(layers=2, depth=1, width=32, heads=2, codes=32, code_width=8, image=32,
                  batch_size=8, steps=2, dtype='float32', published=None),
    '480M': dict(**BIG, layers=12, depth=4, width=1536, heads=24, published=None),
    '821M': dict(**BIG, layers=24, depth=4, width=1536, heads=24, published=None),
    '1.4B': dict(**BIG, layers=42, depth=6, width=1536, heads=24, published=(1.4e9, 0.05e9)),
    '3.8B': dict(**BIG, layers=42, depth=6, width=2560, heads=40, published=(3.8e9, 0.05e9)),
}


def get_config(size: str = '1.4B') -> Experiment:
  options = SIZES[size]
  parameters, tolerance = options['published'] or (None, 0.0)
  block: dict[str, Any] = dict(
      width=options['width'], heads=options['heads'], axes=0, qk_norm=False, norm='affine',
      mlp='gelu', bias=True, qkv_bias=True, dropout=0.1, dtype=options['dtype'])
  return Experiment(
      model=DepthConfig(
          classes=1000, label_dropout=0.0, shared=True, code_width=options['code_width'],
          transformer=TransformerConfig(layers=options['layers'], **block),
          depth=TransformerConfig(layers=options['depth'], **block)),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      tokenizer='runs/imagenet256_rvq_tokenizer',
      settings=DepthSettings(top_p=0.92),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=5e-4, warmup=0, betas=(0.9, 0.95), weight_decay=1e-4),
      ema=None,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=parameters, tolerance=tolerance,
          source='table of the official code; without the vectors of codes (256 numbers each, in '
                 'four tables: 16.8M), which are its tokenizer\'s, 480.9M, 820.9M, 1,387.5M and '
                 '3,822.5M are its 480M, 821M, 1.4B and 3.8B',
          spec=TokenSpec(grid=(8, 8), vocab=(options['codes'],) * 4)))
