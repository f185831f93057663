"""Class agreement: does a sample look like the class it was asked for?

The judge is a support vector machine fitted on real training images. It errs too, so its accuracy
on real held-out images is returned beside; agreement above it means samples easier than real ones.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Shaped
from sklearn.svm import SVC

Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8, checked below: floats are refused
Labels = Int[np.ndarray, '_b']

LARGEST = 20_000  # training images; the time of the fit grows with the square


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Shares in 0..1.

  Attributes:
    agreement: share of samples that the judge puts into the class asked for.
    per_class: the same by class; None where no sample asked for the class.
    judge_accuracy: of the judge, on held-out real images.
    samples, train, held_out: how many images of each there were.
    judge: what the judge is.
  """
  agreement: float
  per_class: dict[int, float | None]
  judge_accuracy: float
  samples: int
  train: int
  held_out: int
  judge: str = 'svc_rbf_c10'


def class_agreement(samples: tuple[Images, Labels], train: tuple[Images, Labels],
                    held_out: tuple[Images, Labels]) -> Agreement:
  """Judges `samples`, with the labels they were asked for, by a machine fitted on `train`.

  Raises:
    ValueError: fewer than two classes, or too many training images for a support vector machine.
  """
  judge, classes = fit(train), np.unique(train[1])
  right = judge(samples[0]) == samples[1]
  per_class = {int(c): float(right[samples[1] == c].mean()) if (samples[1] == c).any() else None
               for c in classes}
  return Agreement(float(right.mean()), per_class,
                   float((judge(held_out[0]) == held_out[1]).mean()),
                   len(samples[0]), len(train[0]), len(held_out[0]))


def fit(train: tuple[Images, Labels]) -> Callable[[Images], Labels]:
  """The judge: labels of images, by a machine fitted on `train`. Raises as above."""
  classes = np.unique(train[1])
  if len(classes) < 2:
    raise ValueError(f'The training labels hold {len(classes)} class; a judge needs two or more.')
  if len(train[0]) > LARGEST:
    raise ValueError(f'{len(train[0])} training images; pass a slice of {LARGEST} or fewer.')
  machine = SVC(C=10, gamma='scale').fit(_flat(train[0]), train[1])
  return lambda images: machine.predict(_flat(images))


def _flat(images: Images) -> np.ndarray:
  if images.dtype != np.uint8:
    raise ValueError(f'Images of {images.dtype} must be uint8; use networks.pixels.to_uint8.')
  return images.reshape(len(images), -1) / 255
