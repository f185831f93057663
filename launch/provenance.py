"""Results with what is needed to repeat them: the one writer of docs/results/*.json.

A number in the README or in docs/ comes from a file written here, by the command that measured it.
Absolute paths are shortened to their last part: they mean nothing to the next reader.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smalti.evaluation.files import whole

FORMAT = 1
ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ('smalti', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')


class Clock:
  """Wall and processor time from here on."""

  def __init__(self):
    self._wall, self._cpu = time.perf_counter(), time.process_time()

  @property
  def seconds(self) -> float:
    return time.perf_counter() - self._wall

  @property
  def cpu_seconds(self) -> float:
    return time.process_time() - self._cpu


_CLOCK = Clock()


def record(
    path: str | os.PathLike,
    command: str | Sequence[str] | None,
    results: Any,
    *,
    libraries: Sequence[str] = (),
    clock: Clock | None = None,
    parts: Sequence[Mapping[str, Any]] = (),
    **extra: Any,
) -> dict:
  """Writes `results` to `path` as JSON together with their provenance, and returns the document.

  Args:
    command: what a reader types to repeat it; None takes this process's own arguments.
    results: anything JSON can hold; numpy and jax scalars and arrays are converted.
    libraries: distributions whose versions matter beyond the usual ones.
    clock: what was started with the measurement; None counts from the import of this module.
    parts: documents that `results` are a summary of, whose commits, time and days are named.
    **extra: further top-level entries (dataset, seeds, ...), which may not replace ours.
  """
  clock = clock or _CLOCK
  document = {
      'format': FORMAT,
      'command': _line(command),
      **_SOURCE,
      'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%dT%H:%M:%SZ'),
      'seconds': round(clock.seconds, 2),
      'cpu_seconds': round(clock.cpu_seconds, 2),
      'machine': machine(),
      'versions': versions((*LIBRARIES, *libraries)),
  }
  if parts:
    document = {**document, **joined(parts)}
    del document['cpu_seconds']
  if clash := sorted({*document, 'results'} & set(extra)):
    raise ValueError(f'extra entries {clash} are written by record itself; choose other names.')
  document = {**document, **extra, 'results': results}
  text = portable(json.dumps(document, indent=2, default=_plain, allow_nan=False)) + '\n'
  with whole(path) as file:
    file.write(text.encode())
  return json.loads(text)


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The commits of some documents, oldest first, all their seconds, and of the newest the rest."""
  parts = sorted(parts, key=lambda part: part['date'])
  commits = (commit for part in parts for commit in part.get('commits') or [_commit(part)])
  return {'commits': list(dict.fromkeys(commits)),
          **{name: parts[-1][name] for name in ('date', 'machine', 'versions')},
          'seconds': round(sum(part['seconds'] for part in parts), 2)}


def _commit(document: Mapping[str, Any]) -> str:
  return (document['commit'] or 'unknown')[:10] + (' and changes' if document['modified'] else '')


def commits(document: Mapping[str, Any]) -> str:
  """'commit 1234567890', or where it was made from parts of several, the first and the last."""
  found = document.get('commits') or [_commit(document)]
  if len(found) > 3:
    return f'{len(found)} commits from {found[0]} to {found[-1]}'
  return f'commit{"s" * (len(found) > 1)} {", ".join(found)}'


def portable(text: str) -> str:
  """Absolute paths in a text shortened to their last part: .../python."""
  return re.sub(r'(?<![\w.:/])/(?:[^\s/\'",;]+/)+', '.../', text)


def source() -> dict:
  """The commit this code is from, and whether the tree differed from it; None outside git."""
  top = _git('rev-parse', '--show-toplevel')
  if top is None or Path(top).resolve() != ROOT:
    return {'commit': None, 'modified': None}
  changes = _git('status', '--porcelain', '--untracked-files=no', '--', '.', ':!docs/results')
  return {'commit': _git('rev-parse', 'HEAD'), 'modified': bool(changes)}


def machine() -> dict:
  """Cores, processor family and, if jax runs already, its devices."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  found = {'cores': cores, 'platform': f'{platform.system()} {platform.machine()}'}
  if jax := sys.modules.get('jax'):
    devices = jax.devices()
    found.update(backend=jax.default_backend(), device=devices[0].device_kind, devices=len(devices))
  return found


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str | None]:
  """Installed versions by distribution name; None where one is absent."""
  found: dict[str, str | None] = {'python': platform.python_version()}
  for name in libraries:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def load(path: str | os.PathLike) -> Mapping[str, Any]:
  """A recorded document; refuses a format this version does not know."""
  document = json.loads(Path(path).read_text())
  if document.get('format') != FORMAT:
    raise ValueError(
        f'{path} has format {document.get("format")!r}, this version reads {FORMAT}; '
        f'it was written by smalti {document.get("versions", {}).get("smalti")}.')
  return document


def _line(command: str | Sequence[str] | None) -> str:
  """What a reader types, as one line."""
  if command is None:
    program = Path(sys.argv[0])
    module = ['python', '-m', f'smalti.launch.{program.stem}']
    command = [*(['smalti'] if program.name == 'smalti' else module), *sys.argv[1:]]
  return command if isinstance(command, str) else shlex.join(command)


def _git(*arguments: str) -> str | None:
  try:
    done = subprocess.run(
        ['git', '-C', str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
  except (OSError, subprocess.TimeoutExpired):  # no git here: a wheel install
    return None
  return done.stdout.strip() if done.returncode == 0 else None


# When the code is loaded: a commit made while it measures is not what it measures.
_SOURCE = source()


def _plain(value: Any) -> Any:
  if hasattr(value, 'tolist'):  # numpy and jax, arrays and scalars
    return value.tolist()
  if isinstance(value, os.PathLike):
    return Path(value).name
  raise TypeError(f'a result must be JSON, got {type(value).__name__}: {value!r}')
