"""Images in files: streams of .npz and of PNG folders, and what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from smalti.launch import gallery as galleries
from smalti.launch.gallery import open_gallery


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), np.uint8)


def save(folder, images, suffix='.png'):
  folder.mkdir(exist_ok=True)
  for i, image in enumerate(images):
    Image.fromarray(image.squeeze()).save(folder / f'{i}{suffix}')


@pytest.mark.parametrize('compressed', [False, True])
def test_an_npz_is_read_in_batches(compressed, images, tmp_path):
  (np.savez_compressed if compressed else np.savez)(
      tmp_path / 'a.npz', arr_0=images, arr_1=np.arange(11))
  gallery = open_gallery(tmp_path / 'a.npz')
  assert (gallery.n, gallery.shape) == (11, (6, 5, 3))
  np.testing.assert_array_equal(gallery.labels, np.arange(11))
  parts = list(gallery.batches(4))
  assert [len(part) for part in parts] == [4, 4, 3]
  np.testing.assert_array_equal(np.concatenate(parts), images)


@pytest.mark.parametrize('channels', [1, 3])
def test_a_folder_holds_the_same_images_in_natural_order(channels, images, tmp_path):
  images = images[..., :channels]
  save(tmp_path / 'pngs', images)  # 10.png follows 9.png
  gallery = open_gallery(tmp_path / 'pngs')
  np.testing.assert_array_equal(np.concatenate(list(gallery.batches(4))), images)
  assert gallery.shape == (6, 5, channels)
  mark = gallery.source
  save(tmp_path / 'pngs', images[:1] // 2)
  assert open_gallery(tmp_path / 'pngs').source != mark


@pytest.mark.parametrize('change, message', [
    (lambda d, x: np.savez(d / 'a.npz', x=x), 'arr_0'),
    (lambda d, x: np.savez(d / 'a.npz', arr_0=x / 255), 'not uint8'),
    (lambda d, x: np.savez(d / 'a.npz', arr_0=x[0]), 'not uint8'),
    (lambda d, x: np.savez(d / 'a.npz', arr_0=x[:0]), 'no images'),
    (lambda d, x: np.savez(d / 'a.npz', arr_0=x, arr_1=np.arange(3)), 'one label per image'),
    (lambda d, x: (d / 'a.npz').write_bytes(b'PK no'), 'holds no images'),
    (lambda d, x: (d / 'a.npz').mkdir(), 'holds no PNG'),
    (lambda d, x: save(d / 'a.npz', x, '.jpg'), 'lossy'),
])
def test_other_content_is_refused(change, message, images, tmp_path):
  change(tmp_path, images)
  with pytest.raises(ValueError, match=message):
    open_gallery(tmp_path / 'a.npz')


def test_pictures_of_two_sizes_and_damaged_ones_are_named(images, tmp_path):
  save(tmp_path / 'pngs', images[:3])
  Image.fromarray(images[3, :5]).save(tmp_path / 'pngs' / '2.png')
  with pytest.raises(ValueError, match='2.png is .5, 5, 3.'):
    list(open_gallery(tmp_path / 'pngs').batches(2))
  (tmp_path / 'pngs' / '2.png').write_bytes(b'no')
  with pytest.raises(ValueError, match='2.png is no picture'):
    list(open_gallery(tmp_path / 'pngs').batches(2))
  with pytest.raises(FileNotFoundError):
    open_gallery(tmp_path / 'gone.npz')


def test_samples_are_kept_by_processes_together_and_after_a_kill_at_any_byte(images, tmp_path,
                                                                             monkeypatch):
  (tmp_path / galleries.UNFINISHED).write_bytes(b'\x93NUM')  # killed in the header
  rows = {process: np.arange(process, 11, 2) for process in (0, 1)}
  galleries.keep(tmp_path, 'npz', 11, rows[0], images[rows[0]])
  # as if this process had looked before the other made the file
  monkeypatch.setattr(type(tmp_path), 'exists', lambda self: False)
  galleries.keep(tmp_path, 'npz', 11, np.append(rows[1], -1), images[np.append(rows[1], 0)])
  monkeypatch.undo()
  galleries.close(tmp_path)
  np.testing.assert_array_equal(np.load(tmp_path / 'samples.npz')['arr_0'], images)
