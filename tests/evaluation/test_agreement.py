"""Class agreement on real digits: the truth, chance, and labels turned by one."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from smalti.evaluation.agreement import class_agreement


@pytest.fixture(scope='module')
def digits():
  images, labels = load_digits(return_X_y=True)
  images = np.rint(images.reshape(-1, 8, 8, 1) / 16 * 255).astype(np.uint8)
  return (images[:1000], labels[:1000]), (images[1000:1400], labels[1000:1400]), (
      images[1400:], labels[1400:])


def test_real_images_agree_as_well_as_the_judge_can(digits):
  train, held_out, samples = digits
  result = class_agreement(samples, train, held_out)
  assert result.agreement > 0.93 and result.judge_accuracy > 0.93
  assert (result.samples, result.train, result.held_out) == (397, 1000, 400)
  weights = [(samples[1] == c).mean() for c in range(10)]
  assert result.agreement == pytest.approx(np.dot(weights, list(result.per_class.values())))


def test_wrong_labels_do_not_agree(digits):
  train, held_out, (images, labels) = digits
  assert class_agreement((images, (labels + 1) % 10), train, held_out).agreement < 0.05
  shuffled = np.random.default_rng(0).permutation(labels)
  assert class_agreement((images, shuffled), train, held_out).agreement < 0.2
  only = class_agreement((images[labels == 3], labels[labels == 3]), train, held_out)
  assert only.per_class[3] == only.agreement > 0.7 and only.per_class[4] is None


def test_refusals(digits):
  train, held_out, samples = digits
  with pytest.raises(ValueError, match='two or more'):
    class_agreement(samples, (train[0], np.zeros(1000, int)), held_out)
  with pytest.raises(ValueError, match='to_uint8'):
    class_agreement((samples[0] / 255, samples[1]), train, held_out)
