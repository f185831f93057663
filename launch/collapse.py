"""The collapse monitor: says when a codebook stops carrying information, and what to do.

Two signs, watched from step 0 in what every quantizer logs, per level where there are several:

Diversity. A code costs log2 K bits and tells log2(perplexity). Below half of that, perplexity <
sqrt(K), most of what is paid for is not there. A batch of N vectors shows no more than N codes, so
K counts as at most N. FSQ whose channels are saturated is at 2^d of prod(L) codes, below half its
bits for any L > 4; bits that are always the same count alike, as K = 2.

Norms. With r = rms(z) / rms(codes), |z - q| >= |z| - |q| leaves at least (1 - 1/r)^2 of the energy
of the vectors unexplained, whatever the codes: 81% at r = 10, less than 1 dB gained. Codes that
follow their vectors (moving averages, k-means) are near r = 1; signs of unbounded channels are
there after the first steps.

Bits. One of many that never changes says nothing, and the mean over them hides it: `dead_bits`, the
share of bits whose mean is below .01 or above .99 (.08 of their 1 bit), above 0 and not mending.

All must last for `PATIENCE` steps: a dip is none. Diversity must not be mending either, the mean
of its later half no better by `MENDING` than that of the first: a grid or a frozen basis starts
with few codes and spreads. Norms have no such excuse: codes that start far from the vectors, as
from U(-1/K, 1/K), are the very case.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PATIENCE = 32  # steps
MENDING = 0.05  # relative change between the halves that counts as recovery
NORMS = 10.0

FEW_CODES = (
    'most codes are not used: for VQ set revival or init=kmeans, a smaller dim with cosine=True, '
    'or take SimVQ or FSQ; for FSQ and bits lower the rate of the encoder or raise '
    'weights.entropy')
LARGE_VECTORS = (
    'vectors outgrew the codes: raise weights.commitment, set cosine=True, or take codes of '
    'bounded vectors (FSQ, BSQ)')
SAME_BITS = (
    'bits that never change say nothing: raise weights.entropy or its boost, lower the rate of the '
    'encoder, or take BSQ')


@dataclasses.dataclass(frozen=True)
class Alarm:
  """A sign that lasted.

  Attributes:
    metric: its name in the log, such as 'perplexity_1'.
    value: its mean over the last steps.
    limit: what it should stay above (perplexity) or at or below (ratio, dead_bits).
    remedy: what helps.
  """
  metric: str
  value: float
  limit: float
  remedy: str

  def __str__(self) -> str:
    side = 'below' if self.value < self.limit else 'above'
    return (f'{self.metric} {self.value:.3g} has been {side} {self.limit:.3g} for {PATIENCE} '
            f'steps; {self.remedy}')


class Monitor:
  """Watches one run. `see` takes the metrics of every step and returns alarms, each once.

  An alarm that ended is raised again when it returns.

  Args:
    vocab: alphabets of the codes of a position.
    vectors: how many vectors a batch has, N.
    scales: how many of these each scale has, where every one has the codes of `vocab` and numbers
      of its own.
  """

  def __init__(self, vocab: Sequence[int], vectors: int, scales: Sequence[int] = ()):
    self.limits = {'ratio': NORMS, 'dead_bits': 0.0}
    if len(set(vocab)) == 1:
      self.limits['perplexity'] = math.sqrt(min(vocab[0], vectors))
    sizes = [(k, n) for n in scales or (vectors,) for k in vocab]
    for i, (k, n) in enumerate(sizes):
      self.limits |= {f'perplexity_{i}': math.sqrt(min(k, n)), f'ratio_{i}': NORMS}
    self._seen: dict[str, collections.deque] = {}
    self.raised: dict[str, Alarm] = {}

  def see(self, metrics: Mapping[str, Any]) -> list[Alarm]:
    new = []
    for name in self.limits.keys() & metrics.keys():
      seen = self._seen.setdefault(name, collections.deque(maxlen=PATIENCE))
      seen.append(float(metrics[name]))
      alarm = self._judge(name, seen)
      if alarm is None:
        self.raised.pop(name, None)
      elif name not in self.raised:
        self.raised[name] = alarm
        new.append(alarm)
    return sorted(new, key=lambda alarm: alarm.metric)

  def _judge(self, name: str, seen: collections.deque) -> Alarm | None:
    if len(seen) < PATIENCE:
      return None
    limit, values = self.limits[name], np.array(seen)
    first, last = (half.mean() for half in np.split(values, 2))
    if name.startswith('ratio'):
      found, remedy = values.min() > limit, LARGE_VECTORS
    elif name == 'dead_bits':
      found, remedy = values.min() > limit and last > first * (1 - MENDING), SAME_BITS
    else:
      found, remedy = values.max() < limit and last < first * (1 + MENDING), FEW_CODES
    return Alarm(name, float(values.mean()), limit, remedy) if found else None
