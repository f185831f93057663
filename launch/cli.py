"""The command line: `smalti VERB --name=value ...`, each verb also `python -m smalti.launch.VERB`.

A verb is a module with `define(values)`, which adds its flags, and `main(values)`, which returns an
exit code. Flags live in the call, so that many commands can run in one process. This is the only
front of `ml_collections.config_flags`, which reads the text of every override by annotation; what
it lacks is added here: packaged names, nearest names, `none`, Literals, frozen nodes.
"""

import dataclasses
import difflib
import dis
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import signal
import sys
import sysconfig
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

from absl import flags
from ml_collections import config_flags

import smalti
from smalti.launch import exits, help, memory, serialization

VERBS = {
    'train': 'train a tokenizer or a generator from one config; the same command resumes',
    'sample': 'draw from a trained generator: a grid of images and an .npz',
    'infill': 'parts of held-out examples drawn again, given the rest',
    'reconstruct': 'inputs above what the tokenizer makes of them',
    'data': 'what is in a folder of images: counts, refusals, duplicates, split',
    'tokenize': 'a data set to sharded token files',
    'compress': 'tokens to as few bytes as an autoregressive generator finds them surprising',
    'decompress': 'those bytes to the same tokens',
    'evaluate': 'score a run, or a file of samples, with all that repeats the score',
    'sweep': 'score a grid of settings and checkpoints, in cells that survive a kill',
    'probe': 'what frozen features of a run know of labels',
    'report': 'a run as one page of HTML that opens from disk',
    'export': 'the averaged weights of a run as one file',
    'bench': 'time our parts, peers beside them where installed',
    'demo': 'the whole path on embedded real data, in minutes',
}

_HELP = ('--help', '-help', '-h')
_CHOICE = 'choice'  # the module that absl files arguments without dashes under
_ROOT = pathlib.Path(__file__).resolve().parent.parent
_CONFIGS = _ROOT / 'configs'
_FOLDERS = tuple(str(_ROOT / folder) + os.sep for folder in (
    'configs', 'data', 'evaluation', 'generators', 'launch', 'networks', 'tokenizers'))
_STDLIB = sysconfig.get_paths()['stdlib'] + os.sep

# The text of a Literal passes as it is; membership is checked with all other annotations.
config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())


# Running verbs.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code; mistakes of the user are one line on stderr."""
  argv = list(sys.argv[1:] if argv is None else argv)
  return _guarded(lambda: _main(argv))


