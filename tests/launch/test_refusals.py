"""Mistakes of a user: exit code 2 and one line with the value and the way out; nothing lost."""

import json
import shutil
import types
from typing import Any

import numpy as np
import pytest

from smalti.launch import cli, sample, trees
from smalti.launch.job import Job
from smalti.launch.train import train

DEBUG = ['--config.mesh.data=1']


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'tokenizer'
  train(trees.load_config('digits_vq:debug', [('mesh.data', '1')]), folder)
  return folder


def refused(capfd, *arguments):
  capfd.readouterr()
  assert cli.main([str(a) for a in arguments]) == 2
  lines = capfd.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('smalti: '), lines
  return lines[0]


CONFIGS = {
    'unknown field': (['--config=digits_vq', '--config.optimizer.rat=1'], 'rate'),
    'wrong type': (['--config=digits_vq', '--config.steps=many'], 'steps'),
    'wrong tuple length': (['--config=digits_vq', '--config.optimizer.betas=(0.9,)'], 'betas'),
    'unknown config': (['--config=digit_vq'], 'digits_vq'),
    'unknown size': (['--config=digits_vq:huge'], 'base'),
    'batch of another multiple': (
        ['--config=digits_vq', '--config.batch_size=9', '--config.accumulate=2', *DEBUG],
        'nearest is'),
    'too many devices': (['--config=digits_vq', '--config.mesh.data=999'], '999'),
    'missing folder': (['--config=images_vq', '--config.data.path=nowhere', *DEBUG], 'nowhere'),
    'missing data set': (['--config=imagenet256_llamagen_tokenizer', *DEBUG], 'imagenet2012'),
    'missing tokenizer': (
        ['--config=digits_ar:debug', '--config.tokenizer=nowhere', *DEBUG], 'nowhere'),
    'no tokenizer': (['--config=digits_ar:debug', '--config.tokenizer=none', *DEBUG], 'tokenizer'),
    'no micro-batches': (['--config=digits_vq:debug', '--config.accumulate=0'],
                         'accumulate=0 must be 1 or more'),
    'a log every 0 steps': (['--config=digits_vq:debug', '--config.log.every=0'],
                            'log.every=0 must be 1 or more'),
    'an evaluation every 0 steps': (['--config=digits_vq:debug', '--config.eval.every=0'],
                                    'eval.every=0 must be 1 or more'),
    'a checkpoint every -1 steps': (['--config=digits_vq:debug', '--config.checkpoint.every=-1'],
                                    'checkpoint.every=-1 must be 1 or more'),
    'a seed of 33 bits': (['--config=digits_vq:debug', f'--config.seed={2**32}', *DEBUG],
                          'must be in 0..2**32 - 1'),
    'a seed below 0': (['--config=digits_vq:debug', '--config.seed=-1', *DEBUG],
                       'must be in 0..2**32 - 1'),
    'untracked metric': (['--config=digits_vq:debug', '--config.checkpoint.best=eval/fid', *DEBUG],
                         'eval/fid'),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_that_cannot_train(capfd, tmp_path, monkeypatch, name):
  arguments, word = CONFIGS[name]
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  if name == 'untracked metric':  # found at the first save: its log comes before
    assert cli.main(['train', *arguments, '--workdir=run']) == 2
    assert word in capfd.readouterr().err.strip().splitlines()[-1]
    return
  assert word in refused(capfd, 'train', *arguments, '--workdir=run')


def test_a_chance_above_one(capfd, tokenizer, tmp_path):
  assert 'label_dropout=1.5 must be within 0..1' in refused(
      capfd, 'train', '--config=digits_ar:debug', f'--config.tokenizer={tokenizer}',
      '--config.model.label_dropout=1.5', *DEBUG, f'--workdir={tmp_path}/run')


def test_labels_that_the_model_has_no_row_for(tokenizer, tmp_path):
  with pytest.raises(ValueError, match='label 9, and classes=9'):  # found in a batch: logs before
    train(trees.load_config('digits_ar:debug', [
        ('mesh.data', '1'), ('model.classes', '9'), ('tokenizer', str(tokenizer)),
    ]), tmp_path / 'run')


def test_another_config_in_the_workdir(capfd, tokenizer):
  before = sorted(p.name for p in tokenizer.rglob('*'))
  said = refused(capfd, 'train', '--config=digits_vq:debug', '--config.seed=7', *DEBUG,
                 f'--workdir={tokenizer}')
  assert 'seed: 0 -> 7' in said
  assert sorted(p.name for p in tokenizer.rglob('*')) == before


def test_an_unknown_checkpoint_format(capfd, tokenizer, tmp_path):
  run = shutil.copytree(tokenizer, tmp_path / 'run')
  item = json.loads((run / 'config.json').read_text())
  (run / 'config.json').write_text(json.dumps({**item, 'format': 7, 'version': '3.2.1'}))
  said = refused(capfd, 'reconstruct', f'--workdir={run}')
  assert 'format 7' in said and '3.2.1' in said
  for text in ('[]', '3', '{'):
    (run / 'config.json').write_text(text)
    assert 'restore it from a copy' in refused(capfd, 'reconstruct', f'--workdir={run}')


@pytest.mark.parametrize('verb, word', [
    ('sample', 'is a tokenizer'), ('tokenize', '--out'), ('export', '--out'),
    ('reconstruct', '1 or more'), ('evaluate', '2 or more'), ('tokenize', 'batch_size=0')])
def test_a_verb_on_the_wrong_thing(capfd, tokenizer, verb, word):
  extra = {'reconstruct': ['--n=0'], 'evaluate': ['--n=1'],
           'tokenize': ['--batch_size=0'] * (word != '--out')}.get(verb, [])
  assert word in refused(capfd, verb, f'--workdir={tokenizer}', *extra)


@pytest.mark.parametrize('labels', [[], [''], ['3', '\u00b2'], ['10'], ['-1']])
def test_labels_that_are_no_classes(labels):
  with pytest.raises(ValueError, match='must be integers in 0..9'):
    sample._labels(labels, 4, 10)


def test_a_run_that_is_not_there(capfd, tmp_path):
  assert 'nowhere' in refused(capfd, 'sample', f'--workdir={tmp_path}/nowhere')
  (tmp_path / 'empty').mkdir()
  assert 'config.json' in refused(capfd, 'reconstruct', f'--workdir={tmp_path}/empty')


def test_classes_of_data_without_labels():
  job: Any = types.SimpleNamespace(experiment=trees.load_config('digits_ar:debug'))
  with pytest.raises(ValueError, match='no labels, and classes=10'):
    Job._put(job, {'tokens': np.zeros((2, 16, 1))})


@pytest.mark.parametrize('verb', ['evaluate', 'reconstruct'])
def test_a_file_without_data(capfd, tokenizer, tmp_path, verb):
  path = tmp_path / 'tokenizer.safetensors'
  assert cli.main(['export', f'--workdir={tokenizer}', f'--out={path}']) == 0
  assert 'without data; name a run folder' in refused(capfd, verb, f'--workdir={path}')
