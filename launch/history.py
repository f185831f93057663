"""What a run folder tells about its run, as far as it can be read.

Reports are wanted most of runs that broke: a torn line, a damaged file, a missing piece never stops
the reading. What was left out is said in `Run.notes`.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any

import numpy as np

from smalti.evaluation.manifest import Score, read_scores

Path = str | os.PathLike
PICTURES = ('samples', 'reconstructions', 'infills')


@dataclasses.dataclass
class Run:
  """What a run folder holds, as far as it can be read.

  Attributes:
    metrics: (steps, values) by name, without non-finite values.
    scores: by name of their file: '' of scores.json, 'guided' of scores_guided.json.
    pictures: paths by kind, the newest step last.
    tables: what `evaluate` kept for the page, by name: 'distortion' and 'language'.
    notes: what was left out, in plain words.
  """
  title: str
  config: dict[str, Any]
  metrics: dict[str, tuple[np.ndarray, np.ndarray]]
  scores: dict[str, list[Score]]
  pictures: dict[str, list[pathlib.Path]]
  tables: dict[str, Any]
  notes: list[str]


def read(title: str, workdir: Path) -> Run:
  """Reads a run folder; what is missing stays empty, what is damaged becomes a note."""
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f'{workdir} is no folder; give the --workdir of a run.')
  notes: list[str] = []
  config = {}
  if (workdir / 'config.json').exists():
    try:
      config = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
      config = dict(config.get('experiment', config))
    except (ValueError, AttributeError, TypeError) as error:
      config = {}
      notes.append(f'config.json could not be read ({error}).')
  scores = {}
  for path in [workdir / 'scores.json', *sorted(workdir.glob('scores_*.json'))]:
    try:
      if path.exists():
        scores[path.stem.removeprefix('scores').removeprefix('_')] = read_scores(path)
    except ValueError as error:
      notes.append(f'{path.name} could not be read ({str(error).replace(str(path), path.name)}).')
  pictures = {kind: sorted((workdir / kind).glob('*.png'), key=step_of) for kind in PICTURES}
  tables = {}
  for path in sorted((workdir / 'evaluation').glob('*.json')):
    try:
      tables[path.stem] = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
      notes.append(f'evaluation/{path.name} could not be read ({error}).')
  metrics = read_metrics(workdir / 'metrics.jsonl', notes)
  return Run(title, config, metrics, scores, pictures, tables, notes)


def read_metrics(path: pathlib.Path, notes: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """(steps, values) of every metric; unreadable lines and non-finite values become notes."""
  if not path.exists():
    return {}
  values: dict[str, dict[int, float]] = {}
  unreadable, unbounded = 0, {}
  with open(path, encoding='utf-8', errors='replace') as file:
    for text in file:
      try:
        line = json.loads(text)
        step = int(line.pop('step'))
      except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        unreadable += bool(text.strip())
        continue
      for name, value in line.items():
        try:
          value = float(value)  # non-finite numbers are strings in this file
        except (ValueError, TypeError, OverflowError):
          continue
        if math.isfinite(value):
          values.setdefault(name, {})[step] = value
        else:
          unbounded.setdefault(name, step)
  if unreadable:
    notes.append(f'metrics.jsonl: {unreadable} unreadable '
                 f'line{"s were" if unreadable > 1 else " was"} left out.')
  notes += [f'{name} was not finite, first at step {step:,}; such points are left out.'
            for name, step in unbounded.items()]
  return {name: (np.array(sorted(points)), np.array([points[s] for s in sorted(points)]))
          for name, points in values.items()}


def step_of(path: pathlib.Path) -> tuple:
  """The step in a file's name, then the name: 'step500.png' before 'step1000_seed0.png'."""
  match = re.search(r'step_?(\d+)', path.stem)
  return (int(match[1]) if match else -1, natural(path.stem))


def natural(text: str) -> list:
  """A sort key by which 'level10' follows 'level9'."""
  return [(1, int(x), '') if x.isdecimal() else (0, 0, x) for x in re.split(r'(\d+)', text)]
