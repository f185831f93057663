"""Locks between processes, on one machine or on several that share a folder.

A holder keeps the file LOCK open under `flock`, which the system takes back when a process ends,
however it ends. Not every shared file system carries that to other machines, so a holder touches
its file every few seconds too: who finds the file of another machine, unlocked, takes it over once
nothing was heard of it for five minutes. Where there is no `flock` at all that goes for every file,
and two that begin in the same moment are not told apart.
"""

import collections
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import jax

from smalti.launch.progress import say
from smalti.launch.signals import agreed

LOCK = 'LOCK'
BEAT, STALE = 15, 300  # seconds between two touches, and until none means that nobody lives
WAIT, _ASK = 5.0, 1.0  # seconds between two looks at what others hold
# Of a file system without flock.
_UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)
_heard: dict[str, tuple[float, float]] = {}  # last touch of another's file, and since when we know


class Taken(ValueError):
  """Another process is at this."""


@contextlib.contextmanager
def hold(folder: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
  """Holds a folder for this process, or for all processes of a cluster, which all must call it.

  Args:
    wait: where another machine holds it, look whether that machine lives; it may have been taken
      away, and the job been started again here.

  Raises:
    Taken: another process holds it.
  """
  refused: Exception | None = None
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        stack.enter_context(_hold(folder, wait))
      except (Taken, OSError) as error:
        refused = error
    if agreed(refused is not None):
      raise refused or Taken(f'{folder} is held by another job; wait for it, or stop it.')
    yield


def each(items: Iterable[Any], work: Callable[[Any], None]) -> None:
  """`work(item)` for every item; those that others hold are come back to, until none is left."""
  todo, held = collections.deque(items), 0  # of those, since the last that was not
  while todo:
    try:
      work(todo[0])
    except Taken as error:
      if not held:
        say(str(error))
      held += 1
      todo.rotate(-1)
      if held >= len(todo):
        time.sleep(WAIT)
        held = 1  # all have been said
    else:
      held = 0
      todo.popleft()


@contextlib.contextmanager
def _hold(folder: pathlib.Path, wait: bool) -> Iterator[None]:
  with _acquired(folder, wait) as file:
    mine = json.dumps({'machine': _machine(), 'host': socket.gethostname(), 'pid': os.getpid()})
    file.truncate(0)
    file.write(mine.encode())
    file.flush()
    end = threading.Event()
    heart = threading.Thread(target=_beat, args=(file.fileno(), end), daemon=True)
    heart.start()
    try:
      yield
    finally:
      end.set()
      heart.join()
      if _read(file) == mine:  # else another machine thought us dead
        (folder / LOCK).unlink(missing_ok=True)


def _acquired(folder: pathlib.Path, wait: bool) -> BinaryIO:
  """The file, open and locked."""
  path, touched = folder / LOCK, None  # when the machine that we wait for was last heard of
  folder.mkdir(parents=True, exist_ok=True)
  while True:
    file = open(path, 'a+b')
    locked, holder = _locked(file), _holder(_read(file))
    if not _is_at(file, path):
      file.close()
      continue
    free = locked is not False
    if free and (not holder or locked and holder.get('machine') == _machine()
                 or _silent(file, path)):
      return file
    before, touched = touched, os.fstat(file.fileno()).st_mtime
    file.close()
    host = holder.get('host', '?')
    if not (free and wait) or before not in (None, touched):
      raise Taken(f'{folder} is held by process {holder.get("pid", "?")} of {host}; wait for it, '
                  'or stop it.')
    if before is None:
      say(f'{folder} is held by {host}; waiting for a sign of life')
    time.sleep(_ASK)


def _locked(file: BinaryIO) -> bool | None:
  """Whether the file is ours now; None where the file system cannot say."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in _UNKNOWN:
      raise
    return None
  return True


def _is_at(file: BinaryIO, path: pathlib.Path) -> bool:
  """Whether an open file is still the one of that name: its holder may have removed it."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
  except FileNotFoundError:
    return False


def _silent(file: BinaryIO, path: pathlib.Path) -> bool:
  """Whether nothing was heard for long, by the clock of the files or by ours."""
  touched, now = os.fstat(file.fileno()).st_mtime, time.monotonic()
  if _heard.get(str(path), (None, now))[0] != touched:
    _heard[str(path)] = touched, now
  return time.time() - touched > STALE or now - _heard[str(path)][1] > STALE


def _beat(file: int, end: threading.Event) -> None:
  while not end.wait(BEAT):
    with contextlib.suppress(OSError):
      os.utime(file)


def _read(file: BinaryIO) -> str:
  file.seek(0)
  return file.read().decode(errors='replace')


def _holder(text: str) -> dict:
  try:
    found = json.loads(text)
  except ValueError:  # new, or its holder was killed before it was written
    return {}
  return found if isinstance(found, dict) else {}


def _machine() -> str:
  """What has one table of locks: a running kernel, whatever its containers are called."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return socket.gethostname()
