"""Masked diffusion of pixels: MD4 on ImageNet 64x64 (arXiv 2406.04329: <= 3.40 bits per dimension).

  smalti train --config=imagenet64_md4 --workdir=DIR

The data is the downsampled ImageNet of PixelRNN (TFDS: downsampled_imagenet/64x64), the one that
likelihoods are published on. `base` is the network of the published likelihood, by what the
published code says of it; `samples` is that code's default.
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
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SIZES = {
    'debug': dict(size=8, width=16, blocks=1, layers=1, hidden=32, heads=2, steps=2, batch_size=8),
    'samples': dict(size=64, width=256, blocks=8, layers=20, hidden=768, heads=12,
                    steps=2_000_000, batch_size=512),
    'base': dict(size=64, width=256, blocks=24, layers=12, hidden=768, heads=12, steps=2_000_000,
                 batch_size=512),
}
# of `base`: scales and shifts of the norms of 24 + 25 residual blocks and the last one, and of 12
# blocks and the last layer, as maps of the time in place of parameters; an embedding of it
TIME = (256 * 2 * (24 * 512 + 25 * 768 + 256) + 12 * (257 * 6 * 768 - 2 * 768)
        + 257 * 2 * 768 - 768 + 256 * 1024 + 1024 + 1024 * 256 + 256)
BIASES = 12 * 768


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  base, debug = size == 'base', size == 'debug'
  dtype = 'float32' if debug else 'bfloat16'
  return Experiment(
      model=MaskedUNetConfig(
          schedule='linear', width=options['width'], blocks=options['blocks'], dropout=0.1,
          dtype=dtype,
          transformer=TransformerConfig(
              layers=options['layers'], width=options['hidden'], heads=options['heads'], axes=0,
              qk_norm=False, mlp='gelu', bias=True, qkv_bias=True, dropout=0.1, dtype=dtype)),
      data=TFDSConfig(name='downsampled_imagenet/64x64', eval='validation', size=options['size'],
                      label_key=None),
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
          parameters=198e6 - TIME + BIASES if base else None, tolerance=0.5e6 if base else 0.0,
          source='198M (the published code with n_layers=24, n_dit_layers=12, which it names for '
          'the best likelihood: 198,279,680), less 31,365,120 that tell its network the time, and '
          '9,216 biases of attention that only ours has; ours is not told the time, on purpose. '
          'The default of that code, 8 and 20, is `samples`, 204,595,712 with the time, a count '
          'that is not published',
          spec=TokenSpec(grid=(options['size'],) * 2, vocab=(256,) * 3)))
