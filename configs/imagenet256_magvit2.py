"""Open-MAGVIT2: ids of 18 bits, 6 of them and then 12, of ImageNet at 256 px (arXiv 2409.04410).

  smalti train --config=imagenet256_magvit2:B --config.tokenizer=RUN --workdir=DIR

TencentARC/Open-MAGVIT2: LlamaGen's body over 16 x 16 positions and a few more blocks over the two
words of one, each word with its table and its classifier. The published guidance is one scale per
word, (1.9, 2.0), (1.9, 1.9) and (1.75, 1.85), and L and XL draw the first at a temperature of 1.1:
settings of `sample` may be arrays, those of a config are the first word's scale and 1.0. Places of
words are learned (there they rotate, and the first is zero), and the body has a norm at its end.
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

EPOCH = 1668  # steps of 768 images
BIG: dict[str, Any] = dict(words=(6, 12), image=256, batch_size=768, dtype='bfloat16')
# hidden is LlamaGen's SwiGLU width, a multiple of 256
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(layers=2, depth=1, width=32, heads=2, hidden=64, words=(1, 3), guidance=2.0,
                  rate=3e-4, image=32, batch_size=8, steps=2, warmup=1, dtype='float32',
                  published=None),
    'B': dict(**BIG, layers=24, depth=2, width=1024, heads=16, hidden=2816, guidance=1.9,
              rate=3e-4, steps=300 * EPOCH, warmup=6 * EPOCH, published=(343.6e6, 0.05e6)),
    'L': dict(**BIG, layers=36, depth=3, width=1280, heads=20, hidden=3584, guidance=1.9,
              rate=3e-4, steps=300 * EPOCH, warmup=6 * EPOCH, published=(804.4e6, 0.05e6)),
    'XL': dict(**BIG, layers=48, depth=4, width=1536, heads=24, hidden=4096, guidance=1.75,
               rate=2.4e-4, steps=350 * EPOCH, warmup=7 * EPOCH, published=(1.487e9, 0.0005e9)),
}


def get_config(size: str = 'B') -> Experiment:
  options = SIZES[size]
  parameters, tolerance = options['published'] or (None, 0.0)
  bits = sum(options['words'])
  block: dict[str, Any] = dict(
      width=options['width'], heads=options['heads'], hidden=options['hidden'], qk_norm=False,
      dropout=0.1, dtype=options['dtype'])
  return Experiment(
      model=DepthConfig(
          classes=1000, label_dropout=0.1, dropout=0.1, words=options['words'],
          transformer=TransformerConfig(layers=options['layers'], axes=2, **block),
          depth=TransformerConfig(layers=options['depth'], axes=0, **block)),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      tokenizer='runs/imagenet256_lfq_tokenizer',
      settings=DepthSettings(guidance=options['guidance']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=options['rate'], schedule='linear', final=0.1,
                                warmup=options['warmup'], betas=(0.9, 0.95), weight_decay=0.05),
      ema=None,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=parameters, tolerance=tolerance,
          source='count of the official constructor; the paper has 343M, 804M and 1.5B',
          spec=TokenSpec(grid=(16, 16), vocab=(2**bits,), factors=(2,) * bits)))
