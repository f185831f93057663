"""ResGen on 8 x 8 positions of 8 or 16 residual codes, ImageNet at 256 px (arXiv 2412.10208).

  smalti train --config=imagenet256_resgen:d16 --config.tokenizer=RUN --workdir=DIR

Known are the sizes of tokens and model, 7M steps of 256 images, 63 passes, and that the blocks are
those of DiT-XL, 28 of 1,152; the rank of the mixture makes the count the published one. The
published tokenizer is not described enough to repeat it: imagenet256_rvq_tokenizer with
--config.model.quantizer.levels=8 (or 16) stands in for it.
"""

from typing import Any

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
from smalti.generators.resgen import ResGenConfig, ResGenSettings
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    Published,
)
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

BIG: dict[str, Any] = dict(
    layers=28, width=1152, heads=16, channels=256, components=1024, rank=104, grid=8, codes=16384,
    image=256, batch_size=256, steps=7_000_000, warmup=5000, dtype='bfloat16',
    parameters=574e6, tolerance=0.5e6)
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(layers=2, width=32, heads=2, channels=8, components=8, rank=4, grid=4, codes=16,
                  depth=4, image=32, batch_size=8, steps=2, warmup=1, dtype='float32',
                  parameters=None, tolerance=0.0),
    'd8': dict(**BIG, depth=8),
    'd16': dict(**BIG, depth=16),
}


def get_config(size: str = 'd16') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=ResGenConfig(
          classes=1000, channels=options['channels'], components=options['components'],
          rank=options['rank'], objective='split',
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              hidden=4 * options['width'], axes=2, norm='affine', mlp='gelu', bias=True,
              qkv_bias=True, dtype=options['dtype'])),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      tokenizer='runs/imagenet256_rvq_tokenizer',
      settings=ResGenSettings(steps=63),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=1e-4, schedule='constant', warmup=options['warmup']),
      ema=0.9999,
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=options['parameters'], tolerance=options['tolerance'],
          source='574M with DiT-XL-like blocks, as later reports have it; the size of the mixture '
                 'was not published, and its rank is chosen for the count',
          spec=TokenSpec(grid=(options['grid'],) * 2, vocab=(options['codes'],) * options['depth'],
                         order='depth')))
