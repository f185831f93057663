"""Probing runs: choices that the held-out split cannot sway, controls beside, plain refusals."""

import dataclasses
import json

import numpy as np
import pytest

from smalti.data.arrays import ArraysSource
from smalti.data.digits import DigitsConfig
from smalti.launch import cli, probe, trees
from smalti.launch.train import train

FEW = dict(train=200, validation=100, test=120, shots=(1,))


@dataclasses.dataclass(kw_only=True, slots=True)
class Mislabelled(DigitsConfig):
  """Digits whose held-out labels say nothing."""

  def open(self, split):
    source = DigitsConfig.open(self, split)
    if split == 'eval':
      labels = np.random.default_rng(0).permutation(source.arrays['label'])
      return ArraysSource({**source.arrays, 'label': labels}, source.classes)
    return source


@dataclasses.dataclass(kw_only=True, slots=True)
class Unlabelled(DigitsConfig):

  def open(self, split):
    return ArraysSource({'image': DigitsConfig.open(self, split).arrays['image']})


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'tokenizer'
  train(trees.load_config('digits_vq:debug', [('mesh.data', '1')]), folder)
  return folder


@pytest.fixture(scope='module')
def generator(tokenizer, tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'generator'
  train(trees.load_config('digits_masked:debug', [
      ('mesh.data', '1'), ('tokenizer', str(tokenizer))]), folder)
  return folder


@pytest.mark.slow
def test_the_held_out_split_chooses_nothing(tokenizer):
  found, mislabelled = (probe.probe(str(tokenizer), data=data, **FEW)
                        for data in (DigitsConfig(), Mislabelled()))
  assert found['grid'] == mislabelled['grid'] and found['chosen'] == mislabelled['chosen']
  best = found['grid'][0]
  assert best['validation'] == max(row['validation'] for row in found['grid'])
  assert {**found['chosen'], 'validation': best['validation']} == best
  assert {(row['layer'], row['pool']) for row in found['grid']} == {
      (layer, pool) for layer in ('latents', 'quantized') for pool in (1, 2, 4)}
  for name, row in found['probes'].items():
    other = mislabelled['probes'][name]
    assert row['validation'] == other['validation'] and row['penalty'] == other['penalty']
    assert abs(other['logreg']['top1'] - 0.1) < 3 * np.sqrt(0.09 / 120)  # chance, on no labels
    assert (row['train'], row['logreg']['n']) == (200, 120)
  assert found['probes']['pixels']['logreg']['top1'] > 0.8
  assert set(found['probes']) == {'model', 'untrained', 'pixels', 'codes'}
  assert [few['shots'] for few in found['probes']['model']['few']] == [1]


@pytest.mark.slow
def test_a_generator_is_asked_by_block_and_noise(generator, capsys):
  with pytest.raises(SystemExit) as end:
    cli.run('probe', [f'--workdir={generator}', '--blocks=1', '--train=100', '--validation=60',
                      '--test=60', '--shots=1'])
  assert end.value.code == 0
  found = json.loads((generator / 'probe.json').read_text())['results']
  assert found['kind'] == 'generator'
  assert {(row['layer'], row['noise']) for row in found['grid']} == {
      ('block1', noise) for noise in probe.NOISES}
  clean, hidden = (next(r['validation'] for r in found['grid'] if r['noise'] == noise
                        and r['pool'] == 4) for noise in (0.0, 0.75))
  assert clean > hidden  # what is hidden cannot be read
  with pytest.raises(ValueError, match='some of 1'):
    probe.probe(str(generator), blocks=(9,), **FEW)


@pytest.mark.parametrize('arguments, word', [
    ([], 'needs --workdir'), (['--workdir=nowhere'], 'nowhere'),
    (['--workdir=RUN', '--test=0'], '1 or more'), (['--workdir=RUN', '--blocks=1'], 'generators'),
    (['--workdir=RUN', '--blocks=x'], 'numbers such as 2,4')])
def test_what_cannot_be_probed(tokenizer, capfd, arguments, word):
  with pytest.raises(SystemExit) as end:
    cli.run('probe', [a.replace('RUN', str(tokenizer)) for a in arguments])
  lines = capfd.readouterr().err.strip().splitlines()
  assert end.value.code == 2 and len(lines) == 1 and word in lines[0], lines


def test_data_without_labels_is_refused(tokenizer):
  with pytest.raises(ValueError, match='images with labels, and this data has image'):
    probe.probe(str(tokenizer), data=Unlabelled(), **FEW)
