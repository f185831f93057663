"""The page of a sweep: best cells, curves over axes, trade-offs; from disk, without a network."""

import concurrent.futures

import numpy as np

from smalti.evaluation.manifest import Score, versions, write_scores
from smalti.launch import cells, curves, pictures
from smalti.launch.cells import Cell, Folder


def score(name, value, higher, samples=100, **beside):
  return Score(
      name=name, value=value, unit='', higher_is_better=higher, samples=samples, seeds=(0,),
      settings={}, weights='ema', model='m', extractor='net', sha256='1a2b3c4d' * 8, resize='none',
      uint8='round', reference='train', reference_samples=500, versions=versions(), beside=beside)


def make(out, axes, fd, precision, recall, samples=100, checkpoint=''):
  cell = Cell(axes, {'axes': axes, 'n': samples, 'checkpoint': checkpoint})
  folder = Folder(out, cell.id)
  folder.begin(cell)
  write_scores(folder.path / 'scores.json', [
      score('fd_net_1a2b3c4d', fd, False, samples, floor=0.5, floor_samples=100),
      score('precision_net_1a2b3c4d', precision, True, samples),
      score('recall_net_1a2b3c4d', recall, True, samples)])
  pictures.save_grid(folder.path / 'grid.png', np.zeros((4, 8, 8, 1), np.uint8))
  folder.finish()


def sweep(out, seeds=(0, 1)):
  for seed in seeds:
    for guidance in (1.0, 2.0, 3.0):
      for steps in (4, 8):
        axes = {'run': 'r', 'checkpoint': 10, 'seed': seed, 'guidance': guidance, 'steps': steps}
        make(out, axes, abs(guidance - 2) + 8 / steps + 0.1 * seed, 0.5 + 0.1 * guidance,
             0.9 - 0.1 * guidance)
  return out


def test_a_page_of_seeds_axes_and_trade_offs(tmp_path, read_page):
  page = read_page(curves.write_page(sweep(tmp_path)))
  assert 'guidance 2, steps 8' in page.text and '1.05 ± 0.07071 over 2 seeds' in page.text
  assert '0.5 for 100 real held-out images' in page.text
  for text in ('By guidance', 'By steps', 'Trade-offs', 'All cells', 'optimistic'):
    assert text in page.text, text
  assert page.tags.count('svg') > 6 and page.text.count('2 seeds') >= 6


def test_it_stands_before_anything_is_finished_and_with_one_cell(tmp_path, read_page):
  assert 'No cell is finished' in read_page(curves.write_page(tmp_path)).text
  Folder(tmp_path, 'a' * 12).fail('Traceback\nValueError: <script>alert(1)</script>')
  assert 'ValueError: <script>' in read_page(curves.write_page(tmp_path)).text
  make(tmp_path, {'run': 'r', 'seed': 0, 'steps': 4}, 1.0, 0.5, 0.5)
  read_page(curves.write_page(tmp_path))


def test_what_no_other_cell_beats_in_both():
  x, y = np.array([1.0, 2.0, 3.0, 2.0, 1.0]), np.array([1.0, 2.0, 1.0, 1.5, 1.0])
  for higher, expected in (((True, True), [0, 1, 1, 0, 0]), ((False, False), [1, 0, 0, 0, 1]),
                           ((False, True), [1, 1, 0, 0, 1])):
    np.testing.assert_array_equal(curves.pareto(x, y, *higher), expected)


def test_of_equals_the_one_with_fewer_steps_is_the_best(tmp_path):
  for steps in (16, 4, 8):
    make(tmp_path, {'run': 'r', 'seed': 0, 'steps': steps}, 1.0, 0.5, 0.5)
  ranked = curves.best_first(curves.group(cells.rows(tmp_path)), 'fd_net_1a2b3c4d', False)
  assert [g.axes['steps'] for g in ranked] == [4, 8, 16]


def test_other_numbers_of_samples_and_other_checkpoints_are_no_seeds(tmp_path, read_page):
  axes = {'run': 'r', 'checkpoint': 10, 'seed': 0, 'steps': 4}
  for samples, fd in ((100, 3.0), (1000, 1.0)):  # more samples, a smaller distance: no better cell
    make(tmp_path, axes, fd, 0.5, 0.5, samples)
  make(tmp_path, axes, 2.0, 0.5, 0.5, 1000, 'another run of this name')
  few, many = curves.comparable(cells.rows(tmp_path))
  assert [row.samples for row in few + many] == [100, 1000, 1000]
  assert [len(g.cells) for g in curves.group(many)] == [1, 1]
  page = read_page(curves.write_page(tmp_path))
  assert 'seeds' not in page.text
  assert '1 cells of 100 samples' in page.text and '2 cells of 1,000 samples' in page.text
  cells.write_tables(tmp_path)
  lines = (tmp_path / 'results.csv').read_text().splitlines()
  place = lines[0].split(',').index('n')
  assert sorted(line.split(',')[place] for line in lines[1:]) == ['100', '1000', '1000']


def test_generators_with_other_settings_share_a_page(tmp_path, read_page):
  for steps in (4, 8):
    make(tmp_path, {'run': 'masked', 'seed': 0, 'steps': steps}, 1.0 / steps, 0.5, 0.5)
  for top_k in (1, 2, 3):
    make(tmp_path, {'run': 'ar', 'seed': 0, 'top_k': top_k}, float(top_k), 0.5, 0.5)
  page = read_page(curves.write_page(tmp_path))
  assert 'By top_k' not in page.text  # 'none' is no place on an axis
  assert all(text in page.text for text in ('masked', 'steps 8', 'top_k 1'))


def test_workers_may_write_the_page_at_once(tmp_path):
  make(tmp_path, {'run': 'r', 'seed': 0, 'steps': 4}, 1.0, 0.5, 0.5)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    (path,) = set(pool.map(lambda _: curves.write_page(tmp_path), range(40)))
  (picture,) = (path.parent / 'pictures').iterdir()
  assert f'pictures/{picture.name}' in path.read_text()
  make(tmp_path, {'run': 'r', 'seed': 0, 'steps': 4}, 0.5, 0.5, 0.5, 200)
  old = path.parent / 'pictures' / 'best0-gone.png'
  old.write_bytes(b'')
  curves.write_page(tmp_path)
  assert not old.exists()
