"""A CIFAR-10 classifier, the feature extractor of colour images where Inception's weights are not.

smalti train --config=cifar10_classifier --workdir=runs/cifar10_classifier
smalti export --workdir=runs/cifar10_classifier --out=cifar10.safetensors
"""

from smalti.data.augment import AugmentConfig
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
from smalti.networks.classifier import ClassifierConfig

SIZES = {
    'debug': dict(size=8, channels=1, width=8, multipliers=(1, 2), steps=2, batch_size=16,
                  data=DigitsConfig()),
    'base': dict(size=32, channels=3, width=32, multipliers=(1, 2, 4), steps=4000, batch_size=128,
                 data=CifarJpegConfig(augment=AugmentConfig(flip=True, crop=3))),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=ClassifierConfig(
          image_size=(options['size'], options['size']), channels=options['channels'],
          width=options['width'], multipliers=options['multipliers']),
      data=options['data'],
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=3e-3, warmup=200, weight_decay=0.05),
      ema=0.998,
      checkpoint=CheckpointConfig(every=1000),
      log=LogConfig(every=50),
      eval=EvalConfig(every=1000),
      published=Published(source='our own size: 10 epochs within half an hour on two cores'))
