"""Collapse of a large codebook, and what prevents it: smalti sweep --config=collapse.

K = 16,384 codes of 32 channels in the net of `quantizers`: a plain codebook that follows its
gradient (VQGAN's start, no moving averages, no revival), SimVQ, FSQ, and the same codebook with
k-means, moving averages and revival. Use of the codes is measured every 200 steps.
"""

import dataclasses
from typing import Any

from smalti.configs import quantizers
from smalti.launch.experiment import CheckpointConfig, Experiment
from smalti.tokenizers.quantizer import QuantizerConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.simvq import SimVQConfig
from smalti.tokenizers.vq import VQConfig

CODES, DIM = 16384, 32
ROWS: dict[str, QuantizerConfig] = {
    'vq': VQConfig(codes=CODES, dim=DIM, update='gradient', init='uniform', revival=0.0),
    'simvq': SimVQConfig(codes=CODES, dim=DIM),
    'fsq': FSQConfig(levels=(8, 8, 8, 6, 5)),
    'vq_revived': VQConfig(codes=CODES, dim=DIM, init='kmeans'),
}
SIZES = {'debug': 'debug', 'base': 'base'}


def get_config(size: str = 'base') -> Experiment:
  """The plain codebook."""
  experiment: Any = quantizers.get_config(SIZES[size])
  plain: Any = ROWS['vq']
  experiment.model.quantizer = plain if size == 'base' else dataclasses.replace(plain, codes=64)
  return dataclasses.replace(
      experiment, checkpoint=CheckpointConfig(every=200, keep_every=200))


def get_sweep(size: str = 'base') -> dict[str, Experiment]:
  found = {}
  for seed in (0, 1, 2):
    for row, quantizer in ROWS.items():
      experiment: Any = get_config(size)
      experiment.model.quantizer = quantizer
      found[f'{row}/{seed}' if seed else row] = dataclasses.replace(experiment, seed=seed)
  return found
