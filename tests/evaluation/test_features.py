"""Extractors: names that say what they are, hashes, and order among degraded digits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from smalti.evaluation import features
from smalti.evaluation.frechet import frechet_distance


@pytest.fixture(scope='module')
def digits():
  images, labels = load_digits(return_X_y=True)
  images = np.rint(images.reshape(-1, 8, 8, 1) / 16 * 255).astype(np.uint8)
  return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


@pytest.fixture(scope='module')
def classifier(digits):
  return features.Classifier.fit('digits_mlp64', *digits)


def extractors(digits, classifier):
  return (features.Pixels((8, 8, 1)), features.Principal.fit(digits[0][0], 16), classifier)


def test_names_hashes_and_dimensions(digits, classifier):
  found = extractors(digits, classifier)
  assert [e.name for e in found] == ['pixels', 'pca16', 'digits_mlp64']
  assert len({e.sha256 for e in found}) == 3
  for extractor in found:
    assert len(extractor.sha256) == 64
    assert features.score_name(extractor) == f'fd_{extractor.name}_{extractor.sha256[:8]}'
    found = extractor(digits[1][0][:5])
    assert found.keys() == {'features'} and found['features'].dtype == np.float32
    assert found['features'].shape == (5, extractor.dim)
    on_device = extractor(jnp.asarray(digits[1][0][:5]))
    np.testing.assert_array_equal(on_device['features'], found['features'])
    with pytest.raises(ValueError, match='no other size'):
      extractor(np.zeros((2, 9, 8, 1), np.uint8))
    with pytest.raises(ValueError, match='must be uint8'):
      extractor(np.zeros((2, 8, 8, 1), np.float32))
  assert features.Pixels((8, 8, 1)).sha256 != features.Pixels((4, 16, 1)).sha256


def test_fits_are_repeatable_and_accurate(digits, classifier):
  again = features.Classifier.fit('digits_mlp64', *digits)
  assert again.sha256 == classifier.sha256
  other = features.Classifier.fit('digits_mlp64', *digits, seed=1, epochs=2)
  assert other.sha256 != classifier.sha256
  assert classifier.accuracy > 0.9  # on images it has not seen
  assert (features.Principal.fit(digits[0][0], 8).sha256
          == features.Principal.fit(digits[0][0], 8).sha256)


def test_every_weight_counts_in_the_hash(digits, classifier):
  for field in ('weights', 'bias'):
    changed = getattr(classifier, field).copy()
    changed[-1] += 1
    assert dataclasses.replace(classifier, **{field: changed}).sha256 != classifier.sha256
  principal = features.Principal.fit(digits[0][0], 8)
  changed = principal.components.copy()
  changed[-1, -1] += 1
  assert dataclasses.replace(principal, components=changed).sha256 != principal.sha256


def test_large_images_are_averaged_and_say_so():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (20, 128, 96, 3), np.uint8)
  small = features.shrink(images)
  assert small.shape == (20, 32, 24, 3)
  mean = images.reshape(20, 32, 4, 24, 4, 3).mean((2, 4))
  assert np.abs(small - mean).max() <= 1  # the mean of 4 x 4 pixels, rounded by rows and columns
  assert features.shrink(small) is small
  extractor = features.Principal.fit(images, 7)
  assert (extractor.resize, extractor(images)['features'].shape) == ('box_32x24', (20, 7))
  with pytest.raises(ValueError, match='no other size'):
    extractor(small)


def test_all_principal_components_give_the_pixel_distance(digits):
  train, held_out = digits[0][0], digits[1][0]
  distance = lambda e: frechet_distance(  # noqa: E731
      features.moments(e, held_out), features.moments(e, train))
  exact = distance(features.Pixels((8, 8, 1)))
  assert distance(features.Principal.fit(train, 64)) == pytest.approx(exact, rel=1e-2)  # float16
  assert distance(features.Principal.fit(train, 2)) < exact


def test_distance_grows_with_damage(digits, classifier):
  """On the reference's own images: the held-out digits come from other writers."""
  train = digits[0][0]
  rng = np.random.default_rng(0)
  noise, order = rng.normal(size=train.shape), rng.permutation(len(train))

  def copied(share):
    out = train.copy()
    out[order[:int(share * len(out))]] = train[0]
    return out

  for extractor in extractors(digits, classifier):
    reference = features.moments(extractor, train)
    distance = lambda x, e=extractor, r=reference: frechet_distance(  # noqa: E731
        features.moments(e, x, chunk=100), r)
    noisy = [distance(np.clip(train + s * noise, 0, 255).astype(np.uint8)) for s in (0, 15, 40, 90)]
    collapsed = [distance(copied(share)) for share in (0, .1, .3, .6)]
    assert all(np.diff(noisy) > 1e-3), (extractor.name, noisy)
    assert all(np.diff(collapsed) > 1e-3), (extractor.name, collapsed)


def test_moments_of_two_extractors_do_not_mix(digits, classifier):
  images = digits[1][0]
  with pytest.raises(ValueError, match='do not compare'):
    frechet_distance(features.moments(features.Pixels((8, 8, 1)), images),
                     features.moments(classifier, images))


def test_files(digits, classifier, tmp_path):
  path = tmp_path / 'extractor.npz'
  classifier.save(path)
  again = features.Classifier.load(path, classifier.sha256)
  np.testing.assert_array_equal(
      again(digits[1][0])['features'], classifier(digits[1][0])['features'])
  assert (again.name, again.accuracy) == (classifier.name, classifier.accuracy)
  with pytest.raises(ValueError, match='not 00000000'):
    features.Classifier.load(path, '0' * 64)
  path.write_bytes(b'PK\x03\x04 not a zip')
  with pytest.raises(ValueError, match='holds no extractor'):
    features.Classifier.load(path)
  with pytest.raises(ValueError, match='dim=65'):
    features.Principal.fit(digits[0][0], 65)
