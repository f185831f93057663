"""Files appear whole or not at all."""

import pytest

from smalti.evaluation.files import whole


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / 'deep' / 'scores.json'
  with whole(path) as file:
    file.write(b'old')
  with pytest.raises(RuntimeError):
    with whole(path) as file:
      file.write(b'half of the n')
      assert path.read_bytes() == b'old'
      raise RuntimeError
  assert path.read_bytes() == b'old'
  assert list(path.parent.iterdir()) == [path]
  with whole(path) as file:
    file.write(b'new')
  assert path.read_bytes() == b'new'


def test_two_writers_of_one_process_number_do_not_meet(tmp_path):
  # containers that share a folder number their processes alike
  with whole(tmp_path / 'a') as first:
    first.write(b'one')
    with whole(tmp_path / 'a') as second:
      second.write(b'the other')
    assert (tmp_path / 'a').read_bytes() == b'the other'
  assert (tmp_path / 'a').read_bytes() == b'one'
  assert [x.name for x in tmp_path.iterdir()] == ['a']
