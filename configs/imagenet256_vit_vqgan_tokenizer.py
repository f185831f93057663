"""ViT-VQGAN: 32 x 32 codes of ImageNet at 256 px (arXiv 2110.04627).

  smalti train --config=imagenet256_vit_vqgan_tokenizer --workdir=DIR --config.data.data_dir=TFDS

Sizes and losses are those of thuanz123/enhancing-transformers, whose blocks have tanh where
others have GELU: L2, 0.1 LPIPS, and 0.1 of a logistic adversary without adaptive weight. It has
StyleGAN's discriminator with R1, and here VQGAN+'s plays; the paper's logit-Laplace loss is left
out in both.
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
from smalti.tokenizers.vision import VisionTokenizerConfig
from smalti.tokenizers.vq import VQConfig

SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(blocks=(1, 16, 2), codes=16, dim=4, published=None),
    'small': dict(blocks=(8, 512, 8), codes=8192, dim=32, published=50_908_195),
    'base': dict(blocks=(12, 768, 12), codes=8192, dim=32, published=170_664_483),
}


def get_config(size: str = 'base') -> Experiment:
  options, debug = SIZES[size], size == 'debug'
  encoder, decoder = (plain(*options['blocks'], mlp='tanh', qkv_bias=False, init='xavier')
                      for _ in range(2))
  rate = dict(rate=1e-4, schedule='constant', betas=(0.9, 0.99), weight_decay=1e-4)
  biases = 8 * 8 * 3 - 3  # of the last layer: one per value of a patch, theirs one per channel
  return Experiment(
      model=VisionTokenizerConfig(
          image_size=(16, 16) if debug else (256, 256), patch=8, encoder=encoder, decoder=decoder,
          quantizer=VQConfig(codes=options['codes'], dim=options['dim'], cosine=True,
                             update='gradient', init='normal', revival=0.0),
          perceptual='none' if debug else 'lpips',
          weights=LossWeights(commitment=0.25, perceptual=0.1),
          adversary=None if debug else AdversaryConfig(
              loss='vanilla', weight=0.1),
          dtype='float32' if debug else 'bfloat16'),
      data=TFDSConfig(name='imagenet2012', eval='validation', size=16 if debug else 256,
                      augment=AugmentConfig(flip=True)),
      steps=2 if debug else 500_000,
      batch_size=8 if debug else 256,
      optimizer=OptimizerConfig(**rate),
      discriminator=None if debug else OptimizerConfig(**rate),
      ema=0.999,
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          parameters=None if debug else options['published'] + biases,
          source='count of the official constructors of enhancing-transformers, with a bias for '
                 'every value of a patch'))
