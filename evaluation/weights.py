"""Weight files of other projects, as arrays by name, without their libraries.

  safetensors, npz
  PyTorch         a state dict saved with torch.save, in its zip and in its older format
  TorchScript     the parameters and buffers of a module saved with torch.jit.save
  TensorFlow      the float constants of a frozen graph (.pb)

Files are data: sizes are bounded, and nothing in one is run (see `pickles`). What a file is, its
first bytes say and not its name.
"""

import dataclasses
import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from smalti.evaluation import graphdef, pickles
from smalti.evaluation.archive import Archive

LIMIT = 1 << 31  # bytes of a file, and of what it unpacks to; DINOv2-L has 1.2e9
ENTRIES, NAME = 20_000, 1000  # of a state dict, and characters of a name


Tensors = Mapping[str, np.ndarray]


class WeightFileError(ValueError):
  """A file that holds no weights we can read, or one that would do harm."""


@dataclasses.dataclass(frozen=True)
class WeightFile:
  """Arrays by name, and the hash of the file they are from."""
  path: Path
  sha256: str
  tensors: dict[str, np.ndarray]


def read(path: str | os.PathLike) -> WeightFile:
  """All arrays of a file.

  Raises:
    FileNotFoundError: no such file.
    WeightFileError: damaged, hostile, or of none of the formats above.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path} is not a file; name one that holds weights.')
  if (size := path.stat().st_size) > LIMIT:
    raise WeightFileError(f'{path} has {size} bytes; weights of more than {LIMIT} are not read.')
  data = path.read_bytes()
  try:
    tensors = _format(data)(path, data)
  except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError,
          EOFError, RuntimeError, OSError, zipfile.BadZipFile, SafetensorError) as error:
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    if reason.startswith(str(path)):  # an archive of numpy's, which said so itself
      raise WeightFileError(reason) from error
    raise WeightFileError(f'{path} holds no weights that can be read: {reason}; get the file '
                          'again, or one of another kind.') from error
  if not tensors:
    raise WeightFileError(f'{path} holds no tensors; name a file with the weights themselves.')
  return WeightFile(path, hashlib.sha256(data).hexdigest(), tensors)


def _format(data: bytes) -> Callable[[Path, bytes], dict[str, np.ndarray]]:
  if data.startswith(b'PK\x03\x04'):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      names = archive.namelist()
    return _npz if names and all(name.endswith('.npy') for name in names) else _torch_zip
  if data.startswith(b'\x80'):
    return _torch_legacy
  if data[8:9] == b'{' and int.from_bytes(data[:8], 'little') <= len(data) - 8:
    return lambda path, data: load_safetensors(data)
  if data.startswith(b'\n'):  # field 1 of a GraphDef
    return lambda path, data: graphdef.constants(data)
  raise ValueError('neither safetensors, npz, PyTorch nor a frozen TensorFlow graph')


def _npz(path: Path, data: bytes) -> dict[str, np.ndarray]:
  del data
  with Archive(path, 'weights', 'get the file again') as archive:
    _check_total(sum(archive.header(name).bytes for name in archive.names))
    return {name: archive.read(name) for name in archive.names}


def _check_total(size: int) -> None:
  if size > LIMIT:
    raise ValueError(f'it unpacks to {size} bytes, more than {LIMIT}')


# PyTorch. A tensor is a view of a storage: offset, shape and strides in elements.

_TYPES = {'Float': '<f4', 'Double': '<f8', 'Half': '<f2', 'Long': '<i8', 'Int': '<i4',
          'Short': '<i2', 'Char': 'i1', 'Byte': 'u1', 'Bool': '?'}
_STORAGE = re.compile(rf'torch(?:\.cuda)?\.({"|".join(_TYPES)})Storage')
_TENSOR = re.compile(
    rf'torch(?:\.cuda)?\.({"|".join(_TYPES)})Tensor|torch\.nn\.parameter\.Parameter')
_REBUILD = {'torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2'}
_LIST = re.compile(r'torch\.jit\._pickle\.(build_\w+list|restore_type_tag)')
_MODULE = '__torch__.'  # a class of TorchScript; its code is in the archive and is not read
_OTHERS = {'collections.OrderedDict', 'torch._utils._rebuild_parameter', 'torch.Size'}


def _known(name: str) -> bool:
  return bool(name in _REBUILD or name in _OTHERS or name.startswith(_MODULE)
              or any(pattern.fullmatch(name) for pattern in (_STORAGE, _TENSOR, _LIST)))


@dataclasses.dataclass(frozen=True)
class _View:
  dtype: np.dtype
  key: str
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _torch_zip(path: Path, data: bytes) -> dict[str, np.ndarray]:
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    members = {member.filename: member for member in archive.infolist()}
    roots = [name.removesuffix('data.pkl') for name in members
             if name.count('/') == 1 and name.endswith('/data.pkl')]
    if len(roots) != 1:
      raise ValueError('a zip archive with neither arrays nor one data.pkl')

    def content(name: str) -> bytes:
      member = members[roots[0] + name]
      if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f'{member.filename!r} is compressed or encrypted')
      return archive.read(member)

    if f'{roots[0]}byteorder' in members and content('byteorder') != b'little':
      raise ValueError('its numbers are not little-endian')
    views = dict(_views(pickles.read(content('data.pkl'), 0, _known).value))
    keys = {view.key for view in views.values()}
    _check_total(sum(members[f'{roots[0]}data/{key}'].file_size for key in keys))
    storages = {key: content(f'data/{key}') for key in keys}
  return _arrays(views, storages)


def _torch_legacy(path: Path, data: bytes) -> dict[str, np.ndarray]:
  """Five pickles (magic, version, system, object, keys), then size and content of each storage."""
  at, values = 0, []
  for _ in range(5):
    found = pickles.read(data, at, _known)
    values.append(found.value)
    at = found.end
    if values[0] != 0x1950A86A20F9469CFC6C:
      raise ValueError('a pickle, and not one of PyTorch')
    if len(values) == 4:
      types = {key: dtype for key, dtype in map(_storage, found.references)}
  _, version, system, value, keys = values
  if version != 1001 or not isinstance(system, dict) or system.get('little_endian') is not True:
    raise ValueError(f'version {version!r} or byte order')
  storages = {}
  for key in keys:
    size = int.from_bytes(data[at:at + 8], 'little') * types[key].itemsize
    if size > len(data) - at - 8:
      raise ValueError(f'storage {key!r} ends beyond the file')
    storages[key] = memoryview(data)[at + 8:at + 8 + size]
    at += 8 + size
  return _arrays(dict(_views(value)), storages)


def _views(value: Any) -> Iterator[tuple[str, _View]]:
  """The tensors of nested dicts and modules, by their dotted names."""
  pending, count = [('', value)], 0
  while pending:
    name, value = pending.pop()
    count += 1
    if count > ENTRIES or len(name) > NAME:
      raise ValueError(f'more than {ENTRIES} entries, or names of more than {NAME} characters')
    if isinstance(value, pickles.Call):
      if (view := _view(value)) is not None:
        yield name, view
      elif value.name.startswith(_MODULE):
        value = value.state
      elif value.name == 'collections.OrderedDict':
        value = {**dict(*value.arguments), **value.items}
    if isinstance(value, dict):
      prefix = f'{name}.' if name else ''
      pending += [(f'{prefix}{key}', inner) for key, inner in reversed(value.items())]


def _view(call: pickles.Call) -> _View | None:
  """The tensor that a call makes; None where it makes none."""
  arguments: tuple[Any, ...] = call.arguments
  if call.name in _REBUILD:
    return _checked(*arguments[:4])
  if call.name == 'torch._utils._rebuild_parameter':
    return _view(arguments[0])
  if _TENSOR.fullmatch(call.name):  # before 2018: the tensor is an argument, or in the state
    state: tuple[Any, ...] = call.state if isinstance(call.state, tuple) else ()
    if len(state) == 4:
      return _checked(*state)
    return _view(arguments[0] if arguments else state[0])
  return None


def _storage(reference: Any) -> tuple[str, np.dtype]:
  """The key of a storage, and the type of its numbers."""
  key: tuple[Any, ...] = reference.key if isinstance(reference, pickles.Reference) else ()
  if len(key) not in (5, 6) or key[0] != 'storage' or not isinstance(key[2], str):
    raise ValueError('a tensor without a storage')
  kind = _STORAGE.fullmatch(key[1])
  if not kind:
    raise ValueError(f'numbers of {key[1]!r}')
  return key[2], np.dtype(_TYPES[kind[1]])


def _checked(reference: Any, offset: Any, shape: Any, strides: Any) -> _View:
  key, dtype = _storage(reference)
  view = reference.key[5:]  # older files share storages through views: (key, offset, size)
  if view and view[0] is not None:
    offset += view[0][1]
  shape, strides = (tuple(s.arguments[0]) if isinstance(s, pickles.Call) else s
                    for s in (shape, strides))
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
    raise ValueError(f'a tensor of shape {shape!r} with strides {strides!r}')
  return _View(dtype, key, offset, shape, strides)


def _arrays(views: dict[str, _View], storages: dict[str, Any]) -> dict[str, np.ndarray]:
  arrays, total = {}, 0
  for name, view in views.items():
    if len(storages[view.key]) % view.dtype.itemsize:
      raise ValueError(f'{name!r} ends within a number')
    flat = np.frombuffer(storages[view.key], view.dtype)
    size = math.prod(view.shape)
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides))
    if size and (last >= len(flat) or size > len(flat)):
      raise ValueError(f'{name!r} of shape {view.shape} ends beyond its {len(flat)} values')
    total += size * view.dtype.itemsize
    _check_total(total)
    strides = tuple(s * view.dtype.itemsize for s in view.strides)
    arrays[name] = np.ascontiguousarray(np.lib.stride_tricks.as_strided(
        flat[view.offset:] if size else flat[:0], view.shape, strides)).reshape(view.shape)
  return arrays
