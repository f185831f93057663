"""The page of a sweep: curves over every axis, trade-offs, the best cells with their samples.

Everything is derived from the finished cells. Seeds are averaged, and their spread is said: a
difference below it is none.
"""

import collections
import dataclasses
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

import smalti
from smalti.evaluation.files import whole
from smalti.evaluation.manifest import Score
from smalti.launch import cells, charts, page
from smalti.launch.cells import Row

BEST = 6  # cells whose samples are shown
# What trades for what: pairs of measures, by the beginning of their names.
TRADES = (('fd', 'is'), ('fid', 'is'), ('precision', 'recall'), ('density', 'coverage'),
          ('fd', 'agreement'), ('nfe', 'fd'))


@dataclasses.dataclass
class Group:
  """Cells that differ in their seed alone.

  Attributes:
    axes: all axes but the seed.
    values: by metric, of every seed.
  """
  axes: dict[str, Any]
  cells: list[Row]

  def values(self, metric: str) -> np.ndarray:
    return np.array([row.metrics[metric] for row in self.cells if metric in row.metrics])

  def mean(self, metric: str) -> float:
    found = self.values(metric)
    return float(found.mean()) if len(found) else float('nan')


def write_page(out: pathlib.Path) -> pathlib.Path:
  """Writes `out/report/index.html` from the finished cells and returns its path."""
  rows, failed = cells.rows(out), cells.failures(out)
  folder = out / 'report'
  (folder / 'pictures').mkdir(parents=True, exist_ok=True)
  title = f'Sweep of {", ".join(dict.fromkeys(str(row.axes["run"]) for row in rows)) or out.name}'
  text = page.document(title, _body(out, rows, failed, folder), [], _lead(rows, failed),
                       f'Written by smalti {smalti.__version__}.')
  with whole(folder / 'index.html') as file:
    file.write(text.encode())
  for picture in (folder / 'pictures').iterdir():  # ours, of the page before
    if f'"pictures/{picture.name}"' not in text:
      picture.unlink(missing_ok=True)  # another worker may write the page at this moment
  return folder / 'index.html'


def group(rows: Sequence[Row]) -> list[Group]:
  """Rows with the same axes but for the seed, in order; an axis that a row lacks is None.

  Checkpoints that only bear one name are no seeds of each other.
  """
  found: dict[str, Group] = {}
  names = dict.fromkeys(name for row in rows for name in row.axes if name != 'seed')
  for row in rows:
    axes = {name: row.axes.get(name) for name in names}
    found.setdefault(repr((axes, row.checkpoint)), Group(axes, [])).cells.append(row)
  return list(found.values())


def comparable(rows: Sequence[Row]) -> list[list[Row]]:
  """Rows with one number of samples, extractor and reference: no others compare."""
  found: dict[tuple, list[Row]] = {}
  for row in rows:
    score = row.scores[0]
    found.setdefault((score.samples, score.sha256, score.reference), []).append(row)
  return [found[key] for key in sorted(found, key=lambda key: (key[0], repr(key)))]


def varying(groups: Sequence[Group]) -> dict[str, list[Any]]:
  """The axes with more than one value, and their values in order."""
  values: dict[str, list[Any]] = collections.defaultdict(list)
  for g in groups:
    for name, value in g.axes.items():
      if value not in values[name]:
        values[name].append(value)
  return {name: found for name, found in values.items() if len(found) > 1}


def best_first(groups: Sequence[Group], metric: str, higher: bool) -> list[Group]:
  """By the metric; of equals the one with fewer steps comes first."""
  def key(g: Group) -> tuple[float, float]:
    steps = g.axes.get('steps')
    return (-g.mean(metric) if higher else g.mean(metric),
            float(steps) if isinstance(steps, int) else 0.0)
  return sorted((g for g in groups if len(g.values(metric))), key=key)


