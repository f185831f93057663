"""Sweeps: cells that resume, share noise and programs, fail alone, and repeat."""

import json
import shutil

import jax
import numpy as np
import pytest

from smalti.evaluation.manifest import read_file, read_scores
from smalti.launch import (
  cells,
  cli,
  curves,
  evaluate,
  judge as judges,
  provenance,
  run as runs,
  sweep as sweeps,
  trees,
)
from smalti.launch.cells import Folder
from smalti.launch.judge import Accumulation
from smalti.launch.sample import Sampler, draw, resolve_settings
from smalti.launch.scores import Scores
from smalti.launch.train import train

N, BATCH = 40, 16


def config(name, **overrides):
  # as in test_run.py, so that the programs are the same
  return trees.load_config(f'{name}:debug', [
      ('mesh.data', '1'), ('optimizer.schedule', 'constant'), ('optimizer.warmup', '0'),
      *((k.replace('__', '.'), str(v)) for k, v in overrides.items())])


@pytest.fixture(scope='module', autouse=True)
def quick():
  """One device, unless a test says otherwise, and the extractor is fitted once for all tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sweeps, 'Sampler', lambda size: Sampler(size, jax.local_devices()[:1]))
    fit, known = judges._fitted, {}
    patch.setattr(judges, '_fitted', lambda data, shape, folder: known.setdefault(
        shape, known.get(shape) or fit(data, shape, folder)))
    yield


@pytest.fixture(scope='module')
def generator(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sweep')
  train(config('digits_vq'), folder / 'tokenizer')
  train(config('digits_ar', tokenizer=folder / 'tokenizer', checkpoint__every=1), folder / 'ar')
  return str(folder / 'ar')


@pytest.fixture(scope='module')
def references(generator, tmp_path_factory):
  """A sweep folder whose real images are summarized already."""
  out = tmp_path_factory.mktemp('references')
  sweeps.Sweep(out, [generator], n=N)
  return out


@pytest.fixture
def out(references, tmp_path):
  return shutil.copytree(references, tmp_path / 'sweep')


def plan(sweep, mode='grid', checkpoint='last', weights='ema', seed='0', listed=None, **settings):
  return sweeps.plan(sweep, mode=mode, checkpoint=checkpoint, weights=weights, seed=seed,
                     settings=settings, listed=listed)


def make(out, generator, **options):
  return sweeps.Sweep(out, [generator], n=N, batch_size=BATCH, **options)


def read(out):
  return {name: (out / name).read_bytes() for name in ('results.csv', 'results.jsonl')}


def test_axes_make_cells_and_mistakes_are_one_line(out, generator, tmp_path):
  sweep = make(out, generator)
  assert len(plan(sweep, checkpoint='all', temperature='1,0.9', top_k='none,3')) == 8
  assert len(plan(sweep, checkpoint='1:2:1', weights='ema,raw', seed='0,1')) == 8
  assert len(plan(sweep, 'zip', temperature='1,0.9', top_k='none,3')) == 2
  assert len(plan(sweep, checkpoint='last,best,2')) == 1  # one cell, however it is named
  (tmp_path / 'list.json').write_text(json.dumps([
      {'temperature': 0.5}, {'checkpoint': 1, 'seed': 3}, {'temperature': 0.5}]))
  points = plan(sweep, 'list', listed=tmp_path / 'list.json')
  assert sorted((p.step, p.seed, p.settings.temperature) for p in points) == [
      (1, 3, 1.0), (2, 0, 0.5)]
  for message, options in [
      ('no checkpoint 7', dict(checkpoint='7')),
      ('no checkpoint in 5:9:1', dict(checkpoint='5:9:1')),
      ('not one of ema, raw', dict(weights='best')), ('integer of 0', dict(seed='-1')),
      ('did you mean', dict(temprature='1')), ('zip needs', dict(mode='zip', seed='0,1,2',
                                                                temperature='1,2')),
      ('needs --cells', dict(mode='list')),
      ('needs --mode=list', dict(listed=tmp_path / 'list.json')),
      ('one settings.temperature for all', dict(
          mode='list', listed=tmp_path / 'list.json', temperature='1,2'))]:
    with pytest.raises(ValueError, match=message):
      plan(sweep, **options)


def test_floats_share_a_program_and_cells_their_noise(out, generator):
  sweep = make(out, generator)
  points = plan(sweep, checkpoint='all', temperature='1,0.9', top_k='none,3')
  assert sweeps.execute(sweep, points) == 0
  assert sweep.sampler.programs == 2  # top_k off and on; checkpoints and temperatures are data
  rows = cells.rows(out)
  assert len(rows) == 8 and len({row.cell for row in rows}) == 8
  # the same cell alone, in other batches: the same images
  loaded = runs.load(f'{generator}@2')
  tokenizer = runs.load_tokenizer(loaded)
  settings = resolve_settings(loaded, {'temperature': '0.9'})
  images = [draw(loaded, tokenizer, n=N, seed=0, settings=settings, batch_size=size).images
            for size in (8, 24)]
  np.testing.assert_array_equal(*images)
  judge = sweep.judge
  again = Accumulation(judge, N)
  again.add(images[0], np.arange(N))
  fd = next(row for row in judge.measure(again.finish()) if row.name.startswith('fd_'))
  found = next(row for row in rows if row.axes['temperature'] == 0.9
               and row.axes['checkpoint'] == 2 and row.axes['top_k'] is None)
  assert found.metrics[fd.name] == pytest.approx(fd.value, rel=1e-9)
  assert found.scores[0].beside['floor'] > 0 and found.scores[0].beside['untrained'] > 0


def test_every_sample_counts_once_over_eight_devices_and_a_ragged_tail(out, generator):
  assert jax.local_device_count() == 8
  loaded = runs.load(generator)
  tokenizer = runs.load_tokenizer(loaded)
  sampler = Sampler(20)
  assert sampler.batch_size == 24 and sampler.mesh.size == 8
  seen, images = [], {}
  for batch in sampler.batches(sampler.place(loaded), sampler.place(tokenizer), n=N, seed=0,
                               settings=resolve_settings(loaded, {})):
    assert len(batch.images.sharding.device_set) == 8
    seen += [i for i in batch.index if i >= 0]
    images |= dict(zip(batch.index, np.asarray(batch.images)))
  assert sorted(seen) == list(range(N))
  one = draw(loaded, tokenizer, n=N, seed=0, settings=resolve_settings(loaded, {}), batch_size=N)
  np.testing.assert_array_equal(one.images, np.stack([images[i] for i in range(N)]))


def test_a_sweep_goes_on_where_it_stopped_and_gives_the_same_tables(out, generator, tmp_path,
                                                                    monkeypatch):
  def asked(folder):
    sweep = make(folder, generator)
    return sweep, plan(sweep, temperature='1,0.9')

  whole = shutil.copytree(out, tmp_path / 'whole')
  assert sweeps.execute(*asked(whole)) == 0
  drawn = []
  add = Accumulation.add

  def stopping(self, images, index, labels=None):
    drawn.append(index[0])
    if len(drawn) in (3, 6):
      raise KeyboardInterrupt  # after the batch was drawn and before it was counted
    add(self, images, index, labels)

  monkeypatch.setattr(Accumulation, 'add', stopping)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      sweeps.execute(*asked(out))
  assert sweeps.execute(*asked(out)) == 0
  assert read(out) == read(whole)
  assert len(drawn) == 2 * 3 + 2  # two cells of three batches, and one batch twice per stop
  assert cells.Log.count(out, 'batch') == 8 and cells.Log.count(out, 'cell') == 2
  assert sweeps.execute(*asked(out)) == 0
  assert len(drawn) == 8  # finished cells stay
  assert not list(out.rglob('cursor.json'))


def test_the_table_is_recorded_where_it_is_asked_for(out, generator, tmp_path):
  file = tmp_path / 'found.json'
  assert cli.main(['sweep', f'--workdir={generator}', f'--out={out}', f'--n={N}',
                   f'--batch_size={BATCH}', '--settings.temperature=1,0.9',
                   f'--results={file}']) == 0
  first, second = provenance.load(file)['results']
  assert (first['temperature'], second['temperature']) == (0.9, 1.0)
  for row, known in zip((first, second), cells.rows(out), strict=True):
    assert row == {**known.axes, **known.metrics} and any(name.startswith('fd_') for name in row)


def test_a_failing_cell_does_not_stop_the_others(out, generator, monkeypatch):
  sweep = make(out, generator)
  points = plan(sweep, temperature='1,0.9,0.8')
  run, failing = sweeps.Sweep.run, points[1].cell.id
  monkeypatch.setattr(sweeps.Sweep, 'run', lambda self, point, *args: run(
      self, point, *args) if point.cell.id != failing else 1 / 0)
  assert sweeps.execute(sweep, points) == 1
  assert cells.failures(out) == {failing: 'ZeroDivisionError: division by zero'}
  assert len(cells.rows(out)) == 2
  assert 'ZeroDivisionError' in curves.write_page(out).read_text()
  monkeypatch.undo()
  assert sweeps.execute(sweep, points) == 0
  assert len(cells.rows(out)) == 3 and not cells.failures(out)


def test_workers_split_the_cells(out, generator):
  counts = []
  for worker in range(3):
    sweep = make(out, generator)
    points = plan(sweep, seed='0,1,2,3')
    sweeps.execute(sweep, points, worker=worker, workers=3)
    counts.append(len(cells.rows(out)))
  assert counts == [2, 3, 4]


def test_the_prediction_counts_what_is_left(out, generator):
  sweep = make(out, generator)
  points = plan(sweep, top_k='none,3')
  first = sweep.predict(points)
  assert (first.cells, first.left, first.programs, first.batches) == (2, 2, 2, 6)
  assert first.seconds > 0 and not (out / 'cells').exists()
  sweeps.execute(sweep, points[:1])
  assert sweep.predict(points).left == 1


@pytest.mark.parametrize('kind', ['npz', 'png'])
def test_samples_are_kept_on_request(kind, out, generator):
  sweep = make(out, generator, save_samples=kind)
  (point,) = plan(sweep)
  sweeps.execute(sweep, [point])
  folder = Folder(out, point.cell.id).path
  loaded = runs.load(generator)
  expected = draw(loaded, runs.load_tokenizer(loaded), n=N, seed=0, batch_size=N,
                  settings=resolve_settings(loaded, {})).images
  from smalti.launch.gallery import open_gallery
  gallery = open_gallery(folder / ('samples.npz' if kind == 'npz' else 'samples'))
  np.testing.assert_array_equal(np.concatenate(list(gallery.batches(7))), expected)


def test_a_cell_is_repeated_from_its_scores(out, generator, capfd):
  sweep = make(out, generator)
  points = plan(sweep, temperature='0.9', top_k='3')
  sweeps.execute(sweep, points)
  path = Folder(out, points[0].cell.id).path / 'scores.json'
  assert evaluate.repeat(path) == 0
  assert f'{len(read_scores(path))} scores, 0 differ' in capfd.readouterr().err
  scores, request = read_file(path)
  fields = [score for score in scores if score.name != 'nfe']
  changed = [*fields[1:], type(fields[0])(**{
      **{f: getattr(fields[0], f) for f in fields[0].__dataclass_fields__},
      'value': fields[0].value * 1.01})]
  assert evaluate.compare(changed, scores) == 1
  assert 'DIFFERS' in capfd.readouterr().err
  path.write_text(path.read_text().replace('"n": 40', '"n": 41'))
  with pytest.raises(ValueError, match='was edited'):
    evaluate.repeat(path)


def test_processes_share_a_cell_and_only_the_first_gathers(out, generator, tmp_path, monkeypatch):
  alone = shutil.copytree(out, tmp_path / 'alone')
  one = make(alone, generator)
  sweeps.execute(one, plan(one))
  whole = cells.rows(alone)[0]
  monkeypatch.setattr('jax.experimental.multihost_utils.sync_global_devices', lambda name: None)
  gather, gathered = sweeps.Sweep._gather, []
  monkeypatch.setattr(sweeps.Sweep, '_gather', lambda self, *args: (
      gathered.append(self.process), gather(self, *args))[1])
  for process in (1, 0):  # as if the other had come first
    sweep = make(out, generator)
    sweep.processes, sweep.process = 2, process
    (point,) = plan(sweep)
    sweep.run(point, cells.Log(out, process))
  assert gathered == [0]
  (row,) = cells.rows(out)
  assert row.metrics == pytest.approx(whole.metrics, rel=1e-9)


def test_what_another_worker_finished_meanwhile_is_not_drawn_again(out, generator, monkeypatch):
  sweep = make(out, generator)
  points = plan(sweep)
  left = sweeps.Sweep.left
  monkeypatch.setattr(sweeps.Sweep, 'left', lambda self, points: list(points))  # the list is old
  for _ in range(2):
    assert sweeps.execute(sweep, points) == 0
  assert cells.Log.count(out, 'batch') == 3
  assert left(sweep, points) == []


def test_samples_are_complete_where_they_are_asked_for_after_a_stop(out, generator, monkeypatch):
  add, count = Accumulation.add, []

  def stopping(self, *args):
    count.append(1)
    if len(count) == 3:
      raise KeyboardInterrupt
    add(self, *args)

  monkeypatch.setattr(Accumulation, 'add', stopping)
  sweep = make(out, generator)
  (point,) = plan(sweep)
  with pytest.raises(KeyboardInterrupt):
    sweeps.execute(sweep, [point])
  assert sweeps.execute(make(out, generator, save_samples='npz'), [point]) == 0
  kept = np.load(Folder(out, point.cell.id).path / 'samples.npz')['arr_0']
  loaded = runs.load(generator)
  np.testing.assert_array_equal(kept, draw(
      loaded, runs.load_tokenizer(loaded), n=N, seed=0, batch_size=BATCH,
      settings=resolve_settings(loaded, {})).images)


def test_tables_hold_what_was_finished_while_they_were_written(out, generator, monkeypatch):
  sweep = make(out, generator)
  (point,) = plan(sweep)
  sweeps.execute(sweep, [point])
  write = curves.write_page

  def meanwhile(folder):
    cell = Folder(out, point.cell.id).path
    if not (cell.parent / 'other').exists():
      shutil.copytree(cell, cell.parent / 'other')
    return write(folder)

  monkeypatch.setattr(curves, 'write_page', meanwhile)
  found, _ = sweeps.derive(out)
  assert len(found) == 2 and len((out / 'results.jsonl').read_text().splitlines()) == 2


def test_runs_of_one_name_are_told_apart(out, generator, tmp_path):
  other = shutil.copytree(generator, tmp_path / 'other' / 'ar')
  sweep = sweeps.Sweep(out, [generator, str(other)], n=N)
  assert set(sweep.labels.values()) == {generator, str(other)}
  assert sweeps.Sweep(out, [f'{generator}/'], n=N).labels == {f'{generator}/': 'ar'}


def test_scores_name_the_generator_and_not_its_tokenizer(generator):
  models = [Scores(runs.load(f'{generator}@{step}')).common['model'].split() for step in (1, 2)]
  assert [name for _, name in models] == ['ar@1', 'ar@2']
  marks = {mark for mark, _ in models} | {runs.load(generator).fingerprint}
  assert len(marks) == 3
