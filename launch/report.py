"""One page about one or more runs: `smalti report --workdir=RUN`.

Writes `report/index.html` and pictures beside it: curves, samples, reconstructions, scores with
their manifests, and the config. The page opens from disk, needs no network and runs no script.
Pieces that a run does not have are left out; pieces that cannot be read are named on the page.
"""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

import smalti
from smalti.evaluation.files import whole
from smalti.launch import charts, cli, page, portrait
from smalti.launch.history import Path, Run, natural, read, step_of
from smalti.launch.progress import say

TITLES = {
    'rate': 'Learning rate', 'gradient_norm': 'Gradient norm', 'examples/second':
    'Examples per second', 'seconds/step': 'Seconds per step', 'seconds/data':
    'Seconds of a step waiting for data', 'psnr': 'PSNR', 'mse': 'MSE'}
# Sections of charts, by the beginning of a metric's name; what matches none is 'Learning'.
SECTIONS = {
    'Learning': (),
    'Codes': ('usage', 'perplexity', 'entropy', 'dead', 'saturation', 'codes', 'distinct'),
    'Running': ('rate', 'gradient_norm', 'examples/', 'seconds/')}
LOWER = ('loss', 'bits_per_token', 'reconstruction')  # of which the smallest is the best
EARLIER = 24  # pictures of earlier steps that are shown
ARROWS = {True: ' ↑', False: ' ↓', None: ''}
# What scores of two runs must share to be ranked.
ALIKE = ('unit', 'samples', 'uint8', 'sha256', 'resize', 'reference', 'reference_samples')
FULL = 720  # CSS pixels that a small grid is enlarged to, about


def write_report(out: Path, runs: Sequence[tuple[str, Path]] | None = None, *,
                 title: str | None = None, text: str = '') -> pathlib.Path:
  """Writes `out/report/index.html` and returns its path.

  Args:
    out: a run folder, or any folder where `runs` are given.
    runs: (title, run folder) of each section; None takes `out` itself.
    title: of the page; None takes the folder's name.
    text: plain text below the title; a blank line parts paragraphs.

  Raises:
    FileNotFoundError: a run folder is missing.
  """
  out = pathlib.Path(out).resolve()
  title = title or out.name
  found = [read(name, folder) for name, folder in (runs or [(title, out)])]
  folder = out / 'report'
  shutil.rmtree(folder / 'pictures', ignore_errors=True)  # ours, of the page before
  (folder / 'pictures').mkdir(parents=True)
  body = _side_by_side(found)
  for i, run in enumerate(found):
    body += _section(run, f'run{i}', folder, alone=len(found) == 1)
  links = [(f'run{i}', run.title) for i, run in enumerate(found)] if len(found) > 1 else []
  text = page.document(title, body, links, text, f'Written by smalti {smalti.__version__}.')
  with whole(folder / 'index.html') as file:
    file.write(text.encode())
  return folder / 'index.html'


def _section(run: Run, identity: str, folder: pathlib.Path, alone: bool) -> str:
  """The HTML of one run, with its pictures copied to `folder`."""
  parts = [page.facts(_facts(run)), _pictures(run, identity, folder), _scores(run),
           portrait.section(run.tables, identity), _charts(run, identity), _config(run.config)]
  if not any(parts):
    parts.append('<p class="about">This run has logged nothing yet.</p>')
  if run.notes:
    notes = ''.join(f'<p>{page.escape(note)}</p>' for note in run.notes)
    parts.append(f'<div class="notes">{notes}</div>')
  head = f'<p class="about">{page.escape(_about(run.config))}</p>' if run.config else ''
  if not alone:
    head = f'<h2>{page.escape(run.title)}</h2>{head}'
  kind = '' if alone else ' class="run"'
  return f'<section{kind} id="{identity}">{head}{"".join(parts)}</section>'


