"""Every file of a list read and decoded once, each in a worker process that may die of it.

`python -P -m smalti.data.inspection` is the worker: a path per line on stdin, a finding per line on
stdout, both JSON. In it Pillow's warnings are errors and memory is capped; a file that takes too
long or brings the worker down costs that worker, not the caller. (A subprocess and not
multiprocessing: nothing is forked after jax started threads, and scripts need no main guard.)
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from smalti.data import images

SECONDS = 20.0  # per file: the largest allowed image decodes in about two
MEMORY = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Finding:
  """What one file holds: SHA-256 of its bytes and pixel size, or the reason of its refusal."""
  reason: str | None = None
  detail: str = ''
  sha256: str = ''
  height: int = 0
  width: int = 0


def inspect(path: str) -> Finding:
  """Reads and decodes one file in this process."""
  try:
    data = images.read_bytes(path)
    height, width, _ = images.decode(data).shape
  except images.Refused as refusal:
    return Finding(reason=refusal.reason, detail=str(refusal))
  return Finding(sha256=hashlib.sha256(data).hexdigest(), height=height, width=width)


def inspect_all(paths: list[str], *, workers: int | None = None,
                seconds: float = SECONDS) -> Iterator[Finding]:
  """Findings in the order of `paths`, from worker processes.

  Args:
    workers: processes; None takes one per core, at most 8, and one per 32 files.
    seconds: after which a file is refused as 'timed out'.
  """
  if workers is None:
    workers = max(1, min(os.cpu_count() or 1, 8, len(paths) // 32))
  free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
  crew = [_Worker(seconds) for _ in range(workers)]
  for worker in crew:
    free.put(worker)

  def run(path: str) -> Finding:
    worker = free.get()
    try:
      return worker.inspect(path)
    finally:
      free.put(worker)

  pool = concurrent.futures.ThreadPoolExecutor(workers)
  try:
    yield from pool.map(run, paths)
  finally:
    pool.shutdown(wait=True, cancel_futures=True)
    for worker in crew:
      worker.close()


class _Worker:
  """One worker process, started again after every file that killed it."""

  def __init__(self, seconds: float):
    self.process: Any = None  # a Popen whose streams are pipes
    self.seconds, self.late = seconds, False

  def inspect(self, path: str) -> Finding:
    process = self.process or self._start()
    self.late = False
    timer = threading.Timer(self.seconds, self._expire, (process,))
    timer.start()
    try:
      process.stdin.write(json.dumps(path) + '\n')
      process.stdin.flush()
      answer = process.stdout.readline()
    except BrokenPipeError:
      answer = ''
    finally:
      timer.cancel()
      timer.join()  # from here on it will not kill a worker that answered in time
    if answer.endswith('\n') and not self.late:
      return Finding(**json.loads(answer))
    code = self.close()
    if self.late:
      return Finding(reason='timed out', detail=f'timed out: after {self.seconds:g} s')
    return Finding(reason='crashed the decoder', detail=f'crashed the decoder: exit {code}')

  def _start(self) -> Any:
    process: Any = subprocess.Popen(
        [sys.executable, '-P', '-m', 'smalti.data.inspection'], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding='ascii')
    self.process = process
    if process.stdout.readline() != 'ready\n':
      self.close()
      raise RuntimeError('The worker that decodes images does not start: '
                         f'run {sys.executable} -P -m smalti.data.inspection to see why.')
    return process

  def _expire(self, process: subprocess.Popen) -> None:
    self.late = True
    process.kill()

  def close(self) -> int | None:
    if self.process is None:
      return None
    self.process.kill()
    code = self.process.wait()
    with contextlib.suppress(BrokenPipeError):  # the path that killed it may still be unsent
      self.process.stdin.close()
    self.process.stdout.close()
    self.process = None
    return code


def _serve() -> None:
  try:
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
  except ImportError:  # not a Unix: the cap on pixels is the only one
    pass
  warnings.simplefilter('error')
  print('ready', flush=True)
  for line in sys.stdin:
    print(json.dumps(dataclasses.asdict(inspect(json.loads(line)))), flush=True)


if __name__ == '__main__':
  _serve()
