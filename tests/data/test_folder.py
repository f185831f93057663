"""A folder as strangers leave it: 200 files, good, odd and hostile, surveyed, split and read."""

import hashlib
import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from smalti.data import folder, inspection, pipeline
from smalti.data.folder import FolderConfig, survey

SIZE = 24


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  path = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('SMALTI_CACHE_DIR', str(path))
  return path


def picture(i: int, mode: str = 'RGB') -> Image.Image:
  side = 20 + i % 40
  pixels = np.random.default_rng(i).integers(0, 256, (side, side + i % 7, 3), np.uint8)
  return Image.fromarray(pixels).convert(mode)


def forged_png(side: int = 20_000) -> bytes:
  def chunk(kind, body):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
  header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
  return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(99)))


def build(root) -> dict[str, int]:
  """Writes 200 files; returns how many of them must be refused, by reason."""
  exif = Image.Exif()
  exif[0x0112] = 8
  makers = [
      lambda i, p: picture(i).save(f'{p}.png'),
      lambda i, p: picture(i).save(f'{p}.jpg', quality=90),
      lambda i, p: picture(i).save(f'{p}.webp'),
      lambda i, p: picture(i, 'RGBA').save(f'{p}.png'),
      lambda i, p: picture(i, 'L').save(f'{p}.png'),
      lambda i, p: Image.fromarray(np.full((30, 30), 99 * i, np.uint16)).save(f'{p}.png'),
      lambda i, p: picture(i, 'P').save(f'{p}.gif'),
      lambda i, p: picture(i).save(f'{p}.jpg', exif=exif),
      lambda i, p: picture(i, 'CMYK').save(f'{p}.jpg'),
  ]
  for i in range(180):
    place = root / ('birds', 'cats', 'dogs')[i % 3] / ('', 'deep/er')[i % 2]
    place.mkdir(parents=True, exist_ok=True)
    makers[i % len(makers)](i, place / f'{i:03}')
  birds = root / 'birds'
  Image.new('RGB', (1, 1), 'red').save(birds / 'dot.png')
  for i in range(3):
    (root / 'cats' / f'copy{i}.png').write_bytes((root / 'birds' / '000.png').read_bytes())
  file = io.BytesIO()
  picture(0).save(file, 'PNG')
  for i in range(4):
    (birds / f'cut{i}.png').write_bytes(file.getvalue()[:200 + 50 * i])
  picture(7).save(birds / 'exif.jpg', exif=b'Exif\0\0II*\0\x08\0\0\0\xff\xff')
  for i in range(4):
    (birds / f'text{i}.jpg').write_bytes(b'I am no image, %d' % i)
  (birds / 'bomb.png').write_bytes(forged_png())
  (birds / 'nothing.png').write_bytes(b'')
  Image.new('RGB', (3000, 1), 'red').save(birds / 'line.png')  # at SIZE this is still fine
  Image.new('F', (5, 5)).save(birds / 'float.tiff')
  picture(5).save(root / 'loose.png')
  picture(6).save(birds / '.hidden.png')
  os.mkfifo(birds / 'pipe.png')
  return {'damaged': 4, 'not an image': 4, 'suspicious': 1, 'too many pixels': 1, 'empty': 1,
          'unsupported mode': 1, 'outside class folders': 1, 'not a regular file': 1}


def counts(found) -> dict[str, int]:
  reasons = [e.finding.reason for e in found.refused]
  return {r: reasons.count(r) for r in set(reasons)}


def test_two_hundred_files(tmp_path):
  root = tmp_path / 'images'
  expected = build(root)
  found = survey(root, SIZE)
  assert counts(found) == expected
  assert len(found.examples) + len(found.refused) + found.hidden == 200
  assert found.classes == ('birds', 'cats', 'dogs') and found.hidden == 1
  assert [len(group) for group in found.duplicates] == [4]
  paths = [e.path for e in found.examples]
  assert paths == sorted(paths)

  config = FolderConfig(path=str(root), size=SIZE, eval_fraction=0.2)
  parts = {split: config.open(split) for split in ('train', 'eval')}
  assert not set(parts['train'].paths) & set(parts['eval'].paths)
  assert sorted(parts['train'].paths + parts['eval'].paths) == paths
  assert 0.1 < len(parts['eval']) / len(paths) < 0.3
  bytes_of = {s: {hashlib.sha256((root / p).read_bytes()).digest() for p in parts[s].paths}
              for s in parts}
  assert not bytes_of['train'] & bytes_of['eval']  # a copy never straddles
  for source in parts.values():
    for batch in pipeline.batches(source, batch_size=32, seed=0, train=False):
      assert batch['image'].shape == (32, SIZE, SIZE, 3) and batch['image'].dtype == np.uint8
      names = [source.paths[i].split('/')[0] for i in batch['index']]
      assert [source.classes[i] for i in batch['label']] == names


