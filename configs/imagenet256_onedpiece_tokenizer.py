"""One-D-Piece: 256 registers of ImageNet at 256 px, any number of which decodes.

  smalti train --config=imagenet256_onedpiece_tokenizer --workdir=DIR --config.data.data_dir=TFDS

Miwa et al. 2025, arXiv 2501.10064. The published models (4,096 codes of 12 channels) have
TiTok's two stages; here they are trained on pixels in one, as TA-TiTok is, every example with its
own length.
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
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.registers import RegisterTokenizerConfig
from smalti.tokenizers.vq import VQConfig

SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(blocks=(1, 16, 2), registers=4, codes=16, dim=4, published=None),
    's': dict(blocks=(8, 512, 8), registers=256, codes=4096, dim=12, published=51_949_920),
    'b': dict(blocks=(12, 768, 12), registers=256, codes=4096, dim=12, published=172_351_584),
    'l': dict(blocks=(24, 1024, 16), registers=256, codes=4096, dim=12, published=607_592_288),
}


def get_config(size: str = 's') -> Experiment:
  options, debug = SIZES[size], size == 'debug'
  encoder, decoder = (plain(*options['blocks']) for _ in range(2))
  rate = dict(rate=1e-4, final=0.1, warmup=10_000, betas=(0.9, 0.99), weight_decay=1e-4)
  # published code adds learned vectors to learned vectors: registers and class tokens get positions
  doubled = (options['registers'] + 2) * encoder.width
  return Experiment(
      model=RegisterTokenizerConfig(
          image_size=(16, 16) if debug else (256, 256), patch=8 if debug else 16,
          encoder=encoder, decoder=decoder, registers=options['registers'], drop='uniform',
          smooth=True,
          quantizer=VQConfig(codes=options['codes'], dim=options['dim'], cosine=True,
                             update='gradient', init='uniform', revival=0.0),
          perceptual='none' if debug else 'lpips',
          weights=LossWeights(commitment=0.25),
          adversary=None if debug else AdversaryConfig(
              weight=0.1, start=200_000, lecam=0.001),
          dtype='float32' if debug else 'bfloat16'),
      data=TFDSConfig(name='imagenet2012', eval='validation', size=16 if debug else 256,
                      augment=AugmentConfig(flip=True)),
      steps=2 if debug else 1_000_000,
      batch_size=8 if debug else 256,
      optimizer=OptimizerConfig(**rate),
      discriminator=None if debug else OptimizerConfig(**rate, start=200_000),
      ema=0.999,
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=None if debug else options['published'] - doubled,
          source='count of TiTok\'s official constructors with is_legacy=False, less their second '
                 'copies of learned vectors'))
