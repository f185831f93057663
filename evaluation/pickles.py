"""Pickles read as data: nothing that a pickle names is imported, and nothing is called.

PyTorch keeps tensors in pickles, and a pickle is a program: loading one may run anything. Here its
opcodes are interpreted by hand. A name stays a name, a call stays a record of what would have been
called with what, and a name that the caller does not know is refused.
"""

import dataclasses
import io
import pickletools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

OPCODES = 1_000_000  # a network has some tens of thousands
BYTES = 16 << 20  # of one pickle, without the tensors, which are stored beside it


class Name(str):
  """What a pickle would have imported, as 'module.name'."""


@dataclasses.dataclass(eq=False)
class Call:
  """What would have been called, and what would have been done to the result.

  Attributes:
    name: of the function or class.
    arguments: it was to be called with.
    items: put in with result[key] = value.
    state: given to `__setstate__`.
  """
  name: Name
  arguments: tuple
  items: dict = dataclasses.field(default_factory=dict)
  state: Any = None


@dataclasses.dataclass(frozen=True)
class Reference:
  """An object that is stored outside the pickle."""
  key: Any


class Pickle(NamedTuple):
  """What a pickle holds, all references within it, and the offset of what follows it."""
  value: Any
  references: list[Reference]
  end: int


def read(data: bytes, start: int, known: Callable[[str], bool]) -> Pickle:
  """The pickle at `start`.

  Args:
    data: the file.
    start: offset of the first opcode.
    known: which names may occur; every other one is refused.

  Raises:
    ValueError: not a pickle, or one with names or opcodes that tensors do not need.
  """
  stream = io.BytesIO(data[start:start + BYTES])
  stack: list[Any] = []
  memo: dict[int, Any] = {}
  references: list[Reference] = []
  try:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
      if count >= OPCODES:
        raise ValueError(f'more than {OPCODES} opcodes')
      if opcode.name == 'STOP':
        return Pickle(stack.pop(), references, start + stream.tell())
      _step(opcode.name, argument, stack, memo, known)
      if opcode.name == 'BINPERSID':
        references.append(stack[-1])
  except (IndexError, KeyError, TypeError, struct.error) as error:
    raise ValueError(f'its opcodes do not fit together: {error!r}') from error
  raise ValueError('it does not end')


_MARK = object()
_VALUES = {'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'SHORT_BINSTRING', 'BINSTRING',
           'BINUNICODE', 'SHORT_BINUNICODE'}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def _step(name: str, argument: Any, stack: list, memo: dict, known: Callable[[str], bool]) -> None:
  if name in _VALUES:
    stack.append(argument)
  elif name in _CONSTANTS:
    stack.append(_CONSTANTS[name])
  elif name in ('PROTO', 'FRAME'):
    pass
  elif name == 'MARK':
    stack.append(_MARK)
  elif name == 'EMPTY_LIST':
    stack.append([])
  elif name == 'EMPTY_DICT':
    stack.append({})
  elif name in _TUPLES:
    size = _TUPLES[name]
    stack[-size:] = [tuple(stack[-size:])]
  elif name == 'TUPLE':
    stack.append(tuple(_marked(stack)))
  elif name == 'APPEND':
    value = stack.pop()
    _list(stack[-1]).append(value)
  elif name == 'APPENDS':
    values = _marked(stack)
    _list(stack[-1]).extend(values)
  elif name in ('SETITEM', 'SETITEMS'):
    pairs = _marked(stack) if name == 'SETITEMS' else [stack.pop(-2), stack.pop()]
    _set_items(stack[-1], pairs)
  elif name in ('BINPUT', 'LONG_BINPUT'):
    memo[argument] = stack[-1]
  elif name == 'MEMOIZE':
    memo[len(memo)] = stack[-1]
  elif name in ('BINGET', 'LONG_BINGET'):
    stack.append(memo[argument])
  elif name in ('GLOBAL', 'STACK_GLOBAL'):
    if name == 'STACK_GLOBAL':
      argument = f'{stack.pop(-2)} {stack.pop()}'
    stack.append(_name(argument.replace(' ', '.'), known))
  elif name in ('REDUCE', 'NEWOBJ'):
    arguments, function = stack.pop(), stack.pop()
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
      raise ValueError('it calls what is not a name')
    stack.append(Call(function, arguments))
  elif name == 'BUILD':
    state = stack.pop()
    if not isinstance(stack[-1], Call):
      raise ValueError('it gives a state to what was not called')
    stack[-1].state = state
  elif name == 'BINPERSID':
    stack.append(Reference(stack.pop()))
  else:
    raise ValueError(f'opcode {name}, which tensors do not need')


def _name(name: str, known: Callable[[str], bool]) -> Name:
  if not known(name):
    raise ValueError(f'it names {name[:80]!r}, which is no part of a tensor')
  return Name(name)


def _marked(stack: list) -> list:
  """Takes what lies above the last mark, and the mark."""
  at = len(stack) - 1 - stack[::-1].index(_MARK)
  values = stack[at + 1:]
  del stack[at:]
  return values


def _list(value: Any) -> list:
  if not isinstance(value, list):
    raise ValueError('it appends to what is not a list')
  return value


def _set_items(target: Any, pairs: list) -> None:
  items = target.items if isinstance(target, Call) else target
  if not isinstance(items, dict) or len(pairs) % 2:
    raise ValueError('it sets items of what is not a dict')
  for key, value in zip(pairs[::2], pairs[1::2]):
    if not isinstance(key, str | int):
      raise ValueError(f'a key of type {type(key).__name__}')
    items[key] = value
