"""TiTok's generators of ImageNet at 256 px: 32, 64 or 128 registers (arXiv 2406.07550).

  smalti train --config=imagenet256_titok:l32 --config.tokenizer=RUN --workdir=DIR

MaskGIT of bytedance/1d-tokenizer on the 4,096 codes of L-32, B-64 and S-128; sampling as its
script and inference files have it, where both temperatures fall. Blocks are normalised before
attention and MLP here, after them there for l32 and b64, and attention's weights are not dropped
out. s128 is a U-ViT there: its long connections, which join the first ten blocks to the last ten,
are not here, so that its scores are not expected.
"""

from typing import Any

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
from smalti.generators.masked import MaskedConfig, MaskedSettings
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

BIG: dict[str, Any] = dict(codes=4096, image=256, batch_size=2048, steps=500_000, warmup=10_000,
                           dtype='bfloat16')
BERT: dict[str, Any] = dict(**BIG, layers=24, width=768, heads=16, hidden=3072, qkv_bias=True,
                            passes=8, schedule='linear', power=1.0)
# counts of the official constructors without a place of the class and two types of token
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(layers=2, width=32, heads=2, hidden=64, qkv_bias=True, registers=4, codes=16,
                  image=32, batch_size=8, steps=2, warmup=1, dtype='float32', passes=2, noise=2.0,
                  guidance=2.0, schedule='linear', power=1.0, published=None),
    'l32': dict(**BERT, registers=32, noise=9.5, guidance=5.5,
                published=177_202_432 - 3 * 768),
    'b64': dict(**BERT, registers=64, noise=11.0, guidance=4.0,
                published=177_227_008 - 3 * 768),
    's128': dict(**BIG, layers=21, width=1024, heads=16, hidden=4096, qkv_bias=False,
                 registers=128, passes=64, noise=2.8, guidance=6.9, schedule='power_cosine',
                 power=3.0, published=294_990_848 - 10 * (2048 * 1024 + 1024) - 1024),
}


def get_config(size: str = 'l32') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=MaskedConfig(
          classes=1000, label_dropout=0.1, objective='maskgit', ratio='arccos', counts='round',
          visible=0.1, label_smoothing=0.1,
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              hidden=options['hidden'], axes=0, qk_norm=False, norm='affine', mlp='gelu', bias=True,
              qkv_bias=options['qkv_bias'], dropout=0.1, dtype=options['dtype'])),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      tokenizer='runs/imagenet256_titok_tokenizer',
      settings=MaskedSettings(
          sampler='maskgit', ratio='arccos', steps=options['passes'], noise='both', anneal=True,
          choice_temperature=options['noise'], guidance=options['guidance'],
          guidance_schedule=options['schedule'], guidance_power=options['power']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=2e-4, final=0.05, warmup=options['warmup'], betas=(0.9, 0.96),
                                weight_decay=0.03),
      ema=0.999,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=options['published'],
          source='count of the official constructor, less a place of the class, and types of token '
                 '(l32, b64: 177.2M) or the maps of its long connections (s128: 295.0M)',
          spec=TokenSpec(grid=(options['registers'],), vocab=(options['codes'],))))
