"""Cells: names, axes, locks, and tables that are derived from finished cells alone."""

import csv
import json

import pytest

from smalti.evaluation.manifest import Score, versions, write_scores
from smalti.launch import cells
from smalti.launch.cells import Cell, Folder


def finished(out, *, value, **axes):
  cell = Cell({'run': 'r', 'seed': 0, **axes}, {'axes': axes})
  folder = Folder(out, cell.id)
  folder.begin(cell)
  write_scores(folder.path / 'scores.json', [Score(
      name='psnr', value=value, unit='dB', higher_is_better=True, samples=10, seeds=(0,),
      settings={}, weights='ema', model='m', extractor=None, sha256=None, resize=None,
      uint8='round', reference='r', reference_samples=10, versions=versions(), beside={})])
  folder.finish()
  return folder


def test_a_cell_is_named_by_its_definition_alone():
  a = Cell({'steps': 8}, {'steps': 8, 'guidance': 2.0})
  assert a.id == Cell({}, {'guidance': 2.0, 'steps': 8}).id != Cell({}, {'steps': 9}).id
  assert len(a.id) == 12


@pytest.mark.parametrize('text, expected', [
    ('1,2, 3', ['1', '2', '3']), ('(1,2);(3,4)', ['(1,2)', '(3,4)']), ('(1,2)', ['(1,2)']),
    ('none,3', ['none', '3']), ('x', ['x'])])
def test_values_of_an_axis(text, expected):
  assert cells.values(text) == expected


def test_grid_zip_and_what_does_not_go_in_step():
  axes = {'a': [1, 2], 'b': ['x', 'y', 'z']}
  assert cells.expand(axes, 'grid') == [
      {'a': a, 'b': b} for a in (1, 2) for b in ('x', 'y', 'z')]
  assert cells.expand({'a': [1, 2], 'b': ['x', 'y'], 'c': [7]}, 'zip') == [
      {'a': 1, 'b': 'x', 'c': 7}, {'a': 2, 'b': 'y', 'c': 7}]
  with pytest.raises(ValueError, match='a has 2 values, and the longest 3'):
    cells.expand(axes, 'zip')
  with pytest.raises(ValueError, match='holds no value'):
    cells.values(' , ')


def test_tables_hold_finished_cells_in_the_order_of_their_axes(tmp_path):
  for steps, value in ((16, 3.0), (4, 1.0), (8, 2.0)):
    finished(tmp_path, value=value, steps=steps, top_k=None)
  unfinished = Folder(tmp_path, 'f' * 12)
  unfinished.begin(Cell({'steps': 2}, {}))
  cells.write_tables(tmp_path)
  with open(tmp_path / 'results.csv') as file:
    table = list(csv.DictReader(file))
  assert [(row['steps'], row['psnr'], row['top_k']) for row in table] == [
      ('4', '1.0', ''), ('8', '2.0', ''), ('16', '3.0', '')]
  lines = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
  assert [line['psnr'] for line in lines] == [1.0, 2.0, 3.0]
  before = (tmp_path / 'results.csv').read_bytes()
  cells.write_tables(tmp_path)
  assert (tmp_path / 'results.csv').read_bytes() == before


def test_a_failure_is_kept_until_the_cell_is_tried_again(tmp_path):
  folder = Folder(tmp_path, 'b' * 12)
  cell = Cell({'steps': 1}, {})
  folder.begin(cell)
  folder.fail('Traceback\n  here\nValueError: of the day')
  assert cells.failures(tmp_path) == {'b' * 12: 'ValueError: of the day'}
  folder.begin(cell)
  assert cells.failures(tmp_path) == {}


@pytest.mark.parametrize('text', ['{', '{}', '[]', '[1]'])
def test_a_list_of_cells_that_is_none(text, tmp_path):
  (tmp_path / 'cells.json').write_text(text)
  with pytest.raises(ValueError, match='cells.json'):
    cells.read_list(tmp_path / 'cells.json')
