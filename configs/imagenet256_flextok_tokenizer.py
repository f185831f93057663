"""FlexTok's tokenizers of ImageNet at 256 px (arXiv 2502.13967; apple/ml-flextok).

  smalti train --config=klvae --workdir=runs/klvae --config.data.data_dir=TFDS
  SMALTI_DINOV2=dinov2-large.safetensors \
    smalti train --config=imagenet256_flextok_tokenizer:d18_d28 --init_from=vae=runs/klvae \
    --workdir=DIR --config.data.data_dir=TFDS

Encoder and decoder layers give the name, widths are 64 per layer. Published are the architecture
and 256 registers of 64,000 codes on the 32 x 32 x 16 latents of an f8 VAE; the recipe is not, and
this one is ours, one rate for all widths, REPA at the block and weight of its own paper (set
--config.model.alignment=none to do without DINOv2's weights). Never run at these sizes by us.
"""

from smalti.data.catalogue import TFDSConfig
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    MeshConfig,
    OptimizerConfig,
    Published,
)
from smalti.networks.flow import lean
from smalti.tokenizers.alignment import AlignmentConfig
from smalti.tokenizers.flexible import FlexTokConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.variational import VAEConfig

F8C16 = VAEConfig(image_size=(256, 256), features=16, width=128, multipliers=(1, 2, 4, 4), blocks=2,
                  attention=(32,), dtype='bfloat16')
SIZES = {
    'debug': dict(image=16, vae=None, patch=4, registers=4, encoder=lean(1, 16, head=8),
                  decoder=lean(1, 16, head=8), levels=(5, 3), batch_size=8, steps=2, warmup=1),
    'd12_d12': dict(image=256, vae=F8C16, patch=2, registers=256, encoder=lean(12),
                    decoder=lean(12), levels=(8, 8, 8, 5, 5, 5), batch_size=1024, steps=500_000,
                    warmup=10_000),
    'd18_d18': dict(image=256, vae=F8C16, patch=2, registers=256, encoder=lean(18),
                    decoder=lean(18), levels=(8, 8, 8, 5, 5, 5), batch_size=1024, steps=500_000,
                    warmup=10_000),
    'd18_d28': dict(image=256, vae=F8C16, patch=2, registers=256, encoder=lean(18),
                    decoder=lean(28), levels=(8, 8, 8, 5, 5, 5), batch_size=1024, steps=500_000,
                    warmup=10_000),
}


def get_config(size: str = 'd18_d18') -> Experiment:
  options = SIZES[size]
  return Experiment(
      model=FlexTokConfig(
          image_size=(options['image'],) * 2, vae=options['vae'], patch=options['patch'],
          registers=options['registers'], encoder=options['encoder'], decoder=options['decoder'],
          quantizer=FSQConfig(levels=options['levels']), reach=None,
          alignment=None if size == 'debug' else AlignmentConfig(teacher='dinov2_large'),
          dtype='float32' if size == 'debug' else 'bfloat16'),
      data=TFDSConfig(name='imagenet2012', eval='validation', size=options['image']),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(
          rate=2e-4, warmup=options['warmup'], betas=(0.9, 0.99), weight_decay=0.05),
      ema=0.9998,
      mesh=MeshConfig(data=-1),
      checkpoint=CheckpointConfig(every=5000),
      eval=EvalConfig(every=5000, batches=16),
      published=Published(source='no primary count; 573M (d18-d18) and 1.4B (d18-d28) of third '
                          'parties are the blocks without their modulation, which code has'))
