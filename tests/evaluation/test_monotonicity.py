"""Ladders do to images what they say; with a trained network every distance climbs them."""

import functools

import numpy as np
import pytest

from smalti.evaluation import features, monotonicity
from smalti.evaluation.monotonicity import LADDERS, Rung


@functools.cache
def pool():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 10, 400)
  images = rng.integers(60, 190, (400, 16, 16, 3))
  images[np.arange(400), labels] += 60  # the class is a lit row
  return images.astype(np.uint8), labels


def degrade(ladder, level, n=200):
  return monotonicity.degrade(ladder, level, *pool(), n=n)


def test_the_first_rungs_are_the_images_themselves():
  images, _ = pool()
  for ladder in ('noise', 'blur', 'copies', 'dropped'):
    np.testing.assert_array_equal(degrade(ladder, 0), images[:200])


def test_noise_has_its_deviation_and_its_seed():
  images = pool()[0][:200].astype(float)
  for level in LADDERS['noise'][1:]:
    difference = degrade('noise', level) - images
    if level < 20:  # more is cut off at 0 and 255
      assert difference.std() == pytest.approx(np.sqrt(level**2 + 1 / 12), rel=0.02)
      assert abs(difference.mean()) < 0.1
  np.testing.assert_array_equal(degrade('noise', 5), degrade('noise', 5))
  other = monotonicity.degrade('noise', 5, *pool(), n=200, seed=1)
  assert (other != degrade('noise', 5)).any()


def test_blur_and_jpeg_lose_detail_step_by_step():
  images = pool()[0][:200].astype(float)
  for ladder in ('blur', 'jpeg'):
    errors = [np.abs(degrade(ladder, level) - images).mean() for level in LADDERS[ladder]]
    assert np.all(np.diff(errors) > 0)
  grey = pool()[0][:3, :, :, :1]
  assert monotonicity.blurred(grey[0], 1).shape == monotonicity.compressed(grey[0], 50).shape
  flat = np.full((8, 8, 3), 77, np.uint8)
  np.testing.assert_array_equal(monotonicity.blurred(flat, 2), flat)


def test_a_second_jpeg_does_not_sharpen(monkeypatch):
  size = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))
  rng = np.random.default_rng(0)
  textures = np.fft.ifft2(np.fft.fft2(rng.standard_normal((40, 32, 32))) / (size + 0.05)).real
  images = np.clip(128 + 8 * textures, 0, 255).astype(np.uint8)[..., None]

  def sharpness(x):
    return sum(np.abs(np.diff(x.astype(float), 2, axis)).mean() for axis in (1, 2))

  monkeypatch.setattr(monotonicity, 'OFFSET', 0)  # as such data sets were made
  before = np.stack([monotonicity.compressed(x, 75) for x in images])
  one_grid = np.stack([monotonicity.compressed(x, 50) for x in before])
  monkeypatch.undo()
  two_grids = np.stack([monotonicity.compressed(x, 50) for x in before])
  assert sharpness(one_grid) > 1.05 * sharpness(before) > sharpness(two_grids)


def test_copies_are_of_one_class_and_dropped_classes_are_gone():
  images, labels = pool()
  copied = degrade('copies', 0.3)
  changed = (copied != images[:200]).any((1, 2, 3))
  assert 0.3 * 200 * 0.8 < changed.sum() <= 60  # a copy may stand where it was
  first = {image.tobytes() for image in images[:200][labels[:200] == 0]}
  assert all(image.tobytes() in first for image in copied[changed])
  np.testing.assert_array_equal(degrade('dropped', 3, n=100), images[labels >= 3][:100])
  with pytest.raises(ValueError, match='are left of 400'):
    degrade('dropped', 5, n=300)
  with pytest.raises(ValueError, match='must be one of noise'):
    degrade('nose', 5)


def test_verdicts():
  def rungs(fds, recalls, precisions):
    return [Rung(ladder, level, fd, fd, fd, p, r) for ladder, levels in LADDERS.items()
            for level, fd, r, p in zip(levels, fds, recalls, precisions)]

  good = monotonicity.verdicts(rungs([1, 2, 3, 4], [.9, .8, .7, .6], [.8, .82, .84, .76]))
  assert all(good.values()) and len(good) == 17
  assert sum(map(monotonicity.required, good)) == 7
  bad = monotonicity.verdicts(rungs([1, 2, 2, 4], [.9, .8, .8, .6], [.8, .8, .8, .74]))
  assert not any(bad.values())


def test_a_small_network_climbs_on_digits():
  """The whole chain without data sets: 8 x 8 digits, whose ladders are shorter."""
  from smalti.data.digits import DigitsConfig
  source = DigitsConfig().open('train').arrays
  images, labels = source['image'], source['label']
  network = features.Classifier.fit('mlp64', (images, labels), (images, labels), epochs=20)
  rungs = monotonicity.climb(network, images[:500], images[500:], labels[500:], n=400)
  held = monotonicity.verdicts(rungs)
  assert len(rungs) == 20
  assert held['noise fd'] and held['blur fd'] and held['copies fd'] and held['dropped fd']
  assert [rung.fd for rung in rungs if rung.level == 0] == pytest.approx([0] * 4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.parametrize('name', ['cifar10', 'mnist'])
def test_every_ladder_of_real_images(name):
  """5,000 images a rung; the untrained twin's verdicts are in docs/results/monotonicity.json."""
  from smalti.launch import extractors
  from smalti.launch.monotonicity import climb
  found = climb(name, extractors.load(name), 5000)
  assert not [verdict for verdict, holds in found['holds'].items()
              if monotonicity.required(verdict) and not holds]
