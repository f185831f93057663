"""Batches: a source, a seed and a batch number to numpy arrays, through grain.

Batch i is a pure function of (seed, i), so the position of a run is its step and a restart needs
no saved iterator. Epoch e visits every example once, in its own order; batches run on over the end
of an epoch, so none is short. Indices are batched first and read together (one gather per array,
which is what keeps in-memory sources at the speed of numpy), and every process reads its own
contiguous rows of the same global batch.
"""

import functools
import sys
from collections.abc import Iterator

import grain
import numpy as np

from smalti.data import augment as augmentation
from smalti.data.augment import AugmentConfig
from smalti.data.noise import noise
from smalti.data.source import Source

ORDER = 0  # purpose of noise; those of augmentation follow


def batches(source: Source, *, batch_size: int, seed: int, start: int = 0, train: bool = True,
            process: int = 0, processes: int = 1, augment: AugmentConfig | None = None,
            threads: int | None = None) -> Iterator[dict[str, np.ndarray]]:
  """Iterates over this process's rows of the global batches `start`, `start + 1`, ...

  Every batch has what `source.read` returns and `index: int32[B]`, the examples' numbers in the
  source. In training the stream is endless and shuffled. Otherwise it is one pass in order; the
  last batch is filled up with copies of the last example, and `valid: bool[B]` tells them apart.

  Args:
    batch_size: examples per global batch, a multiple of `processes`.
    seed: of order and augmentation, 0 or more.
    start: number of the first batch.
    process, processes: whose rows to read, out of how many equal parts.
    augment: applied to `image` in training; an example's draw depends on its position in the
      global stream, not on the process that reads it.
    threads: batches read at once ahead of the consumer; None takes `source.threads`, which
      sources that decode or wait for a disk have, else 0 (in-memory arrays are faster without).

  Raises:
    ValueError: an empty source, or a batch size that the processes cannot share equally.
  """
  if not len(source):
    raise ValueError('The data source is empty; there is nothing to iterate over.')
  if batch_size < 1 or batch_size % processes:
    raise ValueError(f'{batch_size=} must be a positive multiple of {processes=}.')
  if not 0 <= process < processes:
    raise ValueError(f'{process=} must be within 0..{processes - 1}.')
  if threads is None:
    threads = getattr(source, 'threads', 0)
  share = batch_size // processes
  rows = np.arange(share) + process * share
  if train:
    order = functools.lru_cache(maxsize=2)(functools.partial(permutation, len(source), seed))

    def read(number: int) -> dict[str, np.ndarray]:
      positions = number * batch_size + rows
      epochs, places = np.divmod(positions, len(source))
      index = np.empty(share, np.int64)
      for epoch in np.unique(epochs):
        index[epochs == epoch] = order(int(epoch))[places[epochs == epoch]]
      batch = _read(source, index)
      if augment is not None and 'image' in batch:
        batch['image'] = augmentation.apply(
            augment, batch['image'], seed=seed, positions=positions)
      return batch
    stop = sys.maxsize // batch_size
  else:
    def read(number: int) -> dict[str, np.ndarray]:
      positions = number * batch_size + rows
      batch = _read(source, np.minimum(positions, len(source) - 1))
      return {**batch, 'valid': positions < len(source)}
    stop = -(-len(source) // batch_size)
  if start >= stop:
    return iter(())
  numbers = grain.MapDataset.range(start, stop)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
  return iter(numbers.map(read).to_iter_dataset(options))


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
  """int64[length]: the order of all examples in one epoch.

  Drawn as the ranks of hashed example numbers, 8 bytes and a tenth of a microsecond each. (grain's
  own shuffle needs no memory, but measured 9 microseconds an example, and 68 for small sources.)
  """
  return np.argsort(noise(seed, ORDER, epoch, np.arange(length)))


def _read(source: Source, index: np.ndarray) -> dict[str, np.ndarray]:
  return {**source.read(index), 'index': index.astype(np.int32)}