def pareto(x: np.ndarray, y: np.ndarray, x_higher: bool, y_higher: bool) -> np.ndarray:
  """bool[n]: points that no other beats in both."""
  a, b = (x if x_higher else -x), (y if y_higher else -y)
  better = (a[None] >= a[:, None]) & (b[None] >= b[:, None]) & (
      (a[None] > a[:, None]) | (b[None] > b[:, None]))
  return ~better.any(1)


def _lead(rows: Sequence[Row], failed: dict[str, str]) -> str:
  if not rows:
    return f'No cell is finished yet; {len(failed)} failed.' if failed else 'No cell is finished.'
  text = '; '.join(
      f'{len(part)} cells of {part[0].scores[0].samples:,} samples each, all drawn from the same '
      f'noise, compared with {part[0].scores[0].reference_samples:,} training images'
      for part in comparable(rows)) + '.'
  text += (' The best cell is chosen on the reference it is scored on, which is standard and '
           'optimistic.')
  return text + (f' {len(failed)} cells failed.' if failed else '')


def _body(out: pathlib.Path, rows: list[Row], failed: dict[str, str], folder: pathlib.Path) -> str:
  if failed:
    notes = ''.join(f'<p>{page.escape(cell)}: {page.escape(text)}</p>'
                    for cell, text in failed.items())
    warning = f'<div class="notes">{notes}</div>'
  else:
    warning = ''
  return warning + ''.join(
      f'<section class="run">{_part(out, part, folder)}</section>' for part in comparable(rows))


def _part(out: pathlib.Path, rows: list[Row], folder: pathlib.Path) -> str:
  """Cells that compare."""
  groups = group(rows)
  axes = varying(groups)
  scores = {score.name: score for row in rows for score in row.scores}
  first = next(iter(scores.values()))
  mark = rows[0].cell  # for identities on the page
  return (f'{_best(out, groups, axes, first, folder)}{_curves(groups, axes, scores, mark)}'
          f'{_trades(groups, axes, scores, mark)}{_table(groups, axes, scores)}')


def _best(out: pathlib.Path, groups: list[Group], axes: dict[str, list[Any]], score: Score,
          folder: pathlib.Path) -> str:
  """The best cells by the first score, with their samples."""
  ranked = best_first(groups, score.name, bool(score.higher_is_better))[:BEST]
  figures = ''
  for i, g in enumerate(ranked):
    source = out / 'cells' / g.cells[0].cell / 'grid.png'
    said = _said(g, axes) or g.cells[0].cell
    values = g.values(score.name)
    value = charts.number(values.mean()) + (
        f' ± {charts.number(values.std(ddof=1))} over {len(values)} seeds'
        if len(values) > 1 else '')
    if source.exists():
      link = f'pictures/best{i}-{g.cells[0].cell}.png'
      shutil.copyfile(source, folder / link)
      figures += (f'<figure class="picture"><a href="{link}"><img src="{link}" '
                  f'alt="samples of {page.escape(said)}" loading="lazy"></a>'
                  f'<figcaption><b>{value}</b> {page.escape(said)}</figcaption></figure>')
  floor = score.beside.get('floor')
  about = f'{score.name}, lower is better' if not score.higher_is_better else score.name
  if floor is not None:
    about += (f'; {charts.number(floor)} for {score.beside.get("floor_samples"):,} real held-out '
              'images')
  return (f'<h3>The best cells of {score.samples:,} samples</h3>'
          f'<p class="about">{page.escape(about)}.</p>'
          f'<div class="pictures">{figures}</div>')


