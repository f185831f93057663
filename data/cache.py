"""The user's cache folder, and files written so that a reader never sees half of one."""

import contextlib
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import BinaryIO


def folder() -> pathlib.Path:
  """$SMALTI_CACHE_DIR, else smalti in $XDG_CACHE_HOME or in the home's .cache."""
  if chosen := os.environ.get('SMALTI_CACHE_DIR'):
    return pathlib.Path(chosen)
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(home) / 'smalti'


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file to write; it takes the place of `path` when the block ends without an exception."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.{threading.get_ident()}.tmp')
  try:
    with open(temporary, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