def run(verb: str, argv: Sequence[str] | None = None) -> None:
  """What `python -m smalti.launch.VERB` does: the verb, then exit with its code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  sys.exit(_guarded(lambda: _verb(verb, argv)))


def _guarded(command: Callable[[], int]) -> int:
  try:
    return command()
  except (exits.NonFinite, exits.Preempted) as error:
    _complain(error)
    return exits.NON_FINITE if isinstance(error, exits.NonFinite) else exits.PREEMPTED
  except KeyboardInterrupt:
    _complain(KeyboardInterrupt('interrupted'))
    return 128 + signal.SIGINT
  except Exception as error:
    if os.environ.get('SMALTI_TRACEBACK') == '1' or not _by_user(error):
      raise
    _complain(error)
    return exits.USER_ERROR


def _main(argv: list[str]) -> int:
  if not argv or argv[0] in (*_HELP, 'help'):
    print(help.verbs(VERBS))
    return exits.FINISHED
  if argv[0] == '--version':
    print(f'smalti {smalti.__version__}')
    return exits.FINISHED
  verb, *arguments = argv
  if verb not in VERBS:
    raise ValueError(f'unknown verb {verb!r}; {serialization.suggest(verb, VERBS)}')
  return _verb(verb, arguments)


def _verb(verb: str, arguments: list[str]) -> int:
  """One module of launch/ with `define` and `main`; not all of them are among `VERBS`."""
  memory.keep_pages()
  module = importlib.import_module(f'smalti.launch.{verb}')
  values = flags.FlagValues()
  values.set_gnu_getopt(True)  # flags may follow the choice of `define_choice`
  _define_common(values)
  module.define(values)
  asked = [a for a in arguments if a in _HELP]
  arguments = [a for a in arguments if a not in _HELP]
  if asked:
    print(_help(verb, module, values, arguments))
    return exits.FINISHED
  _parse(verb, values, arguments)
  if values.compilation_cache:
    import jax
    jax.config.update('jax_compilation_cache_dir', values.compilation_cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  return module.main(values) or exits.FINISHED


def _help(verb: str, module: Any, values: flags.FlagValues, arguments: list[str]) -> str:
  lines = [inspect.cleandoc(module.__doc__ or ''), '', 'Options:',
           *help.options(values, _choices(values), ['plugin', 'compilation_cache'])]
  if 'config' in values:
    lines += ['', f'Packaged configs: {", ".join(packaged())}']
    if any(re.match('--?config(=|$)', a) for a in arguments):
      _parse(verb, values, arguments)
      lines += ['', 'Fields:', *help.fields(values.config)]
  if 'settings' in values:
    lines += ['', 'With --workdir=RUN its settings are listed.']
    if any(re.match('--?workdir(=|$)', a) for a in arguments):
      _parse(verb, values, arguments)
      (first, *_) = [values.workdir] if isinstance(values.workdir, str) else values.workdir
      lines[-1:] = help.settings(first)
  return '\n'.join(lines)


def _define_common(values: flags.FlagValues) -> None:
  flags.DEFINE_multi_string(
      'plugin', [], 'A module outside smalti whose config classes may be named',
      flag_values=values)
  flags.DEFINE_string(
      'compilation_cache', None, 'A folder that keeps compiled programs between processes; '
      'default JAX_COMPILATION_CACHE_DIR.', flag_values=values)


def _parse(verb: str, values: flags.FlagValues, arguments: list[str]) -> None:
  """Parses into `values`: plain flags by absl, then the dotted ones."""
  overrides: dict[str, list[tuple[str, str]]] = {}
  for tree in ('config', 'settings'):
    if tree in values:
      arguments, overrides[tree] = _split(arguments, tree)
  try:
    _, *rest = values([f'smalti {verb}', *arguments])
  except flags.UnrecognizedFlagError as error:
    if '.' in error.flagname:
      raise ValueError(f'{verb} takes no --{error.flagname}, only the options of '
                       f'`smalti {verb} --help`.') from error
    hint = serialization.suggest(error.flagname, values)
    raise ValueError(f'{verb} has no option --{error.flagname}; {hint}') from error
  for choice in _choices(values)[:len(rest)]:
    values[choice].parse(rest.pop(0))
  if rest:
    raise ValueError(f'{verb} does not know what to do with {rest[0]!r}; '
                     'options are written --name=value.')
  for plugin in values.plugin:
    _import_plugin(plugin)
  serialization.named_plugins = tuple(values.plugin)
  if 'settings' in values:
    if values.settings is not None:
      raise ValueError('--settings stands for no value; name one, as in --settings.steps=12.')
    values['settings'].value = dict(overrides['settings'])
  if 'config' in values:
    if isinstance(values['config'], _SweepFlag):
      if overrides['config']:
        raise ValueError(f'--config.{overrides["config"][0][0]} has no place in a sweep over '
                         'configs; change a copy of the file, and name its path.')
      if values.config is not None:
        values['config'].value = values.config, load_sweep(values.config)
    elif values.config is not None:
      values['config'].value = load_config(values.config, overrides['config'], values.plugin)
    elif cast(_ConfigFlag, values['config']).required or overrides['config']:
      raise ValueError(f'{verb} needs --config=NAME[:size] or a path to a .py or .json; '
                       f'packaged are {", ".join(packaged())}.')


def _split(arguments: list[str], tree: str) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes `--tree.path=text` (or `--tree.path text`, `--notree.flag`) out of the arguments."""
  rest, overrides = [], []
  queue = list(arguments)
  while queue:
    argument = queue.pop(0)
    match = re.fullmatch(rf'--?(no)?{tree}\.([^=]*)(?:=(.*))?', argument, re.DOTALL)
    if not match:
      rest.append(argument)
      continue
    negated, path, text = match.groups()
    if text is None and not negated and queue and not re.match('--|-[a-zA-Z]', queue[0]):
      text = queue.pop(0)
    overrides.append((path, text if text is not None else 'false' if negated else 'true'))
  return rest, overrides


