"""Line charts as inline SVG that takes its colours from the page, for light and dark alike.

Drawn by matplotlib without pyplot, so that nothing global changes. Placeholder colours in the
drawing become CSS variables, and whatever names another machine (namespaces, metadata) is left
out.
"""

import dataclasses
import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

POINTS = 400  # of a line, at most; longer ones are thinned by the median of neighbours
LINES = 8  # colours of the page
INK, RULE = '#010203', '#010204'


@dataclasses.dataclass
class Line:
  """One line of a chart; `held_out` draws it with markers, as it has few points."""
  name: str
  steps: np.ndarray
  values: np.ndarray
  held_out: bool = False


def chart(title: str, lines: Sequence[Line], identity: str, *, linear: bool = False,
          across: str = 'step', dots: bool = False, values: bool = True) -> str:
  """A figure of HTML: title, legend with the last values, and the drawing.

  An axis is logarithmic where all its values are positive and span a factor of 30, the vertical one
  unless `linear`, and the horizontal one unless it is 'step'.

  Args:
    identity: unique within the page; element ids begin with it.
    across: what the horizontal axis is; written below it unless it is 'step'.
    dots: points that no line joins.
    values: whether the legend says the last values.
  """
  if len(lines) > LINES:
    chosen = np.linspace(0, len(lines) - 1, LINES).round().astype(int)
    title, lines = f'{title} ({LINES} of {len(lines)})', [lines[i] for i in chosen]
  legend = ''.join(
      f'<li><i class="swatch{" dotted" if line.held_out else ""}" style="--c:var(--line{i})"></i>'
      f'{html.escape(line.name)}{f" <b>{number(line.values[-1])}</b>" if values else ""}</li>'
      for i, line in enumerate(lines))
  return (f'<figure class="chart"><figcaption><h4>{html.escape(title)}</h4><ul>{legend}</ul>'
          f'</figcaption>{_svg(title, lines, identity, linear, across, dots)}</figure>')


def number(value: float) -> str:
  """Four significant digits, with thousands separated."""
  if not math.isfinite(value):
    return str(value)
  if value == int(value) and abs(value) < 1e15:
    return f'{int(value):,}'
  if abs(value) >= 1000:
    return f'{value:,.0f}'
  return f'{value:.4g}'


def _svg(title: str, lines: Sequence[Line], identity: str, linear: bool, across: str,
         dots: bool) -> str:
  import matplotlib  # half a second, for this verb alone
  from matplotlib.figure import Figure
  from matplotlib.ticker import EngFormatter, LogFormatterSciNotation, MaxNLocator, NullFormatter
  style: dict[Any, Any] = {
      'svg.fonttype': 'none', 'svg.hashsalt': identity, 'axes.edgecolor': RULE,
      'axes.spines.top': False, 'axes.spines.right': False, 'axes.spines.left': False,
      'xtick.color': RULE, 'ytick.color': RULE, 'xtick.labelcolor': INK, 'ytick.labelcolor': INK,
      'axes.labelcolor': INK, 'text.color': INK, 'font.size': 8.5, 'grid.color': RULE,
      'axes.formatter.useoffset': False, 'path.simplify': True}
  with matplotlib.rc_context(style):
    figure = Figure(figsize=(4.0, 2.2))
    figure.patch.set_alpha(0)
    below = 0.13 if across == 'step' else 0.2
    axes = figure.add_axes((0.13, below, 0.85, 0.96 - below))
    axes.patch.set_alpha(0)
    axes.grid(axis='y', linewidth=0.6)
    axes.tick_params(length=0, pad=4)
    values = np.concatenate([line.values for line in lines])
    for i, line in enumerate(lines):
      steps, smooth = thin(line.steps, line.values)
      few = line.held_out or len(steps) == 1 or across != 'step'
      axes.plot(steps, smooth, color=_colour(i), linewidth=1.6, solid_capstyle='round',
                linestyle='none' if dots else (0, (1, 1.6)) if line.held_out else '-',
                marker='o' if dots or few and len(steps) <= 60 else None, markersize=3.2)
    axes.margins(x=0.05 if dots else 0.01, y=0.08)
    low, high = values.min(), values.max()
    if high - low <= 1e-9 * abs(high):  # a constant, in the middle of an honest range
      axes.set_ylim(*sorted((0, 2 * high)) if high else (0, 1))
    if low > 0 and high > 30 * low and not linear:
      axes.set_yscale('log')
      axes.yaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False))
      axes.yaxis.set_minor_formatter(NullFormatter())
    else:
      axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
      if high >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=''))
    steps = np.concatenate([line.steps for line in lines])
    if across != 'step':
      axes.set_xlabel(across)
    if across != 'step' and steps.min() > 0 and steps.max() > 30 * steps.min():
      axes.set_xscale('log')
      axes.xaxis.set_minor_formatter(NullFormatter())
    else:
      axes.xaxis.set_major_locator(MaxNLocator(5, integer=across == 'step'))
    if across == 'step' and steps.max() >= 10_000:
      axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    buffer = io.StringIO()
    nothing = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
    figure.savefig(buffer, format='svg', metadata=nothing)
  return _themed(buffer.getvalue(), f'{title} by {across}', identity)


def _themed(svg: str, title: str, identity: str) -> str:
  """The drawing without prolog, metadata and namespaces, with ids and colours of the page."""
  svg = svg[svg.index('<svg'):]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', '', svg)
  svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg)', r'\1\2', svg, count=1)
  svg = re.sub(r' (width|height)="[\d.]+pt"', '', svg, count=2)
  svg = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{identity}-', svg)
  svg = re.sub(r"font: [^;\"]*;?", '', svg)  # the page's font
  svg = svg.replace(INK, 'currentColor').replace(RULE, 'var(--rule)')
  for i in range(LINES):
    svg = svg.replace(_colour(i), f'var(--line{i})')
  return svg.replace('<svg', f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """At most `POINTS` points: medians of equal runs of neighbours; the last point stays."""
  each = -(-len(steps) // POINTS)
  if each == 1:
    return steps, values
  parts = [slice(i, i + each) for i in range(0, len(steps), each)]
  ends = np.array([steps[p][-1] for p in parts])
  return ends, np.array([np.median(values[p]) for p in parts])


def _colour(i: int) -> str:
  return f'#0102{i + 16:02x}'
