"""`smalti data` prints what training reads, and a hostile name cannot steer a terminal."""

import numpy as np
import pytest
from PIL import Image

from smalti.launch import cli, data


@pytest.fixture
def root(tmp_path, tmp_path_factory, monkeypatch):
  monkeypatch.setenv('SMALTI_CACHE_DIR', str(tmp_path_factory.mktemp('cache')))
  for i in range(30):
    place = tmp_path / ('cats', 'dogs')[i % 2]
    place.mkdir(exist_ok=True)
    Image.fromarray(np.full((16, 20, 3), i, np.uint8)).save(place / f'{i:02}.png')
  (tmp_path / 'dogs' / 'copy.png').write_bytes((tmp_path / 'cats' / '00.png').read_bytes())
  for i in range(7):
    (tmp_path / 'dogs' / f'bad\x1b[2J{i}.png').write_bytes(b'no image %d' % i)
  return tmp_path


def test_the_page_says_what_is_there(root, capsys):
  assert cli.main(['data', f'--path={root}', '--size=18', '--eval_fraction=0.3']) == 0
  text = capsys.readouterr().out
  rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
  assert '31 images in 2 classes, 7 files refused' in text
  assert rows['cats'][0] == '15' and rows['dogs'][0] == '16' and rows['all'][0] == '31'
  for name in ('cats', 'dogs', 'all'):
    images, train, held_out = map(int, rows[name])
    assert train + held_out == images
  assert 'smallest 20x16, median 20x16, largest 20x16; read as 18x18' in text
  assert '31 images are smaller than 18' in text
  assert '7  not an image' in text and 'and 2 more; --all names them' in text
  assert 'cats/00.png = dogs/copy.png' in text and '1 of them under another class' in text
  assert '\x1b' not in text and 'bad\\x1b[2J0.png' in text


def test_all_names_every_file(root, capsys):
  assert cli.main(['data', f'--path={root}', '--all']) == 0
  text = capsys.readouterr().out
  assert text.count('.png (none of') == 7 and '--all' not in text


def test_folders_that_are_splits_are_noticed(root, capsys):
  (root / 'cats').rename(root / 'train')
  (root / 'dogs').rename(root / 'val')
  assert cli.main(['data', f'--path={root}']) == 0
  assert 'look like splits, not classes' in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path, capsys):
  for argument, message in (('--size=8', 'needs --path=DIR'),
                            (f'--path={tmp_path}/gone', 'not a folder')):
    assert cli.main(['data', argument]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count('\n') == 1


def test_surrogates_and_controls_are_escaped():
  assert data.printable('a\udcff\nb é') == 'a\\udcff\\nb é'
