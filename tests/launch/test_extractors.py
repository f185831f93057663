"""Extractors by name, and classifiers as runs: no tokens, one file bit for bit, plain refusals."""

import hashlib
import json

import numpy as np
import pytest

from smalti.evaluation import features
from smalti.launch import cli, export, extractors, run as runs, trees
from smalti.launch.train import train


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'classifier'
  train(trees.load_config('mnist_classifier:debug', [('mesh.data', '1')]), folder)
  return folder


@pytest.fixture(scope='module')
def file(classifier, tmp_path_factory):
  path = tmp_path_factory.mktemp('files') / 'my-digits.safetensors'
  export.save(runs.load(classifier), path)
  return path


def test_run_and_file_are_one_model_without_tokens(classifier, file, tmp_path):
  run, exported = runs.load(classifier), runs.load(file)
  assert run.spec is exported.spec is None
  assert run.fingerprint == exported.fingerprint and len(run.fingerprint) == 16
  assert runs.kind(exported.model) == 'classifier'
  x = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
  for a, b in zip(run.model(x), exported.model(x)):
    np.testing.assert_array_equal(a, b)
  export.save(run, tmp_path / 'again.safetensors')
  assert (tmp_path / 'again.safetensors').read_bytes() == file.read_bytes()


def test_a_flipped_bit_is_noticed(file, tmp_path):
  data = bytearray(file.read_bytes())
  data[-3] ^= 4
  (tmp_path / 'flipped.safetensors').write_bytes(data)
  with pytest.raises(ValueError, match='is damaged'):
    extractors.load(tmp_path / 'flipped.safetensors')


@pytest.mark.parametrize('verb, extra, word', [
    ('sample', [], 'sample from a generator'), ('reconstruct', [], 'reconstruct with a tokenizer'),
    ('tokenize', ['--out=tokens'], 'tokenize with a tokenizer'),
    ('train', ['--config=digits_ar:debug', '--config.mesh.data=1'], 'name a tokenizer')])
def test_verbs_of_tokens_refuse_it_in_one_line(classifier, tmp_path, capfd, verb, extra, word):
  place = [f'--tokenizer={classifier}', f'--workdir={tmp_path / "run"}'] if verb == 'train' else [
      f'--workdir={classifier}']
  assert cli.main([verb, *place, *extra]) == 2
  lines = capfd.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and 'is a classifier' in lines[0] and word in lines[0], lines


def test_a_file_is_an_extractor_named_by_its_hash(file):
  found = extractors.load(file)
  assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
  assert features.score_name(found) == f'fd_mydigitsnet_{found.sha256[:8]}'
  x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
  assert found(x)['features'].shape == (4, found.dim)
  assert extractors.load('pixels', shape=(8, 8, 1)).dim == 64


def test_names_that_are_none(tmp_path, monkeypatch):
  for reference, word in (('cifar', 'known are cifar10, mnist, inception, pixels'),
                          ('pixels', 'needs the shape')):
    with pytest.raises(ValueError, match=word):
      extractors.load(reference)
  with pytest.raises(FileNotFoundError, match='No extractor at'):
    extractors.load(tmp_path / 'none.safetensors')
  monkeypatch.setattr(extractors, 'FOLDER', tmp_path)  # as in an installed wheel
  with pytest.raises(FileNotFoundError, match='not beside the package'):
    extractors.load('mnist')
  assert extractors.default_for((28, 28, 1)) is None
  (tmp_path / 'mnist.safetensors').write_bytes(b'another')
  with pytest.raises(ValueError, match='expected dc8d91f6654269bd'):
    extractors.load('mnist')


def test_a_generator_or_tokenizer_is_no_extractor(tmp_path):
  train(trees.load_config('digits_vq:debug', [('mesh.data', '1')]), tmp_path / 'run')
  export.save(runs.load(tmp_path / 'run'), tmp_path / 'vq.safetensors')
  with pytest.raises(ValueError, match='is a tokenizer; an extractor is a classifier'):
    extractors.load(tmp_path / 'vq.safetensors')


@pytest.mark.parametrize('shape, name', [
    ((28, 28, 1), 'mnist'), ((32, 32, 3), 'cifar10'), ((256, 256, 3), 'cifar10'),
    ((8, 8, 1), None), ((16, 16, 3), None), ((28, 28, 3), None), ((64, 64, 1), None)])
def test_which_images_get_which(shape, name):
  assert extractors.default_for(shape) == name


@pytest.mark.parametrize('name', extractors.PACKAGED)
def test_packaged_networks_are_those_of_their_cards(name):
  found = extractors.load(name)
  assert found.dim == 128 and len(found.classes) == 10 == found.model.classes
  text = json.loads((extractors.FOLDER / f'{name}.json').read_text())
  assert text['results']['name'] == features.score_name(found)
  assert text['results']['sha256'] == found.sha256
  assert text['results']['accuracy'] >= {'cifar10': 0.75, 'mnist': 0.99}[name]
  assert (extractors.FOLDER / f'{name}.safetensors').stat().st_size < 2_000_000


@pytest.mark.needs_data
def test_the_digits_network_still_reads_digits():
  from smalti.data.downloads import MnistConfig
  rows = MnistConfig().open('eval').read(np.arange(500))
  logits = extractors.load('mnist')(rows['image'])['logits']
  assert (logits.argmax(1) == rows['label']).mean() > 0.98
