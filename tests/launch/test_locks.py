"""Locks: one holder at a time, taken over from the dead and not from the living."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from smalti.launch import locks
from smalti.launch.locks import LOCK, Taken, hold

PROGRAM = '''
import pathlib, sys, time
from smalti.launch.locks import Taken, hold
folder, gate, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
print("ready", flush=True)
while not gate.exists():
  time.sleep(.001)
try:
  with hold(folder):
    print("got", flush=True)
    time.sleep(seconds)
except Taken:
  print("taken", flush=True)
'''


def process(folder, gate, seconds=0.0):
  return subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(folder), str(gate), str(seconds)],
      stdout=subprocess.PIPE, text=True)


def left_behind(folder, machine, age=0.0):
  """The file of a process that holds no lock here: it is gone, or on another machine."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / LOCK).write_text(json.dumps({'machine': machine, 'host': 'afar', 'pid': 7}))
  os.utime(folder / LOCK, (time.time() - age,) * 2)
  return folder / LOCK


def test_one_holder_at_a_time_and_nothing_left(tmp_path):
  folder = tmp_path / 'run'
  with hold(folder):
    with pytest.raises(Taken, match=f'process {os.getpid()} of {socket.gethostname()}; wait'):
      with hold(folder, wait=True):
        pass
    assert (folder / LOCK).exists()
  with pytest.raises(KeyError):
    with hold(folder):
      raise KeyError
  assert list(folder.iterdir()) == []


def test_a_killed_holder_is_followed_at_once_and_a_living_one_is_not(tmp_path):
  folder, gate = tmp_path / 'run', tmp_path / 'gate'
  gate.touch()
  first = process(folder, gate, 60)
  assert first.stdout.readline() == 'ready\n' and first.stdout.readline() == 'got\n'
  with pytest.raises(Taken, match=f'process {first.pid} of'):
    with hold(folder, wait=True):
      pass
  first.send_signal(signal.SIGKILL)
  deadline = time.monotonic() + 10
  while True:  # it is not waited for: a zombie, as below a supervisor that does not reap
    try:
      with hold(folder):
        break
    except Taken:
      assert time.monotonic() < deadline
      time.sleep(.01)
  first.wait()


def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path):
  folder, gate = tmp_path / 'run', tmp_path / 'gate'
  left_behind(folder, locks._machine())
  rivals = [process(folder, gate, 300) for _ in range(3)]
  for rival in rivals:
    assert rival.stdout.readline() == 'ready\n'
  gate.touch()
  assert sorted(rival.stdout.readline() for rival in rivals) == ['got\n', 'taken\n', 'taken\n']
  for rival in rivals:
    rival.kill()
    rival.wait()


