"""Files of arrays: what was written comes back, and no damage passes or surprises."""

import io
import zipfile

import numpy as np
import pytest

from smalti.evaluation.archive import Archive, write

ARRAYS = {'a': np.arange(24, dtype=np.uint8).reshape(2, 3, 4), 'b': np.float64(2.5),
          'c': np.asfortranarray(np.arange(6.).reshape(2, 3)), 'd': np.zeros((0, 3)), 'e': 'name'}


def opened(path):
  return Archive(path, 'test arrays', 'write them again')


def read(path):
  with opened(path) as archive:
    return {name: archive.read(name) for name in archive.names}


def test_round_trip(tmp_path):
  path = tmp_path / 'deep' / 'arrays.npz'
  write(path, ARRAYS)
  found = read(path)
  assert found.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(found[name], array)
    assert found[name].dtype == np.asarray(array).dtype
  with opened(path) as archive:
    assert [x.shape for x in archive.rows('a', 1)] == [(1, 3, 4)] * 2
    np.testing.assert_array_equal(np.concatenate(list(archive.rows('a', 3))), ARRAYS['a'])
    assert archive.header('c').shape == (2, 3)
    with pytest.raises(ValueError, match='not stored by rows'):
      next(archive.rows('c', 1))
    with pytest.raises(ValueError, match=r'arrays.npz holds no test arrays \(it has no z, only a, '
                                         r'b, c, d, e\); write them again.$'):
      archive.read('z')
    with pytest.raises(ValueError, match='more than 7'):
      archive.read('a', largest=7)
  np.savez_compressed(path, **ARRAYS)
  np.testing.assert_array_equal(read(path)['a'], ARRAYS['a'])


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_every_flipped_byte_is_seen_or_harmless(tmp_path, save):
  path = tmp_path / 'arrays.npz'
  save(path, a=ARRAYS['a'], d=ARRAYS['d'])
  whole, good = path.read_bytes(), read(path)
  refused = 0
  for place in range(len(whole)):
    mask = (1, 0x80, 0xff)[place % 3]
    path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1:])
    try:
      found = read(path)
    except ValueError as error:
      assert str(path) in str(error) and '\n' not in str(error)
      refused += 1
    else:  # the file's date and the like: the arrays are what they were
      for name in found.keys() & good.keys():
        np.testing.assert_array_equal(found[name], good[name])
        assert found[name].dtype == good[name].dtype
  assert refused > len(whole) / 2
  for end in range(0, len(whole), 17):
    path.write_bytes(whole[:end])
    with pytest.raises(ValueError, match='write them again'):
      read(path)


def test_hostile_headers(tmp_path):
  path = tmp_path / 'arrays.npz'

  def member(name, data):
    with zipfile.ZipFile(path, 'w') as file:
      file.writestr(name, data)

  def header(text):
    text = text.encode() + b' ' * (117 - len(text)) + b'\n'
    return b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text

  tebibyte = "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }"
  for data, match in ((header(tebibyte), 'of 0 bytes'),
                      (header(tebibyte.replace('1099511627776', '-1')), 'of 0 bytes'),
                      (header(tebibyte.replace('|u1', '|O')), 'no plain data'),
                      (header('__import__("os").abort()'), 'header'),
                      (b'\x93NUMPY\x03\x00' + bytes(9), 'version'), (b'', 'EOF')):
    member('a.npy', data)
    with pytest.raises(ValueError, match=match):
      read(path)
  buffer = io.BytesIO()
  np.save(buffer, np.array([{}], object), allow_pickle=True)
  member('a.npy', buffer.getvalue())
  with pytest.raises(ValueError, match='no plain data'):
    read(path)
  path.write_bytes(b'\x93NUMPY')
  with pytest.raises(ValueError, match='write them again'):
    read(path)
  with pytest.raises(FileNotFoundError, match='write them again'):
    read(tmp_path / 'none.npz')
