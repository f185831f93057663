"""Rounds alternate, ratios are per round, and a peer is another process that answers in JSON."""

import sys

import pytest

from smalti.launch import timing
from smalti.launch.timing import Timing


class Side:
  """Takes the seconds it is told, and notes when it was asked."""

  def __init__(self, name, cpu, log):
    self.name, self.cpu, self.log, self.first = name, iter(cpu), log, 9.0

  def measure(self, calls):
    self.log.append(self.name)
    seconds = next(self.cpu)
    return Timing(seconds, 2 * seconds)


def test_rounds_alternate_and_ratios_are_of_one_round():
  log = []
  found = timing.compare(  # the first of each calibrates
      Side('a', [1, 1, 4, 1], log), Side('b', [1, 2, 2, 4], log), rounds=3)
  assert log == ['a', 'b', 'a', 'b', 'b', 'a', 'a', 'b']
  assert found['cpu_ratio'] == {'median': 0.5, 'q1': 0.375, 'q3': 1.25}  # of 1/2, 4/2, 1/4
  assert found['our_time']['cpu_seconds']['median'] == 1  # a ratio of medians would be 1/2 too,
  assert found['peer_time']['cpu_seconds']['median'] == 2  # but its quartiles would mean nothing
  assert found['our_time']['first_seconds'] == 9


def test_work_of_this_process_is_its_cpu_time():
  spent = timing.measure(lambda: sum(i * i for i in range(200_000)), 3)
  assert 0 < spent.cpu <= 1.5 * spent.wall


PEER = '''
import json, sys
for line in sys.stdin:
  request = json.loads(line)
  if request.get('case') == 'broken':
    reply = {'error': 'no such thing'}
  elif 'calls' in request:
    reply = {'cpu': 2.0, 'wall': 3.0}
  elif request['case'] == 'used':
    reply = {'cpu': 1.0}
  else:
    reply = {'first': 0.5, 'check': list(request)}
  print(json.dumps(reply), flush=True)
'''


@pytest.fixture
def script(tmp_path):
  path = tmp_path / 'peer.py'
  path.write_text(PEER)
  return path


def test_a_peer_answers_line_by_line(script):
  with timing.Peer(sys.executable, script) as peer:
    assert peer.prepare('anything', codes=3) == {'first': 0.5, 'check': ['case', 'codes']}
    assert peer.measure(5) == Timing(2.0, 3.0)
    assert timing.compare(Side('a', [1, 1], []), peer, rounds=1)['cpu_ratio']['median'] == 0.5
    with pytest.raises(RuntimeError, match='no such thing'):
      peer.ask({'case': 'broken'})
  assert peer.process.returncode == 0


def test_a_peer_that_dies_is_named(tmp_path):
  (tmp_path / 'peer.py').write_text('raise SystemExit(1)')
  with pytest.raises((RuntimeError, BrokenPipeError)):
    timing.Peer(sys.executable, tmp_path / 'peer.py')


def test_an_interpreter_that_is_none_is_refused():
  with pytest.raises(FileNotFoundError, match='--peer_python'):
    timing.Peer('no/such/python')
