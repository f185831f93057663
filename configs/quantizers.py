"""Every quantizer in one small net, at one rate of bits: smalti sweep --config=quantizers.

32 x 32 pictures become 64 positions of about 10 bits, 640 in all: patches of 4 x 4 pixels, two
residual blocks of 96 channels at 8 x 8 in the encoder and three in the decoder. The rows differ in
the quantizer alone: same net, data, steps and learning rate.

One of them: smalti train --config=quantizers:fsq --workdir=runs/fsq.
"""

import dataclasses
from typing import Any

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
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.bernoulli import BernoulliConfig
from smalti.tokenizers.binary import BSQConfig, LFQConfig
from smalti.tokenizers.clustering import ClusteringConfig
from smalti.tokenizers.entropy import EntropyConfig
from smalti.tokenizers.grouped import GroupedConfig
from smalti.tokenizers.gumbel import GumbelConfig
from smalti.tokenizers.ibq import IBQConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.multiscale import MultiScaleConfig
from smalti.tokenizers.partitioned import PartitionedConfig
from smalti.tokenizers.quantizer import QuantizerConfig
from smalti.tokenizers.recurrent import RecurrentConfig
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.simvq import SimVQConfig
from smalti.tokenizers.sinkhorn import SinkhornConfig
from smalti.tokenizers.sparse import SparseConfig
from smalti.tokenizers.vq import VQConfig

DIM = 32  # of all codes that are vectors
ROWS: dict[str, tuple[QuantizerConfig, LossWeights]] = {  # the most important first
    'vq': (VQConfig(codes=1024, dim=DIM), LossWeights()),
    'fsq': (FSQConfig(levels=(8, 5, 5, 5)), LossWeights()),
    'simvq': (SimVQConfig(codes=1024, dim=DIM), LossWeights()),
    # MaskBit's weights; at this scale the 1 and 0.1 of MAGVIT-v2 drown the pictures
    'lfq': (LFQConfig(bits=10), LossWeights(reconstruction=4.0, entropy=0.02, entropy_boost=3.0)),
    'residual': (ResidualConfig(quantizer=VQConfig(codes=32, dim=DIM), levels=2), LossWeights()),
    'bsq': (BSQConfig(bits=10), LossWeights(commitment=0.0, entropy_boost=3.0)),
    'ibq': (IBQConfig(codes=1024, dim=DIM), LossWeights(commitment=1.0, entropy=0.05)),
    'bernoulli': (BernoulliConfig(bits=10, dim=DIM), LossWeights()),
    'product': (GroupedConfig(quantizer=VQConfig(codes=32, dim=DIM // 2)), LossWeights()),
    'vq_gradient': (VQConfig(codes=1024, dim=DIM, update='gradient'), LossWeights()),
    'vq_cosine': (VQConfig(codes=1024, dim=8, cosine=True, update='gradient'), LossWeights()),
    'vq_rotation': (VQConfig(codes=1024, dim=DIM, estimator='rotation'), LossWeights()),
    'vq_clustering': (
        VQConfig(codes=1024, dim=DIM, update='gradient', revival=0.0,
                 clustering=ClusteringConfig()), LossWeights()),
    'vq_sinkhorn': (
        VQConfig(codes=1024, dim=DIM, update='gradient', assignment=SinkhornConfig()),
        LossWeights()),
    'grvq': (  # 10.3 bits
        GroupedConfig(quantizer=ResidualConfig(
            quantizer=VQConfig(codes=6, dim=DIM // 2), levels=2)), LossWeights()),
    'multiscale': (  # 130 codes of 30, 637.9 bits
        MultiScaleConfig(quantizer=VQConfig(codes=30, dim=DIM, update='gradient'),
                         scales=(1, 2, 3, 4, 6, 8)), LossWeights()),
    'vq_entropy': (
        VQConfig(codes=1024, dim=DIM, update='gradient', entropy=EntropyConfig()), LossWeights()),
    'gumbel': (GumbelConfig(codes=1024, dim=DIM, steps=2000), LossWeights(entropy=5e-4)),
    'mcrvq': (  # three codes of 10, 637.8 bits
        PartitionedConfig(quantizer=VQConfig(codes=10, dim=DIM), levels=3, split=2, dropout=0.0),
        LossWeights()),
    'sparse': (SparseConfig(codes=32, dim=DIM, active=2), LossWeights()),
    'recurrent': (RecurrentConfig(dim=DIM, bits=5, levels=2, hidden=128), LossWeights()),
}
REPEATED = ('vq', 'fsq', 'simvq', 'lfq', 'residual')  # which the text compares: three seeds
SIZES = {
    'debug': dict(image=8, channels=1, patch=2, width=8, blocks=0, steps=2, batch_size=16),
    'base': dict(image=32, channels=3, patch=4, width=96, blocks=0, steps=2000, batch_size=64),
    'digits': dict(image=8, channels=1, patch=1, width=32, blocks=0, steps=2000, batch_size=64),
    **{row: dict(image=32, channels=3, patch=4, width=96, blocks=0, steps=2000, batch_size=64)
       for row in ROWS},
}


def get_config(size: str = 'base') -> Experiment:
  options, (quantizer, weights) = SIZES[size], ROWS.get(size, ROWS['vq'])
  return Experiment(
      model=AutoencoderConfig(
          image_size=(options['image'],) * 2, channels=options['channels'],
          width=options['width'], multipliers=(1,), blocks=options['blocks'],
          patch=options['patch'], quantizer=quantizer, weights=weights),
      data=CifarJpegConfig() if options['channels'] == 3 else DigitsConfig(),
      steps=options['steps'],
      batch_size=options['batch_size'],
      optimizer=OptimizerConfig(rate=1e-3, warmup=100),
      ema=0.99,
      checkpoint=CheckpointConfig(every=500),
      log=LogConfig(every=100),
      eval=EvalConfig(every=500, batches=8),
      published=Published(source='our own size: 0.9M parameters, minutes on two cores'))


def get_sweep(size: str = 'base') -> dict[str, Experiment]:
  named = {row: (row, 0) for row in ROWS}
  named |= {f'{row}/{seed}': (row, seed) for seed in (1, 2) for row in REPEATED}
  found = {}
  for name, (row, seed) in named.items():
    experiment: Any = get_config(size)
    experiment.model.quantizer, experiment.model.weights = ROWS[row]
    found[name] = dataclasses.replace(experiment, seed=seed)
  found['untrained_encoder'] = dataclasses.replace(found['vq'], fixed=('encoder',))  # a control
  return found