def _import_plugin(name: str) -> None:
  try:
    importlib.import_module(name)
  except (ModuleNotFoundError, TypeError, ValueError) as error:
    missing = getattr(error, 'name', None) or name
    if not (name == missing or name.startswith(missing + '.')):
      raise  # the plugin exists and misses something of its own
    raise ValueError(f'--plugin={name} is no importable module; is its folder on '
                     'PYTHONPATH?') from error


# What verbs call.


class _ConfigFlag(flags.Flag):
  """`--config`: its text while absl parses, the resolved tree after."""
  required = True


class _SweepFlag(flags.Flag):
  """`--config` of `sweep`: its text while absl parses, (text, experiments by name) after."""


def define_sweep(values: flags.FlagValues) -> None:
  """Adds `--config=NAME[:size]`; `values.config` is the text and what its `get_sweep` returned."""
  flags.DEFINE_flag(_SweepFlag(
      flags.ArgumentParser(), flags.ArgumentSerializer(), 'config', None,
      'Trains the rows of a packaged config, or of the path to a .py, that has a get_sweep(size).'),
      values)


def define_config(values: flags.FlagValues, *, required: bool = True) -> None:
  """Adds `--config=NAME[:size]` with `--config.path=value`; `values.config` is the experiment."""
  flag = _ConfigFlag(
      flags.ArgumentParser(), flags.ArgumentSerializer(), 'config', None,
      "A packaged config's name or a path to a .py or .json, with :size; "
      '--config.optimizer.rate=3e-4 overrides a field, none switches an optional one off.')
  flag.required = required
  flags.DEFINE_flag(flag, values)


def define_settings(values: flags.FlagValues) -> None:
  """Adds `--settings.name=value`; `values.settings` is a dict of texts for `apply_settings`."""
  flags.DEFINE_string(
      'settings', None, 'Sampling settings: --settings.steps=12 --settings.temperature=0.9.',
      flag_values=values)


def define_choice(values: flags.FlagValues, name: str, choices: Sequence[str], doc: str) -> None:
  """Adds an argument without dashes, as in `smalti bench quantizers`; None where it is missing."""
  flags.DEFINE_enum(name, None, list(choices), doc, flag_values=values, module_name=_CHOICE)


def _choices(values: flags.FlagValues) -> list[str]:
  return [flag.name for flag in values.flags_by_module_dict().get(_CHOICE, ())]


def apply_settings(settings: Any, overrides: dict[str, str]) -> Any:
  """The settings with overrides, read by annotation: floats coerced, unknown names refused."""
  for name, text in overrides.items():
    settings = override(settings, name, text, tree='settings')
  return settings


def packaged() -> list[str]:
  """Names of the configs that come with smalti."""
  return sorted(p.stem for p in _CONFIGS.glob('*.py') if not p.stem.startswith('_'))


def load_config(name: str, overrides: Iterable[tuple[str, str]] = (),
                plugins: Sequence[str] = ()) -> Any:
  """The experiment of NAME[:size], a .py or a .json, with overrides in order, checked.

  Raises:
    ValueError: an unknown config, size or field, or a value that breaks its annotation.
    FileNotFoundError: a path that leads nowhere.
  """
  from smalti.launch.experiment import Experiment
  config = _load(name, Experiment, plugins)
  if not isinstance(config, Experiment):
    raise ValueError(f'{name}: get_config must return an Experiment, got a '
                     f'{type(config).__name__}.')
  config = _copy(config)  # a file may hand out one object twice, or at every call
  for path, text in overrides:
    config = override(config, path, text)
  serialization.check(config)
  return config


def load_sweep(name: str) -> dict[str, Any]:
  """The experiments, by name, of `get_sweep(size)` of NAME[:size] or a .py; checked.

  Raises:
    ValueError: an unknown config or size, one without `get_sweep`, or one that returns no such.
    FileNotFoundError: a path that leads nowhere.
  """
  from smalti.launch.experiment import Experiment
  found = _load(name, Experiment, (), 'get_sweep')
  if not isinstance(found, dict) or not found or not all(
      isinstance(x, Experiment) for x in found.values()):
    raise ValueError(f'{name}: get_sweep must return experiments by name, got a '
                     f'{type(found).__name__}.')
  for experiment in found.values():
    serialization.check(experiment)
  return {key: _copy(experiment) for key, experiment in found.items()}


