"""Every test runs on the CPU, on eight simulated devices, with shapes checked and programs cached.

SMALTI_TYPECHECK=0 turns the shape checks off; JAX_ENABLE_COMPILATION_CACHE=0 the cache.
"""

import gc
import hashlib
import os
import platform
import resource
import sys
import types
import typing
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8').strip()
os.environ.setdefault('WANDB_MODE', 'offline')

FOLDERS = ('networks', 'tokenizers', 'generators', 'data', 'evaluation', 'launch')
DATA = os.environ.get('SMALTI_DATA_DIR')
CPU_MINUTES = 12  # what all tests together may take; the summary warns above it
CACHE_BYTES = 1 << 30
AREAS = 16_384  # of memory, from which on programs are forgotten


def cache_programs() -> None:
  """Keeps compiled programs in the user's cache folder; jax's key covers program, jaxlib and flags.

  The folder is per processor family, because a program uses the instructions of the machine that
  compiled it. A torn entry is detected by its checksum and compiled again. Settings go through the
  environment, so that processes which tests start use the cache too.
  """
  home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
  folder = home / 'smalti' / f'programs-{processor()}'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    entries = sorted((e.stat().st_mtime, e.stat().st_size, e.path) for e in os.scandir(folder))
    excess = sum(size for _, size, _ in entries) - CACHE_BYTES
    for _, size, path in entries:  # the oldest first
      if excess > 0:
        os.unlink(path)
        excess -= size
  except OSError:  # no home, a full disk, another run that cleans: tests work without a cache
    return
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')


def processor() -> str:
  """A hash of what instructions this machine has."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    features = next((x for x in lines if x.startswith(('flags', 'Features'))), '')
  except OSError:  # not Linux
    features = platform.processor()
  return hashlib.sha256(f'{platform.machine()} {features}'.encode()).hexdigest()[:8]


cache_programs()

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402


def check_shapes(function):
  """Checks what `function` says of arrays at every call, and nothing else it says.

  Axis letters must agree among the arguments and with the result; numpy's arrays may stand for
  jax's. Constructors are left out: transformations of pytrees rebuild them with leaves that are no
  arrays.
  """
  if function.__name__ == '__init__':
    return function
  function.__annotations__ = {
      name: _widen(said) for name, said in function.__annotations__.items() if _has_array(said)}
  return beartype(function, conf=BeartypeConf(is_pep484_tower=True))


def _is_array(annotation) -> bool:
  return isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)


def _has_array(annotation) -> bool:
  return _is_array(annotation) or any(map(_has_array, typing.get_args(annotation)))


def _widen(annotation):
  if _is_array(annotation):
    return annotation | annotation.dtype[np.ndarray, annotation.dim_str]
  parts = tuple(map(_widen, typing.get_args(annotation)))
  if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
    return typing.Union[parts]  # noqa: UP007
  return typing.get_origin(annotation)[parts] if _has_array(annotation) else annotation


if os.environ.get('SMALTI_TYPECHECK', '1') != '0':
  shapes = types.ModuleType('smalti_shapes')  # the import hook wants the checker by name
  shapes.check = check_shapes
  sys.modules[shapes.__name__] = shapes
  jaxtyping.install_import_hook([f'smalti.{f}' for f in FOLDERS], 'smalti_shapes.check')


def pytest_collection_modifyitems(items):
  skip = pytest.mark.skip(reason='SMALTI_DATA_DIR names no folder of data sets')
  for item in items:
    if 'needs_data' in item.keywords and not DATA:
      item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
  used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  minutes = sum(u.ru_utime + u.ru_stime for u in used) / 60
  terminalreporter.write_line(f'CPU time: {minutes:.1f} min')
  if minutes > CPU_MINUTES:
    terminalreporter.write_line(
        f'WARNING: the tests took more than {CPU_MINUTES} min of CPU time; shorten the slowest '
        'above, or mark them slow.', yellow=True)


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """Linux gives a process 65,530 areas of memory; three per program, and the last one crashes."""
  yield
  try:
    areas = Path('/proc/self/maps').read_bytes().count(b'\n')
  except OSError:  # not Linux
    return
  if areas > AREAS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture
def calls(monkeypatch):
  """calls(owner, name): a list that grows with every call; within jit, with every program.

  jit's own count of programs falls where its cache is full.
  """
  def watch(owner, name):
    seen, function = [], getattr(owner, name)

    def counted(*args, **options):
      seen.append(name)
      return function(*args, **options)

    monkeypatch.setattr(owner, name, counted)
    return seen

  return watch


@pytest.fixture
def unchecked():
  """No shape checks: for tests of the errors that users see, who do not run with checks."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)
