"""scikit-learn's handwritten digits: real images that need no download.

1,797 grey 8x8 images of UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998,
the test part), shipped inside scikit-learn. Pixels count the ink in 4x4 blocks, 0 to 16; here they
are uint8 `round(value * 255 / 16)`, half to even.

The split is fixed and stratified, and no random number enters it: every class gives 20 percent
of its examples to the nearest example, evenly spaced in the order of the file (see `held_out`).
Both parts keep the order of the file.
"""

import dataclasses

import numpy as np

from smalti.data.arrays import ArraysSource
from smalti.data.source import DataConfig, Split

EVAL = 360


@dataclasses.dataclass(kw_only=True, slots=True)
class DigitsConfig(DataConfig):
  """1,437 training and 360 held-out images, uint8[8, 8, 1], ten classes."""

  def open(self, split: Split) -> ArraysSource:
    from sklearn.datasets import load_digits  # imports for a second; only who opens pays
    digits = load_digits()
    image = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    label = digits.target.astype(np.int32)
    chosen = held_out(label, EVAL) == (split == 'eval')
    return ArraysSource({'image': image[chosen], 'label': label[chosen]},
                        classes=tuple(str(name) for name in digits.target_names))


def held_out(label: np.ndarray, count: int) -> np.ndarray:
  """bool[N]: a stratified choice of exactly `count` examples, without randomness.

  Class c gets `floor(count * share_c)` examples, and the classes with the largest remainders one
  more (ties to the smaller class). Within a class they are evenly spaced in the given order.
  """
  classes, sizes = np.unique(label, return_counts=True)
  quota = count * sizes / len(label)
  share = np.floor(quota).astype(int)
  rest = np.argsort(-(quota - share), kind='stable')[:count - share.sum()]
  share[rest] += 1
  chosen = np.zeros(len(label), bool)
  for c, size, n in zip(classes, sizes, share):
    rows = np.flatnonzero(label == c)
    chosen[rows[(2 * np.arange(n) + 1) * size // (2 * max(n, 1))]] = True
  return chosen
