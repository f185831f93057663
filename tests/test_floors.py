"""Imports go down only, and what must not be said anywhere is said nowhere: read from the syntax.

The floors are those of the README's map. A synthetic module that breaks each rule shows that the
rule would be seen.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('networks', 'tokenizers', 'generators', 'data', 'evaluation', 'launch', 'configs')
# What a module of a floor may import of ours; nobody but launch, by name, loads configs.
BELOW = {
    'tokenizers/spec.py': (),
    'networks': ('networks',),
    'tokenizers': ('networks', 'tokenizers'),
    'generators': ('networks', 'tokenizers.spec', 'generators'),
    'data': ('tokenizers.spec', 'data'),
    'evaluation': ('networks', 'tokenizers.spec', 'evaluation'),
    'launch': ('networks', 'tokenizers', 'generators', 'data', 'evaluation', 'launch'),
    'configs': FOLDERS,
}
SPEC_ONLY = {'numpy'}  # tokenizers/spec.py must import in a blink
LIGHT = {'jax', 'flax', 'optax', 'jaxtyping', 'numpy'}  # what the folders below need at import
LIGHT_FOLDERS = ('networks', 'tokenizers', 'generators', 'launch/step.py', 'launch/state.py')
CLUSTER = {'wandb', 'orbax'}  # launch only
MESH = {'Mesh', 'PartitionSpec', 'NamedSharding', 'make_mesh'}  # launch only, but for:
MESH_ALLOWED = {('networks/layers.py', 'PartitionSpec')}
KEYED = ('networks', 'tokenizers', 'generators')  # what they draw is from the keys they are given
TORCH_ALLOWED = 'launch/peers/'  # scripts that another interpreter runs, beside which we measure
FORBIDDEN_IMPORTS = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'shelve', 'marshal', 'joblib'}
FORBIDDEN_CALLS = {'eval', 'exec', 'os.system', 'os.popen', 'torch.load', 'yaml.load'}


def violations(path: str, text: str) -> list[str]:
  """The broken rules of the module `path` (relative to the root), as lines with their numbers."""
  tree = ast.parse(text)
  folder = path.split('/')[0]
  found = []

  def refuse(node, rule):
    found.append(f'{path}:{node.lineno}: {rule}')

  if path.startswith(LIGHT_FOLDERS):
    for node in tree.body:  # an import inside a function costs only those who call it
      for name, _ in _imports(node):
        top = name.split('.')[0]
        if top != 'smalti' and top not in LIGHT and not _standard(top):
          refuse(node, f'{top} at import; import it where it is used')
  for node in ast.walk(tree):
    for name, imported in _imports(node):
      _check_import(path, folder, name, imported, lambda rule, node=node: refuse(node, rule))
    if isinstance(node, ast.ImportFrom) and node.level:
      refuse(node, 'a relative import; write smalti.')
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      if called in FORBIDDEN_CALLS and not path.startswith(TORCH_ALLOWED):
        refuse(node, f'{called}() runs code from data')
      for keyword in node.keywords:
        says = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        if keyword.arg in ('allow_pickle', 'shell') and says:
          refuse(node, f'{keyword.arg}=True')
    if isinstance(node, ast.ImportFrom) and node.module == '__future__' and _has_config(tree):
      if any(alias.name == 'annotations' for alias in node.names):
        refuse(node, 'annotations become strings beside a config dataclass: overrides break')
    name = getattr(node, 'attr', None) or getattr(node, 'id', None)
    if name in MESH and folder != 'launch' and (path, name) not in MESH_ALLOWED:
      refuse(node, f'{name} outside launch')
    if name == 'P' and folder != 'launch' and isinstance(node, ast.Attribute):
      if ast.unparse(node) == 'jax.P' and path != 'networks/layers.py':
        refuse(node, 'jax.P outside launch')
    if folder in KEYED and isinstance(node, ast.Attribute):
      if ast.unparse(node) in ('np.random', 'numpy.random'):
        refuse(node, 'numpy.random; draw from a key')
  return found


def _imports(node) -> list[tuple[str, str | None]]:
  """(module, name or None) of an import statement."""
  if isinstance(node, ast.Import):
    return [(alias.name, None) for alias in node.names]
  if isinstance(node, ast.ImportFrom) and not node.level:
    return [(node.module, alias.name) for alias in node.names]
  return []


def _check_import(path, folder, module, name, refuse):
  top, _, rest = module.partition('.')
  if top in FOLDERS:
    refuse(f'a bare import of {module}; write smalti.{module}')
  if top == 'smalti':
    full = '.'.join(part for part in (rest, name) if part)
    allowed = BELOW.get(path, BELOW[folder])
    inside = full.split('.')[0] in FOLDERS
    if inside and not any(full == a or full.startswith(a + '.') for a in allowed):
      refuse(f'{folder} may not import smalti.{full}')
    return
  if top in FORBIDDEN_IMPORTS:
    refuse(f'{top} runs code from data')
  if top in CLUSTER and folder != 'launch':
    refuse(f'{top} outside launch')
  if top in ('torch', 'tensorflow') and not path.startswith(TORCH_ALLOWED):
    refuse(f'{top} is not a dependency')
  if name in MESH and folder != 'launch' and (path, name) not in MESH_ALLOWED:
    refuse(f'{name} outside launch')
  if (module, name) == ('jax', 'P') and folder != 'launch' and path != 'networks/layers.py':
    refuse('jax.P outside launch')
  if folder in KEYED and (top in ('random', 'secrets') or module == 'numpy.random'
                          or (module, name) == ('numpy', 'random')):
    refuse(f'{module} draws from a state of its own; draw from a key')
  if path == 'tokenizers/spec.py' and top not in SPEC_ONLY and not _standard(top):
    refuse(f'tokenizers/spec.py imports {top}, numpy alone is allowed')


def _standard(top: str) -> bool:
  return top in sys.stdlib_module_names or top == '__future__'


def _has_config(tree) -> bool:
  return any(
      isinstance(node, ast.ClassDef) and (
          node.name.endswith('Config') or node.name.endswith('Settings')
          or any('dataclass' in ast.unparse(d) for d in node.decorator_list))
      for node in ast.walk(tree))


MODULES = sorted(
    str(p.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / folder).rglob('*.py'))


def test_there_are_modules_to_check():
  assert len(MODULES) > 10 and 'tokenizers/spec.py' in MODULES


@pytest.mark.parametrize('path', MODULES)
def test_module_keeps_the_rules(path):
  found = violations(path, (ROOT / path).read_text())
  assert not found, '\n'.join(found)


def test_no_folder_below_the_root_is_a_regular_package():
  """Namespace portions let a real package called `tokenizers` win from any folder."""
  found = [str(p) for f in FOLDERS for p in (ROOT / f).rglob('__init__.py')]
  assert not found


def test_every_folder_with_modules_has_a_floor():
  known = {*FOLDERS, 'tests', 'docs', 'notebooks', 'build', 'runs', 'dist'}
  found = {p.parent.name for p in ROOT.glob('*/*.py') if not p.parent.name.startswith('.')}
  assert found <= known, f'{found - known} has no floor in this test and is in no wheel'


def test_the_install_lists_the_same_folders():
  setup = ast.parse((ROOT / 'setup.py').read_text())
  listed = next(ast.literal_eval(n.value) for n in setup.body
                if isinstance(n, ast.Assign) and n.targets[0].id == 'FOLDERS')
  assert set(listed) == set(FOLDERS)


CONFIG = 'import dataclasses\n@dataclasses.dataclass\nclass XConfig:\n  a: int = 1\n'


@pytest.mark.parametrize(('path', 'text'), [
    ('networks/bad.py', 'from smalti.tokenizers.spec import TokenSpec'),
    ('tokenizers/bad.py', 'from smalti.generators import masked'),
    ('tokenizers/bad.py', 'import smalti.generators.masked'),
    ('tokenizers/bad.py', 'from smalti import generators'),
    ('generators/bad.py', 'from smalti.tokenizers.vq import VQ'),
    ('generators/bad.py', 'def f():\n  from smalti.data import source'),
    ('data/bad.py', 'from smalti.networks.pixels import to_float'),
    ('evaluation/bad.py', 'from smalti.launch import step'),
    ('launch/bad.py', 'from smalti.configs import digits_vq'),
    ('generators/bad.py', 'from ..tokenizers import spec'),
    ('tokenizers/spec.py', 'import jax'),
    ('launch/bad.py', 'from tokenizers import Tokenizer'),
    ('launch/bad.py', 'import tokenizers.spec'),
    ('networks/bad.py', 'from jax.sharding import PartitionSpec'),
    ('networks/layers.py', 'from jax.sharding import Mesh'),
    ('networks/bad.py', 'from jax import P'),
    ('generators/bad.py', 'import jax\nx = jax.P("data")'),
    ('tokenizers/bad.py', 'import jax\nmesh = jax.make_mesh((1,), ("data",))'),
    ('evaluation/bad.py', 'import wandb'),
    ('data/bad.py', 'import orbax.checkpoint as ocp'),
    ('data/bad.py', 'import pickle'),
    ('data/bad.py', 'import numpy as np\nnp.load("x", allow_pickle=True)'),
    ('launch/bad.py', 'import subprocess\nsubprocess.run("ls", shell=True)'),
    ('launch/bad.py', 'x = eval("1")'),
    ('launch/bad.py', 'exec("x = 1")'),
    ('tokenizers/bad.py', 'import sklearn.cluster'),
    ('launch/step.py', 'import grain'),
    ('launch/bad.py', 'import torch'),
    ('launch/bad.py', 'import tensorflow as tf'),
    ('tokenizers/bad.py', 'from __future__ import annotations\n' + CONFIG),
    ('tokenizers/bad.py', 'import random\nx = random.random()'),
    ('generators/bad.py', 'def f():\n  from random import shuffle'),
    ('networks/bad.py', 'import numpy as np\nx = np.random.normal(size=3)'),
    ('generators/bad.py', 'import numpy as np\nrng = np.random.default_rng()'),
    ('tokenizers/bad.py', 'import numpy\nnumpy.random.seed(0)'),
    ('networks/bad.py', 'from numpy import random'),
    ('networks/bad.py', 'from numpy.random import normal'),
])
def test_a_bad_module_is_caught(path, text):
  assert violations(path, text)


@pytest.mark.parametrize(('path', 'text'), [
    ('networks/layers.py', 'from jax.sharding import PartitionSpec\nfrom jax import P'),
    ('generators/good.py', 'from smalti.tokenizers.spec import TokenSpec'),
    ('tokenizers/good.py', 'from smalti.tokenizers import spec\nimport smalti.networks.layers'),
    ('launch/good.py', 'from __future__ import annotations\nimport wandb\nimport smalti'),
    ('launch/good.py', 'model.eval()\nregex.exec()'),
    ('tokenizers/good.py', 'def f():\n  from rdkit import Chem'),
    ('launch/peers/llama.py', 'import torch'),
    ('data/good.py', 'import numpy as np\nnp.load("x", allow_pickle=False)'),
    ('tokenizers/good.py', CONFIG),
    ('tokenizers/good.py', 'import jax\nx = jax.random.normal(jax.random.key(0))'),
    ('data/good.py', 'import random\nimport numpy as np\nrng = np.random.default_rng(0)'),
])
def test_a_good_module_passes(path, text):
  assert not violations(path, text)
