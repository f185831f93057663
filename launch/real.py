"""Real examples in memory, that samples and likelihoods are compared with."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from smalti.evaluation.subset import subset
from smalti.launch.judge import BYTES
from smalti.launch.sample import TEXT

LARGEST = 20_000  # real images read for baselines and judges


@dataclasses.dataclass
class Split:
  """Real examples of one split, in memory: images, labels or None, what captions say or nothing.

  `share` is how much of the split they are.
  """
  images: np.ndarray
  labels: np.ndarray | None
  texts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  share: float = 1.0

  @classmethod
  def read(cls, data: Any, split: str) -> 'Split':
    source = data.open(split)
    size = sum(value[0].nbytes for value in source.read(np.arange(1)).values())
    rows = source.read(subset(len(source), max(2, min(LARGEST, BYTES // size))))
    if 'image' not in rows:
      raise ValueError(f'{type(data).__name__} holds no images to compare with; '
                       'evaluate with --data=CONFIG, whose data has.')
    return cls(rows['image'], rows.get('label'),
               {name: rows[name] for name in (*TEXT, 'claims') if name in rows},
               len(rows['image']) / len(source))

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(np.ascontiguousarray(self.images)).hexdigest()[:16]
