"""Files that appear under their name only once they are complete."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A new file to write; it takes the name `path` when the block ends, and vanishes if it fails."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # not by the process: containers that share a folder number theirs alike
  part = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:12]}.part')
  try:
    with open(part, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
