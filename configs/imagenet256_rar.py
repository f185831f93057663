"""RAR: autoregression in random order that becomes row-major (arXiv 2411.00776, table 1).

  smalti train --config=imagenet256_rar:B --config.tokenizer=RUN --workdir=DIR

bytedance/1d-tokenizer: MaskGIT's tokens, adaLN on label and step, positions learned, all orders for
125,000 steps of 2,048 and row-major from 187,500 on. The label is one token and the modulation;
there it has a class token before it. Sampling is row-major with a guidance that grows as a power of
the cosine.
"""

from typing import Any

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

BIG: dict[str, Any] = dict(steps=250_000, anneal=(125_000, 187_500), batch_size=2048, image=256,
                           dtype='bfloat16', warmup=62_500)
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(layers=2, width=32, heads=2, hidden=64, guidance=2.0, power=1.0, steps=2,
                  anneal=(0, 1), batch_size=8, image=32, dtype='float32', warmup=1),
    'B': dict(**BIG, layers=24, width=768, heads=16, hidden=3072, guidance=16.0, power=2.75),
    'L': dict(**BIG, layers=24, width=1024, heads=16, hidden=4096, guidance=15.5, power=2.5),
    'XL': dict(**BIG, layers=32, width=1280, heads=16, hidden=5120, guidance=6.9, power=1.5),
    'XXL': dict(**BIG, layers=40, width=1408, heads=16, hidden=6144, guidance=8.0, power=1.2),
}


def get_config(size: str = 'B') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=AutoregressiveConfig(
          classes=1000, label_dropout=0.1, anneal=options['anneal'],
          transformer=TransformerConfig(
              layers=options['layers'], width=options['width'], heads=options['heads'],
              hidden=options['hidden'], axes=0, norm='affine', mlp='gelu', bias=True,
              qkv_bias=True, modulated=True, dropout=0.1, dtype=options['dtype'])),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      tokenizer='runs/imagenet256_maskgit_tokenizer',
      settings=AutoregressiveSettings(
          temperature=1.0 if size in ('debug', 'B') else 1.02, guidance=options['guidance'],
          guidance_schedule='power_cosine', guidance_power=options['power']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=4e-4, final=0.025, warmup=options['warmup'],
                                betas=(0.9, 0.96), weight_decay=0.03),
      ema=None,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          source="the paper's 261M, 461M, 955M and 1,499M count positions that 256 codes never "
                 'reach; without them these are 259.2M, 459.4M, 952.5M and 1,495.3M',
          spec=TokenSpec(grid=(16, 16), vocab=(1024,))))
