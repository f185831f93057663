"""FSQ's tokenizer: 16 x 16 codes of ImageNet at 256 px, 1,000 to 64,000 (arXiv 2309.15505).

  smalti train --config=imagenet256_fsq_tokenizer:1k --workdir=DIR --config.data.data_dir=TFDS

Section 5.1 of the paper: MaskGIT's tokenizer with levels in place of its codebook, and all else as
it is. 1k is the published one; the others have the levels of Table 1.
"""

import dataclasses
from typing import Any

from smalti.configs import imagenet256_maskgit_tokenizer as maskgit
from smalti.launch.experiment import Experiment, Published
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.scalar import FSQConfig

SIZES: dict[str, tuple[int, ...]] = {
    'debug': (5, 5),
    '1k': (8, 5, 5, 5),
    '4k': (7, 5, 5, 5, 5),
    '16k': (8, 8, 8, 6, 5),
    '64k': (8, 8, 8, 5, 5, 5),
}


def get_config(size: str = '1k') -> Experiment:
  debug = size == 'debug'
  experiment: Any = maskgit.get_config('debug' if debug else 'base')
  experiment.model.quantizer = ProjectedConfig(
      dim=8 if debug else 256, quantizer=FSQConfig(levels=SIZES[size]))
  experiment.model.weights = dataclasses.replace(experiment.model.weights, entropy=0.0)
  return dataclasses.replace(
      experiment, published=Published(source='no count of the tokenizer alone was published'))
