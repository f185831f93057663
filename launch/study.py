"""Studies: models trained side by side, `smalti sweep --config=quantizers --out=DIR`.

The config's `get_sweep(size)` names the rows, one experiment each, the most important first; what
stands after a slash repeats a row with another seed. A finished row is a file of its own in
--results, with its config, scores and provenance, and is skipped; a begun one goes on from its
checkpoint. So a study may be killed at any time, shared by workers, and completed later from the
files alone: tables say which rows were not run.

A generator's experiment may name the row of its tokenizer, `tokenizer='row:NAME'`, which is trained
first. Rows that differ in their sampling settings alone share one training run.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from smalti.evaluation import baselines, codes, reconstruction
from smalti.evaluation.manifest import seal
from smalti.evaluation.subset import subset
from smalti.generators.generator import GeneratorConfig
from smalti.launch import exits, locks, provenance, run as runs, signals, state as states
from smalti.launch.evaluate import generator_scores
from smalti.launch.experiment import Experiment
from smalti.launch.fidelity import tokenizer_scores
from smalti.launch.judge import Judge, open_judge, references
from smalti.launch.pictures import save_grid
from smalti.launch.progress import say
from smalti.launch.reconstruct import tokenized
from smalti.launch.sample import Sampler
from smalti.launch.scores import Scores
from smalti.launch.serialization import to_json
from smalti.launch.train import train

IMAGES = 2_000  # held-out images that errors and distances are measured on
TRAIN = 10_000  # training images that baselines are fitted on
BASELINES = 'baselines'
BATCH = 64  # samples per call
GRID = 10  # samples of a picture, on each side
ROW = 'row:'
CURVE = 163_840 // 64  # held-out images whose tokens are counted at every kept step


@dataclasses.dataclass(frozen=True)
class Study:
  """Rows of a config, and where they are trained and recorded.

  Attributes:
    name: what the command calls the config, with its size.
    rows: experiments by name, NAME or NAME/SEED.
    out: the folder of runs and references.
    results: the folder of finished rows.
  """
  name: str
  rows: Mapping[str, Experiment]
  out: pathlib.Path
  results: pathlib.Path

  @property
  def summary(self) -> pathlib.Path:
    return self.results.with_name(f'{self.results.name}.json')

  def path(self, row: str) -> pathlib.Path:
    return self.results / f'{row.replace("/", "-").replace(" ", "_")}.json'

  def finished(self, row: str) -> bool:
    """Whether the file of a row is there, and of the experiment that is asked for."""
    path = self.path(row)
    return path.exists() and provenance.load(path).get('definition') == self.definition(row)

  def definition(self, row: str, settings: bool = True) -> str:
    """`definition` of a row, and of the row of its tokenizer: other tokens are another row."""
    experiment = self.rows[row]
    own = definition(experiment if settings else dataclasses.replace(experiment, settings=None))
    name = experiment.tokenizer or ''
    if not name.startswith(ROW):
      return own
    if name.removeprefix(ROW) not in self.rows:
      raise ValueError(f'{row} names the tokenizer {name}, which is not among the rows.')
    return seal([own, self.definition(name.removeprefix(ROW))])[:12]

  def trained(self, row: str) -> pathlib.Path:
    """The run of a row, trained to its end."""
    experiment = dataclasses.replace(self.rows[row], settings=None)
    mark = self.definition(row, settings=False)
    folder = self.out / 'runs' / f'{type(experiment.model).__name__}-{mark}'
    name = experiment.tokenizer or ''
    if name.startswith(ROW):
      path = self.trained(name.removeprefix(ROW))
      experiment = dataclasses.replace(experiment, tokenizer=str(path))
    train(experiment, folder)
    return folder

  def run(self, row: str, judge: Judge) -> None:
    """Trains a row, or goes on with it, and writes its file.

    Raises:
      Taken: another process is at this row, or at a run that it needs.
    """
    with locks.hold(self.out / 'rows' / self.definition(row)):
      if not signals.agreed(self.finished(row)):  # by another worker, meanwhile
        self._run(row, judge)

  def _run(self, row: str, judge: Judge) -> None:
    clock, experiment = provenance.Clock(), self.rows[row]
    folder = self.trained(row)
    loaded = runs.load(folder)
    scores = Scores(loaded, quiet=True)
    results = {
        'row': row.partition('/')[0], 'seed': experiment.seed, 'bits': loaded.spec.bits,
        'parameters': _parameters(loaded), 'seconds_per_step': _seconds(folder)}
    if isinstance(experiment.model, GeneratorConfig):
      results |= generated(loaded, scores, judge, experiment,
                           self.path(row).with_suffix('.png'))
    else:
      tokenizer_scores(loaded, scores, judge, experiment.data, beside=False)
      found = {score.name: score.value for score in scores.rows}
      results |= {**found, 'usage': _mean(found, 'usage'),
                  'perplexity': _mean(found, 'perplexity')}
    if len(runs.outline(folder).steps) > experiment.checkpoint.keep:
      results['curve'] = curve(folder, experiment)
    provenance.record(
        self.path(row), ['smalti', 'sweep', f'--config={self.name}', f'--rows={row}'], results,
        clock=clock, definition=self.definition(row), judge=judge.definition,
        experiment=to_json(experiment), fingerprint=loaded.fingerprint, images=IMAGES)
    say(f'{row}: ' + '  '.join(f'{k} {v:.4g}' for k, v in results.items()
                               if isinstance(v, int | float) and '_depth' not in k))


def generated(loaded: runs.Loaded, scores: Scores, judge: Judge, experiment: Experiment,
              picture: pathlib.Path) -> dict[str, Any]:
  """The scores of a generator's samples, images per second with one program, and a picture."""
  codec = runs.load_tokenizer(loaded)
  settings = experiment.settings or loaded.model.settings()
  data = runs.pixels(experiment.data, codec)
  samples = generator_scores(loaded, codec, scores, judge, data, n=IMAGES, seed=experiment.seed,
                             settings=settings)
  sampler, clock = Sampler(BATCH), []
  models = sampler.place(loaded), sampler.place(codec)
  for batch in sampler.batches(*models, n=3 * BATCH, seed=1, settings=settings):
    np.asarray(batch.images)
    clock.append(time.perf_counter())
  save_grid(picture, samples.images[:GRID * GRID], columns=GRID)
  found: dict[str, Any] = {'images_per_second': BATCH / (clock[2] - clock[1])}
  for score in scores.rows:
    found[score.name] = score.value
    name = score.name.partition('_')[0]
    if name in ('fd', 'agreement') or score.name == 'class_agreement':
      found[name] = score.value
      found |= {f'{name}_{key}': value for key, value in score.beside.items()
                if key in ('floor', 'untrained', 'judge_accuracy')}
    if score.name == 'bits_per_token_held_out':
      found |= {key: score.beside[key]
                for key in ('unigram', 'positional_unigram', 'neighbours', 'likelihood',
                            'bits_per_dimension')}
  return found