def _about(config: dict) -> str:
  """One line on what was trained: the classes of model and data, batch and steps."""
  kinds = [str(config.get(name, {}).get('type', '')).rpartition(':')[2].removesuffix('Config')
           if isinstance(config.get(name), dict) else '' for name in ('model', 'data')]
  said = ' on '.join(kind for kind in kinds if kind)
  counts = [f'{config[name]:,} {word}' for name, word in (
      ('steps', 'steps'), ('batch_size', 'examples per step')) if isinstance(config.get(name), int)]
  return ', '.join([said, *counts] if said else counts)


def _facts(run: Run) -> list[tuple[str, str, str]]:
  """The numbers to see first: how far, how good, how fast."""
  items, metrics = [], run.metrics
  if not metrics:
    return items
  items.append(('Steps', charts.number(max(int(s[-1]) for s, _ in metrics.values())), ''))
  for name in (*LOWER, 'psnr', 'perplexity', 'usage'):
    held_out = metrics.get(f'eval/{name}')
    steps, values = held_out or metrics.get(name, (None, None))
    if steps is None:
      continue
    remark = 'training'
    if held_out:
      best = int(values.argmin())
      remark = 'held out'
      if name in LOWER and best < len(values) - 1:
        remark += f'; best {charts.number(values[best])} at step {steps[best]:,}'
    items.append((_title(name), charts.number(values[-1]), remark))
  if 'examples/second' in metrics:
    items.append(('Examples per second', charts.number(np.median(metrics['examples/second'][1])),
                  'median'))
  if 'seconds/step' in metrics:
    steps, each = metrics['seconds/step']
    items.append(('Time in steps', _duration(float((each * np.diff(steps, prepend=0)).sum())), ''))
  return items[:8]


