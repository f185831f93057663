"""Every generator and sampler on MNIST: smalti sweep --config=generators.

MNIST becomes 7 x 7 positions of 6 bits (one code of 64, two residual codes of 8, six bits), or 16
ordered registers of 6 bits. The transformers have 4 blocks of 128 channels, about a million
parameters and 2,500 steps, some minutes on two cores. Rows of one model differ in the sampler and
share their training run. A row names its tokenizer, which is trained first.

The rows `cifar10 ...` have the same transformers on 32 x 32 colour pictures: 8 x 8 positions of 10
bits, from the tokenizers of `quantizers`.

One of them: smalti train --config=generators:masked --config.tokenizer=RUN --workdir=DIR.
"""

import dataclasses
from typing import Any

from smalti.configs import onedpiece, quantizers
from smalti.data.digits import DigitsConfig
from smalti.data.downloads import CifarJpegConfig, MnistConfig
from smalti.generators.autoregressive import AutoregressiveConfig, AutoregressiveSettings
from smalti.generators.binary import BinaryConfig, BinarySettings
from smalti.generators.block import BlockDiffusionConfig
from smalti.generators.delay import DelayConfig
from smalti.generators.depth import DepthConfig
from smalti.generators.maskbit import MaskBitConfig
from smalti.generators.masked import MaskedConfig
from smalti.generators.resgen import ResGenConfig
from smalti.generators.stacked import StackedConfig
from smalti.generators.unmasking import MaskedSettings
from smalti.launch.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    LogConfig,
    OptimizerConfig,
    Published,
)
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.bernoulli import BernoulliConfig
from smalti.tokenizers.binary import LFQConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.quantizer import QuantizerConfig
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.vq import VQConfig

CODES: dict[str, tuple[QuantizerConfig, LossWeights]] = {
    'vq': (VQConfig(codes=64, dim=16), LossWeights()),
    'rvq': (ResidualConfig(quantizer=VQConfig(codes=8, dim=16), levels=2), LossWeights()),
    'bits': (BernoulliConfig(bits=6, dim=16), LossWeights()),
    'lfq': (LFQConfig(bits=6), LossWeights(reconstruction=4.0, entropy=0.02, entropy_boost=3.0)),
    'nested': (FSQConfig(levels=(4, 4, 4)), LossWeights()),
}
PICTURES = {'cifar10 vq': 'vq', 'cifar10 bits': 'bernoulli', 'cifar10 rvq': 'residual'}
SPECS = {'vq': TokenSpec(grid=(7, 7), vocab=(64,)),
         'rvq': TokenSpec(grid=(7, 7), vocab=(8, 8), order='depth'),
         'bits': TokenSpec(grid=(7, 7), vocab=(2,) * 6, factors=(2,)),
         'lfq': TokenSpec(grid=(7, 7), vocab=(64,), factors=(2,) * 6),
         'nested': TokenSpec(grid=(16,), vocab=(64,), factors=(4, 4, 4), order='nested',
                             budgets=tuple(range(1, 17))),
         'cifar10 vq': TokenSpec(grid=(8, 8), vocab=(1024,)),
         'cifar10 bits': TokenSpec(grid=(8, 8), vocab=(2,) * 10, factors=(2,)),
         'cifar10 rvq': TokenSpec(grid=(8, 8), vocab=(32, 32), order='depth')}
