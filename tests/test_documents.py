"""Tables are what their files say, and what the pages tell a reader to type exists."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from smalti.launch import cli, documents, provenance, trees

ROOT = Path(__file__).resolve().parent.parent
PAGES = [p for p in documents.documents(ROOT) if p.exists()]
RESULTS = ROOT / 'docs' / 'results'


def name(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_tables_are_rendered_from_their_files(page):
  text = page.read_text()
  assert documents.render(text, RESULTS) == text, 'run python -m smalti.launch.documents'


@pytest.mark.parametrize('path', sorted(RESULTS.rglob('*.json')), ids=name)
def test_results_say_how_to_repeat_them(path):
  found = provenance.load(path)
  assert found['command'] and found['commit'] and found['versions']['jax']
  assert not re.search(r'(?<![\w.])/(home|root|tmp|work|Users)/', path.read_text()), 'a path'


def commands(page):
  """Lines of its shell blocks, continued ones joined, comments left out."""
  for block in re.findall(r'```(?:sh|bash|console)\n(.*?)```', page.read_text(), re.DOTALL):
    for line in block.replace('\\\n', ' ').splitlines():
      words = shlex.split(line.removeprefix('$ '), comments=True)
      while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):  # SMALTI_DATA_DIR=... smalti ...
        words = words[1:]
      if words:
        yield words


def docstring_commands(path):
  """Indented commands of a config's docstring; what stands in brackets, or apart, is prose."""
  text = ast.get_docstring(ast.parse(path.read_text())) or ''
  for line in re.findall(r'^ +(smalti (?:.|\n +--)*)$', text, re.MULTILINE):
    line = re.sub(r'\[.*?\]', '', re.sub(r'\n +--', ' --', line))
    yield re.split(r' {2,}', line)[0].split()


COMMANDS = [(page, words) for page in PAGES for words in commands(page)] + [
    (path, words) for path in sorted((ROOT / 'configs').glob('*.py'))
    for words in docstring_commands(path)]


def check(words):
  """Raises AssertionError unless the command could run here."""
  program, *rest = words
  if rest[:1] == ['-m'] and rest[1].startswith('smalti.launch.'):
    program, rest = 'smalti', [rest[1].removeprefix('smalti.launch.'), *rest[2:]]
  if Path(program).name == 'smalti':
    verb, *options = rest
    if verb == 'documents':
      return
    assert verb in cli.VERBS, f'no verb {verb}'
    values = flags.FlagValues()
    cli._define_common(values)
    importlib.import_module(f'smalti.launch.{verb}').define(values)
    for option in options:
      check_option(option, values)
    check_config(options)
  elif program == 'make':
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    assert set(w for w in rest if '=' not in w) <= {*targets}, f'no target among {rest}'


def check_option(option, values):
  found = re.fullmatch(r'--([\w]+)(\.[\w.\[\]]+)?(?:=(.*))?', option)
  if not found:
    assert not option.startswith('-'), f'{option} is written --name=value'
    return
  flag, path, text = found.groups()
  assert flag in values or flag.startswith('no') and flag[2:] in values, f'no option --{flag}'


def check_config(options):
  """Raises for an unknown config, size or field; a pattern of a page (DIR, ...) stands for a text.
  """
  found = [re.fullmatch(r'--config(?:\.([\w.\[\]]+))?=(.*)', option) for option in options]
  names = [m[2] for m in found if m and m[1] is None and not m[2].endswith(('.py', '.json'))]
  fields = [(m[1], m[2]) for m in found if m and m[1] is not None]
  if not names and fields:
    names = ['digits_vq']  # of a run that is there already
  for name in names:
    trees.load_config(name, fields)


@pytest.mark.parametrize(
    ('page', 'words'), COMMANDS, ids=[f'{name(p)}: {" ".join(w)}'[:90] for p, w in COMMANDS])
def test_commands_exist(page, words):
  check(words)


@pytest.mark.parametrize('line', [
    'smalti trane --workdir=x', 'smalti train --wrkdir=x', 'make tests',
    'smalti train --config=digits_vq:huge', 'smalti train --config.nothing=1 --workdir=x',
    'python -m smalti.launch.nothing',
    'smalti train --config=imagenet256_vqgan_tokenizer --config.data.folder=TFDS --workdir=DIR',
])
def test_a_wrong_command_is_caught(line):
  with pytest.raises((AssertionError, ValueError)):
    check(line.split())


# The mechanism itself.


@pytest.fixture
def results(tmp_path):
  rows = [{'case': 'a', 'ratio': {'median': 0.501}, 'met': True},
          {'case': 'b', 'ratio': None, 'met': None}]
  for file, content in {'rows.json': rows, 'parts.json': {'rows': rows, 'n': 3}, 'runs.json': {
      'ar': {'bits': {'value': 1.25}, 'n': 3}, 'masked': {'bits': {'value': 2.0}}}}.items():
    (tmp_path / file).write_text(json.dumps({
        'format': 1, 'command': 'smalti bench train', 'commit': 'c' * 40, 'modified': False,
        'date': '2026-01-02T03:04:05Z', 'seconds': 61.2, 'machine': {'cores': 2},
        'versions': {'jax': '1.2'}, 'results': content}))
  return tmp_path


SOURCE = ('<sub>`smalti bench train`, commit cccccccccc, 2026-01-02, 2 cores, jax 1.2, '
          '61 s</sub>')


def test_columns_are_templates(results):
  open_ = '<!-- results: rows.json | Case = {case} | R = {ratio.median:.2f}x | Met = {met} -->\n'
  table = '| Case | R | Met |\n|---|---|---|\n| a | 0.50x | yes |\n| b |  |  |\n\n'
  text = f'before\n{open_}old\n<!-- end -->\nafter\n'
  once = documents.render(text, results)
  assert once == f'before\n{open_}{table}{SOURCE}\n<!-- end -->\nafter\n'
  assert documents.render(once, results) == once


def test_without_columns_every_number_is_one(results):
  text = documents.render('<!-- results: runs.json -->\n<!-- end -->', results)
  assert '|  | bits | n |\n|---|---|---|\n| ar | 1.25 | 3 |\n| masked | 2 |  |\n' in text


def test_a_part_of_the_results(results):
  whole, part = (
      documents.render(f'<!-- results: {name} | Case = {{case}} -->\n<!-- end -->', results)
      for name in ('rows.json', 'parts.json#rows'))
  assert '| a |\n| b |' in whole and part.split('\n')[1:] == whole.split('\n')[1:]


def test_a_folder_has_a_row_per_file(results):
  (results / 'runs').mkdir()
  for name, n in (('b', 2), ('a', 1)):
    content = json.loads((results / 'runs.json').read_text())
    (results / 'runs' / f'{name}.json').write_text(json.dumps({**content, 'results': {'n': n}}))
  text = documents.render('<!-- results: runs | Run = {key} | N = {n} -->\n<!-- end -->', results)
  assert '| a | 1 |\n| b | 2 |\n' in text
  assert '` and 1 more of its kind, commit' in text


def test_a_number_in_a_sentence(results):
  text = 'at <!-- result: runs.json {ar.bits.value:.2f} -->?<!-- end --> bits'
  assert '-->1.25<!-- end --> bits' in documents.render(text, results)


@pytest.mark.parametrize('text', [
    '<!-- results: rows.json -->\n', '<!-- results: none.json -->\n<!-- end -->',
    '<!-- results: parts.json#vq -->\n<!-- end -->'])
def test_what_render_refuses(text, results):
  with pytest.raises(ValueError):
    documents.render(text, results)
