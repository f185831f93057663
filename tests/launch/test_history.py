"""Reading run folders: order, repeats, torn lines, non-finite values."""

import json
import pathlib

import numpy as np

from smalti.launch import history


def test_metrics_in_order_with_the_last_of_each_step(tmp_path):
  lines = [{'step': 3, 'loss': 1.0}, {'step': 1, 'loss': 3.0, 'rate': 2}, {'step': 3, 'loss': 0.5},
           {'step': 2, 'loss': 'nan'}, {'step': 5, 'loss': 'inf', 'text': 'words'}]
  path = tmp_path / 'metrics.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)) + '\n\n{"step": 6, "loss": 0.2}\n{"step": 7, ')
  notes = []
  metrics = history.read_metrics(path, notes)
  assert set(metrics) == {'loss', 'rate'}
  steps, values = metrics['loss']
  np.testing.assert_array_equal(steps, [1, 3, 6])
  np.testing.assert_array_equal(values, [3.0, 0.5, 0.2])
  assert notes == ['metrics.jsonl: 1 unreadable line was left out.',
                   'loss was not finite, first at step 2; such points are left out.']


def test_pictures_are_ordered_by_step():
  names = ['step1000_keep2', 'step1000_keep10', 'step500', 'cover', 'step1000_keep1']
  order = sorted((pathlib.Path(f'{name}.png') for name in names), key=history.step_of)
  assert [path.stem for path in order] == [
      'cover', 'step500', 'step1000_keep1', 'step1000_keep2', 'step1000_keep10']


def test_an_empty_folder_is_an_empty_run(tmp_path):
  run = history.read('x', tmp_path)
  assert (run.config, run.metrics, run.scores, run.notes) == ({}, {}, {}, [])
