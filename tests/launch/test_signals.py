"""The first signal sets a flag, the second ends the process, and afterwards all is as before."""

import os
import signal
import subprocess
import sys

import pytest

from smalti.launch.signals import Preemption, agreed


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_first_signal_sets_a_flag(number, capfd):
  before = signal.getsignal(number)
  with Preemption() as preemption:
    assert not preemption.requested and not agreed(preemption.requested)
    os.kill(os.getpid(), number)
    assert preemption.requested and agreed(preemption.requested)
  assert signal.getsignal(number) is before
  assert f'{signal.Signals(number).name}: saving after this step' in capfd.readouterr().err
  with Preemption() as preemption:
    assert not preemption.requested


def test_handlers_come_back_after_an_error():
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with pytest.raises(ZeroDivisionError), Preemption():
    raise ZeroDivisionError
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize('pair', [(signal.SIGTERM,) * 2, (signal.SIGINT, signal.SIGTERM)])
def test_second_signal_exits_at_once(pair):
  code = ('import os, sys\n'
          'from smalti.launch.signals import Preemption\n'
          'with Preemption():\n'
          '  try:\n'
          '    for number in map(int, sys.argv[1:]):\n'
          '      os.kill(os.getpid(), number)\n'
          '      print("still here", flush=True)\n'
          '  finally:\n'
          '    print("cleaned up", flush=True)\n')
  done = subprocess.run([sys.executable, '-c', code, *map(str, map(int, pair))],
                        capture_output=True, text=True, timeout=60, cwd=os.path.dirname(__file__))
  assert done.returncode == 128 + pair[1]
  assert done.stdout == 'still here\n'
  assert 'exit without saving' in done.stderr
