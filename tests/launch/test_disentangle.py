"""The comparison of bottlenecks: what is measured, what is skipped, what the summary says."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from smalti.data import factors
from smalti.launch import disentangle, provenance, trees
from smalti.launch.disentangle import (
  CELLS,
  DECAYS,
  MEASURES,
  MODELS,
  SEEDS,
  Cell,
  measure,
  summary,
)
from smalti.tokenizers.styled import StyledConfig


def cell_file(folder, model, decay, seed, **values):
  found = {'model': model, 'weight_decay': decay, 'seed': seed, 'active': [True] * 4,
           'infom': 0.5, 'infoc': 0.5, 'infoe': 0.5, 'psnr': 20.0, **values}
  provenance.record(folder / f'{model}-{decay:g}-{seed}.json', 'command', found)


def test_every_combination_is_one_cell_and_each_model_has_three_seeds_first():
  assert len(CELLS) == 27 == len(MODELS) * len(DECAYS) * len(SEEDS)
  assert {c.decay for c in list(CELLS.values())[:9]} == {DECAYS[0]}
  assert {(c.model, c.seed) for c in list(CELLS.values())[:9]} == {
      (m, s) for m in MODELS for s in SEEDS}


def test_cells_differ_in_bottleneck_decay_and_seed_alone():
  one, two, three = (Cell(m, 0.5, 2).experiment() for m in MODELS)
  assert one.optimizer.weight_decay == 0.5 and one.seed == 2
  for other in (two, three):
    assert dataclasses.replace(other, model=one.model) == one
  network = [f.name for f in dataclasses.fields(StyledConfig)]
  for name in network:
    assert getattr(one.model, name) == getattr(two.model, name) == getattr(three.model, name)
  assert one.optimizer.clip_each == 1.0 and one.optimizer.clip is None
  assert one.model.latents == 2 * len(factors.SHAPES3D.sizes)


def test_mean_deviation_and_order(tmp_path):
  for seed, value in enumerate((0.5, 0.7)):
    cell_file(tmp_path, 'qlae', 1.0, seed, infom=value, psnr=20.0 + seed)
  cell_file(tmp_path, 'qlae', 0.1, 0, infom=0.1, infoc=0.1, infoe=0.99)
  cell_file(tmp_path, 'ae', 1.0, 0, infom=0.3, psnr=30.0)
  rows, order = summary(tmp_path)
  assert list(rows) == ['qlae 0.1', 'qlae 1', 'ae 1']
  row = rows['qlae 1']
  assert row['infom'] == {
      'mean': pytest.approx(0.6), 'deviation': pytest.approx(0.2 / 2**0.5), 'text': '0.600 ± 0.141'}
  assert row['seeds'] == 2 and row['active'] == 4
  ranks = {r['measure']: r for r in order}
  assert ranks['infom']['order'] == 'qlae 0.600 ± 0.141 > ae 0.300'
  assert ranks['psnr']['first'] == 'ae'
  assert ranks['infom']['as_published'] is True and ranks['psnr']['as_published'] is None
  assert ranks['infoe']['order'].startswith('qlae 0.500')  # at the decay chosen by InfoM and InfoC


def test_an_undefined_measure_does_not_spoil_the_summary(tmp_path):
  cell_file(tmp_path, 'qlae', 1.0, 0, infoc=None)
  cell_file(tmp_path, 'ae', 1.0, 0)
  rows, order = summary(tmp_path)
  assert order[0]['as_published'] is (order[0]['first'] == 'qlae')
  assert order[1]['measure'] == 'infoc' and order[1]['first'] == 'ae'
  assert rows['qlae 1']['infoc']['text'] == 'undefined'
  json.dumps([rows, order], allow_nan=False)
  assert summary(tmp_path / 'empty')[0] == {}


def test_finished_cells_are_skipped(tmp_path, monkeypatch):
  done = []

  def run(cell, out, folder):
    done.append(cell.name)
    cell_file(out, cell.model, cell.decay, cell.seed)

  monkeypatch.setattr(disentangle, 'run_cell', run)
  names = list(CELLS)[:3]
  command = [f'--out={tmp_path}/infomec', f'--runs={tmp_path}/runs']
  assert disentangle.main([*command, f'--cells={names[1]}']) == 0
  assert disentangle.main([*command, f'--cells={",".join(names)}']) == 0
  assert done == [names[1], names[0], names[2]]
  written = provenance.load(tmp_path / 'infomec.json')
  assert written['finished'] == 3 and written['results']['qlae 1']['seeds'] == 3
  assert len(provenance.load(tmp_path / 'infomec_order.json')['results']) == len(MEASURES)
  assert disentangle.main([*command, '--cells=']) == 0 and len(done) == 3


def test_unknown_cells_are_refused(tmp_path, capsys):
  with pytest.raises(SystemExit) as error:
    disentangle.main(['--cells=qlae-7-0', f'--out={tmp_path}/infomec'])
  assert error.value.code == 2 and 'qlae-7-0' in capsys.readouterr().err


@pytest.mark.parametrize('size', ['ae', 'vq'])
def test_measures_of_an_untrained_network(size, monkeypatch):
  monkeypatch.setattr(factors, 'EVAL', 120)
  experiment = trees.load_config(f'shapes_qlae:{size}')
  experiment.model = dataclasses.replace(
      experiment.model, image_size=(16, 16), widths=(8, 8), hidden=16)
  model = jax.jit(lambda: experiment.model.build(rngs=nnx.Rngs(0)))()
  source = factors.Shapes3DLikeConfig(size=16).open('eval')
  rows = source.read(np.arange(len(source)))
  found = measure(model, rows['image'], rows['factors'], batch_size=60)
  assert np.shape(found['nmi']) == (6, 12) and len(found['active']) == 12
  assert found['latents'] == ('real' if size == 'ae' else 'codes')
  assert 0 < found['psnr'] < 20
  json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_a_cell_trains_measures_and_is_committed(tmp_path, monkeypatch):
  monkeypatch.setattr(factors, 'EVAL', 240)
  debug = trees.load_config('shapes_qlae:debug')
  debug.mesh.data = 1
  monkeypatch.setattr(Cell, 'experiment', lambda self: debug)
  disentangle.run_cell(Cell('qlae', 1.0, 0), tmp_path, tmp_path / 'runs')
  found = provenance.load(tmp_path / 'qlae-1-0.json')
  assert found['results']['samples'] == 240 and found['fingerprint']
  assert found['results']['values'] and found['factors'][0] == 'floor_hue'
