"""Pickles as data: what is understood, and that nothing is ever run."""

import os
import pickle
from collections import OrderedDict

import pytest

from smalti.evaluation import pickles


def read(data, start=0):
  return pickles.read(data, start, lambda name: name in ('collections.OrderedDict', 'a.B'))


@pytest.mark.parametrize('protocol', [2, 4])
def test_plain_values_come_back(protocol):
  value = {'a': [1, 2.5, None, True], 'b': (False, (), ('x',), (1, 2), (1, 2, 3)), 'c': {},
           'long': -2**70, 'shared': ['x'] * 3, 'many': tuple(range(300))}
  found = read(b'before' + pickle.dumps(value, protocol) + b'behind', 6)
  assert found.value == value and not found.references
  assert found.end == 6 + len(pickle.dumps(value, protocol))


def test_calls_stay_records():
  found = read(pickle.dumps(OrderedDict(a=1, b=2), 2)).value
  assert (found.name, found.arguments, found.items) == (
      'collections.OrderedDict', (), {'a': 1, 'b': 2})
  built = read(b'\x80\x02ca\nB\n)\x81}b.').value
  assert (built.name, built.arguments, built.state) == ('a.B', (), {})
  reference = read(b'\x80\x02K\x07Q.')
  assert reference.value.key == 7 and reference.references == [reference.value]


class Hostile:
  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


def test_nothing_is_run(tmp_path):
  witness = tmp_path / 'witness'
  for value in (Hostile(os.system, f'touch {witness}'), Hostile(eval, '1'),
                [1, {'a': Hostile(os.mkdir, str(witness))}], Hostile(getattr, 'a', 'upper')):
    for protocol in range(2, 6):
      with pytest.raises(ValueError, match='no part of a tensor'):
        read(pickle.dumps(value, protocol))
  assert not witness.exists()


@pytest.mark.parametrize(('data', 'reason'), [
    (b'\x80\x02K\x01', 'pickle exhausted'),
    (b'', 'pickle exhausted'),
    (b'\x80\x02.', 'do not fit'),
    (b'\x80\x02h\x05.', 'do not fit'),
    (b'\x80\x02u.', 'do not fit'),
    (b'\x80\x02]K\x01K\x02s.', 'not a dict'),
    (b'\x80\x02}K\x01a.', 'not a list'),
    (b'\x80\x02}]K\x02s.', 'key of type list'),
    (b'\x80\x02K\x01)R.', 'not a name'),
    (b'\x80\x02]}b.', 'not called'),
    (b'\x80\x02(ios\nsystem\n.', 'opcode INST'),
    (b'\x80\x02' + b'N' * (pickles.OPCODES + 1), 'more than 200000 opcodes'),
])
def test_refusals(data, reason):
  with pytest.raises(ValueError, match=reason):
    read(data)
