"""The command line: `smalti VERB --name=value ...`, each verb also `python -m smalti.launch.VERB`.

A verb is a module with `define(values)`, which adds its flags, and `main(values)`, which returns an
exit code. Flags live in the call, so that many commands can run in one process. Those of configs
and settings have dots in their names; `trees` reads them.
"""

import dis
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import signal
import sys
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any, cast

from absl import flags

import smalti
from smalti.launch import exits, help, memory, serialization, trees

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
_FOLDERS = tuple(str(_ROOT / folder) + os.sep for folder in (
    'configs', 'data', 'evaluation', 'generators', 'launch', 'networks', 'tokenizers'))
_STDLIB = sysconfig.get_paths()['stdlib'] + os.sep


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
    lines += ['', f'Packaged configs: {", ".join(trees.packaged())}']
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
        values['config'].value = values.config, trees.load_sweep(values.config)
    elif values.config is not None:
      values['config'].value = trees.load_config(values.config, overrides['config'], values.plugin)
    elif cast(_ConfigFlag, values['config']).required or overrides['config']:
      raise ValueError(f'{verb} needs --config=NAME[:size] or a path to a .py or .json; '
                       f'packaged are {", ".join(trees.packaged())}.')


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
