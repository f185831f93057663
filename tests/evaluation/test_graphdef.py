"""Frozen TensorFlow graphs: a writer of the wire format against the reader."""

import struct

import numpy as np
import pytest

from smalti.evaluation import graphdef, weights


def varint(value):
  out = bytearray()
  while value > 127:
    out.append(value & 127 | 128)
    value >>= 7
  return bytes(out) + bytes([value])


def field(number, value):
  """A length-delimited field, or a varint."""
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(array=None, *, kind=1, shape=None, more=b''):
  shape = array.shape if shape is None else shape
  dims = b''.join(field(2, field(1, size)) for size in shape)
  content = b'' if array is None else field(4, array.tobytes())
  return field(1, kind) + field(2, dims) + content + more


def node(name, operation='Const', value=None):
  attributes = field(5, field(1, b'dtype') + field(2, field(6, 1)))  # AttrValue.type
  if value is not None:
    attributes += field(5, field(1, b'value') + field(2, field(8, value)))
  return field(1, field(1, name.encode()) + field(2, operation.encode()) + attributes)


RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.normal(size=(3, 3, 2, 200)).astype(np.float32)
SCALAR = np.float32(0.0078125)


def graph():
  """Constants, a placeholder, other types, and every way in which floats are stored."""
  packed = field(5, struct.pack('<3f', 1, 2, 3))
  single = b''.join(varint(5 << 3 | 5) + struct.pack('<f', x) for x in (4, 5))
  return b''.join([
      node('conv/conv2d_params', value=tensor(KERNEL)),
      node('conv/Conv2D', 'Conv2D'),
      node('Mul/y', value=tensor(np.array(SCALAR))),
      node('packed', value=tensor(shape=(3,), more=packed)),
      node('single', value=tensor(shape=(2,), more=single)),
      node('filled', value=tensor(shape=(2, 3), more=field(5, struct.pack('<2f', 7, 8)))),
      node('image', value=tensor(shape=(), kind=7, more=field(8, b'not a number'))),
      node('size', value=tensor(np.array([299, 299], np.int32), kind=3)),
      field(4, field(1, 8)),  # versions
  ])


def test_constants_come_back(tmp_path):
  path = tmp_path / 'graph.pb'
  path.write_bytes(graph())
  found = weights.read(path).tensors
  want = {'conv/conv2d_params': KERNEL, 'Mul/y': np.array(SCALAR), 'packed': [1, 2, 3],
          'single': [4, 5], 'filled': [[7, 8, 8], [8, 8, 8]]}  # the last value is repeated
  assert list(found) == list(want)
  for name, value in want.items():
    assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(('data', 'reason'), [
    (node('x', value=tensor(KERNEL[:1], shape=(9, 9))), 'values for shape'),
    (node('x', value=tensor(shape=(1 << 40,), more=field(5, struct.pack('<f', 1)))), 'for shape'),
    (node('x', value=tensor(shape=(1 << 19, 1 << 19), more=field(5, bytes(4)))), 'for shape'),
    (node('x', value=field(1, 1) + field(4, b'abc')), 'within a number'),
    (node('x', value=tensor(KERNEL)) * 2, "two nodes are called 'x'"),
    (node('x', value=tensor(KERNEL))[:-5], 'beyond its message'),
    (field(1, field(1, b'\xff') + field(2, b'Const')), 'codec'),
    (b'\n' + b'\xff' * 12, 'more than 10 bytes'),
    (b'\n\x02\x0b\x00', 'wire type 3'),
    (b'\n\xff', 'beyond its message'),
])
def test_refusals(data, reason, tmp_path):
  with pytest.raises(ValueError, match=reason):
    graphdef.constants(data)
  path = tmp_path / 'graph.pb'
  path.write_bytes(data)
  with pytest.raises(weights.WeightFileError, match='holds no weights'):
    weights.read(path)


def test_damage_is_one_line(tmp_path):
  data, random, refusals = graph(), np.random.default_rng(0), 0
  path = tmp_path / 'graph.pb'
  starts = [i for i in range(len(data)) if i < 40 or i > len(data) - 400]  # between: numbers
  for trial in range(400):
    damaged = bytearray(data)
    damaged[random.choice(starts)] = random.integers(256)
    path.write_bytes(damaged[:random.integers(len(data))] if trial % 5 == 0 else damaged)
    try:
      weights.read(path)
    except weights.WeightFileError as error:
      refusals += 1
      assert '\n' not in str(error)
  assert refusals > 50
