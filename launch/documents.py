"""Tables of README.md and docs/*.md, rendered from docs/results/*.json: never typed by hand.

`python -m smalti.launch.documents` rewrites what stands between two comments:

    <!-- results: bench_train.json | Case = {case} | Ratio = {cpu_ratio.median:.2f} -->
    <!-- end -->

A row per entry of the file's results, or of one of them (`budgets.json#steps`), or per file of a
folder (`infilling`), whose key is the file's name; a column per
`Heading = template`, whose fields are dotted paths (`{key}` is the name of an entry; a cell whose
fields are all missing is empty). Without columns there is one for every number. Below the table
stands what repeats it. A single number in a sentence is `<!-- result: demo.json
{digits_ar.psnr.value:.1f} -->17.2<!-- end -->`.
"""

import pathlib
import re
import string
import sys
from collections.abc import Mapping
from typing import Any

from smalti.launch import provenance

ROOT = provenance.ROOT
_TABLE = re.compile(r'(<!-- results: (\S+)\s*(.*?)-->\n)(.*?)(<!-- end -->)', re.DOTALL)
_NUMBER = re.compile(r'(<!-- result: (\S+) (\{[^}]*\}) -->)(.*?)(<!-- end -->)')


def documents(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
  """The files that may hold tables."""
  return [root / 'README.md', *sorted((root / 'docs').rglob('*.md'))]


def render(text: str, results: pathlib.Path) -> str:
  """`text` with its tables and numbers as the files in `results` have them.

  Raises:
    ValueError: a comment that is not closed, or a file that cannot be read.
  """
  opened, closed = len(re.findall('<!-- results?:', text)), text.count('<!-- end -->')
  if opened != closed:
    raise ValueError(f'{opened} tables are begun and {closed} ended; each needs its <!-- end -->.')
  text = _TABLE.sub(lambda m: m[1] + _table(_part(results, m[2]), m[3]) + m[5], text)
  return _NUMBER.sub(
      lambda m: m[1] + _Template().format(m[3], **_load(results / m[2])['results']) + m[5], text)


def _load(path: pathlib.Path) -> Mapping[str, Any]:
  if path.is_dir() and any(path.glob('*.json')):
    found = {file.stem: provenance.load(file) for file in sorted(path.glob('*.json'))}
    first, *others = found.values()
    return {**first, 'results': {name: one['results'] for name, one in found.items()},
            **provenance.joined(list(found.values())), 'others': len(others)}
  if not path.is_file():
    known = ', '.join(sorted(p.name for p in path.parent.glob('*.json'))) or 'none'
    raise ValueError(f'no results at {path.name}; there are {known}.')
  return provenance.load(path)


def _part(results: pathlib.Path, name: str) -> Mapping[str, Any]:
  """A file, `NAME.json`, or `NAME.json#PART` with that part alone as its results."""
  name, _, part = name.partition('#')
  document = _load(results / name)
  if part and part not in document['results']:
    raise ValueError(f'{name} has no {part}; there are {", ".join(document["results"])}.')
  return {**document, 'results': document['results'][part]} if part else document


def _table(document: Mapping[str, Any], columns: str) -> str:
  found = document['results']
  rows = [{'key': key, **row} for key, row in found.items()] if isinstance(found, Mapping) else [
      {'key': str(i), **row} for i, row in enumerate(found)]
  named = [part.partition('=') for part in columns.split('|') if part.strip()]
  headings = [(name.strip(), template.strip()) for name, _, template in named] or _numbers(rows)
  lines = ['| ' + ' | '.join(name for name, _ in headings) + ' |', '|---' * len(headings) + '|']
  for row in rows:
    cells = (_Template().cell(template, row) for _, template in headings)
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join([*lines, '', _source(document), ''])


def _numbers(rows: list[dict]) -> list[tuple[str, str]]:
  """A column for every number, or `value` of an entry, that a row has."""
  found = {'': '{key}'}
  for name, value in (item for row in rows for item in row.items()):
    if isinstance(value, Mapping) and isinstance(value.get('value'), int | float):
      found[name] = '{' + name + '.value:.4g}'
    elif isinstance(value, int | float) and not isinstance(value, bool):
      found[name] = '{' + name + ':.4g}'
  return list(found.items())


def _source(document: Mapping[str, Any]) -> str:
  versions, cores = document['versions'], document['machine']['cores']
  others = f' and {document["others"]} more of its kind' if document.get('others') else ''
  return (f'<sub>`{document["command"]}`{others}, {provenance.commits(document)}, '
          f'{document["date"][:10]}, {cores} core{"s" * (cores != 1)}, jax {versions["jax"]}, '
          f'{document["seconds"]:.0f} s</sub>')


class _Template(string.Formatter):
  """`{a.b:.2f}` reads entries of dicts and lists; what is missing is empty."""

  def cell(self, template: str, row: Mapping[str, Any]) -> str:
    """The template filled in, or nothing where the row has none of its fields."""
    names = [name for _, name, _, _ in self.parse(template) if name]
    if names and all(self.get_field(name, (), row)[0] is None for name in names):
      return ''
    return self.format(template, **row)

  def get_field(self, name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
    value: Any = kwargs
    for part in name.split('.'):
      if isinstance(value, Mapping):
        value = value.get(part)
      elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
        value = value[int(part)]
      else:
        value = None
    return value, name.split('.')[0]

  def format_field(self, value: Any, spec: str) -> str:
    if value is None:
      return ''
    if isinstance(value, bool):
      return 'yes' if value else 'no'
    return format(value, spec if isinstance(value, int | float) else '')


def main() -> int:
  for path in documents():
    old = path.read_text(encoding='utf-8')
    new = render(old, ROOT / 'docs' / 'results')
    if new != old:
      path.write_text(new, encoding='utf-8')
      print(f'written: {path.relative_to(ROOT)}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
