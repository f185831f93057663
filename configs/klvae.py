"""KL-VAEs, stage 0 of FlexTok on latents: smalti train --config=klvae --workdir=runs/klvae.

Reconstruction and divergence alone: the published ones add a discriminator and LPIPS. What learns
on the latents copies the run: smalti train --config=imagenet256_flextok_tokenizer
--init_from=vae=runs/klvae --workdir=DIR.
"""

from smalti.data.augment import AugmentConfig
from smalti.data.catalogue import TFDSConfig
from smalti.data.digits import DigitsConfig
from smalti.data.downloads import CifarJpegConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    Published,
)
from smalti.tokenizers.variational import VAEConfig

SIZES = {
    'debug': dict(image=8, channels=1, features=2, width=8, multipliers=(1, 2), blocks=1,
                  attention=(), batch_size=16, steps=2, rate=1e-3, data=DigitsConfig()),
    'small': dict(image=32, channels=3, features=4, width=32, multipliers=(1, 2, 2), blocks=1,
                  attention=(), batch_size=64, steps=4000, rate=1e-3,
                  data=CifarJpegConfig(augment=AugmentConfig(flip=True))),
    'base': dict(image=256, channels=3, features=16, width=128, multipliers=(1, 2, 4, 4), blocks=2,
                 attention=(32,), batch_size=256, steps=400_000, rate=1e-4,
                 data=TFDSConfig(name='imagenet2012', eval='validation', size=256)),
}


def get_config(size: str = 'base') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=VAEConfig(
          image_size=(options['image'],) * 2, channels=options['channels'],
          features=options['features'], width=options['width'],
          multipliers=options['multipliers'], blocks=options['blocks'],
          attention=options['attention'],
          dtype='bfloat16' if size == 'base' else 'float32'),
      data=options['data'],
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=options['rate'], warmup=100, betas=(0.9, 0.99)),
      ema=0.999,
      checkpoint=CheckpointConfig(every=1000, best='eval/mse'),
      eval=EvalConfig(every=1000, batches=16),
      published=Published(source='none: the released f8 VAEs have attention in the middle alone, '
                          'and 1x1 convolutions around the latents'))
