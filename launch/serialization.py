"""Configs as JSON, and the check of every field against its annotation.

A config is a tree of dataclasses whose fields are int, float, bool, str, `X | None`, `tuple[...]`,
`Literal[...]` or further configs. In JSON every config node names its class, `type: module:Class`,
and tuples are lists. JSON is data: reading it imports the module that holds a named class, only
within this package or where a plugin allows it, and calls nothing but that dataclass.
"""

import dataclasses
import difflib
import functools
import importlib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

# Folders of ours whose modules JSON may name; `smalti.setup`, say, would run an installer.
_FOLDERS = ('data', 'evaluation', 'generators', 'launch', 'networks', 'tokenizers')

# Classes by the names they had when some run was stored.
MOVED = {'smalti.tokenizers.autoencoder:LossWeights': 'smalti.tokenizers.image:LossWeights'}


# The modules of --plugin in this command: whatever it opens may name their classes.
named_plugins: tuple[str, ...] = ()


def to_json(config: Any) -> dict[str, Any]:
  """The config as dicts, lists and scalars; whole numbers in float fields become floats.

  Raises:
    ValueError: a field breaks its annotation, or a class could not be found again by its name.
  """
  return _node_to_json(config, type(config), '')


def from_json(data: Any, base: type, plugins: Sequence[str] = ()) -> Any:
  """The config that `to_json` wrote; fields it lacks take their defaults.

  Args:
    data: what `json.load` returned.
    base: the class the root must be or extend.
    plugins: modules outside this package whose classes may be named.

  Raises:
    ValueError: a field is unknown or breaks its annotation, or a class is not allowed there.
  """
  def node(value, annotation, path):
    if not isinstance(value, dict):
      raise ValueError(f'{_at(path)} must be a {_name(annotation)}, got {value!r}.')
    cls = _resolve(value.get('type'), annotation, path, plugins)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in value:
      if name != 'type' and name not in known:
        raise ValueError(
            f'{_at(path)} has no field {name!r} in {cls.__name__}; {suggest(name, known)}')
    missing = [n for n, f in known.items() if n not in value and _required(f)]
    if missing:
      raise ValueError(f'{_at(path)} lacks {", ".join(missing)} of {cls.__name__}.')
    hints = annotations(cls)
    arguments = {n: _walk(v, hints[n], join(path, n), walk)
                 for n, v in value.items() if n != 'type'}
    try:
      return cls(**arguments)
    except ValueError as error:  # a class that checks itself does not know where it sits
      raise ValueError(f'{_at(path)}: {error}') from error

  walk = _Walk(node, list, tuple)
  return node(data, base, '')


def check(config: Any) -> None:
  """Checks every field of a live tree against its annotation.

  Raises:
    ValueError: names the dotted path of the field, its value and what it must be.
  """
  _node_checked(config, type(config), '')


def conform(value: Any, annotation: Any, path: str) -> Any:
  """`value` as a member of `annotation`: whole numbers become floats, all else must fit."""
  return _walk(value, annotation, path, _CHECK)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
  """Where two JSON configs differ, as 'optimizer.rate: 0.0003 -> 0.001'.

  The dotted path ends at the first colon. Nodes of different classes differ once, at their type.
  """
  return list(_differences(a, b, ''))


def annotations(cls: type) -> dict[str, Any]:
  """The annotation of every field of a dataclass, with names in quotes resolved."""
  return _annotations(cls)


def suggest(name: str, known: Iterable[str]) -> str:
  """The end of an error message: the nearest of the known names, or all where none is near."""
  known = list(known)
  near = difflib.get_close_matches(name, known, n=1)
  if near:
    return f'did you mean {near[0]!r}?'
  return f'known are {", ".join(known)}.' if known else 'none are known.'


def describe(annotation: Any) -> str:
  """An annotation in words: 'a whole number', 'one of cosine, linear', 'a number or none'."""
  inner, optional = unwrap(annotation)
  if optional:
    return f'{describe(inner)} or none'
  if typing.get_origin(inner) is Literal:
    return f'one of {", ".join(str(m) for m in typing.get_args(inner))}'
  if typing.get_origin(inner) is tuple:
    elements = typing.get_args(inner)
    if elements[-1] is Ellipsis:
      return f'a tuple of {_PLURAL.get(elements[0], _name(elements[0]))}'
    return f'a tuple of length {len(elements)}: {", ".join(describe(e) for e in elements)}'
  return _SINGULAR.get(inner, f'a {_name(inner)}')


def unwrap(annotation: Any) -> tuple[Any, bool]:
  """The X of `X | None`, and whether None was there."""
  if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
    return annotation, False
  inner = [a for a in typing.get_args(annotation) if a is not types.NoneType]
  if len(inner) != 1:
    raise TypeError(f'{annotation} cannot annotate a config field: only unions with None can.')
  return inner[0], True


def join(path: str, name: str) -> str:
  return f'{path}.{name}' if path else name


# What JSON, checking and writing have in common: one walk along the annotations.


class _Walk(NamedTuple):
  """How a walk treats config nodes, which sequence it reads and which it makes."""
  node: Callable[[Any, Any, str], Any]
  source: type
  target: type