def _curves(groups: list[Group], axes: dict[str, list[Any]], scores: dict[str, Score],
            mark: str) -> str:
  """Every metric over every numeric axis, a line per value of another axis."""
  out = ''
  numeric = [name for name, values in axes.items()
             if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)]
  anchor = best_first(groups, next(iter(scores)), bool(
      next(iter(scores.values())).higher_is_better))[0]
  for name in numeric:
    other = next((a for a in axes if a != name), None)
    rest = [a for a in axes if a not in (name, other)]
    chosen = [g for g in groups if all(g.axes[a] == anchor.axes[a] for a in rest)]
    figures = []
    for i, metric in enumerate(scores):
      lines = []
      for value in axes[other] if other else [None]:
        line = [(float(g.axes[name]), g.mean(metric)) for g in chosen
                if (other is None or g.axes[other] == value) and len(g.values(metric))]
        if len(line) > 1:
          x, y = np.array(sorted(line)).T
          label = '' if other is None else f'{other} {_plain(value)}'
          lines.append(charts.Line(label, x, y))
      if lines:
        figures.append(charts.chart(_heading(metric, scores), lines, f'{mark}-{name}-{i}',
                                    across=name))
    if figures:
      fixed = ', '.join(f'{a} {_plain(anchor.axes[a])}' for a in rest)
      said = f'<p class="about">At {page.escape(fixed)}.</p>' if fixed else ''
      out += (f'<h3>By {page.escape(name)}</h3>{said}<div class="charts">'
              f'{"".join(figures)}</div>')
  return out


def _trades(groups: list[Group], axes: dict[str, list[Any]], scores: dict[str, Score],
            mark: str) -> str:
  """Scatter of pairs of measures; the cells that no other beats in both are listed."""
  figures = []
  for i, (left, right) in enumerate(TRADES):
    a = next((name for name in scores if name.split('_')[0] == left), None)
    b = next((name for name in scores if name.split('_')[0] == right), None)
    chosen = [g for g in groups if a and b and len(g.values(a)) and len(g.values(b))]
    if len(chosen) < 3:
      continue
    x, y = (np.array([g.mean(name) for g in chosen]) for name in (a, b))
    front = pareto(x, y, bool(scores[a].higher_is_better), bool(scores[b].higher_is_better))
    order = np.argsort(x[front])
    lines = [charts.Line('cells', x, y),
             charts.Line('unbeaten', x[front][order], y[front][order])]
    said = '; '.join(_said(g, axes) for g, kept in zip(chosen, front) if kept)
    figures.append(
        '<div>' + charts.chart(f'{right} over {left}', lines, f'{mark}-trade-{i}', across=a,
                                dots=True, values=False)
        + f'<p class="about">Unbeaten: {page.escape(said)}.</p></div>')
  return f'<h3>Trade-offs</h3><div class="charts">{"".join(figures)}</div>' if figures else ''


def _table(groups: list[Group], axes: dict[str, list[Any]], scores: dict[str, Score]) -> str:
  best = {name: best_first(groups, name, score.higher_is_better)[0]
          for name, score in scores.items() if score.higher_is_better is not None}
  rows = []
  for g in groups:
    cells_ = [page.escape(g.cells[0].cell if len(g.cells) == 1 else f'{len(g.cells)} seeds')]
    cells_ += [page.escape(_plain(g.axes[name])) for name in axes]
    for name in scores:
      values = g.values(name)
      if not len(values):
        cells_.append('')
        continue
      spread = f' <small>± {charts.number(values.std(ddof=1))}</small>' if len(values) > 1 else ''
      mark = ' best' if best.get(name) is g else ''
      cells_.append(f'<span class="value{mark}">{charts.number(values.mean())}{spread}</span>')
    rows.append(cells_)
  head = ['Cell', *map(page.escape, axes), *(_breakable(_heading(n, scores)) for n in scores)]
  return f'<h3>All cells</h3>{page.table(head, rows)}'


def _heading(name: str, scores: dict[str, Score]) -> str:
  arrow = {True: ' ↑', False: ' ↓', None: ''}[scores[name].higher_is_better]
  return name + arrow


def _breakable(name: str) -> str:
  return page.escape(name).replace('_', '_<wbr>')


def _said(g: Group, axes: dict[str, list[Any]]) -> str:
  return ', '.join(f'{name} {_plain(g.axes[name])}' for name in axes)


def _plain(value: Any) -> str:
  if value is None:
    return 'none'
  return charts.number(value) if isinstance(value, float) else str(value)