def override(config: Any, path: str, text: str, *, tree: str = 'config') -> Any:
  """A copy of `config` with the field at the dotted `path` read from `text`.

  Raises:
    ValueError: no such field, with the nearest one; or text that is none of its annotation.
  """
  return _override(_copy(config), path.split('.'), text, f'{tree}.{path}', config)


# Loading and overriding configs.


def _copy(value: Any) -> Any:
  """The same tree in which no two fields share a node."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return dataclasses.replace(
        value, **{f.name: _copy(getattr(value, f.name)) for f in dataclasses.fields(value)})
  return tuple(map(_copy, value)) if isinstance(value, tuple) else value


def _load(name: str, base: type, plugins: Sequence[str], function: str = 'get_config') -> Any:
  name, size = (name, '') if os.path.exists(name) else name.partition(':')[::2]
  path = pathlib.Path(name)
  if path.suffix not in ('.py', '.json'):
    if name not in packaged():
      raise ValueError(f'unknown config {name!r}; {serialization.suggest(name, packaged())}')
    return _call(importlib.import_module(f'smalti.configs.{name}'), name, size, function)
  if not path.is_file():
    raise FileNotFoundError(f'no config at {name}; packaged are {", ".join(packaged())}.')
  if path.suffix == '.py':
    loader = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return _call(module, name, size, function)
  if function != 'get_config':
    raise ValueError(f'{name} is no Python file with a {function}(size).')
  if size:
    raise ValueError(f'{name}:{size} names a size, but the JSON of a config has one size only.')
  try:
    data = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{name} is not JSON: {error}.') from error
  if isinstance(data, dict) and 'experiment' in data:  # the config.json of a run
    from smalti.launch import run as runs
    runs.check_format(data, name)
    data = data['experiment']
  return serialization.from_json(data, base, plugins)


def _call(module: Any, name: str, size: str, function: str) -> Any:
  """`get_config(size)` or `get_sweep(size)` of a config module, for a size it knows."""
  get = getattr(module, function, None)
  if not callable(get):
    raise ValueError(f'{name} has no {function}(size).')
  if not size:
    return get()
  sizes = getattr(module, 'SIZES', None)
  if sizes is None and inspect.signature(get).parameters:
    return get(size)  # a file that knows its sizes by other means
  if size not in (sizes or ()):
    raise ValueError(f'{name} has no size {size!r}; known are {", ".join(sizes or ("none",))}.')
  return get(size)


def _override(node: Any, parts: list[str], text: str, path: str, root: Any) -> Any:
  """Sets one field below `node` and returns the node, rebuilt where it is frozen."""
  match = re.fullmatch(r'(\w*)(?:\[(\d+)\])?', parts[0])
  name, index = match.groups() if match else (parts[0], None)
  if name not in {f.name for f in dataclasses.fields(node)}:
    raise ValueError(f'--{path}: {type(node).__name__} has no field {name!r}; '
                     f'{_nearest(path.partition(".")[2], node, root)}')
  annotation = serialization.annotations(type(node))[name]
  old = getattr(node, name)
  if index is not None:
    if not isinstance(old, tuple) or int(index) >= len(old) or len(parts) == 1:
      raise ValueError(f'--{path}: [{index}] must lead to a field of an entry of a tuple; give '
                       f'tuples as a whole, as in --{path.split("[")[0]}=(1,2).')
    entry = old[int(index)]
    new = (*old[:int(index)], _descend(entry, parts, text, path, root), *old[int(index) + 1:])
  elif len(parts) > 1:
    new = _descend(old, parts, text, path, root)
  else:
    new = _read(annotation, text, old, path)
  if type(node).__dataclass_params__.frozen:
    try:
      return dataclasses.replace(node, **{name: new})
    except ValueError as error:  # settings check themselves
      raise ValueError(f'--{path}={text}: {error}') from error
  setattr(node, name, new)
  return node


def _descend(node: Any, parts: list[str], text: str, path: str, root: Any) -> Any:
  above = path[:len(path) - len('.'.join(parts[1:])) - 1]
  if node is None:
    raise ValueError(f'--{path}: {above} is none; put --{above}=build before it, or choose a size '
                     'that has one.')
  if not dataclasses.is_dataclass(node):
    raise ValueError(f'--{path}: {above} is {node!r}, which has no fields.')
  return _override(node, parts[1:], text, path, root)


def _read(annotation: Any, text: str, old: Any, path: str) -> Any:
  """The text as a value of the annotation, by config_flags where it has a parser."""
  inner: Any
  inner, optional = serialization.unwrap(annotation)
  if optional and text.lower() == 'none':
    return None
  if inner is object or dataclasses.is_dataclass(inner) and (
      text != 'build' or old is not None or cast(type, inner).__subclasses__()):
    raise ValueError(
        f'--{path}={text}: which config stands there is chosen by size or file; override its '
        f'fields{", or say none" if optional else ""}.')
  elements = typing.get_args(inner) if typing.get_origin(inner) is tuple else ()
  refusal = f'{path} must be {serialization.describe(annotation)}, got {text!r}.'
  if elements and text[:1] == '{':  # config_flags makes a tuple of the keys
    raise ValueError(refusal)
  if elements and elements[0] not in (int, float, bool) and text[:1] not in ('(', '['):
    # config_flags takes a,b for one string
    value: Any = tuple(part.strip() for part in text.split(',') if part.strip())
  else:
    field = dataclasses.make_dataclass('Field', [('value', annotation)])
    values = flags.FlagValues()
    argument = f'--field.value={text}'
    try:
      config_flags.DEFINE_config_dataclass(
          'field', field(None), flag_values=values, sys_argv=[argument])
      values(['smalti', argument])
    except (flags.Error, ValueError, TypeError, SyntaxError) as error:
      raise ValueError(refusal) from error
    value = values['field'].value.value
  return serialization.conform(value, annotation, path)


def field_paths(node: Any, path: str = '') -> list[str]:
  """Dotted paths of all fields below a node."""
  found = []
  for field in dataclasses.fields(node):
    here, value = serialization.join(path, field.name), getattr(node, field.name)
    found.append(here)
    entries = {here: value} if not isinstance(value, tuple) else {
        f'{here}[{i}]': entry for i, entry in enumerate(value)}
    for at, entry in entries.items():
      if dataclasses.is_dataclass(entry):
        found += field_paths(entry, at)
  return found


def _nearest(path: str, node: Any, root: Any) -> str:
  """The field that was meant: the nearest path, else one that ends alike, else those here."""
  known = field_paths(root)
  if difflib.get_close_matches(path, known, n=1):
    return serialization.suggest(path, known)
  last = path.rpartition('.')[2]
  alike = sorted((k for k in known if k.rpartition('.')[2] == last), key=lambda k: k.count('.'))
  if alike:
    return f'did you mean {" or ".join(map(repr, alike[:3]))}?'
  return serialization.suggest(last, [f.name for f in dataclasses.fields(node)])


# Errors.


def _complain(error: BaseException) -> None:
  if isinstance(error, OSError) and error.errno is not None:
    text = f'{error.filename}: {error.strerror}' if error.filename else str(error.strerror)
  else:
    text = str(error) or type(error).__name__
  print(f'smalti: {" ".join(text.split())}', file=sys.stderr, flush=True)


_MISTAKES = (ValueError, OSError)  # a full disk too: what is to be done is in the message


def _by_user(error: Exception) -> bool:
  """Whether a `raise` of ours, flag parsing or the file system refused what was asked."""
  if isinstance(error, flags.Error):
    return True
  if not isinstance(error, _MISTAKES):
    return False
  steps = []
  link = error.__traceback__
  while link is not None:
    steps.append((link.tb_frame.f_code, link.tb_lasti))
    link = link.tb_next
  while isinstance(error, OSError) and steps and _of_python(steps[-1][0].co_filename):
    steps.pop()  # pathlib and shutil stand between our call and the system's answer
  if not steps:
    return False
  code, place = steps[-1]
  raised = dis.opname[code.co_code[place]] == 'RAISE_VARARGS'  # else numpy, say, refused our call
  return os.path.realpath(code.co_filename).startswith(_FOLDERS) and (
      raised or isinstance(error, OSError))


def _of_python(file: str) -> bool:
  return file.startswith('<frozen') or file.startswith(_STDLIB) and 'site-packages' not in file
