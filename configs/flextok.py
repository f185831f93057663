"""FlexTok on pixels: smalti train --config=flextok:small --workdir=runs/flextok.

Sizes: `digits` needs nothing and takes minutes on a laptop; `small` is CIFAR-10 as JPEG (its file
under $SMALTI_DATA_DIR), half an hour on two cores; `aligned` is the same with features drawn to
those of the classifier trained here. Decoded at every length:

  smalti reconstruct --workdir=runs/flextok [--settings.steps=10 --settings.guidance=2]
  python -m smalti.launch.budgets --workdir=runs/flextok
"""

import dataclasses

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
from smalti.networks.flow import lean
from smalti.tokenizers.alignment import AlignmentConfig
from smalti.tokenizers.flexible import FlexTokConfig
from smalti.tokenizers.scalar import FSQConfig

SIZES = {
    'debug': dict(image=8, channels=1, patch=4, registers=4, layers=1, width=16, head=8,
                  levels=(5, 3), rate=1e-3, batch_size=16, steps=2, data=DigitsConfig()),
    'digits': dict(image=8, channels=1, patch=2, registers=8, layers=3, width=64, head=32,
                   levels=(5, 5, 5), rate=2e-3, batch_size=64, steps=4000, data=DigitsConfig()),
    'small': dict(image=32, channels=3, patch=4, registers=16, layers=6, width=192, head=64,
                  levels=(8, 8, 8, 5, 5, 5), rate=1e-3, batch_size=32, steps=1800, location=1.5,
                  data=CifarJpegConfig(augment=AugmentConfig(flip=True))),
}
SIZES['aligned'] = dict(
    SIZES['small'], alignment=AlignmentConfig(teacher='cifar10', block=2, hidden=512))


def get_config(size: str = 'small') -> Experiment:
  options = SIZES[size]
  blocks = dataclasses.replace(
      lean(options['layers'], options['width'], head=options['head']), remat=False)
  return Experiment(
      model=FlexTokConfig(
          image_size=(options['image'],) * 2, channels=options['channels'], patch=options['patch'],
          registers=options['registers'], encoder=blocks, decoder=blocks,
          quantizer=FSQConfig(levels=options['levels']), location=options.get('location', 0.0),
          alignment=options.get('alignment')),
      data=options['data'],
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(
          rate=options['rate'], warmup=100, betas=(0.9, 0.99), weight_decay=0.05),
      ema=0.998,
      checkpoint=CheckpointConfig(every=200),
      log=LogConfig(every=20),
      eval=EvalConfig(every=200, batches=16),
      published=Published(source='our own sizes: the paper has no model of so few pixels'))
