"""Files that a user has: golden contents where they are there, one line where they are not."""

import gzip
import hashlib

import numpy as np
import pytest

from smalti.data import downloads
from smalti.data.downloads import CifarJpegConfig, MnistConfig


@pytest.mark.needs_data
def test_mnist_is_the_published_one():
  sizes = {'train': 60_000, 'eval': 10_000}
  for split, size in sizes.items():
    source = MnistConfig().open(split)
    assert len(source) == size and source.classes == tuple('0123456789')
    batch = source.read(np.array([0, size - 1]))
    assert batch['image'].shape == (2, 28, 28, 1) and batch['image'].dtype == np.uint8
    assert batch['label'].dtype == np.int32
  train = MnistConfig().open('train').arrays
  # the MD5 of the original, uncompressed archive
  raw = (2051).to_bytes(4) + (60_000).to_bytes(4) + (28).to_bytes(4) * 2 + train['image'].tobytes()
  assert hashlib.md5(raw).hexdigest() == '6bbc9ace898e44ae57da46a324031adb'
  assert train['label'][:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]


@pytest.mark.needs_data
def test_cifar_is_decoded_once_and_checked(tmp_path, monkeypatch):
  monkeypatch.setenv('SMALTI_CACHE_DIR', str(tmp_path))
  source = CifarJpegConfig().open('eval')
  image, label = source.arrays['image'], source.arrays['label']
  assert image.shape == (10_000, 32, 32, 3) and image.dtype == np.uint8
  assert source.classes[0] == 'airplane' and source.classes[9] == 'truck'
  np.testing.assert_array_equal(label, np.arange(10_000) % 10)
  np.testing.assert_allclose(image.mean((0, 1, 2)) / 255, (0.494, 0.485, 0.450), atol=2e-3)
  monkeypatch.setattr(downloads.images, 'decode', None)  # a second time nothing is decoded
  again = CifarJpegConfig().open('eval').arrays['image']
  assert isinstance(again, np.memmap)
  np.testing.assert_array_equal(again, image)
  stored, = tmp_path.rglob('*.npy')
  data = bytearray(stored.read_bytes())
  data[5000] ^= 1
  stored.write_bytes(data)
  with pytest.raises(TypeError):  # the damaged cache is not used: it wants to decode again
    CifarJpegConfig().open('eval')


@pytest.mark.needs_data
@pytest.mark.slow
def test_cifar_training_colours(tmp_path, monkeypatch):
  monkeypatch.setenv('SMALTI_CACHE_DIR', str(tmp_path))
  image = CifarJpegConfig().open('train').arrays['image']
  np.testing.assert_allclose(image.mean((0, 1, 2)) / 255, (0.49125, 0.48209, 0.44652), atol=1e-4)
  np.testing.assert_allclose(image.std((0, 1, 2)) / 255, (0.24523, 0.24278, 0.26063), atol=1e-4)


def test_what_is_missing_is_named_with_the_way_out(tmp_path, monkeypatch):
  monkeypatch.delenv('SMALTI_DATA_DIR', raising=False)
  with pytest.raises(FileNotFoundError, match='no folder was named; set --config.data.folder=DIR'):
    MnistConfig().open('train')
  for config, name in ((MnistConfig, 'mnist-t10k-images-idx3-ubyte.gz'),
                       (CifarJpegConfig, 'cifar10-jpeg-test.npz')):
    with pytest.raises(FileNotFoundError, match=f'has no images/{name}'):
      config(folder=str(tmp_path)).open('eval')


def test_other_files_are_refused(tmp_path):
  name = 'train-images-idx3-ubyte.gz'
  with gzip.open(tmp_path / name, 'wb', compresslevel=1) as file:
    file.write(bytes(100))
  with pytest.raises(ValueError, match=f'{name} is not the published file'):
    MnistConfig(folder=str(tmp_path)).open('train')
  packed = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(packed[:-12])
  with pytest.raises(ValueError, match=f'{name} is damaged'):
    MnistConfig(folder=str(tmp_path)).open('train')
  (tmp_path / 'cifar10-jpeg-test.npz').write_bytes(b'x')
  with pytest.raises(ValueError, match='cifar10-jpeg-test.npz is not the published file'):
    CifarJpegConfig(folder=str(tmp_path)).open('eval')
