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


def test_parts_are_named_by_their_commits_and_their_time(tmp_path):
  parts = [{'commit': letter * 40, 'modified': letter == 'b', 'date': f'2001-01-0{day}T',
            'seconds': day, 'machine': {'cores': day}, 'versions': {}}
           for day, letter in ((2, 'b'), (1, 'a'), (3, 'a'))]
  found = provenance.record(tmp_path / 'a.json', 'x', {}, parts=parts)
  assert found['commits'] == ['a' * 10, 'b' * 10 + ' and changes']
  assert (found['seconds'], found['date']) == (6, '2001-01-03T')
  assert found['machine'] == {'cores': 3} and 'cpu_seconds' not in found  # of older ones, unknown
  assert provenance.commits(found) == f'commits {"a" * 10}, {"b" * 10} and changes'
  again = provenance.joined([found, {**parts[0], 'commit': 'c' * 40, 'date': '2002'},
                             {**parts[0], 'commit': 'd' * 40, 'date': '2003'}])
  assert provenance.commits(again) == f'4 commits from {"a" * 10} to {"d" * 10} and changes'
  assert provenance.commits({**parts[1]}) == f'commit {"a" * 10}'


def test_a_clock_counts_from_its_start(tmp_path):
  sum(range(5_000_000))  # what came before is not counted
  found = provenance.record(tmp_path / 'a.json', 'x', {}, clock=provenance.Clock())
  whole = provenance.record(tmp_path / 'a.json', 'x', {})
  assert found['seconds'] < whole['seconds'] / 2 and found['cpu_seconds'] < whole['cpu_seconds'] / 2


def test_the_commit_is_that_of_the_code_that_was_loaded(tmp_path, monkeypatch):
  before = provenance.record(tmp_path / 'a.json', 'x', {})
  monkeypatch.setattr(provenance, '_git', lambda *_: 'f' * 40)  # a commit since
  assert provenance.record(tmp_path / 'a.json', 'x', {})['commit'] == before['commit']
