"""Reference files of four kinds: read alike, marked where they say too little, refused if wrong."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from smalti.evaluation import reference
from smalti.evaluation.features import Pixels, identity
from smalti.evaluation.measures import compare
from smalti.evaluation.subset import subset
from smalti.evaluation.summary import summarize

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 2, 2, 3), np.uint8)
PIXELS = Pixels((2, 2, 3))


@dataclasses.dataclass(frozen=True)
class Places(Pixels):
  """Pixels with a spatial output."""

  def __call__(self, images):
    found = super().__call__(images)
    return found | {'spatial': found['features'][:, :5]}


def save(path, **arrays):
  np.savez(path, **arrays)
  return path


def statistics(dim=12, seed=0):
  x = np.random.default_rng(seed).normal(size=(100, dim))
  return {'mu': x.mean(0), 'sigma': np.cov(x.T)}


@pytest.fixture
def ours(tmp_path):
  path = tmp_path / 'ours.npz'
  summarize(PIXELS, [IMAGES], 60).save(path)
  return path


def test_ours(ours):
  found = reference.load(ours, PIXELS)
  assert (found.n, found.verified, found.extractor) == (60, True, identity(PIXELS))
  assert found.source == summarize(PIXELS, [IMAGES], 60).source
  np.testing.assert_array_equal(found.features, PIXELS(IMAGES)['features'])


def test_pytorch_fid_and_ttur(tmp_path):
  known = statistics()
  path = save(tmp_path / 'stats.npz', **known)
  found = reference.load(path, PIXELS)
  assert (found.n, found.verified, len(found.features)) == (0, False, 0)
  assert found.source.startswith('stats.npz sha256:')
  np.testing.assert_array_equal(found.moments.mean, known['mu'])
  np.testing.assert_array_equal(found.moments.covariance, known['sigma'])
  measured = compare(summarize(PIXELS, [IMAGES], 60), found)
  assert [m.beside for m in measured] == [{'unverified_reference': True}]
  found.save(tmp_path / 'copy.npz')  # an unverified reference stays one
  assert not reference.load(tmp_path / 'copy.npz', PIXELS).verified
  save(path, mu=known['mu'].astype(np.float32), sigma=np.asfortranarray(known['sigma']))
  np.testing.assert_array_equal(reference.load(path, PIXELS).moments.covariance, known['sigma'])


def test_clean_fid(tmp_path):
  resize = PIXELS.resize
  with pytest.raises(ValueError, match=f"resize 'clean' by its name, not '{resize}'"):
    reference.load(save(tmp_path / 'digits_clean_train_8.npz', **statistics()), PIXELS)
  with pytest.raises(ValueError, match="resize 'tf1' by its name"):
    reference.load(
        save(tmp_path / 'digits_legacy_tensorflow_train_8.npz', **statistics()), PIXELS)
  rows = np.random.default_rng(0).normal(size=(40, 12))
  found = reference.load(save(tmp_path / 'kid.npz', feats=rows), PIXELS, keep=30)
  assert (found.n, found.verified) == (40, False)
  np.testing.assert_allclose(found.moments.covariance, np.cov(rows.T), atol=1e-6)
  np.testing.assert_array_equal(found.features, rows[subset(40, 30)].astype(np.float32))

  class Clean(Pixels):
    resize = 'clean'

  assert reference.load(
      save(tmp_path / 'x_clean_train_8.npz', **statistics()), Clean((2, 2, 3))).n == 0


@pytest.mark.parametrize('write', [np.savez, np.savez_compressed])
def test_adm(tmp_path, write):
  path, known, spatial = tmp_path / 'virtual.npz', statistics(), statistics(5, 1)
  write(path, arr_0=IMAGES, arr_1=np.arange(60), mu_s=spatial['mu'], sigma_s=spatial['sigma'],
        **known)
  places = Places((2, 2, 3))
  found = reference.load(path, places, batch_size=7)
  assert (found.n, found.verified) == (0, False)
  np.testing.assert_array_equal(found.moments.covariance, known['sigma'])
  np.testing.assert_array_equal(found.spatial.covariance, spatial['sigma'])
  np.testing.assert_array_equal(found.features, PIXELS(IMAGES)['features'])
  names = [m.name.split('_')[0] for m in compare(summarize(places, [IMAGES], 60), found)]
  assert names == ['fd', 'sfd', 'kd', 'precision', 'recall', 'density', 'coverage']
  write(path, arr_0=IMAGES)  # a batch of samples: everything is computed from it
  found = reference.load(path, places, batch_size=7)
  assert (found.n, found.verified) == (60, True)
  np.testing.assert_allclose(
      found.moments.covariance, np.cov(PIXELS(IMAGES)['features'].T.astype(float)), rtol=1e-10)


def test_images_are_a_stream(tmp_path):
  path = tmp_path / 'samples.npz'
  np.savez(path, arr_0=np.zeros((400, 64, 64, 3), np.uint8), arr_1=np.arange(400))  # 4.7 MiB
  tracemalloc.start()
  shapes = [batch.shape for batch in reference.images(path, 30)]
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert shapes == [(30, 64, 64, 3)] * 13 + [(10, 64, 64, 3)]
  assert peak < 3 * 2**20  # two batches of 0.35 MiB and a chunk
  np.savez(path, arr_0=IMAGES)
  np.testing.assert_array_equal(np.concatenate(list(reference.images(path, 7))), IMAGES)
  for wrong in (np.zeros((3, 2, 2, 3)), np.zeros((2, 2, 3), np.uint8),
                np.zeros((0, 2, 2, 3), np.uint8)):
    np.savez(path, arr_0=wrong)
    with pytest.raises(ValueError, match='holds no images .arr_0 is .*give an .npz with arr_0'):
      next(reference.images(path, 7))


@pytest.mark.parametrize(('change', 'match'), [
    ({'mu': np.zeros(11)}, 'a mean of shape .11,. and a covariance of .12, 12.'),
    ({'sigma': np.full((12, 12), np.nan)}, 'not finite'),
    ({'sigma': np.triu(np.ones((12, 12)))}, 'asymmetric'),
    ({'sigma': np.array('text')}, 'could not convert'),
    ({'mu_s': np.zeros(3)}, 'has no sigma_s'),
])
def test_what_is_refused(tmp_path, change, match):
  path = save(tmp_path / 'stats.npz', **statistics() | change)
  with pytest.raises(ValueError, match=f'stats.npz holds no reference statistics .*{match}') as e:
    reference.load(path, PIXELS)
  assert '\n' not in str(e.value)


def test_features_that_do_not_compare(tmp_path, ours):
  path = save(tmp_path / 'stats.npz', **statistics(9))
  with pytest.raises(ValueError, match='has 9 dimensions, and pixels 12'):
    reference.load(path, PIXELS)
  with pytest.raises(ValueError, match='was made with hash'):
    reference.load(ours, Pixels((1, 4, 3)))

  class Renamed(Pixels):
    name, resize = 'other', 'none'

  class Resized(Pixels):
    resize = 'clean'

  with pytest.raises(ValueError, match="extractor 'pixels', not 'other'"):
    reference.load(ours, Renamed((2, 2, 3)))
  with pytest.raises(ValueError, match="resize 'none', not 'clean'"):
    reference.load(ours, Resized((2, 2, 3)))
  with pytest.raises(FileNotFoundError, match='is no file; give an .npz'):
    reference.load(tmp_path / 'none.npz', PIXELS)
  ours.write_bytes(ours.read_bytes()[:-40])
  with pytest.raises(ValueError, match='holds no'):
    reference.load(ours, PIXELS)
