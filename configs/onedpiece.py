"""One-D-Piece at 32 px: registers, of which any number is an image, and the first the most of it.

`small` is CIFAR-10 as JPEG (its file under $SMALTI_DATA_DIR), half an hour on two cores, with the
registers and codes of `flextok:small`, whose decoder samples where this one averages:

  smalti train --config=onedpiece:small --workdir=runs/onedpiece
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
from smalti.networks.vision import plain
from smalti.tokenizers.registers import RegisterTokenizerConfig
from smalti.tokenizers.scalar import FSQConfig

SIZES = {
    'debug': dict(image=8, channels=1, patch=4, layers=1, width=16, heads=2, registers=4,
                  levels=(5, 5), batch_size=16, steps=2, data=DigitsConfig()),
    'small': dict(image=32, channels=3, patch=4, layers=4, width=128, heads=4, registers=16,
                  levels=(8, 8, 8, 5, 5, 5), batch_size=32, steps=4500,
                  data=CifarJpegConfig(augment=AugmentConfig(flip=True))),
    'base': dict(image=32, channels=3, patch=4, layers=6, width=192, heads=6, registers=32,
                 levels=(8, 8, 8, 5, 5, 5), batch_size=128, steps=50_000,
                 data=CifarJpegConfig(augment=AugmentConfig(flip=True, crop=3))),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  blocks = [plain(options['layers'], options['width'], options['heads'], init='xavier',
                  remat=size == 'base')
            for _ in range(2)]
  return Experiment(
      model=RegisterTokenizerConfig(
          image_size=(options['image'],) * 2, channels=options['channels'],
          patch=options['patch'], encoder=blocks[0], decoder=blocks[1],
          registers=options['registers'], quantizer=FSQConfig(levels=options['levels']),
          positions='sincos', smooth=True, drop='uniform'),
      data=options['data'],
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=1e-3, warmup=200, betas=(0.9, 0.99), weight_decay=0.01),
      ema=0.999,
      checkpoint=CheckpointConfig(every=1000, best='eval/mse'),
      log=LogConfig(every=50),
      eval=EvalConfig(every=1000, batches=16),
      published=Published(source='our own sizes; the published ones read ImageNet'))
