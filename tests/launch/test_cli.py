"""The command line: typed overrides, one-line errors, exit codes."""

import json
import os
import pathlib
import random
import string
import subprocess
import sys
import types

import pytest
from absl import flags

from smalti.generators.maskbit import MaskBitConfig
from smalti.generators.unmasking import MaskedSettings
from smalti.launch import cli, exits, help, serialization, trees
from smalti.networks.transformer import TransformerConfig

PLUGIN = '''
import dataclasses
from typing import Literal

from smalti.data.source import DataConfig
from smalti.networks.model import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSettings:
  steps: int = 8
  temperature: float = 1.0
  top_k: int | None = None
  kind: Literal['cosine', 'linear'] = 'cosine'

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f'steps={self.steps} must be 1 or more.')


@dataclasses.dataclass(kw_only=True, slots=True)
class BaseConfig:
  """Base of parts."""


@dataclasses.dataclass(kw_only=True, slots=True)
class PartConfig(BaseConfig):
  """A part.

  Attributes:
    width: how wide it is,
      in channels.
    rate: how fast.
  """
  width: int = 8
  rate: float = 0.1


@dataclasses.dataclass(kw_only=True, slots=True)
class ProbeConfig(ModelConfig):
  sizes: tuple[int, ...] = (1, 2)
  betas: tuple[float, float] = (0.9, 0.95)
  shape: tuple[int, int] | None = None
  names: tuple[str, ...] = ()
  kind: Literal['a', 'b'] = 'a'
  choice: Literal['x', 'y'] | None = None
  clip: float | None = None
  title: str = 't'
  deep: bool = False
  part: BaseConfig = dataclasses.field(default_factory=PartConfig)
  spare: PartConfig | None = None
  other: BaseConfig | None = None
  parts: tuple[BaseConfig, ...] = ()
'''

