"""ResGen on residual tokens of digits: smalti train --config=digits_resgen --workdir=DIR.

Needs a tokenizer of residual codes: smalti train --config=digits_rvq --workdir=runs/digits_rvq
first, or name another with --config.tokenizer=RUN and --config.model.channels.
"""

import dataclasses
from typing import Any

from smalti.configs import digits_masked
from smalti.generators.resgen import ResGenConfig
from smalti.launch.experiment import CheckpointConfig, Experiment, Published
from smalti.tokenizers.spec import TokenSpec

SIZES = digits_masked.SIZES


def get_config(size: str = 'base') -> Experiment:
  experiment: Any = digits_masked.get_config(size)
  model = ResGenConfig(classes=10, channels=8, components=64, rank=8,
                       transformer=experiment.model.transformer)
  return dataclasses.replace(
      experiment, model=model, tokenizer='runs/digits_rvq',
      checkpoint=CheckpointConfig(every=100, best='eval/nll_z_per_dim'),
      published=Published(source='our own size for 8 x 8 digits',
                          spec=TokenSpec(grid=(4, 4), vocab=(16,) * 4, order='depth')))