STEPS = 2500
HALTON = MaskedSettings(sampler='halton', steps=16)
# name: the tokens, the generator and, where they are not its own, how it is sampled
ROWS: dict[str, tuple[str, Any, Any]] = {  # the most important first
    'autoregressive': ('vq', AutoregressiveConfig, None),
    'masked': ('vq', MaskedConfig, None),
    'masked ancestral': ('vq', MaskedConfig, MaskedSettings(sampler='ancestral', steps=16)),
    'masked first_hitting': ('vq', MaskedConfig, MaskedSettings(sampler='first_hitting')),
    'masked halton': ('vq', MaskedConfig, HALTON),
    'masked remdm': ('vq', MaskedConfig, MaskedSettings(sampler='remdm', steps=64)),
    'masked confidence': (
        'vq', MaskedConfig, MaskedSettings(sampler='confidence', choice_temperature=0.5)),
    'binary': ('bits', BinaryConfig, None),
    'binary 16 steps': ('bits', BinaryConfig, BinarySettings(steps=16)),
    'binary product': ('bits', BinaryConfig, BinarySettings(reverse='product')),
    'depth': ('rvq', DepthConfig, None),
    'resgen': ('rvq', ResGenConfig, None),
    'maskgit': ('vq', MaskedConfig, None),
    'maskbit': ('lfq', MaskBitConfig, None),
    'rar': ('vq', AutoregressiveConfig, None),
    'any order': ('vq', AutoregressiveConfig, None),
    'any order random': ('vq', AutoregressiveConfig, AutoregressiveSettings(order='random')),
    'block': ('vq', BlockDiffusionConfig, None),
    'delay': ('rvq', DelayConfig, None),
    'stacked': ('rvq', StackedConfig, None),
    'nested': ('nested', AutoregressiveConfig, None),
    'cifar10 autoregressive': ('cifar10 vq', AutoregressiveConfig, None),
    'cifar10 masked': ('cifar10 vq', MaskedConfig, None),
    'cifar10 binary': ('cifar10 bits', BinaryConfig, None),
    'cifar10 depth': ('cifar10 rvq', DepthConfig, None),
    'cifar10 resgen': ('cifar10 rvq', ResGenConfig, None),
}
# of log sigma: a third of what parts a sum of codes from the nearest other (median: 1.1 of 64 sums,
# .78 of 1,024); narrower, density is all that is learned
FLOOR, FLOOR_1024 = -1.0, -1.35
OWN: dict[str, dict[str, Any]] = {  # what a generator has beside a transformer and classes
    'maskgit': dict(objective='maskgit'),
    'rar': dict(anneal=(STEPS // 2, STEPS * 3 // 4)),  # as published
    'any order': dict(anneal=(STEPS, STEPS)), 'any order random': dict(anneal=(STEPS, STEPS)),
    'block': dict(block_size=7),
    'resgen': dict(channels=16, components=128, rank=16, floor=FLOOR),
    'cifar10 resgen': dict(channels=quantizers.DIM, components=256, rank=16, floor=FLOOR_1024),
}
COMPARED = ('autoregressive', 'masked', 'binary', 'depth', 'resgen')  # a second seed
SIZES: dict[str, Any] = {'debug': None, 'base': None, **dict.fromkeys(ROWS)}


def tokenizer(name: str) -> Experiment:
  """Tokens of MNIST: the net of `quantizers`, or of One-D-Piece for registers; or of pictures."""
  if name in PICTURES:
    return quantizers.get_config(PICTURES[name])
  quantizer, weights = CODES[name]
  experiment: Any = quantizers.get_config()
  model: Any = onedpiece.get_config('small').model if name == 'nested' else experiment.model
  experiment.model = dataclasses.replace(
      model, image_size=(28, 28), channels=1, quantizer=quantizer)
  if name != 'nested':
    experiment.model.width, experiment.model.weights = 64, weights
  return dataclasses.replace(
      experiment, data=MnistConfig(), steps=1500, checkpoint=CheckpointConfig(every=500))


def get_config(size: str = 'base') -> Experiment:
  debug = size == 'debug'
  row = size if size in ROWS else 'masked'
  tokens, kind, settings = ROWS[row]
  own = OWN.get(row, {})
  body = TransformerConfig(layers=2, width=32, heads=2) if debug else TransformerConfig(
      layers=4, width=128, heads=4, dropout=0.1, axes=0 if 'anneal' in own else 1, remat=False)
  model = kind(transformer=body, classes=10, **own)
  if kind is DepthConfig:
    model.depth = TransformerConfig(layers=1, width=128, heads=4, axes=0, remat=False)
  return Experiment(
      model=model,
      data=DigitsConfig() if debug else CifarJpegConfig() if tokens in PICTURES else MnistConfig(),
      tokenizer=f'runs/generators_{tokens.replace(" ", "_")}',
      settings=settings,
      steps=2 if debug else STEPS,
      batch_size=16 if debug else 64,
      optimizer=OptimizerConfig(rate=1e-3, warmup=100, weight_decay=0.05),
      ema=0.995,
      checkpoint=CheckpointConfig(every=500),
      log=LogConfig(every=100),
      eval=EvalConfig(every=500, batches=16),
      published=Published(
          source='our own size: about a million parameters, minutes on two cores',
          spec=TokenSpec(grid=(4, 4), vocab=(16,)) if debug else SPECS[tokens]))


def get_sweep(size: str = 'base') -> dict[str, Experiment]:
  del size  # there is one
  found: dict[str, Experiment] = {}
  for seed in (0, 1):
    for row, (tokens, _, _) in ROWS.items():
      if not seed or row in COMPARED:
        found.setdefault(f'tokens {tokens}', tokenizer(tokens))
        experiment = dataclasses.replace(
            get_config(row), tokenizer=f'row:tokens {tokens}', seed=seed)
        found[f'{row}/{seed}' if seed else row] = experiment
  return found
