"""The DataSource contract: named examples with random access."""

import dataclasses
from typing import Literal, Protocol

import numpy as np

Split = Literal['train', 'eval']


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
  """Base of all data configs; the type of a config selects the source."""

  def open(self, split: Split) -> 'Source':
    """Opens one split. Raises ValueError or FileNotFoundError in one line with the way out."""
    raise TypeError(f'{type(self).__name__} does not say what it opens.')


class Source(Protocol):
  """A finite sequence of examples, read in batches of global indices.

  Attributes:
    classes: names of the labels, or () where there are none.
    content: optional; a digest of what is in it, where the config alone does not decide that.
    threads: optional; how many threads read ahead. Sources in memory want none (the default).
  """
  classes: tuple[str, ...]

  def __len__(self) -> int: ...

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at `indices`, in new arrays: `image` uint8[B, H, W, C], `label` int32[B],
    `tokens`, and so on by the names of batch entries."""
    ...
