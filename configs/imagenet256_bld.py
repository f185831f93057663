"""Binary Latent Diffusion of ImageNet at 256 px (arXiv 2304.04820; ZeWang95/BinaryLatentDiffusion).

  smalti train --config=imagenet256_bld --config.tokenizer=RUN --workdir=DIR

24 blocks over 16 x 16 positions of 64 bits, T=64; time and class are tokens of their own. Sampling
repeats the published: the product, temperature 0.9, the likelier value at the end;
--settings.reverse=mixture is the exact one. Positions are learned here, sines and cosines there;
averages there move by 0.005 every ten steps.
"""

from typing import Any

from smalti.data.catalogue import TFDSConfig
from smalti.generators.binary import BinaryConfig, BinarySettings
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    Published,
)
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(layers=2, width=32, heads=2, grid=2, bits=4, image=32, batch_size=8, steps=2,
                  dtype='float32'),
    'base': dict(layers=24, width=768, heads=12, grid=16, bits=64, image=256, batch_size=256,
                 steps=2_000_000, dtype='bfloat16'),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=BinaryConfig(
          classes=1000, reverse='product',
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              hidden=4 * options['width'], axes=0, qk_norm=False, norm='affine', mlp='gelu',
              bias=True, qkv_bias=True, dtype=options['dtype'])),
      data=TFDSConfig(name='imagenet2012', size=options['image']),
      tokenizer='runs/imagenet256_bld_tokenizer',
      settings=BinarySettings(reverse='product', temperature=0.9, last='threshold',
                              clamp='clean'),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=2e-4, schedule='constant', warmup=10_000, betas=(0.9, 0.95)),
      ema=0.9995,
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          source='no count of the denoiser alone was published',
          spec=TokenSpec(grid=(options['grid'],) * 2, vocab=(2,) * options['bits'],
                         factors=(2,))))
