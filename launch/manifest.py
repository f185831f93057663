"""SHA-256 manifest of a folder: whether every file still holds what was written.

Orbax does not notice a flipped bit in array data (334 of 340 restored silently wrong, on every
storage option). One line per file, `digest size path`, and a last line with the digest of all
lines above it, so that a flipped bit in the manifest is noticed too.
"""

import hashlib
import os
import pathlib

from smalti.evaluation.files import whole

NAME = 'MANIFEST.sha256'
_HEADER = b'smalti manifest 1\n'
# Orbax finishes these two after the manifest; no array and no configuration is read from them.
_LEFT_OUT = ('_CHECKPOINT_METADATA', 'commit_success.txt')


def write(folder: str | os.PathLike) -> None:
  """Writes the manifest of all files in `folder`, atomically and flushed to the device."""
  folder = pathlib.Path(folder)
  lines = [_HEADER]
  for path in sorted(path for path in folder.rglob('*') if path.is_file()):
    name = path.relative_to(folder).as_posix()
    if name != NAME and name not in _LEFT_OUT:
      digest, size = _digest(path)
      lines.append(f'{digest} {size} {name}\n'.encode())
  body = b''.join(lines)
  with whole(folder / NAME) as file:
    file.write(body + hashlib.sha256(body).hexdigest().encode() + b'\n')


def identity(folder: str | os.PathLike) -> str:
  """What names the content of a folder: the digest of its manifest, in hex."""
  return hashlib.sha256((pathlib.Path(folder) / NAME).read_bytes()).hexdigest()


def damage(folder: str | os.PathLike, under: str = '') -> str | None:
  """What differs from the manifest of `folder`, in a few words; None if nothing does.

  Args:
    under: looks only at files whose path in the folder begins so.
  """
  folder = pathlib.Path(folder)
  try:
    data = (folder / NAME).read_bytes()
  except OSError as error:
    return f'its {NAME} cannot be read ({error.strerror})'
  body, last = data[:-65], data[-65:]
  if not body.startswith(_HEADER) or last != hashlib.sha256(body).hexdigest().encode() + b'\n':
    return f'its {NAME} is damaged'
  try:
    lines = [line.split(' ', 2) for line in body[len(_HEADER):].decode().splitlines()]
    entries = [(digest, int(size), name) for digest, size, name in lines]
  except ValueError:
    return f'its {NAME} is not a manifest'
  for digest, size, name in entries:
    if not name.startswith(under):
      continue
    relative = pathlib.PurePosixPath(name)
    if relative.is_absolute() or '..' in relative.parts:
      return f'its {NAME} names {name}, outside the folder'
    path = folder / relative
    try:
      # The size first: a truncated file need not be read.
      if path.stat().st_size != size:
        return f'{name} has {path.stat().st_size} bytes instead of {size}'
      if _digest(path)[0] != digest:
        return f'the content of {name} changed'
    except OSError as error:
      return f'{name} cannot be read ({error.strerror})'
  return None


def _digest(path: pathlib.Path) -> tuple[str, int]:
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return digest, file.tell()
