"""Bits of 8 x 8 digits: smalti train --config=digits_bits --workdir=runs/digits_bits.

Bernoulli codes (docs/bernoulli.md), 4 at each of 4 x 4 positions, for binary diffusion.
"""

from typing import Any

from smalti.configs import digits_vq
from smalti.launch.experiment import Experiment
from smalti.tokenizers.bernoulli import BernoulliConfig

SIZES = {'debug': dict(bits=4, dim=8), 'base': dict(bits=4, dim=24)}


def get_config(size: str = 'base') -> Experiment:
  experiment: Any = digits_vq.get_config(size)
  experiment.model.quantizer = BernoulliConfig(**SIZES[size])
  return experiment
