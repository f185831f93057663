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

OPCODES = 200_000  # a network has some tens of thousands
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
  machine = _Machine(known)
  try:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
      if count >= OPCODES:
        raise ValueError(f'more than {OPCODES} opcodes')
      if opcode.name == 'STOP':
        return Pickle(machine.pop(), machine.references, start + stream.tell())
      machine.step(opcode.name, argument)
  except (IndexError, KeyError, TypeError, struct.error) as error:
    raise ValueError(f'its opcodes do not fit together: {error!r}') from error
  raise ValueError('it does not end')


_VALUES = {'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'SHORT_BINSTRING', 'BINSTRING',
           'BINUNICODE', 'SHORT_BINUNICODE'}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class _Machine:
  """The stack machine of pickles, for the opcodes that plain data and tensors need."""

  def __init__(self, known: Callable[[str], bool]):
    self.known = known
    self.stack: list[Any] = []
    self.marks: list[int] = []  # heights of the stack
    self.memo: dict[int, Any] = {}
    self.references: list[Reference] = []

  def step(self, name: str, argument: Any) -> None:
    stack = self.stack
    if name in _VALUES:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in ('PROTO', 'FRAME'):
      pass
    elif name == 'MARK':
      self.marks.append(len(stack))
    elif name == 'EMPTY_LIST':
      stack.append([])
    elif name == 'EMPTY_DICT':
      stack.append({})
    elif name in _TUPLES:
      stack.append(tuple(self.pop_all(_TUPLES[name])))
    elif name == 'TUPLE':
      stack.append(tuple(self.pop_marked()))
    elif name in ('APPEND', 'APPENDS'):
      values = self.pop_marked() if name == 'APPENDS' else self.pop_all(1)
      if not isinstance(stack[-1], list):
        raise ValueError('it appends to what is not a list')
      stack[-1].extend(values)
    elif name in ('SETITEM', 'SETITEMS'):
      pairs = self.pop_marked() if name == 'SETITEMS' else self.pop_all(2)
      _set_items(stack[-1], pairs)
    elif name in ('BINPUT', 'LONG_BINPUT'):
      self.memo[argument] = stack[-1]
    elif name == 'MEMOIZE':
      self.memo[len(self.memo)] = stack[-1]
    elif name in ('BINGET', 'LONG_BINGET'):
      stack.append(self.memo[argument])
    elif name == 'GLOBAL':
      stack.append(self.name(argument.replace(' ', '.')))
    elif name == 'STACK_GLOBAL':
      stack.append(self.name('.'.join(self.pop_all(2))))
    elif name in ('REDUCE', 'NEWOBJ'):
      function, arguments = self.pop_all(2)
      if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise ValueError('it calls what is not a name')
      stack.append(Call(function, arguments))
    elif name == 'BUILD':
      state = self.pop()
      if not isinstance(stack[-1], Call):
        raise ValueError('it gives a state to what was not called')
      stack[-1].state = state
    elif name == 'BINPERSID':
      stack.append(Reference(self.pop()))
      self.references.append(stack[-1])
    else:
      raise ValueError(f'opcode {name}, which tensors do not need')

  def name(self, name: str) -> Name:
    if not self.known(name):
      raise ValueError(f'it names {name[:80]!r}, which is no part of a tensor')
    return Name(name)

  def pop(self) -> Any:
    return self.stack.pop()

  def pop_all(self, count: int) -> list:
    values = [self.stack.pop() for _ in range(count)]
    return values[::-1]

  def pop_marked(self) -> list:
    """Takes what lies above the last mark, and the mark."""
    return self.pop_all(len(self.stack) - self.marks.pop())


def _set_items(target: Any, pairs: list) -> None:
  items = target.items if isinstance(target, Call) else target
  if not isinstance(items, dict) or len(pairs) % 2:
    raise ValueError('it sets items of what is not a dict')
  for key, value in zip(pairs[::2], pairs[1::2]):
    if not isinstance(key, str | int):
      raise ValueError(f'a key of type {type(key).__name__}')
    items[key] = value