def _walk(value: Any, annotation: Any, path: str, walk: _Walk) -> Any:
  inner, optional = unwrap(annotation)
  if optional and value is None:
    return None
  origin = typing.get_origin(inner)
  if origin is Literal:
    if any(type(m) is type(value) and m == value for m in typing.get_args(inner)):
      return value
  elif origin is tuple:
    if isinstance(value, list | tuple) and isinstance(value, walk.source):
      elements = typing.get_args(inner)
      if elements[-1] is Ellipsis:
        elements = elements[:1] * len(value)
      if len(elements) == len(value):
        return walk.target(_walk(v, e, f'{path}[{i}]', walk)
                           for i, (v, e) in enumerate(zip(value, elements)))
  elif inner is object or dataclasses.is_dataclass(inner):
    return walk.node(value, inner, path)
  elif inner is float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
      return float(value)
  elif inner in (bool, int, str):
    if type(value) is inner:
      return value
  else:
    raise TypeError(f'{path}: {annotation} cannot annotate a config field.')
  raise ValueError(f'{_at(path)} must be {describe(annotation)}, got {value!r}.')


def _node_checked(value: Any, annotation: Any, path: str) -> Any:
  if not dataclasses.is_dataclass(value) or not isinstance(value, annotation):
    raise ValueError(f'{_at(path)} must be a {_name(annotation)}, got {_short(value)}.')
  hints = annotations(type(value))
  for field in dataclasses.fields(value):
    conform(getattr(value, field.name), hints[field.name], join(path, field.name))
  return value


def _node_to_json(value: Any, annotation: Any, path: str) -> dict[str, Any]:
  if not dataclasses.is_dataclass(value) or not isinstance(value, annotation):
    raise ValueError(f'{_at(path)} must be a {_name(annotation)}, got {_short(value)}.')
  cls = type(value)
  if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
    raise ValueError(
        f'{_at(path)} is a {cls.__qualname__}, which could not be found again in '
        f'{cls.__module__}; move it to an importable module and name that with --plugin.')
  hints = annotations(cls)
  return {'type': f'{cls.__module__}:{cls.__qualname__}'} | {
      f.name: _walk(getattr(value, f.name), hints[f.name], join(path, f.name), _WRITE)
      for f in dataclasses.fields(cls)}


_CHECK = _Walk(_node_checked, tuple, tuple)
_WRITE = _Walk(_node_to_json, tuple, list)
_SINGULAR = {int: 'a whole number', float: 'a finite number', bool: 'true or false',
             str: 'a string', object: 'a config'}
_PLURAL = {int: 'whole numbers', float: 'finite numbers', bool: 'truth values', str: 'strings'}


def _resolve(name: Any, annotation: Any, path: str, plugins: Sequence[str]) -> type:
  """The class a JSON node names, if the annotation and the allowed modules agree."""
  if not isinstance(name, str) or not re.fullmatch(r'[A-Za-z_][\w.]*:[A-Za-z_]\w*', name):
    raise ValueError(f"{_at(path)} must name its class as type 'module:Class', got {name!r}.")
  module, _, attribute = MOVED.get(name, name).partition(':')
  ours = module.split('.')[0] == 'smalti' and module.split('.')[1:2] in ([f] for f in _FOLDERS)
  if not ours and module not in (*plugins, *named_plugins):
    raise ValueError(
        f'{_at(path)} names {name!r}, outside smalti; to trust that module add --plugin={module}.')
  try:
    found = vars(importlib.import_module(module)).get(attribute)
  except ModuleNotFoundError as error:
    if not (error.name and (module == error.name or module.startswith(error.name + '.'))):
      raise  # the module exists and misses something of its own
    found = None
  # A class counts where it is defined: modules also hold what they import.
  if not isinstance(found, type) or not dataclasses.is_dataclass(found) or (
      found.__module__ != module):
    raise ValueError(f'{_at(path)} names {name!r}, which is no config class of that module.')
  if not issubclass(found, annotation):
    raise ValueError(f'{_at(path)} must be a {_name(annotation)}; {name!r} is not one.')
  return found


def _differences(a: Any, b: Any, path: str) -> Iterator[str]:
  if isinstance(a, dict) and isinstance(b, dict):
    if a.get('type') != b.get('type'):
      yield f'{join(path, "type")}: {a.get("type")} -> {b.get("type")}'
      return
    for name in [*a, *(n for n in b if n not in a)]:
      yield from _differences(a.get(name, _ABSENT), b.get(name, _ABSENT), join(path, name))
  elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(
      isinstance(v, dict) for v in a):
    for i, (x, y) in enumerate(zip(a, b)):
      yield from _differences(x, y, f'{path}[{i}]')
  elif a != b or isinstance(a, bool) != isinstance(b, bool):
    yield f'{path}: {_short(a)} -> {_short(b)}'


class _Absent:
  def __repr__(self):
    return 'absent'


_ABSENT = _Absent()


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _required(field: dataclasses.Field) -> bool:
  missing = dataclasses.MISSING
  return field.default is missing and field.default_factory is missing


def _at(path: str) -> str:
  return path or 'the config'


def _name(annotation: Any) -> str:
  return 'config' if annotation is object else getattr(annotation, '__name__', str(annotation))


def _short(value: Any) -> str:
  if isinstance(value, dict):
    return str(value.get('type', 'a dict'))
  return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)
