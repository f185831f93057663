"""BSQ-ViT: 32 x 32 codes of 18 or 36 bits of ImageNet at 256 px (arXiv 2406.07548).

  smalti train --config=imagenet256_bsq_tokenizer:18 --workdir=DIR --config.data.data_dir=TFDS

Signs on the unit sphere between two vision transformers; configs/tokenizer of
zhaoyue-zephyrus/bsq-vit: L1 and 0.1 LPIPS, StyleGAN's discriminator with a logistic loss and R1,
the codebook's term at three times its weight for the first steps. R1 is taken at every step here
and not at sixteen times its weight at every 16th.
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
from smalti.networks.discriminator import PatchDiscriminatorConfig, StyleDiscriminatorConfig
from smalti.networks.vision import plain
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.binary import BSQConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.vision import VisionTokenizerConfig

FULL: dict[str, Any] = dict(
    image=256, patch=8, blocks=(12, 768, 12), perceptual='lpips',
    discriminator=StyleDiscriminatorConfig(group=4), batch_size=256, rate=4e-7 * 256, warmup=5000,
    steps=1_000_000)
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(image=8, patch=4, blocks=(1, 16, 2), perceptual='none', bits=6, groups=1,
                  discriminator=PatchDiscriminatorConfig(width=8, layers=1), batch_size=8,
                  rate=1e-3, warmup=1, steps=2),
    '18': dict(**FULL, bits=18, groups=1),
    '36': dict(**FULL, bits=36, groups=4),  # int32 holds 30 bits
}


def get_config(size: str = '18') -> Experiment:
  options = SIZES[size]
  adam = OptimizerConfig(rate=options['rate'], schedule='cosine', final=0.5,
                         warmup=options['warmup'], betas=(0.9, 0.99), weight_decay=1e-4)
  return Experiment(
      model=VisionTokenizerConfig(
          image_size=(options['image'],) * 2, patch=options['patch'],
          encoder=plain(*options['blocks']), decoder=plain(*options['blocks']),
          positions='learned',
          quantizer=BSQConfig(bits=options['bits'], groups=options['groups']),
          reconstruction='l1', perceptual=options['perceptual'],
          weights=LossWeights(perceptual=0.1, commitment=0.0, entropy=0.1, entropy_boost=3.0),
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], loss='vanilla', weight=0.1, penalty=5.0),
          dtype='float32' if size == 'debug' else 'bfloat16'),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=adam,
      discriminator=adam,
      ema=0.999,
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(
          source='174M in the paper, of a transformer with other details than ours'))