def definition(experiment: Experiment) -> str:
  """12 hex digits over what an experiment sets: a field added later, at its default, changes none.
  """
  return seal(_said(experiment))[:12]


def _said(node: Any) -> Any:
  if isinstance(node, tuple):
    return [_said(entry) for entry in node]
  if not dataclasses.is_dataclass(node):
    return node
  out = {'type': type(node).__name__}
  for field in dataclasses.fields(node):
    value = getattr(node, field.name)
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    if default is dataclasses.MISSING or value != default:
      out[field.name] = _said(value)
  return out


def curve(folder: pathlib.Path, experiment: Experiment) -> list[dict[str, float]]:
  """Use of the codes on held-out images at every kept checkpoint, with the weights as they were."""
  source, found = experiment.data.open('eval'), []
  images = source.read(subset(len(source), CURVE))['image']
  for step in runs.outline(folder).steps:
    loaded = runs.load(f'{folder}@{step}', weights='raw')
    uses = [codes.code_use(count)
            for count in codes.counts(loaded.spec, tokenized(loaded, images))]
    found.append({'step': step, 'tokens': uses[0].tokens,
                  'usage': float(np.mean([use.usage for use in uses])),
                  'perplexity': float(np.mean([use.perplexity for use in uses]))})
  return found


def record_baselines(study: Study, experiment: Experiment, bits: float) -> None:
  """What JPEG, principal components, k-means and the mean image reach with as many bits."""
  if study.path(BASELINES).exists():
    return
  clock = provenance.Clock()
  sources = [experiment.data.open(split) for split in ('train', 'eval')]
  fitted, images = (source.read(subset(len(source), n))['image']
                    for source, n in zip(sources, (TRAIN, IMAGES)))
  found = baselines.baselines(fitted, images, bits=bits)
  mean = np.rint(np.mean(fitted, 0, dtype=np.float64)).astype(np.uint8)
  flat = reconstruction.summarize([reconstruction.measure(
      images, np.broadcast_to(mean, images.shape).copy())])
  rows = {point.curve: {'bits': point.bits, 'psnr': point.psnr, 'ssim': point.ssim}
          for point in found.at}
  rows['mean image'] = {'bits': 0.0, 'psnr': flat.psnr, 'ssim': flat.ssim}
  provenance.record(study.path(BASELINES), f'smalti sweep --config={study.name}', rows,
                    libraries=('scikit-learn', 'pillow'), clock=clock,
                    images=len(images), train=len(fitted),
                    sha256=hashlib.sha256(images.tobytes()).hexdigest())


