"""What is installed, what it imports, and that packages of the same name stay unharmed.

Our folders are called `tokenizers`, `data`, `networks`: from the repository's root a process could
take them for HuggingFace's `tokenizers`. They are namespace portions, so a real package always
wins; each way to start Python is tried here.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('networks', 'tokenizers', 'generators', 'data', 'evaluation', 'launch', 'configs')
MODULES = sorted(
    'smalti.' + '.'.join(p.relative_to(ROOT).with_suffix('').parts)
    for folder in FOLDERS for p in (ROOT / folder).rglob('*.py') if 'peers' not in p.parts)
LIGHT = ('smalti.networks.', 'smalti.tokenizers.', 'smalti.generators.', 'smalti.launch.step')


def run(*command, cwd=ROOT, **environment):
  """Output of `command` with `environment` added to ours."""
  done = subprocess.run(
      [str(c) for c in command], cwd=cwd, env={**os.environ, **environment},
      capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


# --- neighbours ------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def stubs(tmp_path_factory):
  """Stub packages named like our folders; each process says at exit which one it finds."""
  folder = tmp_path_factory.mktemp('stubs')
  for name in ('tokenizers', 'data', 'networks'):
    (folder / name).mkdir()
    (folder / name / '__init__.py').write_text('stub = True\n')
  (folder / 'sitecustomize.py').write_text(
      'import atexit, os\n'
      'def report():\n'
      '  import data, networks, tokenizers\n'
      '  with open(os.environ["REPORT"], "a") as file:\n'
      '    for module in (tokenizers, data, networks):\n'
      '      print(getattr(module, "stub", module.__path__), file=file)\n'
      'atexit.register(report)\n')
  return folder


@pytest.mark.parametrize('command', [
    ['-c', 'import smalti.tokenizers.spec'],
    ['-m', 'smalti.launch.provenance'],
    ['-m', 'pytest', '--collect-only', '-q', 'tests/test_floors.py'],
    ['SCRIPTS/pytest', '--collect-only', '-q', 'tests/test_floors.py'],
    ['SCRIPTS/smalti', '--help'],
], ids=['python -c', 'python -m smalti', 'python -m pytest', 'pytest', 'smalti'])
def test_a_real_package_wins(command, stubs, tmp_path):
  scripts = Path(sys.executable).parent
  if command[0].startswith('SCRIPTS/'):
    script = scripts / command[0].removeprefix('SCRIPTS/')
    if not script.exists():
      pytest.skip(f'{script.name} is not installed as a console script here')
    command = [script, *command[1:]]
  else:
    command = [sys.executable, *command]
  report = tmp_path / 'report'
  run(*command, PYTHONPATH=str(stubs), REPORT=str(report))
  assert set(report.read_text().split('\n')[:-1]) == {'True'}


def test_a_real_package_wins_in_a_notebook(stubs, tmp_path, monkeypatch):
  nbformat = pytest.importorskip('nbformat')
  nbclient = pytest.importorskip('nbclient')
  monkeypatch.setenv('PYTHONPATH', str(stubs))
  monkeypatch.setenv('REPORT', str(tmp_path / 'report'))
  cell = nbformat.v4.new_code_cell(
      'import tokenizers, smalti.tokenizers.spec\nprint(tokenizers.stub)')
  notebook = nbformat.v4.new_notebook(cells=[cell])
  nbclient.NotebookClient(  # its folder is the root
      notebook, timeout=120, resources={'metadata': {'path': str(ROOT)}}).execute()
  assert cell.outputs[0]['text'] == 'True\n'


def test_huggingface_imports_unharmed():
  for name in ('tokenizers', 'transformers'):
    try:
      importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pytest.skip(f'{name} is not installed; the extra `neighbours` has it')
  said = run(sys.executable, '-c', (
      'import tokenizers, transformers, smalti.tokenizers.spec\n'
      'from transformers import LlamaConfig\n'
      'print(tokenizers.__file__, tokenizers.Tokenizer.__module__, LlamaConfig().model_type)'))
  assert 'site-packages' in said and said.split()[1:] == ['tokenizers', 'llama']


# --- what an import costs --------------------------------------------------------------------


def test_every_module_imports_without_torch_or_tensorflow():
  """Nor without the extras: what needs rdkit or trimesh imports it where it is used."""
  loaded = run(sys.executable, '-c', (
      'import importlib, sys\n'
      f'for name in {MODULES!r}: importlib.import_module(name)\n'
      'print(*sys.modules)'), JAX_PLATFORMS='cpu').split()
  assert 'smalti.tokenizers.spec' in loaded
  assert not {'torch', 'tensorflow', 'tensorflow_datasets.testing'} & set(loaded)


def test_the_spec_needs_numpy_alone():
  loaded = run(sys.executable, '-c', (
      'import sys, numpy\nbefore = set(sys.modules)\n'
      'import smalti\nassert smalti.__version__\n'
      'import smalti.tokenizers.spec\n'
      'print(*{m.split(".")[0] for m in set(sys.modules) - before})')).split()
  assert set(loaded) - sys.stdlib_module_names == {'smalti'}


def test_models_and_the_step_import_with_four_libraries():
  """On a bare GPU image there is no grain, no wandb, no absl of ours."""
  light = [m for m in MODULES if m.startswith(LIGHT)]
  assert len(light) > 5
  run(sys.executable, '-c', (
      'import sys, importlib, importlib.abc\n'
      'BLOCKED = {"grain", "tensorflow_datasets", "wandb", "ml_collections", "sklearn", "tqdm",\n'
      '  "matplotlib", "PIL", "safetensors", "array_record", "skimage", "rdkit", "trimesh"}\n'
      'class Block(importlib.abc.MetaPathFinder):\n'
      '  def find_spec(self, name, path=None, target=None):\n'
      '    if name.split(".")[0] in BLOCKED: raise ImportError(f"{name} is blocked")\n'
      'sys.meta_path.insert(0, Block())\n'
      f'for name in {light!r}: importlib.import_module(name)'), JAX_PLATFORMS='cpu')


# --- the wheel -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """A wheel of the tracked files, built in a clean folder: a stale build/ would leak into it."""
  folder = tmp_path_factory.mktemp('wheel')
  tracked = subprocess.run(
      ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
      cwd=ROOT, capture_output=True, text=True)
  if tracked.returncode:
    pytest.skip('not a git checkout')
  for name in filter(None, tracked.stdout.split('\0')):
    if (ROOT / name).is_file():
      (folder / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, folder / 'source' / name)
  installed = importlib.util.find_spec('setuptools') and importlib.metadata.version('setuptools')
  offline = installed and int(installed.split('.')[0]) >= 77
  run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps',
      *(['--no-build-isolation'] if offline else []), '--wheel-dir', folder, folder / 'source')
  return next(folder.glob('*.whl'))


def test_the_wheel_holds_every_module_and_no_test(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  wanted = {'smalti/__init__.py', 'smalti/py.typed'}
  wanted |= {m.replace('.', '/') + '.py' for m in MODULES}
  assert wanted <= names, sorted(wanted - names)
  folders = {n.split('/')[1] for n in names if n.startswith('smalti/') and n.count('/') > 1}
  assert folders == set(FOLDERS)
  assert not [n for n in names if '/test' in n or 'conftest' in n or 'notebook' in n]
  assert {n.split('/')[0] for n in names} == {'smalti', next(
      n for n in names if n.endswith('METADATA')).split('/')[0]}, 'a bare top-level package'
  assert any(n.endswith('licenses/LICENSE') for n in names)


def test_the_wheel_runs_without_the_repository(wheel, tmp_path):
  zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
  said = run(sys.executable, '-c', (
      'import smalti, smalti.tokenizers.spec as spec\nprint(smalti.__file__, spec.__file__)'),
      cwd=tmp_path, PYTHONPATH=str(tmp_path / 'site'))
  assert said.count(str(tmp_path / 'site')) == 2
