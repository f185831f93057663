"""What an adversary adds to a small tokenizer of 32 x 32 pictures, in two stages.

  smalti train --config=adversarial:l2 --workdir=runs/l2
  smalti train --config=adversarial:gan --workdir=runs/gan --init_from=runs/l2

The first trains on squared error until its rate is gone. `more` and `gan` go on for 1,000 steps,
with and without a discriminator, alike in all else; `python -m smalti.launch.adversarial` compares
them over two seeds.
"""

from smalti.data.digits import DigitsConfig
from smalti.data.downloads import CifarJpegConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    LogConfig,
    OptimizerConfig,
    Published,
)
from smalti.networks.discriminator import PatchDiscriminatorConfig
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.vq import VQConfig

SMALL = dict(image=32, channels=3, patch=4, width=96, batch_size=64,
             quantizer=FSQConfig(levels=(8, 5, 5, 5)))
SIZES = {
    'debug': dict(stage='gan', image=8, channels=1, patch=2, width=8, batch_size=16, steps=2,
                  quantizer=VQConfig(codes=16, dim=8),
                  discriminator=PatchDiscriminatorConfig(width=8, layers=1)),
    'l2': dict(stage='l2', **SMALL, steps=3000),
    'more': dict(stage='more', **SMALL, steps=1000),
    'gan': dict(stage='gan', **SMALL, steps=1000,
                discriminator=PatchDiscriminatorConfig(width=32, layers=2)),
}


def get_config(size: str = 'gan') -> Experiment:
  options = SIZES[size]
  first, plays = options['stage'] == 'l2', options['stage'] == 'gan'
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, channels=options['channels'],
          width=options['width'], multipliers=(1,), blocks=0, patch=options['patch'],
          quantizer=options['quantizer'],
          # not the adaptive weight from the first step: against a discriminator that knows nothing
          # yet it grew to 25 times, which kept it so, and the distance above that of plain error
          adversary=AdversaryConfig(
              discriminator=options['discriminator'], weight=0.02, warm=150,
              lecam=0.001) if plays else None),
      data=CifarJpegConfig() if options['channels'] == 3 else DigitsConfig(),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=(
          OptimizerConfig(rate=1e-3, warmup=100) if first else
          OptimizerConfig(rate=2e-4, schedule='constant', warmup=50, betas=(0.5, 0.9))),
      discriminator=OptimizerConfig(
          rate=4e-4, schedule='constant', warmup=0, betas=(0.5, 0.9)) if plays else None,
      ema=0.99,
      checkpoint=CheckpointConfig(every=500),
      log=LogConfig(every=50),
      eval=EvalConfig(every=500, batches=8),
      published=Published(source='our own size: 0.9M parameters, minutes on two cores'))
