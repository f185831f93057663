"""Trees of dataclasses: experiments by name, and their fields and those of settings from text.

This is the only front of `ml_collections.config_flags`, which reads the text of every override by
annotation; what it lacks is added here: packaged names, nearest names, `none`, Literals, frozen
nodes.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

from absl import flags
from ml_collections import config_flags

from smalti.launch import serialization

_CONFIGS = pathlib.Path(__file__).resolve().parent.parent / 'configs'

# The text of a Literal passes as it is; membership is checked with all other annotations.
config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())


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
