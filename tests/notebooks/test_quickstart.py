"""The notebook runs: at debug size here, in full by `make notebooks`; from any folder, twice."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

PATH = pathlib.Path(__file__).parents[2] / 'notebooks' / 'quickstart.ipynb'


def execute(folder, size):
  notebook = nbformat.read(PATH, 4)
  os.environ['SMALTI_NOTEBOOK_SIZE'] = size
  NotebookClient(notebook, timeout=600, resources={'metadata': {'path': str(folder)}}).execute()
  return notebook


def images(notebook):
  return [output for cell in notebook.cells if cell.cell_type == 'code'
          for output in cell.outputs if 'image/png' in output.get('data', {})]


def test_debug_size_ends_with_a_grid(tmp_path, monkeypatch):
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  # one device: the kernel is not this process
  monkeypatch.setenv('XLA_FLAGS', '')
  notebook = execute(tmp_path, 'debug')
  assert len(images(notebook)) == 2
  assert 'image/png' in notebook.cells[-1].outputs[-1]['data']


@pytest.mark.slow
def test_full_size_twice(tmp_path, monkeypatch):
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  monkeypatch.setenv('XLA_FLAGS', '')
  for _ in range(2):
    assert len(images(execute(tmp_path, 'base'))) == 2


def test_the_first_cell_never_changes_jax():
  first = nbformat.read(PATH, 4).cells[1].source
  assert "find_spec('smalti') is None" in first and "'-c', str(pins)" in first


def test_outputs_are_not_committed():
  assert not any(cell.get('outputs') for cell in nbformat.read(PATH, 4).cells)