def execute(study: Study, chosen: list[str], *, worker: int = 0, workers: int = 1) -> int:
  """Runs this worker's rows; returns how many failed. Tables come after every row."""
  failed, judges = 0, {}
  mine = [row for i, row in enumerate(chosen) if i % workers == worker]
  todo = [row for row in mine if not study.finished(row)]
  say(f'{len(study.rows)} rows, {sum(map(study.finished, study.rows))} finished; '
      f'{len(todo)} for this worker')

  def run(row: str) -> None:
    nonlocal failed
    experiment = study.rows[row]
    try:
      data = seal(_said(experiment.data))
      if data not in judges:
        judges[data] = open_judge(experiment.data, references(study.out), n=IMAGES)
      study.run(row, judges[data])
    except (exits.Preempted, KeyboardInterrupt, locks.Taken):
      raise
    except Exception as error:
      failed += 1
      path = study.out / 'errors' / f'{row.replace("/", "-")}.txt'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(traceback.format_exc(), encoding='utf-8')
      say(f'{row} failed: {error}; see {path}')
    summarize(study)

  locks.each(todo, run)
  return failed


def summarize(study: Study) -> dict[str, Any]:
  """`RESULTS.json`: every row of the study, means and deviations over its seeds; not run, too."""
  rows: dict[str, Any] = {}
  parts = [provenance.load(study.path(row))
           for row in [*filter(study.finished, study.rows), BASELINES] if study.path(row).exists()]
  for name in dict.fromkeys(row.partition('/')[0] for row in study.rows):
    seeds = [row for row in study.rows if row.partition('/')[0] == name]
    found = [_whole(provenance.load(study.path(row))['results'])
             for row in seeds if study.finished(row)]
    rows[name] = {'seeds': len(found), 'planned': len(seeds),
                  'state': '' if found else 'not run', **_spreads(found)}
  if study.path(BASELINES).exists():
    for name, row in provenance.load(study.path(BASELINES))['results'].items():
      rows[name] = {'seeds': 0, 'state': 'baseline', **{
          key: {'mean': value, 'text': _text(value)} for key, value in row.items()}}
  provenance.record(
      study.summary, f'smalti sweep --config={study.name}', rows, parts=parts,
      finished=sum(map(study.finished, study.rows)), rows=len(study.rows), images=IMAGES)
  return rows


