"""Examples held in memory: a dict of arrays with one leading axis."""

import numpy as np


class ArraysSource:
  """Rows of in-memory arrays.

  Args:
    arrays: entry name to array, all with the same number of rows, in a fixed order.
    classes: names of the labels, or ().

  Raises:
    ValueError: no array at all, or arrays of unequal length.
  """

  def __init__(self, arrays: dict[str, np.ndarray], classes: tuple[str, ...] = ()):
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
      raise ValueError(f'Arrays of one source need one length, got {lengths}.')
    self.arrays = dict(arrays)
    self.classes = tuple(classes)
    self._length = next(iter(lengths.values()))

  def __len__(self) -> int:
    return self._length

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Copies of the rows at `indices`."""
    return {name: np.take(array, indices, axis=0) for name, array in self.arrays.items()}
