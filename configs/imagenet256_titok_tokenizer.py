"""TiTok in one stage: 32 to 256 registers of ImageNet at 256 px (arXiv 2406.07550, 2501.07730).

  smalti train --config=imagenet256_titok_tokenizer:b64 --workdir=DIR --config.data.data_dir=TFDS

s128, b64 and l32 have the sizes of the paper's table 1, whose two-stage recipe predicts the codes
of a frozen VQGAN first; bl64, bl128 and sl256 are the published single-stage models. All are
trained here as TA-TiTok trains, on pixels, LPIPS and a late discriminator; ConvNeXt's share of its
perceptual loss (a tenth) is not there. The published batch is 32 per device of an unnamed number.
"""

from typing import Any

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    Published,
)
from smalti.networks.vision import plain
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.clustering import ClusteringConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.registers import RegisterTokenizerConfig
from smalti.tokenizers.vq import VQConfig

SMALL, BASE, LARGE = (8, 512, 8), (12, 768, 12), (24, 1024, 16)  # layers, width, heads
EARLY: dict[str, Any] = dict(
    codes=4096, dim=12, cosine=True, update='gradient', init='uniform', revival=0.0)
LATER = dict(codes=8192, dim=64, update='gradient', init='uniform', clustering=ClusteringConfig(),
             revival=0.0)
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(encoder=(1, 16, 2), decoder=(1, 16, 2), registers=4, published=None,
                  codes={**LATER, 'codes': 16, 'dim': 4}),
    's128': dict(encoder=SMALL, decoder=SMALL, registers=128, codes=EARLY, published=51_753_312),
    'b64': dict(encoder=BASE, decoder=BASE, registers=64, codes=EARLY, published=171_909_216),
    'l32': dict(encoder=LARGE, decoder=LARGE, registers=32, codes=EARLY, published=606_904_160),
    'bl64': dict(encoder=BASE, decoder=LARGE, registers=64, codes=LATER, published=390_016_148),
    'bl128': dict(encoder=BASE, decoder=LARGE, registers=128, codes=LATER, published=390_179_988),
    'sl256': dict(encoder=SMALL, decoder=LARGE, registers=256, codes=LATER, published=330_260_884),
}


def get_config(size: str = 'bl64') -> Experiment:
  options, debug = SIZES[size], size == 'debug'
  encoder, decoder = plain(*options['encoder']), plain(*options['decoder'])
  rate = dict(rate=1e-4, final=0.1, warmup=10_000, betas=(0.9, 0.999), weight_decay=1e-4)
  # published code adds learned vectors to learned vectors: registers and class token get positions
  doubled = (options['registers'] + 1) * encoder.width + decoder.width
  return Experiment(
      model=RegisterTokenizerConfig(
          image_size=(16, 16) if debug else (256, 256), patch=8 if debug else 16,
          encoder=encoder, decoder=decoder, registers=options['registers'], smooth=True,
          quantizer=VQConfig(**options['codes']),
          perceptual='none' if debug else 'lpips',
          weights=LossWeights(commitment=0.25, perceptual=1.0),
          adversary=None if debug else AdversaryConfig(
              weight=0.1, start=200_000, lecam=0.001),
          dtype='float32' if debug else 'bfloat16'),
      data=TFDSConfig(name='imagenet2012', eval='validation', size=16 if debug else 256,
                      augment=AugmentConfig(flip=True)),
      steps=2 if debug else 650_000,
      batch_size=8 if debug else 256,
      optimizer=OptimizerConfig(**rate),
      discriminator=None if debug else OptimizerConfig(**rate, start=200_000),
      ema=0.999,
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=None if debug else options['published'] - doubled,
          source='count of the official constructors with is_legacy=False, less their second '
                 'copies of learned vectors'))
