"""Scores a grid of settings and checkpoints: `smalti sweep --workdir=RUN --settings.steps=8,16`.

Every point is a cell: a folder named by a hash over all that decides its numbers. Asked again, what
is finished stays and what was begun goes on, so a sweep may be killed at any time and shared by
workers (`--worker=i --num_workers=n`). All cells draw from the same noise. Tables (`results.csv`,
`results.jsonl`) and the page `report/index.html` are derived from the finished cells; times and
batches are in `logs/`. `--dry_run` times a batch of every program and says how long it will take.

Axes: --settings.NAME=1,2,3 (tuples parted by `;`), --seed=0,1,2, --weights=ema,raw,
--workdir=RUN1,RUN2, and --checkpoint=best | last | all | 1000,2000 | 10000:400000:10000. They are
combined (--mode=grid), taken in step (zip), or listed in a JSON file (--mode=list --cells=FILE).

With --config=NAME it trains and scores the experiments of that config's `get_sweep` instead: see
`launch/study.py`.
"""

import dataclasses
import os
import pathlib
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from smalti.evaluation.manifest import Score, read_scores, write_scores
from smalti.launch import (
  cells,
  cli,
  curves,
  exits,
  gallery,
  locks,
  manifest,
  mesh as meshes,
  pictures,
  provenance,
  run as runs,
  serialization,
  signals,
  study,
)
from smalti.launch.cells import Cell, Folder, Log
from smalti.launch.judge import Accumulation, Judge, open_judge, references
from smalti.launch.progress import say, track
from smalti.launch.sample import Sampler, resolve_settings
from smalti.launch.scores import Scores

FORMAT = 1
# Options of cells, of no use where the rows of a config are trained.
CELLS = ('n', 'batch_size', 'checkpoint', 'weights', 'seed', 'mode', 'cells', 'extractor',
         'inception_weights', 'tokenizer', 'save_samples', 'save_every')
GRID = 64  # samples of the picture of a cell


@dataclasses.dataclass(frozen=True)
class Point:
  """A cell, and what must be loaded and drawn for it."""
  cell: Cell
  run: str
  step: int
  weights: str
  seed: int
  settings: Any

  @property
  def program(self) -> tuple:
    """What is alike for points that share a compiled program, in one run."""
    return self.run, jax.tree.structure(self.settings)