def _whole(row: Mapping[str, Any]) -> dict[str, Any]:
  """A row's scores; where there are some for every budget, those of all codes by their plain names.
  """
  budgets = [int(name.removeprefix('psnr_keep')) for name in row if name.startswith('psnr_keep')]
  last = f'_keep{max(budgets)}' if budgets else ''
  return {name.removesuffix(last): value for name, value in row.items()
          if '_keep' not in name or last and name.endswith(last)}


def _spreads(found: list[dict[str, Any]]) -> dict[str, Any]:
  """Mean and deviation of every number that all seeds have."""
  out: dict[str, Any] = {}
  for name in found[0] if found else ():
    values = [row.get(name) for row in found]
    if name != 'seed' and all(isinstance(v, int | float) for v in values):
      out[name] = _spread(values)
    elif name == 'curve':
      out[name] = [{key: points[0][key] if key == 'step' else _spread([p[key] for p in points])
                    for key in points[0]} for points in zip(*values)]
  distance = next((name for name in out if name.startswith('rfd_')), None)
  kinds = {row['likelihood'] for row in found if 'likelihood' in row}
  out |= {'likelihood': kinds.pop()} if kinds else {}
  return {**out, **({'rfd': {**out[distance], 'name': distance}} if distance else {})}


def _spread(values: list[float]) -> dict[str, Any]:
  mean = float(np.mean(values))
  deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return {'mean': mean, 'deviation': deviation, 'text': _text(mean, deviation)}


def _text(mean: float | None, deviation: float | None = None) -> str:
  if mean is None:
    return ''
  digits = 0 if abs(mean) >= 1000 else 1 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 3
  said = f' ± {deviation:.{digits}f}' if deviation is not None else ''
  return f'{mean:.{digits}f}{said}'


def _mean(found: dict[str, float], name: str) -> float:
  """Over the codes of a position, where there are several."""
  return float(np.mean([v for k, v in found.items()
                        if k == name or k.startswith(f'{name}_depth')]))


def _parameters(loaded: runs.Loaded) -> int:
  return states.count(states.Structure.of(loaded.model).split(loaded.model)[0])


def _seconds(folder: pathlib.Path) -> float | None:
  """The median time of a step, from the run's own log."""
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  found = [line['seconds/step'] for line in lines if 'seconds/step' in line][1:]
  return float(np.median(found)) if found else None


def main(values: Any) -> int:
  """The part of `smalti sweep` that trains."""
  name, rows = values.config
  out = pathlib.Path(values.out or f'runs/{name.replace(":", "_")}')
  study = Study(name, rows, out, pathlib.Path(values.results or out / 'results'))
  chosen = list(rows) if not values.rows else values.rows
  if unknown := sorted(set(chosen) - set(rows)):
    raise ValueError(f'rows={",".join(unknown)} are not in {name}; it has {", ".join(rows)}.')
  if values.dry_run:
    for row, experiment in rows.items():
      state = 'finished' if study.finished(row) else 'to do'
      say(f'{row}  {study.definition(row)}  {experiment.steps} steps  {state}')
    return 0
  failed = execute(study, chosen, worker=values.worker, workers=values.num_workers)
  first = next((row for row in rows if study.finished(row)), None)
  if first is not None and not any(isinstance(row.model, GeneratorConfig)
                                   for row in rows.values()):
    bits = provenance.load(study.path(first))['results']['bits']
    record_baselines(study, rows[first], bits)
  summarize(study)
  say(f'{sum(map(study.finished, rows))} of {len(rows)} rows: '
      f'{study.summary}')
  return 1 if failed else 0
