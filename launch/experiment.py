"""Experiment: everything that defines a training run, as one tree of dataclasses.

A config file has `get_config(size='base') -> Experiment`. Fields are assigned by command-line
overrides and never changed after parsing.
"""

import dataclasses
from typing import Literal

from smalti.data.source import DataConfig
from smalti.networks.model import ModelConfig
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimizerConfig:
  """AdamW with warm-up, for one group of parameters.

  Attributes:
    rate: peak learning rate.
    schedule: from the peak to `rate * final` at the last step: 'constant', 'cosine' or 'linear'.
    final: what is left of the rate at the end.
    warmup: steps of linear warm-up.
    betas, epsilon: Adam's moments.
    weight_decay: decoupled, on kernels and embeddings only.
    clip: largest global gradient norm of the group; None is off.
    clip_each: largest absolute value of each element of a gradient; None is off.
    start: the group's first step; its moments and schedule begin there.
  """
  rate: float = 3e-4
  schedule: Literal['constant', 'cosine', 'linear'] = 'cosine'
  final: float = 0.0
  warmup: int = 100
  betas: tuple[float, float] = (0.9, 0.95)
  epsilon: float = 1e-8
  weight_decay: float = 0.0
  clip: float | None = 1.0
  clip_each: float | None = None
  start: int = 0


@dataclasses.dataclass(kw_only=True, slots=True)
class MeshConfig:
  """Devices per mesh axis; -1 (once) takes what is left.

  Attributes:
    data: replicas, over which the batch is split.
    fsdp: devices over which batch, parameters and moments are split.
    tensor: devices over which heads, hidden units and vocabulary are split.
  """
  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
  """When to save and what to keep; the newest verified checkpoint is never deleted.

  Attributes:
    every: steps between checkpoints.
    keep: how many of the newest stay, 2 or more.
    keep_every: steps whose multiples stay for good; None keeps none of them.
    best: a metric such as 'eval/bits' whose best checkpoint stays too; None tracks none.
    mode: whether the best is the smallest ('min') or the largest ('max').
  """
  every: int = 500
  keep: int = 2
  keep_every: int | None = None
  best: str | None = None
  mode: Literal['min', 'max'] = 'min'


@dataclasses.dataclass(kw_only=True, slots=True)
class LogConfig:
  """`metrics.jsonl` is always written; wandb on request, offline without an account."""
  every: int = 50
  wandb: Literal['off', 'offline', 'online'] = 'off'
  project: str = 'smalti'


@dataclasses.dataclass(kw_only=True, slots=True)
class EvalConfig:
  """Held-out loss of the averaged weights: every so many steps, over so many batches.

  Fewer batches than there are hold rows drawn at random, the same at every step and in every run.
  """
  every: int = 500
  batches: int | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class Published:
  """A published parameter count, for the test that builds every size abstractly.

  Attributes:
    parameters: the count of trained parameters, or None where none was published.
    tolerance: half a unit of the last published digit.
    source: paper and table, or the reason why there is none.
    spec: the tokens of the published tokenizer, for generators.
  """
  parameters: float | None = None
  tolerance: float = 0.0
  source: str = ''
  spec: TokenSpec | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class Experiment:
  """One training run.

  Attributes:
    model: a tokenizer's or a generator's config; its type selects the class.
    data: where examples come from.
    tokenizer: for generators: a run folder (`RUN` or `RUN@STEP`), an exported file, a folder of
      stored tokens, or `pixels:HxWxC`, which needs no run.
    settings: default sampling settings of a generator, a frozen dataclass; None takes its own.
    steps: optimizer steps.
    batch_size: examples per step, over all devices and micro-batches.
    accumulate: micro-batches per step; micro-batch i is rows i::accumulate.
    ema: decay of the averaged weights, warmed up as min(ema, (1 + n) / (10 + n)); None keeps none.
    optimizer: the optimizer of all parameters but the discriminator's.
    discriminator: the optimizer of the group `discriminator`, where the model has one; its `start`
      is that of the adversary. None is `optimizer` once more.
    fixed: parts of the model, by the path of a parameter or of what holds it, which stay as they
      started or came with --init_from.
    seed: all randomness of the run is folded from it by purpose.
    deterministic: asks the compiler for bitwise repeatable kernels on GPUs, at some cost.
  """
  model: ModelConfig
  data: DataConfig
  tokenizer: str | None = None
  settings: object | None = None
  steps: int = 1000
  batch_size: int = 128
  accumulate: int = 1
  ema: float | None = 0.999
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  discriminator: OptimizerConfig | None = None
  fixed: tuple[str, ...] = ()
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  published: Published = dataclasses.field(default_factory=Published)
  seed: int = 0
  deterministic: bool = False
