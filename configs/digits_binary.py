"""Binary diffusion of digits: smalti train --config=digits_binary --workdir=runs/digits_binary.

Needs a tokenizer of bits: smalti train --config=digits_bits --workdir=runs/digits_bits first, or
name another with --config.tokenizer=RUN.
"""

import dataclasses
from typing import Any

from smalti.configs import digits_masked
from smalti.generators.binary import BinaryConfig
from smalti.launch.experiment import Experiment, Published
from smalti.tokenizers.spec import TokenSpec

SIZES = digits_masked.SIZES


def get_config(size: str = 'base') -> Experiment:
  experiment: Any = digits_masked.get_config(size)
  model = BinaryConfig(classes=10, transformer=experiment.model.transformer)
  return dataclasses.replace(
      experiment, model=model, tokenizer='runs/digits_bits',
      published=Published(source='our own size for 8 x 8 digits',
                          spec=TokenSpec(grid=(4, 4), vocab=(2,) * 4, factors=(2,))))
