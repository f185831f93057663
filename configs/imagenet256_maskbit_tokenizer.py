"""MaskBit's tokenizer: 16 x 16 codes of 10 to 18 bits of ImageNet at 256 px (arXiv 2409.16211).

  smalti train --config=imagenet256_maskbit_tokenizer:14 --workdir=DIR --config.data.data_dir=TFDS

`vqgan_plus` is VQGAN+ of the same paper, 4,096 codes in place of the bits. MaskGIT's networks with
strided convolutions, L2 at weight 4, the paper's own discriminator with LeCAM from step 20,000, and
an entropy term that starts at three times its weight. Its perceptual loss is on the logits of a
ResNet-50; LPIPS stands for it, at the same weight. Settings: configs/tokenizer of
markweberdev/maskbit; 16 images per GPU, whose number it does not say (16 here).
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
from smalti.networks.convnet import ConvOptions
from smalti.networks.discriminator import BlurDiscriminatorConfig, PatchDiscriminatorConfig
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.binary import LFQConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.vq import VQConfig

FULL: dict[str, Any] = dict(
    image=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, perceptual='lpips', start=20_000,
    warmup=5000, discriminator=BlurDiscriminatorConfig(stages=4), batch_size=256, steps=1_350_000)
SIZES: dict[str, dict[str, Any]] = {
    'debug': dict(image=8, width=8, multipliers=(1, 1), blocks=0, perceptual='none', start=1,
                  warmup=1, discriminator=PatchDiscriminatorConfig(width=8, layers=1),
                  batch_size=8, steps=2, quantizer=LFQConfig(bits=6)),
    **{str(bits): dict(**FULL, quantizer=LFQConfig(bits=bits)) for bits in (10, 12, 14, 16, 18)},
    'vqgan_plus': dict(**FULL, quantizer=VQConfig(
        codes=4096, dim=64, update='gradient', init='uniform', revival=0.0)),
}


def get_config(size: str = '14') -> Experiment:
  options = SIZES[size]
  adam = OptimizerConfig(rate=1e-4, schedule='cosine', final=0.1, warmup=options['warmup'],
                         betas=(0.9, 0.999), weight_decay=1e-4)
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          layers=ConvOptions(bias=False, extra=0, pointwise=True),
          quantizer=options['quantizer'], perceptual=options['perceptual'],
          weights=LossWeights(reconstruction=4.0, perceptual=0.1, commitment=0.25, entropy=0.02,
                              entropy_boost=3.0),
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], weight=0.02, start=options['start'],
              lecam=0.001)),
      data=TFDSConfig(name='imagenet2012', size=options['image'],
                      augment=AugmentConfig(flip=True)),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=adam,
      discriminator=adam,
      ema=0.999,
      checkpoint=CheckpointConfig(every=5000, best='eval/mse'),
      eval=EvalConfig(every=5000, batches=40),
      published=Published(source='no count of the tokenizer alone was published'))
