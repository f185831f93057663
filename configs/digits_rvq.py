"""Residual tokens of 8 x 8 digits: smalti train --config=digits_rvq --workdir=runs/digits_rvq."""

import dataclasses
from typing import Any

from smalti.configs import digits_vq
from smalti.launch.experiment import Experiment
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.vq import VQConfig

SIZES = digits_vq.SIZES


def get_config(size: str = 'base') -> Experiment:
  experiment: Any = digits_vq.get_config(size)
  quantizer = ResidualConfig(quantizer=VQConfig(codes=16, dim=8), levels=4)
  return dataclasses.replace(
      experiment, model=dataclasses.replace(experiment.model, quantizer=quantizer))
