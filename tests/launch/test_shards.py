"""Sampling jobs in parts: whatever stops them, every sample is there once and is its own."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from smalti.configs import digits_masked, digits_vq
from smalti.launch import cli, shards
from smalti.launch.gallery import open_gallery
from smalti.launch.sample import Sampler
from smalti.launch.train import train


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """An untrained generator of digits on its tokenizer."""
  folder = tmp_path_factory.mktemp('runs')
  for module in (digits_vq, digits_masked):
    experiment = module.get_config('debug')
    experiment.steps, experiment.mesh.data = 1, 1
    if module is digits_masked:
      experiment.tokenizer = str(folder / 'digits_vq')
    train(experiment, folder / module.__name__.rpartition('.')[2])
  return folder / 'digits_masked'


def command(workdir, out, *more):
  return ['sample', f'--workdir={workdir}', f'--out={out}', '--n=50', '--part=16', '--batch_size=8',
          '--settings.steps=2', *more]


def arrays(folder):
  parts = [dict(np.load(path)) for path in shards.files(folder)]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_parts_hold_the_samples_of_one_call_and_go_on_where_they_stopped(
    workdir, tmp_path, monkeypatch, capsys):
  assert cli.main(['sample', f'--workdir={workdir}', '--n=50', '--settings.steps=2',
                   '--name=whole']) == 0
  whole = dict(np.load(workdir / 'samples' / 'whole.npz'))
  drawn, batches = [], Sampler.batches

  def stopped(self, *arguments, **options):
    for i, batch in enumerate(batches(self, *arguments, **options)):
      if len(drawn) == 5:
        raise OSError('the machine is gone')
      drawn.append(i)
      yield batch

  monkeypatch.setattr(Sampler, 'batches', stopped)
  out = tmp_path / 'job'
  with pytest.raises(OSError, match='the machine is gone'):
    cli.main(command(workdir, out))
  assert sorted(p.name for p in out.iterdir()) == [
      'job.json', 'samples-00000.npz', 'samples-00001.npz']  # no half of the third
  with pytest.raises(ValueError, match='is not finished'):
    open_gallery(out)
  monkeypatch.setattr(Sampler, 'batches', batches)
  assert cli.main(command(workdir, out)) == 0
  assert '2 to draw here' in capsys.readouterr().err
  found = arrays(out)
  for name in ('arr_0', 'arr_1', 'tokens'):
    np.testing.assert_array_equal(found[name], whole[name])
  np.testing.assert_array_equal(found['index'], np.arange(50))
  gallery = open_gallery(out)
  assert (gallery.n, gallery.shape) == (50, (8, 8, 1))
  np.testing.assert_array_equal(gallery.labels, np.arange(50) % 10)
  for size in (7, 16, 100):
    parts = list(gallery.batches(size))
    assert [len(p) for p in parts] == [size] * (50 // size) + [50 % size] * (50 % size > 0)
    np.testing.assert_array_equal(np.concatenate(parts), whole['arr_0'])


def test_workers_share_a_job_and_the_last_closes_it(workdir, tmp_path, capsys):
  out = tmp_path / 'job'
  assert cli.main(command(workdir, out, '--worker=1', '--num_workers=2')) == 0
  assert 'parts are left for other workers' in capsys.readouterr().err
  assert not (out / 'index.json').exists()
  assert cli.main(command(workdir, out, '--worker=0', '--num_workers=2')) == 0
  np.testing.assert_array_equal(arrays(out)['index'], np.arange(50))
  assert cli.main(command(workdir, out, '--worker=2', '--num_workers=2')) == 2


def test_another_job_in_the_folder_and_damaged_parts_are_refused(workdir, tmp_path, capsys):
  out = tmp_path / 'job'
  assert cli.main(command(workdir, out)) == 0
  before = (out / 'samples-00001.npz').read_bytes()
  assert cli.main(command(workdir, out, '--seed=1')) == 2
  assert 'another job, with other seed' in capsys.readouterr().err
  retrained = shutil.copytree(workdir, tmp_path / 'generator')
  item = json.loads((retrained / 'config.json').read_text())
  shutil.rmtree(retrained / 'checkpoints')
  experiment = digits_masked.get_config('debug')
  experiment.steps, experiment.mesh.data, experiment.seed = 1, 1, 5
  experiment.tokenizer = item['experiment']['tokenizer']
  train(experiment, retrained)
  (tmp_path / 'generator').rename(tmp_path / 'aside')
  workdir.rename(tmp_path / 'first')
  (tmp_path / 'aside').rename(workdir)
  assert cli.main(command(workdir, out)) == 2
  assert 'another job, with other checkpoint' in capsys.readouterr().err
  workdir.rename(tmp_path / 'aside')
  (tmp_path / 'first').rename(workdir)
  (out / 'samples-00001.npz').write_bytes(before[:-1])
  with pytest.raises(ValueError, match='missing or damaged'):
    open_gallery(out)
  (out / 'samples-00001.npz').unlink()
  (out / 'index.json').unlink()
  assert cli.main(command(workdir, out)) == 0  # draws what is not there
  np.testing.assert_array_equal(arrays(out)['index'], np.arange(50))
  assert json.loads((out / 'index.json').read_text())['parts'][3]['count'] == 2


@pytest.mark.slow
def test_ten_thousand_samples_killed_five_times(workdir, tmp_path):
  out, rng = tmp_path / 'job', random.Random(0)
  arguments = [sys.executable, '-m', 'smalti.launch.sample', f'--workdir={workdir}',
               f'--out={out}', '--n=10000', '--part=256', '--batch_size=64', '--settings.steps=8']
  for _ in range(5):
    before = len(list(out.glob('samples-*.npz')))
    process = subprocess.Popen(
        arguments, stderr=subprocess.DEVNULL, cwd=pathlib.Path(__file__).parent)
    while len(list(out.glob('samples-*.npz'))) < before + 2:
      assert process.poll() is None
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / 'index.json').exists()
  assert subprocess.run(arguments, check=False).returncode == 0
  found = arrays(out)
  np.testing.assert_array_equal(found['index'], np.arange(10_000))
  assert cli.main(['sample', f'--workdir={workdir}', '--n=10000', '--settings.steps=8',
                   '--name=whole', '--batch_size=512']) == 0
  np.testing.assert_array_equal(
      found['tokens'], np.load(workdir / 'samples' / 'whole.npz')['tokens'])
