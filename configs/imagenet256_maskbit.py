"""MaskBit of ImageNet at 256 px: 16 x 16 tokens of 10, 12 or 14 bits in 64 passes.

  smalti train --config=imagenet256_maskbit:14 --config.tokenizer=RUN --workdir=DIR

arXiv 2409.16211, configs/generator of markweberdev/maskbit: two words per token, hidden one by one;
cross-entropy of all words, hidden or not; guidance that grows as a power of the cosine. Blocks are
normalised before attention and MLP here, after them there. 32 images per GPU, whose number it does
not say (32 here).
"""

from typing import Any

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
from smalti.generators.maskbit import MaskBitConfig
from smalti.generators.masked import MaskedSettings
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

FULL: dict[str, Any] = dict(layers=24, width=1024, heads=16, hidden=4096, grid=16, image=256,
                            batch_size=1024, steps=1_350_000, warmup=5000, passes=64,
                            dtype='bfloat16')
LAST = 1024 * 1024 + 3 * 1024  # a dense layer and a norm before the head
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(layers=2, width=32, heads=2, hidden=64, grid=4, image=32, batch_size=8, steps=2,
                  warmup=1, passes=3, dtype='float32', bits=4, guidance=2.0, power=1.0, noise=4.5,
                  published=None),
    '10': dict(**FULL, bits=10, guidance=7.4, power=2.5, noise=10.5, published=304_728_128),
    '12': dict(**FULL, bits=12, guidance=8.1, power=3.0, noise=8.2, published=304_795_776),
    '14': dict(**FULL, bits=14, guidance=8.1, power=3.0, noise=7.8, published=304_929_024),
}


def get_config(size: str = '14') -> Experiment:
  options, debug = SIZES[size], size == 'debug'
  spec = TokenSpec(grid=(options['grid'],) * 2, vocab=(2,) * options['bits'])
  if not debug:
    spec = TokenSpec(grid=spec.grid, vocab=(2 ** options['bits'],), factors=spec.vocab)
  return Experiment(
      model=MaskBitConfig(
          groups=2, classes=1000, label_dropout=0.1, objective='maskgit', ratio='arccos',
          counts='bernoulli', visible=1.0, label_smoothing=0.1,
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              hidden=options['hidden'], axes=0, qk_norm=False, norm='affine', mlp='gelu', bias=True,
              qkv_bias=True, dropout=0.1, dtype=options['dtype'])),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      tokenizer='runs/imagenet256_maskbit_tokenizer',
      settings=MaskedSettings(
          sampler='maskgit', ratio='arccos', steps=options['passes'],
          choice_temperature=options['noise'], guidance=options['guidance'],
          guidance_schedule='power_cosine', guidance_power=options['power']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=1e-4, final=0.1, warmup=options['warmup'], betas=(0.9, 0.96),
                                weight_decay=0.045),
      ema=0.999,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=None if debug else options['published'] - LAST - 1024,
          source="count of the official constructor (the paper's 305M), less its dense layer and "
                 'norm before the head and a place of the class',
          spec=spec))