CONFIG = '''
from probe_plugin import DataConfig, PartConfig, ProbeConfig, ProbeSettings
from smalti.launch.experiment import Experiment

SIZES = {'debug': dict(steps=2), 'base': dict(steps=1000)}
SHARED = PartConfig()


def get_config(size='base'):
  return Experiment(model=ProbeConfig(part=SHARED, parts=(SHARED, PartConfig())), data=DataConfig(),
                    settings=ProbeSettings(), **SIZES[size])
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with a plugin and a config file, and a verb `probe` that keeps what it was given."""
  (tmp_path / 'probe_plugin.py').write_text(PLUGIN)
  (tmp_path / 'probe.py').write_text(CONFIG)
  (tmp_path / 'broken.json').write_text('{"type": ')
  (tmp_path / 'empty.py').write_text('x = 1\n')
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv('SMALTI_TRACEBACK', raising=False)
  monkeypatch.delitem(sys.modules, 'probe_plugin', raising=False)
  return tmp_path


@pytest.fixture
def verb(folder, monkeypatch):
  seen = []
  module = types.ModuleType('smalti.launch.probe', 'Looks at what it was given.\n\nMore of it.')

  def define(values):
    cli.define_config(values)
    cli.define_settings(values)
    cli.define_choice(values, 'what', ['this', 'that'], 'What to look at.')
    flags.DEFINE_integer('n', 1, 'How many.', flag_values=values)

  def main(values):
    seen.append(values)

  module.define, module.main, module.seen = define, main, seen
  monkeypatch.setitem(sys.modules, 'smalti.launch.probe', module)
  monkeypatch.setitem(cli.VERBS, 'probe', 'looks at what it was given')
  return module


def parse(verb, *arguments):
  assert cli.main(['probe', *arguments]) == 0
  return verb.seen[-1]


@pytest.mark.parametrize('arguments, path, value', [
    (['--config.steps=7'], 'steps', 7),
    (['--config.steps', '7'], 'steps', 7),
    (['--config.steps=7', '--config.steps=8'], 'steps', 8),
    (['--config.optimizer.rate=1'], 'optimizer.rate', 1.0),
    (['--config.optimizer.rate=3e-4'], 'optimizer.rate', 3e-4),
    (['--config.optimizer.schedule=linear'], 'optimizer.schedule', 'linear'),
    (['--config.optimizer.clip=none'], 'optimizer.clip', None),
    (['--config.model.clip=1'], 'model.clip', 1.0),
    (['--config.model.clip=1', '--config.model.clip=None'], 'model.clip', None),
    (['--config.model.sizes=(3,)'], 'model.sizes', (3,)),
    (['--config.model.sizes=3,4,5'], 'model.sizes', (3, 4, 5)),
    (['--config.model.sizes=()'], 'model.sizes', ()),
    (['--config.model.betas=(0,1)'], 'model.betas', (0.0, 1.0)),
    (['--config.model.shape=[4,5]'], 'model.shape', (4, 5)),
    (['--config.model.shape=(4,5)', '--config.model.shape=none'], 'model.shape', None),
    (['--config.model.names=train,eval'], 'model.names', ('train', 'eval')),
    (['--config.model.names=one'], 'model.names', ('one',)),
    (["--config.model.names=('a,b','c')"], 'model.names', ('a,b', 'c')),
    (['--config.model.kind=b'], 'model.kind', 'b'),
    (['--config.model.choice=y'], 'model.choice', 'y'),
    (['--config.model.title=none'], 'model.title', 'none'),   # a string, not an optional one
    (['--config.model.title=12'], 'model.title', '12'),
    (['--config.tokenizer=runs/a=b c'], 'tokenizer', 'runs/a=b c'),
    (['--config.tokenizer=x', '--config.tokenizer=none'], 'tokenizer', None),
    (['--config.model.deep'], 'model.deep', True),
    (['--config.model.deep=true', '--noconfig.model.deep'], 'model.deep', False),
    (['--config.model.part.width=9'], 'model.part.width', 9),
    (['--config.model.spare=build', '--config.model.spare.rate=2'], 'model.spare.rate', 2.0),
    (['--config.model.spare=build', '--config.model.spare=none'], 'model.spare', None),
    (['--config.model.parts[1].width=5'], 'model.parts[1].width', 5),
    (['--config.settings.steps=3'], 'settings.steps', 3),     # a frozen node
    (['--config.settings.temperature=1'], 'settings.temperature', 1.0),
    (['--config.settings=none'], 'settings', None),
    (['--config.checkpoint.keep_every=10'], 'checkpoint.keep_every', 10),
])
def test_overrides_are_typed(verb, arguments, path, value):
  config = parse(verb, '--config=probe.py', *arguments).config
  for part in path.replace('[', '.').replace(']', '').split('.'):
    config = config[int(part)] if part.isdigit() else getattr(config, part)
  assert config == value and type(config) is type(value)
  if isinstance(value, tuple):
    assert [type(v) for v in config] == [type(v) for v in value]


def test_config_by_size_path_and_json(verb, folder):
  assert parse(verb, '--config=probe.py').config.steps == 1000
  assert parse(verb, '--config=probe.py:debug').config.steps == 2
  assert parse(verb, '--config', f'{folder}/probe.py:debug', '-n', '3').n == 3
  config = parse(verb, '--config=probe.py:debug', '--config.model.clip=2').config
  (folder / 'c.json').write_text(json.dumps(serialization.to_json(config)))
  again = parse(verb, '--plugin=probe_plugin', '--config=c.json', '--config.steps=5').config
  assert serialization.differences(
      serialization.to_json(config), serialization.to_json(again)) == ['steps: 2 -> 5']


def test_overrides_never_leak(verb):
  """Two commands in one process share nothing, even where a config file shares an object."""
  first = parse(verb, '--config=probe.py', '--config.model.part.width=99', '--config.ema=none',
                '--config.model.parts[0].rate=7', '--settings.steps=3').config
  values = parse(verb, '--config=probe.py')
  assert first.model.part.width == 99 and first.model.parts[0].rate == 7
  assert values.config.model.part.width == 8 and values.config.model.parts[0].rate == 0.1
  assert first.model.parts[0].width == 8 and first.model.part.rate == 0.1  # one object there
  shared = trees.load_config('probe.py').model.part
  assert shared == values.config.model.part and shared is not values.config.model.part
  assert values.config.ema == 0.999 and values.settings == {} and values.what is None
  before = serialization.to_json(values.config)
  trees.override(values.config, 'model.part.width', '5')
  assert serialization.to_json(values.config) == before


def test_settings_are_applied_by_annotation(verb):
  values = parse(verb, 'that', '--config=probe.py', '--settings.steps=12',
                 '--settings.temperature=1', '--settings.top_k=none', '--settings.kind=linear')
  assert values.what == 'that'
  settings = trees.apply_settings(values.config.settings, values.settings)
  assert settings == type(settings)(steps=12, temperature=1.0, kind='linear')
  assert type(settings.temperature) is float and values.config.settings.steps == 8
  for name, text, fragment in [('step', '3', "did you mean 'steps'?"),
                               ('steps', '3.0', 'settings.steps must be a whole number'),
                               ('kind', 'cos', 'one of cosine, linear'),
                               ('steps', '0', '1 or more')]:
    with pytest.raises(ValueError, match=fragment.replace('?', r'\?')):
      trees.apply_settings(settings, {name: text})


BAD = [
    (['--config.steps=abc'], "config.steps must be a whole number, got 'abc'"),
    (['--config.steps=5e1'], "config.steps must be a whole number, got '5e1'"),
    (['--config.steps=5.0'], 'config.steps must be a whole number'),
    (['--config.steps=none'], 'config.steps must be a whole number'),
    (['--config.steps='], 'config.steps must be a whole number'),
    (['--config.steps'], 'config.steps must be a whole number'),
    (['--config.model.deep=maybe'], 'config.model.deep must be true or false'),
    (['--config.optimizer.rate=fast'], 'config.optimizer.rate must be a finite number'),
    (['--config.optimizer.rate=nan'], 'config.optimizer.rate must be a finite number'),
    (['--config.optimizer.rate=none'], 'config.optimizer.rate must be a finite number'),
    (['--config.optimizer.betas=0.9'], 'a tuple of length 2'),
    (['--config.optimizer.betas=(1,2,3)'], 'a tuple of length 2'),
    (['--config.optimizer.betas=(1,x)'], 'config.optimizer.betas'),
    (['--config.model.sizes=(1,2.5)'], 'config.model.sizes[1] must be a whole number'),
    (['--config.model.sizes=(1,'], 'config.model.sizes must be a tuple of whole numbers'),
    (['--config.model.sizes={1:2}'], 'config.model.sizes'),
    (['--config.model.shape=(1,2,3)'], 'config.model.shape'),
    (["--config.model.names=('a',1)"], 'config.model.names[1] must be a string'),
    (['--config.model.names[0]=a'], 'give tuples as a whole'),
    (['--config.model.parts[2].width=1'], 'config.model.parts[2]'),
    (['--config.model.kind=c'], 'config.model.kind must be one of a, b'),
    (['--config.model.choice=z'], 'config.model.choice must be one of x, y or none'),
    (['--config.log.wandb=on'], 'one of off, offline, online'),
    (['--config.optimizer=none'], 'chosen by size or file'),
    (['--config.model=build'], 'chosen by size or file'),
    (['--config.model.other=build'], 'chosen by size or file'),
    (['--config.model.part=probe_plugin:PartConfig'], 'chosen by size or file'),
    (['--config.settings=build'], 'chosen by size or file'),
    (['--config.settings.steps=0'], 'steps=0 must be 1 or more'),
    (['--config.model.spare.rate=1'], '--config.model.spare=build'),
    (['--config.steps.x=1'], 'which has no fields'),
    (['--config.optimizer.rat=1'], "did you mean 'optimizer.rate'?"),
    (['--config.optimzer.rate=1'], "did you mean 'optimizer.rate'?"),
    (['--config.rate=1'], "did you mean 'optimizer.rate' or 'model.part.rate'"),
    (['--config.clip=1'], "did you mean 'model.clip' or 'optimizer.clip'?"),
    (['--config.zzzzzz=1'], 'known are model, data, tokenizer'),
    (['--config.=1'], 'has no field'),
    (['--config.__class__=1'], 'has no field'),
    (['--config.model.__dict__.x=1'], 'has no field'),
    (['--config.optimizer.rate;rate=1'], 'has no field'),
    (['--cofnig.steps=1'], 'takes no --cofnig.steps'),
    (['--settings=3'], '--settings.steps=12'),
    (['--nn=3'], "did you mean 'n'?"),
    (['--n=x'], '--n=x'),
    (['--n'], 'n'),
    (['that', 'more'], "does not know what to do with 'more'"),
    (['other'], 'other'),
    (['--plugin=no_such_module'], '--plugin=no_such_module'),
    (['--plugin='], '--plugin='),
    (['--plugin=.relative'], '--plugin=.relative'),
]

BAD_CONFIGS = [
    ([], 'needs --config=NAME'),
    (['--config='], 'unknown config'),
    (['--config=digits_qv'], "did you mean 'digits_vq'?"),
    (['--config=os'], 'unknown config'),
    (['--config=../probe'], 'unknown config'),
    (['--config=missing.py'], 'no config at missing.py'),
    (['--config=missing/c.json'], 'no config at missing/c.json'),
    (['--config=probe.py:huge'], "no size 'huge'; known are debug, base"),
    (['--config=empty.py'], 'no get_config'),
    (['--config=broken.json'], 'broken.json is not JSON'),
    (['--config.steps=3'], 'needs --config=NAME'),
]


@pytest.mark.parametrize('arguments, fragment', BAD_CONFIGS + [
    (['--config=probe.py', *arguments], fragment) for arguments, fragment in BAD])
def test_mistakes_are_one_line_and_exit_2(verb, capfd, arguments, fragment):
  assert cli.main(['probe', *arguments]) == exits.USER_ERROR
  out, err = capfd.readouterr()
  assert out == '' and verb.seen == []
  assert err.startswith('smalti: ') and err.count('\n') == 1 and err.endswith('\n')
  assert fragment in err


def test_unknown_verbs(capfd):
  assert cli.main(['trian']) == 2
  assert capfd.readouterr().err == "smalti: unknown verb 'trian'; did you mean 'train'?\n"


def test_json_configs_are_only_data(verb, folder, capfd):
  """A plugin that was not named is not imported, even for a file of our own making."""
  item = serialization.to_json(trees.load_config('probe.py'))
  (folder / 'c.json').write_text(json.dumps(item))
  del sys.modules['probe_plugin']
  assert cli.main(['probe', '--config=c.json']) == 2
  assert '--plugin=probe_plugin' in capfd.readouterr().err
  assert 'probe_plugin' not in sys.modules
  (folder / 'd.json').write_text('{"format": 99, "version": "7.0", "experiment": {}}')
  assert cli.main(['probe', '--config=d.json']) == 2
  assert 'smalti 7.0' in capfd.readouterr().err
  (folder / 'e.json').write_text('[' * 100_000)
  assert cli.main(['probe', '--config=e.json']) == 2


def mutate(word, random_):
  """One typing mistake: a letter dropped, doubled, replaced, inserted, or two swapped."""
  i = random_.randrange(len(word) - 1)
  letter = random_.choice(string.ascii_lowercase)
  return random_.choice([
      word[:i] + word[i + 1:], word[:i] + word[i] + word[i:], word[:i] + letter + word[i + 1:],
      word[:i] + letter + word[i:], word[:i] + word[i + 1] + word[i] + word[i + 2:]])


def test_mutated_keys_are_refused_with_the_right_suggestion(folder):
  """200 misspelt paths: 200 refusals, and the right field is suggested for 90 % of them."""
  config, random_ = trees.load_config('probe.py'), random.Random(0)
  paths = [p for p in trees.field_paths(config) if '[' not in p]
  right = total = 0
  while total < 200:
    path = random_.choice(paths)
    parts = path.split('.')
    i = random_.randrange(len(parts))
    parts[i] = mutate(parts[i], random_)
    wrong = '.'.join(parts)
    if wrong in paths:
      continue
    with pytest.raises(ValueError) as info:
      trees.override(config, wrong, '1')
    total += 1
    right += f'did you mean {path!r}?' in str(info.value)
  assert right >= 180, f'{right} of {total} suggestions were right'


def test_exit_codes_and_tracebacks(verb, capfd, monkeypatch):
  def ends(error):
    def main(values):
      raise error
    verb.main = main
    return cli.main(['probe', '--config=probe.py'])

  assert ends(exits.NonFinite('Step 3 is not finite.')) == 3
  assert ends(exits.Preempted('Saved.')) == 75
  assert capfd.readouterr().err == 'smalti: Step 3 is not finite.\nsmalti: Saved.\n'
  for error in (ValueError('not our code'), KeyError('x'), RuntimeError('y'), OSError(5, 'io')):
    with pytest.raises(type(error)):  # a bug keeps its traceback
      ends(error)
  verb.main = lambda values: serialization.check(3)
  assert cli.main(['probe', '--config=probe.py']) == 2
  verb.main = lambda values: trees.load_config('probe.py', [('steps', 'x')])
  assert cli.main(['probe', '--config=probe.py']) == 2
  monkeypatch.setenv('SMALTI_TRACEBACK', '1')
  with pytest.raises(ValueError):
    cli.main(['probe', '--config=probe.py'])
  verb.main = lambda values: 7
  assert cli.main(['probe', '--config=probe.py']) == 7


def test_only_refusals_of_ours_lose_their_traceback(verb, capfd):
  """A `raise` in our folders, or the file system's answer to us; not what numpy says of a bug."""
  def ours(text):
    scope = {}
    exec(compile(text, str(pathlib.Path(cli.__file__).with_name('probe.py')), 'exec'), scope)
    return scope['main']

  verb.main = ours("def main(values):\n  raise ValueError('two\\n  lines')")
  assert cli.main(['probe', '--config=probe.py']) == 2
  verb.main = ours("def main(values):\n  open('missing/file')")
  assert cli.main(['probe', '--config=probe.py']) == 2
  verb.main = ours("import pathlib\ndef main(values):\n  pathlib.Path('probe.py').mkdir()")
  assert cli.main(['probe', '--config=probe.py']) == 2
  assert capfd.readouterr().err == (
      'smalti: two lines\nsmalti: missing/file: No such file or directory\n'
      'smalti: probe.py: File exists\n')
  verb.main = ours('import numpy\ndef main(values):\n  numpy.ones(2) + numpy.ones(3)')
  with pytest.raises(ValueError, match='broadcast'):
    cli.main(['probe', '--config=probe.py'])
  verb.main = ours("def main(values):\n  int('x')")
  with pytest.raises(ValueError, match='invalid literal'):
    cli.main(['probe', '--config=probe.py'])


def test_an_interrupt_is_one_line(verb, capfd):
  def main(values):
    raise KeyboardInterrupt

  verb.main = main
  assert cli.main(['probe', '--config=probe.py']) == 130
  assert capfd.readouterr().err == 'smalti: interrupted\n'


def test_mistakes_inside_a_users_config_keep_their_traceback(verb, folder):
  (folder / 'wrong.py').write_text("def get_config(size='base'):\n  raise ValueError('mine')\n")
  with pytest.raises(ValueError, match='mine'):
    cli.main(['probe', '--config=wrong.py'])


def test_help_lists_options_and_fields(verb, capsys):
  assert cli.main(['probe', '--help']) == 0
  text = capsys.readouterr().out
  assert text.startswith('Looks at what it was given.')
  for part in ('--n: How many. [1]', '--config: ', '--settings: ', '--plugin: ', '\n  what: ',
               'digits_vq'):
    assert part in text
  assert cli.main(['probe', '--config=probe.py', '--config.steps=77', '--help']) == 0
  text = capsys.readouterr().out
  assert '--config.steps=77  optimizer steps.' in text
  assert '--config.model.part.width=8  how wide it is, in channels.' in text
  assert '--config.optimizer.epsilon=1e-08  Adam\'s moments.' in text
  assert verb.seen == []


def test_help_says_of_inherited_fields_what_their_class_says():
  body = TransformerConfig(layers=1, width=8, heads=1)
  text = '\n'.join(help.fields(MaskBitConfig(transformer=body)))
  for part in ('--config.groups=2  words that', '--config.classes=0  number of labels',
               '--config.transformer.memory=0  width of vectors'):
    assert part in text
  text = '\n'.join(help.fields(MaskedSettings(), 'settings'))
  for part in ('--settings.top_p=none  see', '--settings.guidance=none  scale s of',
               '--settings.steps=12  passes over', '--settings.strength=0.04  of'):
    assert part in text


def smalti_process(arguments, folder, **environment):
  code = (f'import sys; from smalti.launch.cli import main; code = main({arguments!r}); '
          'print("jax" in sys.modules, file=sys.stdout); sys.exit(code)')
  return subprocess.run(
      [sys.executable, '-c', code], cwd=folder, capture_output=True, text=True,
      env={**os.environ, 'PYTHONPATH': str(folder), **environment})


def test_help_and_unknown_verbs_do_not_import_jax(folder):
  for arguments, code in ([], 0), (['--help'], 0), (['trian'], 2):
    result = smalti_process(arguments, folder)
    assert result.returncode == code and result.stdout.endswith('False\n')
  result = smalti_process(['--help'], folder)
  for verb, text in cli.VERBS.items():
    assert f'  {verb:11}  {text}\n' in result.stdout


def test_a_mistake_in_a_real_process_is_one_line(folder):
  """`python -m smalti.launch.train`, from a folder that is not the repository."""
  result = subprocess.run(
      [sys.executable, '-m', 'smalti.launch.train', '--config=probe.py', '--workdir=w',
       '--config.optimizer.rat=1'],
      cwd=folder, capture_output=True, text=True,
      env={**os.environ, 'PYTHONPATH': str(folder)})
  assert result.returncode == 2 and result.stdout == ''
  assert result.stderr == ("smalti: --config.optimizer.rat: OptimizerConfig has no field 'rat'; "
                           "did you mean 'optimizer.rate'?\n")


def test_every_verb_has_its_module():
  for verb in cli.VERBS:
    module = pathlib.Path(cli.__file__).with_name(f'{verb}.py')
    text = module.read_text()
    assert f"cli.run('{verb}')" in text and 'def define(' in text and 'def main(' in text