def test_rivals_that_come_and_go_are_never_two_and_never_fail(tmp_path):
  folder, inside, most, errors, got = tmp_path / 'a' / 'run', [], [0], [], [0]
  end = time.monotonic() + 60

  def rival():
    while got[0] < 60 and not errors and time.monotonic() < end:
      try:
        with locks._hold(folder, False):
          inside.append(None)
          most[0], got[0] = max(most[0], len(inside)), got[0] + 1
          inside.pop()
      except Taken:
        pass
      except Exception as error:
        errors.append(error)

  threads = [threading.Thread(target=rival) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert errors == [] and most == [1] and got[0] >= 60


def test_a_file_that_its_holder_just_removed_is_no_lock(tmp_path, monkeypatch):
  locked, calls = locks._locked, []

  def late(file):
    if not calls:
      (tmp_path / LOCK).unlink()  # between our opening and our locking
    calls.append(file)
    return locked(file)

  monkeypatch.setattr(locks, '_locked', late)
  with hold(tmp_path):
    with pytest.raises(Taken):
      with hold(tmp_path):
        pass


def test_another_machine_is_believed_until_it_is_silent(tmp_path):
  left_behind(tmp_path, 'another')
  with pytest.raises(Taken, match='process 7 of afar'):
    with hold(tmp_path):
      pass
  left_behind(tmp_path, 'another', locks.STALE + 1)
  with hold(tmp_path):
    pass
  (tmp_path / LOCK).write_text('')  # killed between making and filling it
  with hold(tmp_path):
    pass


def test_silence_is_measured_where_clocks_differ(tmp_path, monkeypatch):
  left_behind(tmp_path, 'another', -3600)  # touched an hour from now
  with pytest.raises(Taken):
    with hold(tmp_path):
      pass
  now = time.monotonic()
  monkeypatch.setattr(locks.time, 'monotonic', lambda: now + locks.STALE + 1)
  with hold(tmp_path):
    pass


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
  monkeypatch.setattr(locks, 'BEAT', .02)
  with hold(tmp_path):
    os.utime(tmp_path / LOCK, (time.time() - 1000,) * 2)
    deadline = time.monotonic() + 10
    while time.time() - (tmp_path / LOCK).stat().st_mtime > 500:
      assert time.monotonic() < deadline
      time.sleep(.01)
    other = left_behind(tmp_path / 'b', 'another', 1000)
    other.replace(tmp_path / LOCK)
    time.sleep(.1)
    assert time.time() - (tmp_path / LOCK).stat().st_mtime > 500  # none for what is another's


def test_who_waits_takes_over_from_a_machine_that_is_gone(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(locks, '_ASK', .02)
  monkeypatch.setattr(locks, 'STALE', .3)
  left_behind(tmp_path, 'another', -3600)
  with hold(tmp_path, wait=True):
    pass
  assert capsys.readouterr().err.count('is held by afar; waiting for a sign of life') == 1


def test_who_waits_gives_way_to_a_machine_that_lives(tmp_path, monkeypatch):
  monkeypatch.setattr(locks, '_ASK', .02)
  lock = left_behind(tmp_path, 'another')
  beat = threading.Timer(.2, lambda: os.utime(lock, (time.time() + 1,) * 2))
  beat.start()
  with pytest.raises(Taken):
    with hold(tmp_path, wait=True):
      pass
  beat.join()


def test_what_another_wrote_meanwhile_is_left(tmp_path):
  with hold(tmp_path):
    (tmp_path / LOCK).write_text('{"machine": "another", "pid": 1}')  # it thought us dead
  assert (tmp_path / LOCK).exists()


def test_without_flock_the_file_alone_counts(tmp_path, monkeypatch):
  def missing(*_):
    raise OSError(errno.ENOTSUP, 'no locks here')

  monkeypatch.setattr(fcntl, 'flock', missing)
  with hold(tmp_path):
    with pytest.raises(Taken):
      with hold(tmp_path):
        pass
  for machine in ('another', locks._machine()):
    left_behind(tmp_path, machine)
    with pytest.raises(Taken):
      with hold(tmp_path):
        pass
    left_behind(tmp_path, machine, locks.STALE + 1)
    with hold(tmp_path):
      pass


def test_what_stops_process_zero_stops_all(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(locks, 'agreed', lambda flag: asked.append(flag) or flag)
  (tmp_path / 'file').touch()
  with pytest.raises(OSError):  # noqa: PT011 - of the system: a file stands where a folder should
    with hold(tmp_path / 'file'):
      pass
  assert asked == [True]
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  monkeypatch.setattr(locks, 'agreed', lambda flag: True)
  with pytest.raises(Taken, match='another job'):
    with hold(tmp_path / 'file'):
      pass


def test_what_others_hold_is_come_back_to(monkeypatch, capsys):
  free, done, slept = {1: 0, 2: 3, 3: 0, 4: 1}, [], []
  monkeypatch.setattr(locks.time, 'sleep', slept.append)

  def work(item):
    free[item] -= 1
    if free[item] >= 0:
      raise Taken(f'{item} is held')
    done.append(item)

  locks.each([1, 2, 3, 4], work)
  assert done == [1, 3, 4, 2]
  assert slept == [locks.WAIT] * 2
  locks.each([], work)
  with pytest.raises(KeyError):
    locks.each([5], work)


def test_a_second_training_of_a_run_is_refused_in_one_line(tmp_path, capsys):
  from smalti.launch import cli
  with hold(tmp_path / 'run'):
    assert cli.main(['train', '--config=digits_vq:debug', f'--workdir={tmp_path / "run"}']) == 2
  assert not pathlib.Path(tmp_path / 'run' / 'checkpoints').exists()
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and 'is held by process' in error
