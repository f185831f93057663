"""Weight files: every format comes back number for number, and damaged or hostile ones are refused
in one line."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save as save_safetensors

from smalti.evaluation import weights
from smalti.evaluation.weights import WeightFileError

# What torch.save and torch.jit.save write, without torch: pickled values as opcodes.

MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {'f4': 'Float', 'f8': 'Double', 'f2': 'Half', 'i8': 'Long'}


def text(value: str) -> bytes:
  data = value.encode()
  return pickle.BINUNICODE + struct.pack('<I', len(data)) + data


def number(value: int) -> bytes:
  return pickle.BININT + struct.pack('<i', value)


def name(value: str) -> bytes:
  module, _, attribute = value.rpartition('.')
  return pickle.GLOBAL + f'{module}\n{attribute}\n'.encode()


def tuple_of(*values: bytes) -> bytes:
  return pickle.MARK + b''.join(values) + pickle.TUPLE


def dict_of(values: dict[str, bytes]) -> bytes:
  pairs = b''.join(text(key) + value for key, value in values.items())
  return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def call(function: str, *arguments: bytes) -> bytes:
  return name(function) + tuple_of(*arguments) + pickle.REDUCE


def ordered(values: dict[str, bytes]) -> bytes:
  pairs = b''.join(text(key) + value for key, value in values.items())
  return call('collections.OrderedDict') + pickle.MARK + pairs + pickle.SETITEMS


def storage(key: str, array: np.ndarray, *more: bytes) -> bytes:
  kind = name(f'torch.{KINDS[array.dtype.str[1:]]}Storage')
  return tuple_of(text('storage'), kind, text(key), text('cpu'), number(array.size),
                  *more) + pickle.BINPERSID


def tensor(key: str, array: np.ndarray, *more: bytes, offset: int = 0, shape=None, strides=None
           ) -> bytes:
  shape = array.shape if shape is None else shape
  if strides is None:
    strides = [int(np.prod(shape[i + 1:])) for i in range(len(shape))]
  return call('torch._utils._rebuild_tensor_v2', storage(key, array, *more), number(offset),
              tuple_of(*map(number, shape)), tuple_of(*map(number, strides)), pickle.NEWFALSE,
              call('collections.OrderedDict'))


def whole(value: bytes) -> bytes:
  return pickle.PROTO + b'\x02' + value + pickle.STOP


def zipped(value: bytes, arrays: dict[str, np.ndarray], *, order: bytes = b'little',
           compression: int = zipfile.ZIP_STORED) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', compression) as archive:
    archive.writestr('file/data.pkl', whole(value))
    archive.writestr('file/byteorder', order)
    for key, array in arrays.items():
      archive.writestr(f'file/data/{key}', array.tobytes())
    archive.writestr('file/version', b'3\n')
  return out.getvalue()


def legacy(value: bytes, arrays: dict[str, np.ndarray], magic: int = MAGIC) -> bytes:
  system = dict_of({'little_endian': pickle.NEWTRUE})
  keys = pickle.EMPTY_LIST + pickle.MARK + b''.join(map(text, arrays)) + pickle.APPENDS
  head = b''.join(map(whole, (pickle.LONG1 + b'\x0a' + magic.to_bytes(10, 'little'), number(1001),
                              system, value, keys)))
  return head + b''.join(struct.pack('<q', a.size) + a.tobytes() for a in arrays.values())


def state_dict(arrays: dict[str, np.ndarray]) -> tuple[bytes, dict[str, np.ndarray]]:
  """The pickled value and the storages of a state dict, as `zipped` and `legacy` take them."""
  keys = {name: str(i) for i, name in enumerate(arrays)}
  value = ordered({name: tensor(keys[name], array) for name, array in arrays.items()})
  return value, {keys[name]: array for name, array in arrays.items()}


RANDOM = np.random.default_rng(0)
ARRAYS = {'a.weight': RANDOM.normal(size=(3, 2, 2, 1)).astype(np.float32),
          'a.bias': RANDOM.normal(size=3), 'count': np.array(7),
          'empty': np.zeros((0, 3), np.float32),
          'half': RANDOM.normal(size=5).astype(np.float16)}


def npz(arrays):
  out = io.BytesIO()
  np.savez(out, **arrays)
  return out.getvalue()


FORMATS = {'safetensors': save_safetensors, 'npz': npz,
           'torch': lambda arrays: zipped(*state_dict(arrays)),
           'legacy': lambda arrays: legacy(*state_dict(arrays))}


def read(tmp_path, data):
  path = tmp_path / 'weights'
  path.write_bytes(data)
  return weights.read(path)


def refused(tmp_path, data, match):
  with pytest.raises(WeightFileError, match=match) as error:
    read(tmp_path, data)
  assert '\n' not in str(error.value) and len(str(error.value)) < 600


def same(found, want):
  assert list(found) == list(want)
  for name in want:
    assert (found[name].dtype, found[name].shape) == (want[name].dtype, want[name].shape)
    np.testing.assert_array_equal(found[name], want[name])


@pytest.mark.parametrize('kind', FORMATS)
def test_formats_come_back(kind, tmp_path):
  found = read(tmp_path, FORMATS[kind](ARRAYS))
  same(dict(sorted(found.tensors.items())), dict(sorted(ARRAYS.items())))
  assert len(found.sha256) == 64


@pytest.mark.parametrize('write', [zipped, legacy])
def test_views_of_a_shared_storage(write, tmp_path):
  x = np.arange(12, dtype=np.float32)
  value = dict_of({
      'part': tensor('0', x, offset=4, shape=(2, 3)),
      'turned': tensor('0', x, shape=(4, 3), strides=(1, 4)),
      'deep': ordered({'inner': tensor('0', x, shape=())}),
      'epoch': number(3), 'notes': text('none')})
  found = read(tmp_path, write(value, {'0': x})).tensors
  same(found, {'part': x[4:10].reshape(2, 3), 'turned': np.ascontiguousarray(x.reshape(3, 4).T),
               'deep.inner': x[0]})


def test_storages_of_files_before_2018(tmp_path):
  """Views of a storage, parameters, and tensors that are built from their state."""
  x = np.arange(6, dtype=np.float32)
  view = tuple_of(text('v'), number(2), number(3))
  old = (name('torch.FloatTensor') + pickle.EMPTY_TUPLE + pickle.NEWOBJ + tuple_of(
      storage('0', x), number(1), tuple_of(number(4)),
      tuple_of(number(1))) + pickle.BUILD)
  parameter = name('torch.nn.parameter.Parameter') + tuple_of(old) + pickle.NEWOBJ
  variable = (name('torch.nn.parameter.Parameter') + pickle.EMPTY_TUPLE + pickle.NEWOBJ
              + tuple_of(old, *[pickle.NONE] * 4) + pickle.BUILD)
  rebuilt = call('torch._utils._rebuild_parameter', tensor('0', x), pickle.NEWTRUE,
                       call('collections.OrderedDict'))
  found = read(tmp_path, legacy(dict_of({
      'view': tensor('0', x, view, shape=(3,)), 'old': old, 'parameter': parameter,
      'variable': variable, 'rebuilt': rebuilt}), {'0': x})).tensors
  same(found, {'view': x[2:5], 'old': x[1:5], 'parameter': x[1:5], 'variable': x[1:5],
               'rebuilt': x})


def test_modules_of_torchscript(tmp_path):
  x = np.arange(4, dtype=np.float32)

  def module(kind, **members):
    return (name(f'__torch__.{kind}') + pickle.EMPTY_TUPLE + pickle.NEWOBJ
            + dict_of(members) + pickle.BUILD)

  sizes = call('torch.jit._pickle.build_intlist',
                     pickle.EMPTY_LIST + number(3) + pickle.APPEND)
  value = module('Net', layers=module('torch.nn.Sequential', conv=module(
      'Conv', weight=tensor('0', x, shape=(2, 2)), strides=sizes, training=pickle.NEWFALSE)))
  same(read(tmp_path, zipped(value, {'0': x})).tensors,
       {'layers.conv.weight': x.reshape(2, 2)})


@pytest.mark.needs_data
@pytest.mark.parametrize(('net', 'taps'), [('alex', 5), ('vgg', 5), ('squeeze', 7)])
def test_files_that_torch_wrote_in_2018(net, taps):
  folder = os.path.join(os.environ['SMALTI_DATA_DIR'], 'weights')
  found = weights.read(f'{folder}/lpips-v0.1-{net}-lin.pth').tensors
  want = weights.read(f'{folder}/lpips-v0.1-lin.npz').tensors
  assert len(found) == taps
  for k in range(taps):
    np.testing.assert_array_equal(
        found[f'lin{k}.model.1.weight'].reshape(-1), want[f'{net}_lin{k}'])


X = np.arange(6, dtype=np.float32)
OUTSIDE = {'beyond': dict(shape=(7,)), 'offset': dict(offset=1, shape=(6,)),
           'strides': dict(shape=(2, 2), strides=(5, 1)),
           'repeated': dict(shape=(7,), strides=(0,)),
           'negative': dict(shape=(2,), strides=(-1,)), 'below': dict(offset=-1, shape=(2,)),
           'axes': dict(shape=(2,), strides=(1, 1))}


@pytest.mark.parametrize('write', [zipped, legacy])
@pytest.mark.parametrize('case', OUTSIDE)
def test_a_view_stays_within_its_storage(write, case, tmp_path):
  value = dict_of({'x': tensor('0', X, **OUTSIDE[case])})
  refused(tmp_path, write(value, {'0': X}), 'ends beyond|a tensor of shape')


def test_hostile_files(tmp_path):
  witness = tmp_path / 'witness'
  run = call('os.system', text(f'touch {witness}'))
  good = tensor('0', X)
  for write in (zipped, legacy):
    for value in (run, dict_of({'x': good, 'y': run}), ordered({'x': run})):
      refused(tmp_path, write(value, {'0': X}), "names 'os.system'")
    refused(tmp_path, write(call('torch.load', text('x')), {}), "names 'torch.load'")
    refused(tmp_path, write(name('torchvision.models.VGG') + pickle.EMPTY_TUPLE
                            + pickle.NEWOBJ, {}), 'names .torchvision.models.VGG')
    nested = good
    for _ in range(60):  # 2^60 entries, if they were counted out
      nested = dict_of({'a': nested + pickle.BINPUT + b'\x01', 'b': pickle.BINGET + b'\x01'})
    refused(tmp_path, write(nested, {'0': X}), 'more than 20000 entries')
    refused(tmp_path, write(number(1), {}), 'no tensors')
    refused(tmp_path, write(dict_of({'x': good}), {}), 'no weights')
  assert not witness.exists()
  value = dict_of({'x': good})
  refused(tmp_path, zipped(value, {'0': X}, order=b'big'), 'little-endian')
  refused(tmp_path, zipped(value, {'0': X}, compression=zipfile.ZIP_DEFLATED), 'compressed')
  refused(tmp_path, legacy(value, {'0': X}, magic=1), 'not one of PyTorch')
  refused(tmp_path, pickle.dumps({'x': 1}), 'not one of PyTorch')
  objects = io.BytesIO()
  np.savez(objects, x=np.array([print, None], object))
  refused(tmp_path, objects.getvalue(), 'object')
  refused(tmp_path, b'', 'neither')
  refused(tmp_path, b'GIF89a and so on', 'neither')
  with pytest.raises(FileNotFoundError, match='is not a file'):
    weights.read(tmp_path / 'absent')


def test_sizes_are_bounded(tmp_path, monkeypatch):
  big = {'x': np.zeros(5000, np.float32)}
  files = [FORMATS[kind](big) for kind in FORMATS]
  compressed = io.BytesIO()
  np.savez_compressed(compressed, **big)
  x = np.zeros(500, np.float32)
  views = zipped(dict_of({f'x{i}': tensor('0', x) for i in range(3)}), {'0': x})
  monkeypatch.setattr(weights, 'LIMIT', 4000)
  for data in files:
    refused(tmp_path, data, 'weights of more than 4000')
  assert len(compressed.getvalue()) < 4000
  refused(tmp_path, compressed.getvalue(), 'unpacks to')
  assert len(views) < 4000 < 3 * x.nbytes
  refused(tmp_path, views, 'unpacks to')


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of pickletools, on strange strings
@pytest.mark.parametrize('kind', FORMATS)
def test_damage_is_one_line(kind, tmp_path):
  """Any flipped byte and any truncation is read or refused, and never anything else."""
  data, random = FORMATS[kind](ARRAYS), np.random.default_rng(0)
  path, refusals = tmp_path / 'weights', 0
  for trial in range(250):
    damaged = bytearray(data)
    if trial % 5 == 0:
      damaged = damaged[:random.integers(len(data))]
    for _ in range(1 + trial % 3):
      if damaged:
        damaged[random.integers(len(damaged))] = random.integers(256)
    path.write_bytes(damaged)
    try:
      weights.read(path)
    except WeightFileError as error:
      refusals += 1
      assert '\n' not in str(error)
  assert refusals > 50
