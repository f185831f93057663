"""A recorded result names its command, its commit and its versions, and no path of the machine."""

import json
import subprocess

import numpy as np
import pytest

from smalti.launch import provenance


def test_record_round_trips_through_load(tmp_path):
  path = tmp_path / 'deep' / 'result.json'
  written = provenance.record(path, 'smalti bench train', {'ratio': np.float32(0.5)}, seeds=[0, 1])
  assert provenance.load(path) == written == json.loads(path.read_text())
  assert written['results'] == {'ratio': 0.5}
  assert written['seeds'] == [0, 1]
  assert written['versions']['jax'] and written['machine']['cores'] >= 1
  assert list(path.parent.iterdir()) == [path], 'the temporary file stayed'


def test_the_commit_is_the_one_git_names(tmp_path):
  head = subprocess.run(
      ['git', '-C', str(provenance.ROOT), 'rev-parse', 'HEAD'], capture_output=True, text=True)
  if head.returncode:
    pytest.skip('not a git checkout')
  assert provenance.record(tmp_path / 'a.json', 'x', {})['commit'] == head.stdout.strip()


@pytest.mark.parametrize(('given', 'kept'), [
    ('smalti bench train --peer=/opt/x/bin/python', 'smalti bench train --peer=.../python'),
    ('smalti evaluate --workdir=runs/demo', 'smalti evaluate --workdir=runs/demo'),
    (['smalti', 'train', '--workdir', '/home/ada/run'], 'smalti train --workdir .../run'),
    ('curl https://example.org/a/b', 'curl https://example.org/a/b'),
])
def test_no_absolute_path_is_kept(given, kept, tmp_path):
  written = provenance.record(tmp_path / 'a.json', given, {'run': '/home/ada/run', 'rate': '1/s'})
  assert written['command'] == kept
  assert written['results'] == {'run': '.../run', 'rate': '1/s'}


def test_what_record_refuses(tmp_path):
  with pytest.raises(ValueError, match='commit'):
    provenance.record(tmp_path / 'a.json', 'x', {}, commit='other')
  with pytest.raises(ValueError):  # JSON has no NaN: a score that is not a number is a bug
    provenance.record(tmp_path / 'a.json', 'x', {'fd': float('nan')})
  (tmp_path / 'b.json').write_text('{"format": 9, "versions": {"smalti": "7.0"}}')
  with pytest.raises(ValueError, match='7.0'):
    provenance.load(tmp_path / 'b.json')
  assert not (tmp_path / 'a.json').exists()
