"""MaskGIT of ImageNet at 256 px: 16 x 16 of 1,024 codes in 8 passes (arXiv 2202.04200).

  smalti train --config=imagenet256_maskgit --config.tokenizer=RUN --workdir=DIR

BERT of 24 blocks with the class as a token before the codes; no guidance. Blocks are normalised
before attention and MLP here, after them there, and attention's weights are not dropped out. The
rate stays after its warm-up, on which the published settings are silent.
"""

from typing import Any

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
from smalti.generators.masked import MaskedConfig, MaskedSettings
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
    'debug': dict(layers=2, width=32, heads=2, hidden=64, grid=4, codes=16, image=32, batch_size=8,
                  steps=2, warmup=1, dtype='float32', published=None),
    # there without a null label (768) and a kernel of the head (786,432), but with a dense layer
    # before it (592,128), a bias for classes and MASK (1,001), a place of the class (768)
    'base': dict(layers=24, width=768, heads=8, hidden=3072, grid=16, codes=1024, image=256,
                 batch_size=256, steps=2_000_000, warmup=5000, dtype='bfloat16',
                 published=172_457_193 + 768 + 786_432 - 592_128 - 1001 - 768),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=MaskedConfig(
          classes=1000, label_dropout=0.0, objective='maskgit', ratio='cosine', counts='ceil',
          label_smoothing=0.1,
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              hidden=options['hidden'], axes=0, qk_norm=False, norm='affine', mlp='gelu', bias=True,
              qkv_bias=True, dropout=0.1, dtype=options['dtype'])),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      tokenizer='runs/imagenet256_maskgit_tokenizer',
      settings=MaskedSettings(sampler='maskgit', ratio='cosine', steps=8, choice_temperature=4.5),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=1e-4, schedule='constant', warmup=options['warmup'],
                                betas=(0.9, 0.96), weight_decay=0.045),
      ema=0.9999,
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=options['published'],
          source='172,457,193 of the official constructor, whose head is the table of codes, '
                 'classes and MASK; without its dense layer before the head and its place of the '
                 'class, with a head and a null label of our own',
          spec=TokenSpec(grid=(options['grid'],) * 2, vocab=(options['codes'],))))
