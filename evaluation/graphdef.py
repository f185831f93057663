"""Constants of a frozen TensorFlow graph, read from the wire format of its protocol buffer.

The messages, of tensorflow/core/framework: GraphDef {node = 1}, NodeDef {name = 1, op = 2,
attr = 5}, an entry of attr {key = 1, value = 2}, AttrValue {tensor = 8}, TensorProto {dtype = 1,
tensor_shape = 2, tensor_content = 4, float_val = 5}, TensorShapeProto {dim = 2}, Dim {size = 1}.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

FLOAT = 1  # DT_FLOAT
REPEATED = 1 << 20  # values that one stored value may stand for
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def constants(data: bytes) -> dict[str, np.ndarray]:
  """The float32 constants by name; those of other types are no weights and are left out.

  Raises:
    ValueError: not a graph, or a tensor whose values and shape do not fit.
  """
  found: dict[str, np.ndarray] = {}
  for field, kind, node in _fields(memoryview(data)):
    if (field, kind) != (1, BYTES):
      continue  # versions, library
    name, tensor = _node(node)
    if tensor is not None and (value := _tensor(tensor, name)) is not None:
      if name in found:
        raise ValueError(f'two nodes are called {name!r}')
      found[name] = value
  return found


def _node(data: memoryview) -> tuple[str, memoryview | None]:
  """The name of a node, and the tensor of a constant."""
  name, operation, tensor = '', '', None
  for field, kind, value in _fields(data):
    if (field, kind) == (1, BYTES):
      name = _text(value)
    elif (field, kind) == (2, BYTES):
      operation = _text(value)
    elif (field, kind) == (5, BYTES):
      entry = {f: v for f, k, v in _fields(value) if k == BYTES}
      if 1 in entry and 2 in entry and _text(entry[1]) == 'value':
        tensor = next((v for f, k, v in _fields(entry[2]) if (f, k) == (8, BYTES)), None)
  return name, tensor if operation == 'Const' else None


def _tensor(data: memoryview, name: str) -> np.ndarray | None:
  shape: list[int] = []
  kind, content, values = 0, None, []
  for field, wire, value in _fields(data):
    if (field, wire) == (1, VARINT):
      kind = value
    elif (field, wire) == (2, BYTES):
      shape = [_size(v) for f, k, v in _fields(value) if (f, k) == (2, BYTES)]
    elif (field, wire) == (4, BYTES):
      content = np.frombuffer(value, np.uint8)
    elif field == 5 and wire in (BYTES, FIXED32):  # packed, or one at a time
      values.append(np.frombuffer(value, np.uint8))
  if kind != FLOAT:
    return None
  raw = content if content is not None else np.concatenate(values or [np.zeros(0, np.uint8)])
  if len(raw) % 4:
    raise ValueError(f'{name!r} ends within a number')
  flat = raw.view('<f4')
  size = math.prod(shape)
  if content is None and 0 < len(flat) < size <= REPEATED:
    flat = np.concatenate([flat, np.full(size - len(flat), flat[-1])])  # the last one is repeated
  if len(flat) != size:
    raise ValueError(f'{name!r} has {len(flat)} values for shape {shape}')
  return flat.reshape(shape)


def _size(data: memoryview) -> int:
  return next((v for f, k, v in _fields(data) if (f, k) == (1, VARINT)), 0)


def _text(data: memoryview) -> str:
  return str(data, 'utf-8')


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
  """(number, wire type, value) of the fields of a message: varints as int, others as memoryview."""
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    kind = tag & 7
    if kind == VARINT:
      value, at = _varint(data, at)
      yield tag >> 3, kind, value
      continue
    if kind == BYTES:
      size, at = _varint(data, at)
    elif kind in (FIXED64, FIXED32):
      size = 8 if kind == FIXED64 else 4
    else:
      raise ValueError(f'wire type {kind}')
    if size > len(data) - at:
      raise ValueError('a field ends beyond its message')
    yield tag >> 3, kind, data[at:at + size]
    at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  value = 0
  for i in range(10):
    if at + i >= len(data):
      raise ValueError('a number ends beyond its message')
    value |= (data[at + i] & 127) << 7 * i
    if data[at + i] < 128:
      return value, at + i + 1
  raise ValueError('a number of more than 10 bytes')
