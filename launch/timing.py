"""Timing on a noisy machine: short alternating rounds, CPU time first, ratios per round.

Both sides of a comparison are alive at once, ours in this process and the peer in another
interpreter that speaks a line of JSON at a time, and take turns (A B, B A, ...). What is reported
is the median of the per-round ratios with its quartiles: foreign load moves wall time by a factor
of two and CPU time by a sixth, and both sides of a round see much the same of it. Wall time counts
only from rounds in which other processes used few cores.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

THREADS = 2
PYTORCH = Path(__file__).parent / 'peers' / 'pytorch.py'
QUIET = 0.12  # cores that others may use in a round whose wall time counts


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per call: of all threads of the process, and of the clock."""
  cpu: float
  wall: float


Run = Callable[[], Any]


def two_cores() -> None:
  """Leaves this process and its children `THREADS` cores; call it before jax starts."""
  if hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    os.sched_setaffinity(0, cores)


def first(run: Run) -> float:
  """Seconds of the first call: tracing, compilation and one run."""
  begin = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - begin


def measure(run: Run, calls: int) -> Timing:
  """Mean seconds of `calls` calls."""
  cpu, wall = time.process_time(), time.perf_counter()
  for _ in range(calls):
    jax.block_until_ready(run())
  return Timing((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls)


class Program:
  """A jitted function compiled for arguments, to be called with others of their shapes.

  Attributes:
    seconds: what tracing and compiling took.
    bytes: the peak of its temporary memory.
    costs: both, as a row has them.
  """

  def __init__(self, function: Any, *args: Any, **options: Any):
    begin = time.perf_counter()
    self._compiled = function.lower(*args, **options).compile()
    self.seconds = time.perf_counter() - begin
    self.bytes = self._compiled.memory_analysis().temp_size_in_bytes
    self.costs = {'compile_seconds': round(self.seconds, 2),
                  'temporary_mib': round(self.bytes / 2**20, 2)}

  def __call__(self, *args: Any, **options: Any) -> Any:
    return self._compiled(*args, **options)


class Ours:
  """A side of a comparison that runs here; the first call of a `Program` includes compiling it."""

  def __init__(self, run: Run, program: Program | None = None):
    self.run, self.first = run, first(run) + (program.seconds if program else 0.0)

  def measure(self, calls: int) -> Timing:
    return measure(self.run, calls)


class Peer:
  """The other side: a script of `launch/peers` under another interpreter.

  It reads {"case": NAME, ...} and answers {"first": seconds, "check": values}, then
  {"calls": n} and answers {"cpu": seconds, "wall": seconds} per call, and leaves at the end of its
  input. A line with "error" is raised here.
  """

  def __init__(self, python: str, script: Path = PYTORCH):
    if not Path(python).is_file():
      raise FileNotFoundError(
          f'--peer_python={python} is no file; name an interpreter with torch and transformers.')
    threads = {f'{library}_NUM_THREADS': str(THREADS) for library in ('OMP', 'MKL', 'OPENBLAS')}
    # A spinning barrier makes torch 3-60 times slower as soon as another process takes a core.
    # Neither side keeps compiled programs: first calls are compared too.
    environment = {**os.environ, **threads, 'OMP_WAIT_POLICY': 'PASSIVE',
                   'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1'}
    self.process = subprocess.Popen(
        [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment, cwd=script.parent)
    self.versions = self.ask({'case': 'versions'})

  def ask(self, request: dict) -> dict:
    self.process.stdin.write(json.dumps(request) + '\n')
    self.process.stdin.flush()
    answer = json.loads(self.process.stdout.readline() or '{"error": "it ended"}')
    if 'error' in answer:
      raise RuntimeError(f'the peer failed at {request}: {answer["error"]}')
    return answer

  def prepare(self, case: str, **options: Any) -> dict:
    """Sets up one case; returns what the peer says of it."""
    answer = self.ask({'case': case, **options})
    self.first = answer['first']
    return answer

  def measure(self, calls: int) -> Timing:
    answer = self.ask({'calls': calls})
    return Timing(answer['cpu'], answer['wall'])

  def used(self) -> float:
    return self.ask({'case': 'used'})['cpu']

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait(timeout=30)

  def __enter__(self) -> 'Peer':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()


def compare(ours: Any, peer: Any, *, rounds: int, seconds: float = 0.5) -> dict:
  """Alternating rounds of about `seconds` a side; the ratios are ours over the peer's."""
  sides = (ours, peer)
  calls = [max(1, round(seconds / max(side.measure(1).wall, 1e-9))) for side in sides]
  found: list[tuple[Timing, Timing, float | None]] = []
  for i in range(rounds):
    order = (0, 1) if i % 2 == 0 else (1, 0)
    busy, used, begin = _busy(), _used(sides), time.perf_counter()
    timings = {k: sides[k].measure(calls[k]) for k in order}
    foreign = None
    if busy is not None:
      spent = _used(sides) - used
      foreign = max((_busy() - busy - spent) / (time.perf_counter() - begin), 0.0)
    found.append((timings[0], timings[1], foreign))
  quiet = [(a, b) for a, b, foreign in found if foreign is not None and foreign < QUIET]
  return {
      'cpu_ratio': spread([a.cpu / b.cpu for a, b, _ in found]),
      'wall_ratio_all': spread([a.wall / b.wall for a, b, _ in found]),
      'wall_ratio': spread([a.wall / b.wall for a, b in quiet]) if len(quiet) > 2 else None,
      'quiet_rounds': len(quiet), 'rounds': rounds,
      'our_time': summary(ours, [a for a, _, _ in found]),
      'peer_time': summary(peer, [b for _, b, _ in found]),
  }


def alone(ours: Any, *, rounds: int, seconds: float = 0.5) -> dict:
  """Our side where there is no peer: seconds, and no ratio."""
  calls = max(1, round(seconds / max(ours.measure(1).wall, 1e-9)))
  return {'our_time': summary(ours, [ours.measure(calls) for _ in range(rounds)])}


def summary(side: Any, timings: list[Timing]) -> dict:
  return {'first_seconds': round(side.first, 3),
          'cpu_seconds': spread([t.cpu for t in timings]),
          'wall_seconds': spread([t.wall for t in timings])}


def spread(values: list[float]) -> dict[str, float]:
  """Median and quartiles, to four digits."""
  low, middle, high = (
      statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3)
  return {name: float(f'{value:.4g}')
          for name, value in (('median', middle), ('q1', low), ('q3', high))}


def _used(sides: tuple) -> float:
  return time.process_time() + sum(side.used() for side in sides if isinstance(side, Peer))


def _busy() -> float | None:
  """Seconds that all processes of the machine have computed; None where nobody says."""
  try:
    fields = Path('/proc/stat').read_text().split('\n', 1)[0].split()[1:]
  except OSError:  # not Linux
    return None
  user, nice, system, _, _, irq, soft = map(int, fields[:7])
  return (user + nice + system + irq + soft) / os.sysconf('SC_CLK_TCK')


@dataclasses.dataclass(frozen=True)
class Row:
  """One comparison: what was timed, against whom, what came out, and the goal for the ratio."""
  case: str
  peer: str
  result: dict
  goal: float | None = None
  measure: str = 'cpu_ratio'

  def to_json(self) -> dict:
    met = None
    if self.goal is not None and self.measure in self.result:
      met = self.result[self.measure]['q3'] <= self.goal
    return {'case': self.case, 'peer': self.peer, 'measure': self.measure, 'goal': self.goal,
            'met': met, **self.result}


@dataclasses.dataclass(frozen=True)
class Bench:
  """What the cases share."""
  rounds: int
  seconds: float
  peer: 'Peer | None'
  folder: Path

  def against(self, case: str, **options: Any) -> dict | None:
    """Prepares the peer's side of a case; None without a peer."""
    return self.peer.prepare(case, **options) if self.peer else None

  def compare(self, ours: Any, other: Any) -> dict:
    return compare(ours, other, rounds=self.rounds, seconds=self.seconds)

  def run(self, ours: Any) -> dict:
    """Against the prepared peer, or alone."""
    if self.peer:
      return self.compare(ours, self.peer)
    return alone(ours, rounds=self.rounds, seconds=self.seconds)
