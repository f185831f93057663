"""An MNIST classifier, the feature extractor of 28 x 28 grey images.

smalti train --config=mnist_classifier --workdir=runs/mnist_classifier
smalti export --workdir=runs/mnist_classifier --out=mnist.safetensors
"""

from smalti.data.digits import DigitsConfig
from smalti.data.downloads import MnistConfig
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
    'debug': dict(size=8, width=8, multipliers=(1, 2), steps=2, batch_size=16,
                  data=DigitsConfig()),
    'base': dict(size=28, width=32, multipliers=(1, 4), steps=1200, batch_size=128,
                 data=MnistConfig()),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=ClassifierConfig(
          image_size=(options['size'], options['size']), channels=1, width=options['width'],
          multipliers=options['multipliers']),
      data=options['data'],
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=2e-3, warmup=100, weight_decay=0.05),
      ema=0.99,
      checkpoint=CheckpointConfig(every=400),
      log=LogConfig(every=50),
      eval=EvalConfig(every=400),
      published=Published(source='our own size: 2.5 epochs, minutes on two cores'))
