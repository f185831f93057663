"""Preemption: SIGTERM and SIGINT ask for an end, and the loop decides when it is safe.

The handler sets a flag and nothing else. The loop finishes its step, saves and exits with 75;
who cannot wait sends a second signal, which ends the process at once.
"""

import os
import signal
from types import FrameType
from typing import Any

import jax
import numpy as np


class Preemption:
  """`with Preemption() as preemption:` around a loop that looks at `preemption.requested`.

  Enter it in the main thread, after `jax.distributed.initialize`, which has a SIGTERM handler of
  its own. The earlier handlers come back at the end.
  """

  def __init__(self):
    self.requested = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> 'Preemption':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      # None: the handler was not installed from Python, and Python cannot put it back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    name = signal.Signals(number).name
    if self.requested:
      os.write(2, f'{name} again: exit without saving.\n'.encode())
      os._exit(128 + number)
    self.requested = True
    # Not print: a signal may arrive in the middle of one.
    os.write(2, f'{name}: saving after this step; a second signal exits at once.\n'.encode())


def agreed(flag: bool) -> bool:
  """Whether any process has the flag; the same on all, which all must call at the same step."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
