"""Runs: a generator finds its tokenizer by name and refuses another in one line; resume, init."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smalti.evaluation.subset import subset
from smalti.launch import cli, export, run as runs, sample, state as states, tokenize, trees
from smalti.launch.checkpoint import Checkpoints
from smalti.launch.job import Job
from smalti.launch.train import train


def config(name, **overrides):
  # a constant rate, so that runs of other lengths are the same program
  return trees.load_config(f'{name}:debug', [
      ('mesh.data', '1'), ('optimizer.schedule', 'constant'), ('optimizer.warmup', '0'),
      *((k.replace('__', '.'), str(v)) for k, v in overrides.items())])


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'tokenizer'
  train(config('digits_vq'), folder)
  return folder


@pytest.fixture(scope='module')
def generator(tokenizer, tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'generator'
  train(config('digits_ar', tokenizer=tokenizer), folder)
  return folder


def test_fingerprint_is_one_for_run_export_and_token_folder(tokenizer, tmp_path):
  loaded = runs.load(tokenizer)
  export.save(loaded, tmp_path / 'tokenizer.safetensors')
  assert runs.load(tmp_path / 'tokenizer.safetensors').fingerprint == loaded.fingerprint
  tokenize.tokenize(loaded, loaded.experiment.data, tmp_path / 'tokens')
  assert runs.load(tmp_path / 'tokens').fingerprint == loaded.fingerprint
  assert runs.load(f'{tokenizer}@2').fingerprint == loaded.fingerprint
  assert len(loaded.fingerprint) == 16


def test_online_encoding_and_stored_tokens_give_the_same_first_batch(tokenizer, tmp_path):
  from smalti.data.tokens import TokensConfig
  from smalti.launch.step import inputs
  loaded = runs.load(tokenizer)
  tokenize.tokenize(loaded, loaded.experiment.data, tmp_path / 'tokens')
  online = config('digits_ar', tokenizer=tokenizer)
  stored = dataclasses.replace(
      online, data=TokensConfig(path=str(tmp_path / 'tokens')), tokenizer=str(tmp_path / 'tokens'))
  first = []
  for i, experiment in enumerate((online, stored)):
    job = Job(experiment, tmp_path / f'run{i}', None)
    batch = next(job.batches(0))
    assert ('tokens' in batch) == (i == 1)
    encode = jax.jit(lambda batch, frozen: inputs(batch, frozen))
    first.append(jax.device_get(encode(batch, job.frozen)))
    job.close()
  for name in ('tokens', 'label', 'index'):
    np.testing.assert_array_equal(first[0][name], first[1][name])


def test_another_tokenizer_is_refused_and_a_moved_one_found(tokenizer, generator, tmp_path):
  loaded = runs.load(generator)
  assert runs.load_tokenizer(loaded).fingerprint == loaded.fingerprint
  moved = shutil.copytree(tokenizer, tmp_path / 'moved')
  assert runs.load_tokenizer(loaded, str(moved)).fingerprint == loaded.fingerprint
  with pytest.raises(FileNotFoundError, match='where it was moved, say --tokenizer=PATH'):
    runs.load_tokenizer(loaded, str(tmp_path / 'gone'))
  train(config('digits_vq', seed=1), tmp_path / 'retrained')
  with pytest.raises(ValueError, match='was trained on tokenizer'):
    runs.load_tokenizer(loaded, str(tmp_path / 'retrained'))
  with pytest.raises(ValueError, match='was trained on tokenizer|another config'):
    train(config('digits_ar', tokenizer=tmp_path / 'retrained', steps=3), generator)
  assert runs.load_tokenizer(runs.load(generator)).fingerprint == loaded.fingerprint


def test_a_token_folder_of_another_tokenizer_is_refused(tokenizer, tmp_path):
  from smalti.data.tokens import TokensConfig
  loaded = runs.load(tokenizer)
  tokenize.tokenize(loaded, loaded.experiment.data, tmp_path / 'tokens')
  train(config('digits_vq', seed=2), tmp_path / 'other')
  experiment = dataclasses.replace(
      config('digits_ar', tokenizer=tmp_path / 'other'),
      data=TokensConfig(path=str(tmp_path / 'tokens')))
  with pytest.raises(ValueError, match='stored tokens are of tokenizer'):
    train(experiment, tmp_path / 'generator')


def test_what_defines_a_run_may_not_change_and_the_rest_may(tmp_path):
  train(config('digits_vq', steps=1), tmp_path / 'run')
  with pytest.raises(ValueError, match='another config.*optimizer.rate'):
    train(config('digits_vq', steps=2, optimizer__rate=1e-5), tmp_path / 'run')
  train(config('digits_vq', steps=2, log__every=1), tmp_path / 'run')
  history = [json.loads(line) for line in (tmp_path / 'run' / 'config_history.jsonl').open()]
  assert {c.split(':')[0] for c in history[0]['changes']} == {'steps', 'log.every'}


def test_a_run_without_a_checkpoint_takes_any_config(tmp_path):
  runs.write_config(_folder(tmp_path / 'run'), config('digits_vq'), None)
  train(config('digits_vq', steps=1, optimizer__rate=1e-5), tmp_path / 'run')
  assert runs.read_experiment(tmp_path / 'run').optimizer.rate == 1e-5


def test_resume_is_bitwise_the_run_that_never_stopped(tmp_path):
  straight = config('digits_vq', steps=6, checkpoint__every=3, checkpoint__best='none')
  train(straight, tmp_path / 'straight')
  train(straight, tmp_path / 'stopped')
  shutil.rmtree(tmp_path / 'stopped' / 'checkpoints' / '6')
  train(straight, tmp_path / 'stopped')
  trees = []
  for name in ('straight', 'stopped'):
    checkpoints = Checkpoints(tmp_path / name / 'checkpoints')
    trees.append(checkpoints.restore(6, None)[0])
    checkpoints.close()
  a, b = (states.paths(tree) for tree in trees)
  assert a.keys() == b.keys()
  for path in a:
    assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


def test_init_from_copies_what_fits_and_says_what_does_not(tokenizer, tmp_path, capsys):
  train(config('digits_vq', seed=3, model__quantizer__codes=32), tmp_path / 'run',
        init_from=str(tokenizer))
  said = capsys.readouterr().err
  assert 'init_from: copied encoder' in said
  assert 'init_from: other shape quantizer' in said


def test_the_best_checkpoint_is_what_a_run_means(tmp_path):
  train(config('digits_vq', steps=4, checkpoint__every=1, eval__every=1, optimizer__rate=1.0),
        tmp_path / 'run')
  rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
  scores = {row['step']: row['eval/mse'] for row in rows if 'eval/mse' in row}
  assert runs.load(tmp_path / 'run').step == min(scores, key=scores.get)


def bits(tree):
  """The bytes of leaves by their path."""
  return {path: np.asarray(leaf).tobytes() for path, leaf in states.paths(tree).items()}


def test_a_run_is_its_averaged_weights_and_raw_its_last(generator):
  checkpoints = Checkpoints(generator / 'checkpoints')
  tree, _ = checkpoints.restore(2, None)
  checkpoints.close()
  for loaded, weights, name in ((runs.load(generator), 'ema', 'ema'),
                                (runs.load(generator, weights='raw'), 'raw', 'params')):
    params, _ = states.Structure.of(loaded.model).split(loaded.model)
    assert (loaded.step, loaded.weights) == (2, weights)
    assert bits(params) == bits(tree[name])
  assert bits(tree['ema']) != bits(tree['params'])


def test_sample_draws_of_the_averaged_weights_unless_told(generator, tmp_path):
  run = shutil.copytree(generator, tmp_path / 'run')
  checkpoints = Checkpoints(run / 'checkpoints')
  tree, item = checkpoints.restore(2, None)
  tree['params'] = jax.tree.map(lambda x: -x, tree['params'])  # as far as last weights can be
  checkpoints.save(3, tree, item)
  checkpoints.close()
  loaded = runs.load(f'{run}@3')
  model = states.Structure.of(loaded.model).merge(tree['ema'], tree['buffers'])
  averaged = dataclasses.replace(loaded, model=jax.tree.map(jnp.asarray, model))
  want = sample.draw(averaged, runs.load_tokenizer(loaded), n=8, seed=0,
                     settings=sample.resolve_settings(loaded, {})).tokens
  for weights in ('ema', 'raw'):
    assert cli.main(['sample', f'--workdir={run}@3', '--n=8', f'--name={weights}',
                     *(['--weights=raw'] if weights == 'raw' else [])]) == 0
    found = np.load(run / 'samples' / f'{weights}.npz')['tokens']
    assert np.array_equal(found, want) == (weights == 'ema')
    assert json.loads((run / 'samples' / f'{weights}.json').read_text())['weights'] == weights


def test_held_out_scores_are_of_the_averaged_weights(tmp_path):
  job = Job(config('digits_vq', eval__batches=1), tmp_path / 'run', None)
  double = lambda tree: jax.tree.map(lambda x: 2 * x, tree)  # noqa: E731
  with jax.set_mesh(job.mesh):
    first = job.evaluate()
    job.state['params'] = double(job.state['params'])
    assert job.evaluate() == first
    job.state['ema'] = double(job.state['ema'])
    assert job.evaluate()['eval/mse'] != first['eval/mse']
  job.close()


@pytest.mark.parametrize('batches, processes', [(None, 1), (2, 1), (2, 2)])
def test_limited_evaluation_reads_random_rows_that_processes_share(
    tmp_path, monkeypatch, batches, processes):
  experiment = config('digits_vq', eval__batches=batches)
  job = Job(experiment, tmp_path / 'run', None)
  size, read = experiment.batch_size, []
  source, put = job.held_out, lambda rows: (read.append(rows), rows)[1]
  monkeypatch.setattr(source, 'read', lambda index: {'place': index})
  monkeypatch.setattr(job, '_put', put)
  monkeypatch.setattr(job, '_evaluate', lambda *_: (1.0, {}))
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  for process in range(processes):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    job.evaluate()
  found = np.concatenate([rows['place'] for rows in read])
  count = len(source) if batches is None else batches * size
  assert count < len(source) or batches is None
  np.testing.assert_array_equal(np.sort(found), subset(len(source), count))
  if processes == 1:  # in order, as without a limit all rows are
    np.testing.assert_array_equal(found, subset(len(source), count))
  job.close()


@pytest.mark.parametrize('damage, message', [
    (lambda item: {**item, 'format': 99, 'version': '9.9.9'}, 'written by smalti 9.9.9'),
    (lambda item: {**item, 'experiment': {**item['experiment'], 'stepz': 1}}, 'stepz'),
])
def test_an_unknown_format_or_field_is_refused(tokenizer, tmp_path, damage, message):
  run = shutil.copytree(tokenizer, tmp_path / 'run')
  item = json.loads((run / 'config.json').read_text())
  (run / 'config.json').write_text(json.dumps(damage(item)))
  with pytest.raises(ValueError, match=message):
    runs.load(run)


def test_a_damaged_export_is_refused(tokenizer, tmp_path):
  path = tmp_path / 'tokenizer.safetensors'
  export.save(runs.load(tokenizer), path)
  data = bytearray(path.read_bytes())
  data[-100] ^= 1
  path.write_bytes(data)
  with pytest.raises(ValueError, match='damaged'):
    runs.load(path)
  path.write_bytes(data[:200])
  with pytest.raises(ValueError, match='cannot be read'):
    runs.load(path)


def test_any_flipped_bit_of_an_exported_generator_is_noticed(generator, tmp_path):
  path = tmp_path / 'generator.safetensors'
  export.save(runs.load(generator), path)
  whole = path.read_bytes()
  assert runs.load(path).fingerprint == runs.load(generator).fingerprint
  path.write_bytes(whole.replace(b'"leaves"', b'"leafes"'))
  with pytest.raises(ValueError, match='does not say which leaves'):
    runs.load(path)
  start = 8 + int.from_bytes(whole[:8], 'little')
  places = np.random.default_rng(0).integers(start, len(whole), 30)
  for place in (start, len(whole) - 1, *places):  # leaves
    data = bytearray(whole)
    data[place] ^= 1 << int(place) % 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match='damaged'):
      runs.load(path)


@pytest.mark.parametrize('name, value', [
    ('step', 'x'), ('config', '{'), ('config', '[]'), ('spec', '7'), ('spec', '{'), ('format', ''),
    ('fingerprint', None), ('weights', None)])
def test_metadata_of_an_export_that_make_no_sense(tokenizer, tmp_path, name, value):
  path = tmp_path / 'tokenizer.safetensors'
  export.save(runs.load(tokenizer), path)
  data = path.read_bytes()
  start = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:start])
  header['__metadata__'].pop(name)
  header['__metadata__'].update({name: value} if value is not None else {})
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data[start:])
  assert cli.main(['tokenize', f'--workdir={path}', '--data=digits_vq', '--out=x']) == 2


def test_a_run_is_named_by_its_very_weights(generator, tmp_path):
  first, raw = runs.load(generator), runs.load(generator, weights='raw')
  assert first.identity == raw.identity  # of the checkpoint, which holds both
  experiment = first.experiment
  experiment.seed = 3
  train(experiment, tmp_path / 'retrained')
  assert runs.load(tmp_path / 'retrained').identity != first.identity
  export.save(first, tmp_path / 'a.safetensors')
  export.save(runs.load(tmp_path / 'retrained'), tmp_path / 'b.safetensors')
  assert (runs.load(tmp_path / 'a.safetensors').identity
          != runs.load(tmp_path / 'b.safetensors').identity)


def test_time_of_a_step_leaves_out_evaluations_and_saves(tmp_path, monkeypatch):
  from smalti.launch import job as jobs, train as training
  now = [0.0]  # a step takes 1, an evaluation 100, a save 10
  monkeypatch.setattr(training, 'time', SimpleNamespace(perf_counter=lambda: now[0]))

  def taking(name, seconds):
    function = getattr(jobs.Job, name)

    def slow(self, *arguments):
      now[0] += seconds
      return function(self, *arguments)
    monkeypatch.setattr(jobs.Job, name, slow)

  def compiled(self):
    compile(self)
    step = self.step

    def slow(*arguments):
      now[0] += 1
      return step(*arguments)
    self.step = slow

  compile = jobs.Job.compile
  monkeypatch.setattr(jobs.Job, 'compile', compiled)
  taking('evaluate', 100)
  taking('save', 10)
  experiment = config('digits_vq', steps='13')
  experiment.log.every, experiment.eval.every, experiment.checkpoint.every = 4, 3, 5
  train(experiment, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  found = {line['step']: line['seconds/step'] for line in lines if 'seconds/step' in line}
  assert found == dict.fromkeys((1, 4, 5, 8, 10, 12, 13), 1.0)


def test_non_finite_data_stops_before_the_update(tmp_path, monkeypatch):
  from smalti.launch import job as jobs
  from smalti.launch.exits import NonFinite
  batches = jobs.pipeline.batches

  def poisoned(*args, **kwargs):
    for i, rows in enumerate(batches(*args, **kwargs)):
      image = rows['image'].astype(np.float32) / 127.5 - 1
      yield {**rows, 'image': image * (np.nan if i == 2 else 1)}

  monkeypatch.setattr(jobs.pipeline, 'batches', poisoned)
  with pytest.raises(NonFinite, match='Step 3 is not finite in loss term'):
    train(config('digits_vq', steps=6, checkpoint__every=1, checkpoint__best='none'),
          tmp_path / 'run')
  checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints')
  assert checkpoints.latest() == 2
  tree, _ = checkpoints.restore(2, None)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
  checkpoints.close()


def _folder(path):
  path.mkdir()
  return path