def test_findings_are_reused_until_a_file_changes(tmp_path, own_cache, monkeypatch):
  root = tmp_path / 'images'
  root.mkdir()
  for i in range(4):
    picture(i).save(root / f'{i}.png')
  first = survey(root, SIZE)
  asked = []
  original = inspection.inspect_all
  monkeypatch.setattr(folder.inspection, 'inspect_all',
                      lambda paths: asked.append(paths) or original(paths))
  assert survey(root, SIZE) == first and asked == [[]]
  (root / '2.png').write_bytes(b'overwritten')
  (root / '3.png').unlink()
  again = survey(root, SIZE)
  assert asked[1] == [str(root / '2.png')]
  assert [e.path for e in again.examples] == ['0.png', '1.png'] and not again.classes
  assert counts(again) == {'not an image': 1}
  store, = own_cache.rglob('*.json')
  store.write_bytes(b'{"rules"')  # damaged: inspected anew, not trusted
  assert survey(root, SIZE) == again and len(asked[2]) == 3


def test_what_may_pass_is_tried_again(tmp_path, monkeypatch):
  picture(0).save(tmp_path / 'a.png')
  original = inspection.inspect_all
  monkeypatch.setattr(folder.inspection, 'inspect_all',
                      lambda paths: [inspection.Finding(reason='timed out') for _ in paths])
  assert counts(survey(tmp_path, SIZE)) == {'timed out': 1}
  monkeypatch.setattr(folder.inspection, 'inspect_all', original)
  assert counts(survey(tmp_path, SIZE)) == {}


def test_elongated_images_are_refused_at_the_size_that_cannot_hold_them(tmp_path):
  Image.new('RGB', (3000, 1)).save(tmp_path / 'line.png')
  assert counts(survey(tmp_path, 256)) == {'too elongated': 1}
  assert counts(survey(tmp_path, 32)) == {}


def test_the_split_stays_when_files_are_added(tmp_path):
  root = tmp_path / 'images'
  root.mkdir()
  for i in range(40):
    picture(i).save(root / f'{i:02}.bmp')
  before = {s: {e.path for e in survey(root, SIZE).split(s, 0.3)} for s in ('train', 'eval')}
  for i in range(40, 60):
    picture(i).save(root / f'{i:02}.bmp')
  (root / '00.bmp').rename(root / 'renamed.bmp')
  after = {s: {e.path for e in survey(root, SIZE).split(s, 0.3)} for s in ('train', 'eval')}
  for split in before:
    assert before[split] - {'00.bmp'} <= after[split]


def test_both_sides_exist_for_two_images(tmp_path):
  for i in range(2):
    picture(i).save(tmp_path / f'{i}.png')
  for fraction in (0.001, 0.999):
    found = survey(tmp_path, SIZE)
    assert len(found.split('train', fraction)) == len(found.split('eval', fraction)) == 1


def test_a_worker_that_hangs_or_dies_costs_one_file(tmp_path, monkeypatch):
  picture(0).save(tmp_path / 'good.png')
  worker = inspection._Worker(seconds=30.0)
  assert worker.inspect(str(tmp_path / 'good.png')).reason is None
  worker.process.kill()
  worker.process.wait()
  assert worker.inspect(str(tmp_path / 'good.png')).reason == 'crashed the decoder'
  assert worker.inspect(str(tmp_path / 'good.png')).reason is None
  os.kill(worker.process.pid, 19)  # SIGSTOP: it will never answer
  worker.seconds = 0.2
  assert worker.inspect(str(tmp_path / 'good.png')).reason == 'timed out'
  worker.seconds = 30.0
  assert worker.inspect(str(tmp_path / 'good.png')).width == picture(0).width
  worker.close()
  assert threading.active_count() < 20


def test_messages_name_value_rule_and_way_out(tmp_path):
  with pytest.raises(ValueError, match=r'data.path is not set; name a folder'):
    FolderConfig().open('train')
  with pytest.raises(FileNotFoundError, match='is not a folder'):
    survey(tmp_path / 'gone', SIZE)
  (tmp_path / 'a.png').write_bytes(b'x')
  with pytest.raises(ValueError, match='0 images and none for train'):
    FolderConfig(path=str(tmp_path)).open('train')
  picture(0).save(tmp_path / 'b.png')
  picture(1).save(tmp_path / 'c.png')
  with pytest.raises(ValueError, match='eval_fraction=1.5 must lie between 0 and 1'):
    FolderConfig(path=str(tmp_path), eval_fraction=1.5).open('train')
  source = FolderConfig(path=str(tmp_path), size=8).open('train')
  (tmp_path / source.paths[0]).write_bytes(b'broken')
  with pytest.raises(ValueError, match='was a good image when the run began'):
    source.read(np.array([0]))


def test_content_is_of_the_bytes_and_labels(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
  for i in range(8):
    picture(i).save(tmp_path / 'a' / f'{i}.png')

  def content(split='train'):
    return FolderConfig(path=str(tmp_path), size=SIZE).open(split).content

  first = content()
  assert content() == first != content('eval')
  train = FolderConfig(path=str(tmp_path), size=SIZE).open('train').paths
  picture(99).save(tmp_path / train[0])
  changed = content()
  assert changed != first
  (tmp_path / 'a').rename(tmp_path / 'c')
  assert content() not in (first, changed)  # the same images, of another class