class Sweep:
  """The runs, their judge, and the points, none of which is drawn yet."""

  def __init__(self, out: pathlib.Path, workdirs: Sequence[str], *, n: int, batch_size: int = 64,
               extractor: str | None = None, inception_weights: str | None = None,
               tokenizer: str | None = None, save_samples: gallery.Kind = 'none',
               save_every: int = 1):
    if n < 2 or batch_size < 1 or save_every < 1:
      raise ValueError(f'n={n} must be 2 or more, batch_size={batch_size} and '
                       f'save_every={save_every} 1 or more.')
    self.out, self.workdirs, self.n, self.extractor = out, list(workdirs), n, extractor
    self.save_samples, self.save_every = save_samples, save_every
    self.sampler = Sampler(batch_size)
    self.processes, self.process = jax.process_count(), jax.process_index()
    self._override, self._weights = tokenizer, inception_weights
    self._loaded: tuple[tuple, runs.Loaded] | None = None
    self.outlines = {workdir: runs.outline(workdir) for workdir in self.workdirs}
    names = {workdir: os.path.basename(os.path.abspath(workdir)) for workdir in self.workdirs}
    self.labels = {workdir: name if list(names.values()).count(name) == 1 else workdir
                   for workdir, name in names.items()}
    self.tokenizers: dict[str, runs.Loaded] = {}
    data = None
    for workdir, outline in self.outlines.items():
      if not hasattr(outline.model, 'sample'):
        raise ValueError(f'{workdir} is no generator; sweep the settings of one.')
      codec = runs.load_tokenizer(outline, self._override)
      self.tokenizers[workdir] = self.sampler.place(codec)
      other = runs.pixels(outline.experiment.data, codec)
      data = data or other
      changes = serialization.differences(*(serialization.to_json(x) for x in (data, other)))
      if changes:
        raise ValueError(f'{workdir} was trained on other data than {self.workdirs[0]} '
                         f'({"; ".join(changes[:3])}); sweep them apart.')
    self.judge: Judge = open_judge(data, references(out), n=n, extractor=extractor,
                                   weights=inception_weights)

  def step(self, workdir: str, name: str) -> int:
    """The step of `best` (the newest where no metric is tracked), `last`, or a number."""
    known = self.outlines[workdir]
    step = {'best': known.best, 'last': known.last}.get(
        name, int(name) if name.isdigit() else None)
    if step not in known.steps:
      raise ValueError(f'{workdir} has no checkpoint {name}; it has {known.steps}.')
    return step

  def steps(self, workdir: str, text: str) -> list[int]:
    """The steps that `--checkpoint` names, each once."""
    known = self.outlines[workdir].steps
    if text == 'all':
      return known
    if text.count(':') == 2 and all(part.isdigit() for part in text.split(':')):
      first, last, by = map(int, text.split(':'))
      found = [step for step in range(first, last + 1, max(by, 1)) if step in known]
      if not found:
        raise ValueError(f'{workdir} has no checkpoint in {text}; it has {known}.')
      return found
    return list(dict.fromkeys(self.step(workdir, name) for name in cells.values(text)))

  def models(self, run: str, step: int, weights: str) -> tuple[runs.Loaded, runs.Loaded]:
    """Generator and tokenizer on the devices; the last generator asked for is kept."""
    key = run, step, weights
    if self._loaded is None or self._loaded[0] != key:
      self._loaded = None  # one in memory at a time
      self._loaded = key, self.sampler.place(runs.load(f'{run}@{step}', weights=weights))
    return self._loaded[1], self.tokenizers[run]

  def point(self, run: str, step: int, weights: str, seed: int, overrides: dict[str, str]) -> Point:
    outline = self.outlines[run]
    weights = weights if outline.experiment.ema is not None else 'raw'
    settings = resolve_settings(outline, overrides)
    said = serialization.to_json(settings)
    definition = {
        'format': FORMAT, 'weights': weights, 'settings': said, 'n': self.n, 'seed': seed,
        'checkpoint': manifest.identity(outline.path / 'checkpoints' / str(step)),
        'tokenizer': self.tokenizers[run].fingerprint, **self.judge.definition}
    axes = {'run': self.labels[run], 'checkpoint': step, 'weights': weights, 'seed': seed,
            **{k: v if isinstance(v, int | float | str | None) else str(v)
               for k, v in said.items() if k != 'type'}}
    return Point(Cell(axes, definition), run, step, weights, seed, settings)

  def request(self, point: Point) -> dict[str, Any]:
    """What `repeat` needs to draw a cell again."""
    said = serialization.to_json(point.settings)
    texts = {name: 'none' if value is None else str(tuple(value)) if isinstance(value, list)
             else str(value) for name, value in said.items() if name != 'type'}
    return {'verb': 'sweep', 'workdir': point.run, 'checkpoint': point.step,
            'weights': point.weights, 'seed': point.seed, 'settings': texts, 'n': self.n,
            'batch_size': self.sampler.batch_size, 'extractor': self.extractor,
            'inception_weights': self._weights, 'tokenizer': self._override}

  # Drawing.

  def run(self, point: Point, log: 'Log', preemption: signals.Preemption | None = None) -> None:
    """Finishes one cell, from wherever it stands."""
    folder = Folder(self.out, point.cell.id)
    begin = time.perf_counter()
    folder.begin(point.cell)
    generator, tokenizer = self.models(point.run, point.step, point.weights)
    accumulation = Accumulation(self.judge, self.n, source=point.cell.id)
    state = self._state(folder, self.process)
    done = accumulation.resume(state)
    batches = self.sampler.batches(
        generator, tokenizer, n=self.n, seed=point.seed, settings=point.settings,
        start=self.process + done * self.processes, every=self.processes)
    mine = len(range(self.process, -(-self.n // self.sampler.batch_size), self.processes))
    for batch in track(batches, mine - done, 'batch'):
      images = jax.block_until_ready(batch.images)
      accumulation.nfe = batch.nfe
      log.write(event='batch', cell=point.cell.id, batch=self.process + done * self.processes)
      if not (folder.path / 'grid.png').exists() and 0 in batch.index:
        pictures.save_grid(folder.path / 'grid.png', np.asarray(images)[batch.index >= 0][:GRID])
      gallery.keep(folder.path, self.save_samples, self.n, batch.index, images)
      accumulation.add(images, batch.index, batch.labels)
      done += 1
      if done % self.save_every == 0 or done == mine:
        accumulation.save(state, done)
      if preemption is not None and preemption.requested:
        accumulation.save(state, done)
        raise exits.Preempted(f'stopped in cell {point.cell.id} after {done} batches; the same '
                              'command goes on.')
    if self.processes > 1:
      from jax.experimental import multihost_utils
      multihost_utils.sync_global_devices(point.cell.id)  # all parts are written
    if self.process == 0:  # alone: what is finished has no parts any more
      accumulation = self._gather(point, folder) if self.processes > 1 else accumulation
      self._finish(point, folder, generator, accumulation)
      log.write(event='cell', cell=point.cell.id, seconds=round(time.perf_counter() - begin, 3))

  def _state(self, folder: Folder, process: int) -> pathlib.Path:
    # other batch sizes or numbers of processes have drawn other batches, or kept other samples
    name = f'accumulator-{self.sampler.batch_size}-{process}of{self.processes}'
    name += '' if self.save_samples == 'none' else f'-{self.save_samples}'
    return folder.path / 'parts' / name

  def _gather(self, point: Point, folder: Folder) -> Accumulation:
    """The parts of all processes, merged in their order, from the folder they share."""
    total = Accumulation(self.judge, self.n, source=point.cell.id)
    for process in range(self.processes):
      part = Accumulation(self.judge, self.n, source=point.cell.id)
      part.resume(self._state(folder, process))
      total.merge(part)
    return total

  def _finish(self, point: Point, folder: Folder, generator: runs.Loaded,
              accumulation: Accumulation) -> None:
    summaries = accumulation.finish()
    summaries[0].save(folder.path / 'stats.npz')
    scores = Scores(generator, settings=point.settings, seeds=(point.seed,), quiet=True)
    scores.add_judged(self.judge, summaries, accumulation)
    write_scores(folder.path / 'scores.json', scores.rows, self.request(point))
    gallery.close(folder.path)
    folder.finish()

  # Asking first.

  def left(self, points: Sequence[Point]) -> list[Point]:
    return [point for point in points if not Folder(self.out, point.cell.id).done]

  def predict(self, points: Sequence[Point]) -> 'Prediction':
    """Times a few batches of every program in a folder that is thrown away."""
    batches = -(-self.n // self.sampler.batch_size)
    todo = self.left(points)
    programs: dict[tuple, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
      for point in todo:
        if point.program in programs:
          continue
        models = self.models(point.run, point.step, point.weights)
        accumulation = Accumulation(self.judge, self.n)
        took = []
        stream = self.sampler.batches(*models, n=self.n, seed=point.seed, settings=point.settings)
        begin = time.perf_counter()
        for i, batch in enumerate(stream):
          accumulation.add(jax.block_until_ready(batch.images), batch.index, batch.labels)
          accumulation.save(pathlib.Path(scratch), i + 1)
          took.append(time.perf_counter() - begin)
          begin = time.perf_counter()
          if i == 3:
            break
        each = float(np.median(took[1:])) if len(took) > 1 else took[0]
        programs[point.program] = max(took[0] - each, 0.0), each
    once, measure = self._measuring(), self._measuring()  # the first finds floors and neighbours
    seconds = max(once - measure, 0.0) + sum(compile for compile, _ in programs.values()) + sum(
        batches * programs[point.program][1] + measure for point in todo)
    return Prediction(len(points), len(todo), len(programs), batches * len(todo), seconds)

  def _measuring(self) -> float:
    """Seconds that all measures of one cell take."""
    begin = time.perf_counter()
    if self.judge.held_out:
      self.judge.measure(self.judge.held_out)
    return time.perf_counter() - begin


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a sweep will take on this machine."""
  cells: int
  left: int
  programs: int
  batches: int
  seconds: float

  def __str__(self) -> str:
    return (f'{self.cells} cells, {self.left} to do: {self.programs} programs, {self.batches} '
            f'batches, {self.seconds / 3600:.3f} h ({self.seconds:.0f} s)')


def plan(sweep: Sweep, *, mode: str, checkpoint: str, weights: str, seed: str,
         settings: dict[str, str], listed: pathlib.Path | None) -> list[Point]:
  """The points of a command line, each cell once, ordered so that models are loaded once.

  Raises:
    ValueError: an axis that is none, a value of another type, or axes that do not go together.
  """
  asked = []
  if listed is not None and mode != 'list':
    raise ValueError(f'--cells={listed} needs --mode=list.')
  for workdir in sweep.workdirs:
    axes: dict[str, list[Any]] = {
        'checkpoint': sweep.steps(workdir, checkpoint), 'weights': cells.values(weights),
        'seed': cells.values(seed)}
    for name, text in settings.items():
      axes[f'settings.{name}'] = cells.values(text)
    if mode == 'list':
      if listed is None:
        raise ValueError('--mode=list needs --cells=FILE.json, a list of objects.')
      if several := [name for name, found in axes.items() if len(found) > 1]:
        raise ValueError(f'--mode=list takes one {several[0]} for all cells, got '
                         f'{len(axes[several[0]])}; name others in the file.')
      rows = [_listed(row, axes, sweep, workdir) for row in cells.read_list(listed)]
    else:
      rows = cells.expand(axes, mode)
    asked += [(workdir, row) for row in rows]
  points: dict[str, Point] = {}
  order = sorted(asked, key=lambda x: (sweep.workdirs.index(x[0]), x[1]['checkpoint'],
                                       str(x[1]['weights'])))
  for workdir, row in order:
    if row['weights'] not in ('ema', 'raw'):
      raise ValueError(f"weights={row['weights']} is not one of ema, raw.")
    if not str(row['seed']).isdigit():
      raise ValueError(f"seed={row['seed']} must be an integer of 0 or more.")
    overrides = {k.removeprefix('settings.'): str(v) for k, v in row.items()
                 if k.startswith('settings.')}
    point = sweep.point(workdir, row['checkpoint'], row['weights'], int(row['seed']), overrides)
    points.setdefault(point.cell.id, point)
  return list(points.values())


def _listed(row: dict[str, Any], axes: dict[str, list[Any]], sweep: Sweep, workdir: str
            ) -> dict[str, Any]:
  """A row of --cells on top of the first value of every axis; other names are settings."""
  out = {name: found[0] for name, found in axes.items()}
  for name, value in row.items():
    if name == 'checkpoint':
      out[name] = sweep.step(workdir, str(value))
    else:
      out[name if name in ('weights', 'seed') else f'settings.{name}'] = value
  return out


def execute(sweep: Sweep, points: Sequence[Point], *, worker: int = 0, workers: int = 1) -> int:
  """Runs this worker's cells; returns how many of them failed."""
  log = Log(sweep.out, worker if sweep.processes == 1 else sweep.process)
  todo = sweep.left(points)
  mine = [point for i, point in enumerate(points) if i % workers == worker and point in todo]
  say(f'{len(points)} cells, {len(points) - len(todo)} finished before, {len(mine)} for this '
      f'worker, {-(-sweep.n // sweep.sampler.batch_size)} batches each')
  failed, places = 0, {point.cell.id: f'cell {i + 1}/{len(mine)}' for i, point in enumerate(mine)}

  def run(point: Point) -> None:
    nonlocal failed
    name, folder = f'{places[point.cell.id]} {point.cell.id}', Folder(sweep.out, point.cell.id)
    try:
      if signals.agreed(preemption.requested):  # while others were waited for
        raise exits.Preempted(f'stopped before cell {point.cell.id}; the same command goes on.')
      with locks.hold(folder.path):
        if signals.agreed(folder.done):
          say(f'{name} was finished by another worker')
        else:
          sweep.run(point, log, preemption)
          say(f'{name}  {_said(point, points)}')
    except (exits.Preempted, locks.Taken):
      raise
    except Exception as error:
      failed += 1
      folder.fail(traceback.format_exc())
      say(f'{name} failed: {error}; see its ERROR')
    if sweep.process == 0:
      cells.write_tables(sweep.out)

  with signals.Preemption() as preemption:
    locks.each(mine, run)
  return failed


def derive(out: pathlib.Path) -> tuple[list[cells.Row], pathlib.Path]:
  """Writes tables and page; returns the finished cells that are in them, and the page."""
  while True:
    found = cells.write_tables(out)
    page = curves.write_page(out)
    # another worker may have finished a cell meanwhile, and written what this one replaced
    if len(cells.finished(out)) == len(found):
      return found, page


def _said(point: Point, points: Sequence[Point]) -> str:
  """The axes in which points differ."""
  axes = point.cell.axes
  differing = [name for name in axes
               if any(p.cell.axes.get(name) != axes[name] for p in points)]
  return '  '.join(f'{name} {axes[name]}' for name in differing)


def repeat(request: dict[str, Any]) -> list[Score]:
  """Draws one cell again, real images included, in a folder that is thrown away."""
  with tempfile.TemporaryDirectory() as scratch:
    out = pathlib.Path(scratch)
    sweep = Sweep(out, [request['workdir']], n=request['n'], batch_size=request['batch_size'],
                  extractor=request['extractor'], tokenizer=request['tokenizer'],
                  inception_weights=request['inception_weights'])
    point = sweep.point(request['workdir'], request['checkpoint'], request['weights'],
                        request['seed'], request['settings'])
    sweep.run(point, Log(out, 0))
    return read_scores(Folder(out, point.cell.id).path / 'scores.json')


def define(values: Any) -> None:
  from absl import flags
  cli.define_sweep(values)
  flags.DEFINE_list('rows', None, 'With --config: some of its rows; default all.',
                    flag_values=values)
  flags.DEFINE_string('results', None, 'A JSON file that records the table too; with --config: the '
                      'folder of finished rows, default OUT/results.', flag_values=values)
  flags.DEFINE_list('workdir', None, 'The generator, or several with commas.', flag_values=values)
  flags.DEFINE_string('out', None, 'The folder of the sweep; default RUN/sweep.',
                      flag_values=values)
  flags.DEFINE_integer('n', 1000, 'Samples per cell.', flag_values=values)
  flags.DEFINE_integer('batch_size', 64, 'Examples per call.', flag_values=values)
  flags.DEFINE_string('checkpoint', 'best', 'best, last, all, 1000,2000 or first:last:by.',
                      flag_values=values)
  flags.DEFINE_string('weights', 'ema', 'ema, raw, or both.', flag_values=values)
  flags.DEFINE_string('seed', '0', 'Seeds; cells of one seed share their noise.',
                      flag_values=values)
  flags.DEFINE_enum('mode', 'grid', ['grid', 'zip', 'list'], 'How axes make cells.',
                    flag_values=values)
  flags.DEFINE_string('cells', None, 'For --mode=list: a JSON list of objects.',
                      flag_values=values)
  flags.DEFINE_string('extractor', None, 'A name or file; default by the size of the images.',
                      flag_values=values)
  flags.DEFINE_string('inception_weights', None, 'The weights of --extractor=inception; default '
                      'SMALTI_INCEPTION_WEIGHTS.', flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Where the tokenizer was moved to.', flag_values=values)
  flags.DEFINE_enum('save_samples', 'none', ['none', 'npz', 'png'], 'Keeps the samples of cells.',
                    flag_values=values)
  flags.DEFINE_integer('save_every', 1, 'Batches between saves inside a cell.', flag_values=values)
  flags.DEFINE_integer('worker', 0, 'Which part of the cells is done here.', flag_values=values)
  flags.DEFINE_integer('num_workers', 1, 'Into how many parts they are split.', flag_values=values)
  flags.DEFINE_boolean('dry_run', False, 'Lists the cells and predicts the time.',
                       flag_values=values)
  cli.define_settings(values)


def main(values: Any) -> int:
  if bool(values.workdir) == bool(values.config):
    raise ValueError('sweep needs --workdir=RUN, the run of a generator, or --config=NAME, whose '
                     'rows are trained; and not both.')
  if not 0 <= values.worker < values.num_workers:
    raise ValueError(f'worker={values.worker} must be in 0..{values.num_workers - 1}.')
  meshes.distribute()
  if values.config:
    unused = [f'settings.{name}' for name in values.settings]
    if unused := unused + [name for name in CELLS if values[name].present]:
      raise ValueError(f'--{unused[0]} has no place in a sweep over configs, whose rows say it; '
                       'change a copy of the file, and name its path.')
    return study.main(values)
  if values.rows:
    raise ValueError(f'--rows={",".join(values.rows)} goes with --config=NAME.')
  if jax.process_count() > 1 and values.num_workers > 1:
    raise ValueError('The processes of a cluster share every cell; leave out --num_workers.')
  out = pathlib.Path(values.out or pathlib.Path(values.workdir[0]) / 'sweep')
  sweep = Sweep(out, values.workdir, n=values.n, batch_size=values.batch_size,
                extractor=values.extractor, tokenizer=values.tokenizer,
                inception_weights=values.inception_weights,
                save_samples=values.save_samples, save_every=values.save_every)
  points = plan(sweep, mode=values.mode, checkpoint=values.checkpoint, weights=values.weights,
                seed=values.seed, settings=values.settings,
                listed=values.cells and pathlib.Path(values.cells))
  if values.dry_run:
    for point in points:
      say(f'{point.cell.id}  {_said(point, points)}')
    say(str(sweep.predict(points)))
    return 0
  begin = time.perf_counter()
  failed = execute(sweep, points, worker=values.worker, workers=values.num_workers)
  if jax.process_index() == 0:
    found, page = derive(out)
    say(f'{len(found)} cells, {Log.count(out, "batch")} batches drawn in all, '
        f'{sweep.sampler.programs} programs compiled, {time.perf_counter() - begin:.0f} s: {page}')
    if values.results:
      provenance.record(values.results, None, [{**row.axes, **row.metrics} for row in found],
                        samples=values.n)
  return 1 if failed else 0


if __name__ == '__main__':
  cli.run('sweep')
