"""Masked diffusion of pixels: MD4 on CIFAR-10 (arXiv 2406.04329: at most 2.75 bits per dimension).

  smalti train --config=cifar10_md4 --workdir=DIR

No tokenizer is trained: the levels of the pixels are the tokens, and bits per token are bits per
dimension. Images are not mirrored, as published.
"""

from smalti.data.catalogue import TFDSConfig
from smalti.generators.masked import MaskedSettings
from smalti.generators.unet import MaskedUNetConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    Published,
)
from smalti.tokenizers.spec import TokenSpec

SIZES = {
    'debug': dict(size=8, width=16, blocks=1, steps=2, batch_size=8),
    'base': dict(size=32, width=128, blocks=32, steps=2_000_000, batch_size=256),
}
# two layers of an embedding of the time, and a map of it into each of 67 residual blocks
TIME = 128 * 512 + 512 + 512 * 128 + 128 + 67 * 128 * 128


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  debug = size == 'debug'
  return Experiment(
      model=MaskedUNetConfig(
          schedule='linear', width=options['width'], blocks=options['blocks'], dropout=0.1,
          dtype='float32' if debug else 'bfloat16'),
      data=TFDSConfig(name='cifar10', size=options['size'], label_key=None),
      tokenizer=f'pixels:{options["size"]}x{options["size"]}x3',
      settings=MaskedSettings(sampler='ancestral', grid='cosine', steps=256),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(
          rate=2e-4, schedule='cosine', warmup=100, betas=(0.9, 0.99), weight_decay=0.01,
          clip=None),
      ema=0.9999,
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=10_000, batches=None if debug else 40),
      published=Published(
          parameters=None if debug else 28e6 - TIME, tolerance=0.0 if debug else 0.5e6,
          source='28M (the published code: 28,427,520), less 1,229,440 that tell its network the '
          'time; ours is not told, on purpose: the best prediction depends on the visible levels '
          'alone, so that one network serves every schedule and sampler',
          spec=TokenSpec(grid=(options['size'],) * 2, vocab=(256,) * 3)))
