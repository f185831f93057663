"""The part of a page that shows a tokenizer: distortion over bits, and its tokens as a language."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from smalti.launch import charts, page

VARIANTS = {'tokens': 'tokens', 'shuffled': 'shuffled', 'unigram': 'independent'}
CURVES = 7  # baselines beside the tokenizer: the colours of the page


def section(tables: Mapping[str, Any], identity: str) -> str:
  """HTML of the tables that are there; what has another form is left out with a word."""
  out = ''
  for name, draw in (('distortion', _distortion), ('language', _language)):
    if name in tables:
      try:
        out += draw(tables[name], f'{identity}-{name}')
      except (KeyError, TypeError, ValueError, IndexError) as error:
        out += (f'<p class="about">evaluation/{name}.json could not be read '
                f'({page.escape(repr(error))}).</p>')
  return out


def _distortion(table: Mapping[str, Any], identity: str) -> str:
  """PSNR and SSIM over bits per image, the tokenizer first."""
  curves: dict[str, list[tuple[float, dict]]] = {}
  for point in table['points']:
    curves.setdefault(point['curve'], []).append((point['bits'], point['error']))
  figures = []
  for metric, title in (('psnr', 'PSNR, dB ↑'), ('ssim', 'SSIM ↑')):
    own = [(row['bits'], row[metric]) for row in table['tokenizer'] if row[metric] is not None]
    lines = [_line('this tokenizer', own)] if own else []
    for name, points in list(curves.items())[:CURVES]:
      known = [(bits, error[metric]) for bits, error in points if error[metric] is not None]
      if known:
        lines.append(_line(name.replace('_', ' '), known))
    if lines:
      figures.append(charts.chart(title, lines, f'{identity}-{metric}', linear=True,
                                  across='bits per image', values=False))
  about = ('Beside the tokenizer: JPEG (its entropy-coded bits alone), principal components of '
           'patches rounded to a step, and patches by the nearest of K means, entropy-coded.')
  return (f'<h3>Distortion over bits</h3><p class="about">{about}</p>'
          f'<div class="charts">{"".join(figures)}</div>')


def _language(table: Mapping[str, Any], identity: str) -> str:
  """Frequencies, n-grams and innovation of every depth, each with both controls."""
  out, rows = '', []
  for depth, scans in table['depths'].items():
    variants = scans['raster']
    said = '' if len(table['depths']) == 1 else f', {depth}'
    figures = [
        charts.chart(f'Frequency of the r-th code{said}', [
            _line(VARIANTS[name], found['codes']['curve']) for name, found in variants.items()],
                     f'{identity}-{depth}-ranks', across='rank', values=False),
        charts.chart(f'Held-out perplexity of n-grams{said} ↓', [
            _line(VARIANTS[name], list(enumerate(found['perplexity'], 1)))
            for name, found in variants.items()], f'{identity}-{depth}-ngrams', linear=True,
                     across='n'),
        charts.chart(f'Different codes among the first n{said}', [
            *[_line(VARIANTS[name], [row[:2] for row in found['innovation']['curve']])
              for name, found in variants.items()],
            _line('uniform', [row[::2] for row in variants['tokens']['innovation']['curve']])],
                     f'{identity}-{depth}-innovation', linear=True, across='tokens',
                     values=False)]
    out += f'<div class="charts">{"".join(figures)}</div>'
    rows += [[f'{VARIANTS[name]}{said}', *(charts.number(value) for value in (
        found['entropy_corrected'], found['huffman'], found['lzma'],
        found['codes']['zipf']['parameters']['a'], min(found['perplexity'])))]
             for name, found in variants.items()]
  head = ('', 'Entropy, bits', 'Huffman, bits', 'LZMA, bits', 'Zipf exponent',
          'Best n-gram perplexity')
  return (f'<h3>The tokens as a language</h3><p class="about">Whatever the two controls show as '
          f'well is no structure: tokens shuffled within each image, and independent draws with '
          f'the same frequencies.</p>{out}{page.table(head, rows)}')


def _line(name: str, points: Any) -> charts.Line:
  x, y = np.array(sorted(tuple(p) for p in points), float).T
  return charts.Line(name, x, y)