def _pictures(run: Run, identity: str, folder: pathlib.Path) -> str:
  """The newest pictures of each kind large, those of earlier steps in a strip."""
  out = ''
  for kind, paths in run.pictures.items():
    shown = [(path, *found) for path in paths
             if (found := _copy(path, f'{identity}-{kind}', folder, run.notes))]
    if not shown:
      continue
    newest = [row for row in shown if step_of(row[0])[0] == step_of(shown[-1][0])[0]]
    earlier = [row for row in shown if row not in newest][-EARLIER:]
    beside = len(newest) > 1 and all(width <= FULL for _, _, (width, _) in newest)
    out += f'<h3>{kind.capitalize()}</h3><div{" class=pictures" if beside else ""}>'
    for path, link, (width, height) in newest:
      factor = max(1, FULL // width)
      out += (f'<figure class="picture"><a href="{link}"><img src="{link}" '
              f'width="{width * factor}" height="{height * factor}" '
              f'alt="{page.escape(kind)}, {page.escape(path.stem)}"></a>'
              f'<figcaption>{_caption(path, kind)}</figcaption></figure>')
    out += '</div>'
    if earlier:
      out += '<div class="strip">' + ''.join(
          f'<figure><a href="{link}"><img src="{link}" width="{width}" height="{height}" '
          f'loading="lazy" alt="{page.escape(path.stem)}"></a>'
          f'<figcaption>{page.escape(path.stem)}</figcaption></figure>'
          for path, link, (width, height) in earlier) + '</div>'
  return out


def _copy(path: pathlib.Path, prefix: str, folder: pathlib.Path,
          notes: list[str]) -> tuple[str, tuple[int, int]] | None:
  """(link, size) of a picture copied beside the page; None for what is no PNG."""
  try:
    with Image.open(path, formats=('PNG',)) as picture:
      size = picture.size
      picture.verify()
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    reason = str(error).replace(str(path), path.name)
    notes.append(f'{path.parent.name}/{path.name} is no picture ({reason}).')
    return None
  name = f'{prefix}-{re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)}.png'
  shutil.copyfile(path, folder / 'pictures' / name)
  return f'pictures/{name}', size


def _caption(path: pathlib.Path, kind: str) -> str:
  """Its name, and what the JSON beside a picture says of the settings."""
  said = ['inputs above what the tokenizer makes of them'] if kind == 'reconstructions' else []
  try:
    item = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
    flat = {**item, **dict(item.get('settings') or {})}
  except (OSError, ValueError, TypeError, AttributeError):
    flat = {}
  said += [_said(flat)] if flat else []
  return f'<b>{page.escape(path.stem)}</b> {page.escape(" · ".join(said))}'


def _scores(run: Run) -> str:
  """Tables of scores, each score with what it means and how it was made."""
  out = ''
  for label, scores in run.scores.items():
    if not scores:
      continue
    rows = []
    for score in scores:
      beside = [f'{name.replace("_", " ")} {_plain(value)}' for name, value in score.beside.items()]
      against = score.reference or ''
      if score.reference_samples:
        against += f' ({score.reference_samples:,})'
      extractor = (f'{score.extractor} {score.sha256[:8]}, resize {score.resize}'
                   if score.extractor else '')
      rows.append([
          _breakable(score.name),
          f'<span class="value">{charts.number(score.value)} '
          f'<small>{page.escape(score.unit)}{ARROWS[score.higher_is_better]}</small></span>',
          page.escape(', '.join(beside)), f'{score.samples:,}',
          page.escape(', '.join(map(str, score.seeds))), page.escape(extractor),
          f'<span class="quiet">{page.escape(against)}</span>'])
    head = ('Score', 'Value', 'Beside', 'Examples', 'Seeds', 'Extractor', 'Reference')
    manifest = json.dumps([dataclasses.asdict(score) for score in scores], indent=1)
    settings = _said(scores[0].settings)
    about = f'<p class="about">Sampled with {page.escape(settings)}.</p>' if settings else ''
    out += (f'<h3>{page.escape(f"Scores, {label}" if label else "Scores")}</h3>{about}'
            f'{page.table(head, rows)}<details><summary>All that is needed to make them again'
            f'</summary><pre>{page.escape(manifest)}</pre></details>')
  return out


def _side_by_side(runs: Sequence[Run]) -> str:
  """Scores that several runs share; the better is marked only where they compare."""
  heads, columns = [], []
  for run in runs:
    for label, scores in run.scores.items():
      heads.append(f'{run.title}, {label}' if label else run.title)
      columns.append({score.name: score for score in scores})
  rows = []
  for name in dict.fromkeys(name for scores in columns for name in scores):
    found = [scores.get(name) for scores in columns]
    present = [score for score in found if score]
    if len(present) < 2:
      continue
    unlike = [field.replace('_', ' ') for field in ALIKE
              if any(getattr(s, field) != getattr(present[0], field) for s in present)]
    better, values = present[0].higher_is_better, [score.value for score in present]
    ranked = not unlike and better is not None and len(set(values)) > 1
    best = (max if better else min)(values) if ranked else None
    cells = ['' if score is None else
             f'<span class="value{" best" if score.value == best else ""}">'
             f'{charts.number(score.value)}</span>' for score in found]
    remark = f'not ranked: unlike {", ".join(unlike)}' if unlike else ''
    rows.append([_breakable(name) + ARROWS[better], *cells,
                 f'<span class="quiet">{page.escape(remark)}</span>'])
  if len(runs) < 2 or not rows:
    return ''
  used = [i for i in range(len(columns)) if any(row[i + 1] for row in rows)]
  keep = [0, *[i + 1 for i in used], len(columns) + 1]
  head = ['Score', *map(page.escape, heads), '']
  return '<h3>Side by side</h3>' + page.table(
      [head[i] for i in keep], [[row[i] for i in keep] for row in rows])


def _charts(run: Run, identity: str) -> str:
  """Charts of all metrics: training and held-out values of one name share a chart."""
  groups: dict[str, list[charts.Line]] = {}
  bases = [_base(name) for name in run.metrics]
  for name, (steps, values) in sorted(run.metrics.items(), key=lambda x: natural(x[0])):
    if len(steps) < 2 or name == 'eval/examples':
      continue
    base, index = _base(name)
    split = index is not None and sum(b[0] == base for b in bases) > 1
    plain = name.removeprefix('eval/')
    held_out = plain != name
    label = 'held out' if held_out else 'training'
    if split:
      label = f'{index}, {label}' if held_out else index
    groups.setdefault(base if split else plain, []).append(
        charts.Line(label, steps, values, held_out))
  sections: dict[str, list[str]] = {title: [] for title in SECTIONS}
  order = sorted(groups, key=lambda n: (n != 'loss', not any(x.held_out for x in groups[n]), n))
  for i, name in enumerate(order):
    section = next((title for title, starts in SECTIONS.items()
                    if starts and name.startswith(starts)), 'Learning')
    lines = sorted(groups[name], key=lambda line: line.held_out)
    if section == 'Running':
      for line in lines:
        line.name = ''
    sections[section].append(charts.chart(
        _title(name), lines, f'{identity}-chart{i}', linear=name == 'rate'))
  return ''.join(f'<h3>{title}</h3><div class="charts">{"".join(figures)}</div>'
                 for title, figures in sections.items() if figures)


def _config(config: dict) -> str:
  if not config:
    return ''
  rows = _flatten(config)
  cells = ''.join(f'<div><dt>{page.escape(name)}</dt><dd>{page.escape(_plain(value))}</dd></div>'
                  for name, value in rows.items())
  return (f'<h3>Config</h3><details><summary>{len(rows)} fields</summary>'
          f'<dl class="config">{cells}</dl></details>')


def _flatten(tree: Any, path: str = '') -> dict[str, Any]:
  """Leaves by dotted path; lists of plain values are leaves."""
  if isinstance(tree, dict):
    items: Any = tree.items()
  elif isinstance(tree, list) and any(isinstance(x, (dict, list)) for x in tree):
    items = enumerate(tree)
  else:
    return {path: tree}
  out: dict[str, Any] = {}
  for name, value in items:
    out |= _flatten(value, f'{path}.{name}' if path else str(name))
  return out


def _said(settings: dict[str, Any]) -> str:
  """Settings in a line, without those that are off and without identities."""
  ignored = ('format', 'version', 'type', 'generator', 'checkpoint', 'fingerprint', 'settings')
  return ' · '.join(f'{name} {_plain(value)}' for name, value in _flatten(settings).items()
                    if name.split('.')[0] not in ignored and value is not None)


def _breakable(name: str) -> str:
  return page.escape(name).replace('_', '_<wbr>')


def _plain(value: Any) -> str:
  if isinstance(value, list):
    return ', '.join(map(_plain, value)) or '()'
  if isinstance(value, bool) or value is None:
    return str(value).lower()
  return charts.number(value) if isinstance(value, float) else str(value)


def _title(name: str) -> str:
  return TITLES.get(name) or name.replace('_', ' ').replace('/', ' / ').capitalize()


def _base(name: str) -> tuple[str, str | None]:
  """('usage', '3') of 'eval/usage_3', so that the depths of a metric share a chart."""
  plain = name.removeprefix('eval/')
  match = re.fullmatch(r'(.+?)[/_](?:depth|level)?_?(\d+)', plain)
  return (match[1], match[2]) if match else (plain, None)


def _duration(seconds: float) -> str:
  minutes = round(seconds / 60)
  if seconds < 90:
    return f'{seconds:.0f} s'
  return f'{minutes} min' if minutes < 120 else f'{minutes // 60} h {minutes % 60:02d} min'


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run folder.', flag_values=values)


def main(values: Any) -> int:
  if values.workdir is None:
    raise ValueError('report needs --workdir=RUN, a run folder.')
  run = read('', values.workdir)
  if not any((run.config, run.metrics, run.scores, run.tables, run.notes, *run.pictures.values())):
    raise FileNotFoundError(
        f'{values.workdir} is no run: no config, metrics, scores or pictures; a page that is '
        'there stays as it was.')
  say(f'report: {write_report(values.workdir)}')
  return 0


if __name__ == '__main__':
  cli.run('report')
