"""Cells: the points of a sweep, each a folder that any worker may begin, continue or finish.

A cell is named by a hash over everything that decides its numbers, so that asking again finds it.
Its folder holds `config.json`, the accumulator's state while it is drawn, and at the end
`stats.npz`, `scores.json`, `grid.png` and `DONE`; or `ERROR` with a traceback. Tables are derived
from finished cells and from nothing else, so that workers never write one file.
"""

import csv
import dataclasses
import io
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from smalti.evaluation.files import whole
from smalti.evaluation.manifest import Score, read_scores, seal

DONE, ERROR = 'DONE', 'ERROR'


@dataclasses.dataclass(frozen=True)
class Cell:
  """One point of a sweep.

  Attributes:
    axes: what a table says of it: run, checkpoint, weights, seed and sampling settings.
    definition: everything that decides its numbers, as JSON; its hash is the cell's name.
  """
  axes: dict[str, Any]
  definition: dict[str, Any]

  @property
  def id(self) -> str:
    return seal(self.definition)[:12]


class Folder:
  """The folder of one cell."""

  def __init__(self, out: pathlib.Path, identity: str):
    self.path = out / 'cells' / identity

  @property
  def done(self) -> bool:
    return (self.path / DONE).exists()

  def begin(self, cell: Cell) -> None:
    (self.path / ERROR).unlink(missing_ok=True)
    if not (self.path / 'config.json').exists():
      _write(self.path / 'config.json',
             json.dumps(dataclasses.asdict(cell), indent=1) + '\n')

  def finish(self) -> None:
    """Everything was written: the cell counts from now on."""
    _write(self.path / DONE, '')
    shutil.rmtree(self.path / 'parts', ignore_errors=True)

  def fail(self, traceback: str) -> None:
    _write(self.path / ERROR, traceback)


class Log:
  """`logs/worker0.jsonl`: one line for every batch drawn and every cell finished, with its time."""

  def __init__(self, out: pathlib.Path, worker: int):
    self.path = out / 'logs' / f'worker{worker}.jsonl'
    self.path.parent.mkdir(parents=True, exist_ok=True)

  def write(self, **line: Any) -> None:
    with open(self.path, 'a', encoding='utf-8') as file:
      file.write(json.dumps({'time': round(time.time(), 3), **line}) + '\n')

  @staticmethod
  def count(out: pathlib.Path, event: str) -> int:
    """How often an event stands in the logs of all workers."""
    text = f'"event": "{event}"'
    return sum(line.count(text) for path in (out / 'logs').glob('*.jsonl')
               for line in path.read_text(encoding='utf-8').splitlines())


# Axes.


def values(text: str) -> list[str]:
  """The values of an axis: `1,2,3`, or tuples `(1,2);(3,4)` parted by semicolons."""
  separator = ';' if ';' in text or text.startswith(('(', '[')) else ','
  found = [part.strip() for part in text.split(separator) if part.strip()]
  if not found:
    raise ValueError(f'{text!r} holds no value; give one or more, as in 1,2,3.')
  return found


def expand(axes: Mapping[str, Sequence[Any]], mode: str) -> list[dict[str, Any]]:
  """The points of some axes: all combinations ('grid', the last fastest) or in step ('zip').

  Raises:
    ValueError: axes of unlike length in step; those of one value stand for all.
  """
  rows: Iterable[tuple[Any, ...]] = itertools.product(*axes.values())
  if mode == 'zip':
    length = max((len(v) for v in axes.values()), default=1)
    for name, found in axes.items():
      if len(found) not in (1, length):
        raise ValueError(f'zip needs axes of one length: {name} has {len(found)} values, and the '
                         f'longest {length}.')
    rows = zip(*(v if len(v) == length else list(v) * length for v in axes.values()))
  return [dict(zip(axes, row)) for row in rows]


def read_list(path: pathlib.Path) -> list[dict[str, Any]]:
  """The points of --mode=list: a JSON list of objects, such as [{"guidance": 2, "steps": 8}]."""
  try:
    rows = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}).') from error
  if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f'{path} must be a JSON list of objects, one per cell.')
  return rows


# Tables.


@dataclasses.dataclass(frozen=True)
class Row:
  """A finished cell: its name, axes, and scores; the identity of its checkpoint."""
  cell: str
  axes: dict[str, Any]
  scores: list[Score]
  checkpoint: str = ''

  @property
  def metrics(self) -> dict[str, float]:
    return {score.name: score.value for score in self.scores}

  @property
  def samples(self) -> int:
    return self.scores[0].samples


def finished(out: pathlib.Path) -> list[pathlib.Path]:
  return [done.parent for done in (out / 'cells').glob(f'*/{DONE}')]


def rows(out: pathlib.Path) -> list[Row]:
  """All finished cells of a sweep folder, ordered by their axes."""
  found = []
  for folder in finished(out):
    cell = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    found.append(Row(folder.name, cell['axes'], read_scores(folder / 'scores.json'),
                     cell['definition'].get('checkpoint', '')))
  return sorted(found, key=lambda row: ([_order(v) for v in row.axes.values()], row.cell))


def failures(out: pathlib.Path) -> dict[str, str]:
  """The last line of the traceback of every failed cell."""
  return {path.parent.name: (path.read_text(encoding='utf-8').strip().splitlines() or ['?'])[-1]
          for path in sorted((out / 'cells').glob(f'*/{ERROR}'))}


def write_tables(out: pathlib.Path) -> list[Row]:
  """Derives `results.jsonl` and `results.csv` from the finished cells; no times are in them."""
  found = rows(out)
  axes = list(dict.fromkeys(name for row in found for name in row.axes))
  metrics = list(dict.fromkeys(name for row in found for name in row.metrics))
  lines = [{'cell': row.cell, **row.axes, 'n': row.samples, **row.metrics} for row in found]
  _write(out / 'results.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
  buffer = io.StringIO()
  writer = csv.DictWriter(buffer, ['cell', *axes, 'n', *metrics], lineterminator='\n', restval='')
  writer.writeheader()
  writer.writerows(lines)
  _write(out / 'results.csv', buffer.getvalue())
  return found


def _order(value: Any) -> tuple:
  """Numbers before texts, each in its own order; none first."""
  if value is None:
    return (0, 0.0, '')
  if isinstance(value, int | float):
    return (1, float(value), '')
  return (2, 0.0, str(value))


def _write(path: pathlib.Path, text: str) -> None:
  with whole(path) as file:
    file.write(text.encode())
