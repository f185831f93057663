"""Checkpoints: exact round trips, and faults: flipped bits, lost files, kills, a full disk."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smalti.launch import manifest, state as states
from smalti.launch.checkpoint import CheckpointError, Checkpoints
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.gumbel import GumbelConfig
from smalti.tokenizers.quantizer import absorb
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.simvq import SimVQConfig
from smalti.tokenizers.sinkhorn import SinkhornConfig
from smalti.tokenizers.vq import VQConfig

SEED = 7


def state(seed=0, leaves=2, size=256):
  key = jax.random.key(seed)
  kernels = {f'block{i}': {'kernel': jax.random.normal(jax.random.fold_in(key, i), (size, 16))}
             for i in range(leaves)}
  return {
      'step': jnp.int32(seed), 'params': kernels, 'buffers': {},
      'ema': jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), kernels),
      'optimizer': {'count': jnp.uint32(3), 'mask': jnp.array([True, False]), 'none': {}}}


def abstract(tree, sharding=None):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding), tree)


def assert_equal(got, want):
  """Bitwise, and of the same structure and types."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(folder, steps=(1, 2), **options):
  checkpoints = Checkpoints(folder, **options)
  for step in steps:
    checkpoints.save(step, state(step), {'step': step}, {'loss': float(step)})
  checkpoints.close()
  return checkpoints


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  folder = tmp_path_factory.mktemp('original')
  saved(folder)
  return folder


@pytest.fixture
def folder(original, tmp_path):
  shutil.copytree(original, tmp_path / 'checkpoints')
  return tmp_path / 'checkpoints'


def listed(step_folder):
  """The files whose damage matters: those of the manifest, and the manifest."""
  return sorted(path for path in step_folder.rglob('*') if path.is_file() and not (
      path.parent == step_folder and path.name in manifest._LEFT_OUT))


# Round trips


def test_round_trip_is_bitwise(folder):
  checkpoints = Checkpoints(folder)
  assert checkpoints.steps() == [1, 2] and checkpoints.latest() == 2
  step, tree, item = checkpoints.restore_newest(abstract(state()))
  assert step == 2 and item == {'step': 2}
  assert_equal(tree, state(2))
  tree, item = checkpoints.restore(1, None)
  assert item == checkpoints.read_item(1) == {'step': 1}
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
  assert_equal(tree, state(1))


def test_part_is_restored_alone(folder):
  checkpoints = Checkpoints(folder)
  want = {'ema': state(2)['ema'], 'buffers': {}}
  part = checkpoints.restore_part(2, abstract(want))
  assert_equal(part, want)
  with pytest.raises(ValueError, match='no leaf emma/block0/kernel'):
    checkpoints.restore_part(2, {'emma': abstract(want['ema'])})


def test_empty_folder_has_nothing(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'none')
  assert checkpoints.steps() == []
  assert checkpoints.latest() is None and checkpoints.best() is None
  assert checkpoints.restore_newest(None) is None
  assert not (tmp_path / 'none').exists()  # reading makes nothing
  with pytest.raises(CheckpointError, match='not a committed checkpoint'):
    checkpoints.restore(3, None)


@pytest.mark.parametrize('devices', [1, 2, 8])
def test_restored_on_other_devices_bitwise(tmp_path, devices):
  def sharding(count, spec):
    mesh = jax.make_mesh((count,), ('fsdp',), axis_types=(AxisType.Auto,),
                         devices=jax.devices()[:count])
    return NamedSharding(mesh, spec)

  tree = {'params': state()['params'], 'ema': state()['ema']}
  for count in (1, 2, 8):
    placed = jax.device_put(tree, sharding(count, PartitionSpec('fsdp')))
    checkpoints = Checkpoints(tmp_path / str(count))
    checkpoints.save(1, placed, {})
    target = sharding(devices, PartitionSpec(None, 'fsdp'))
    got, _ = checkpoints.restore(1, abstract(tree, target))
    assert_equal(got, tree)
    assert all(leaf.sharding == target for leaf in jax.tree.leaves(got))
    checkpoints.close()


BOOK = dict(codes=16, dim=4)
CODEBOOKS = {
    'age': VQConfig(**BOOK, assignment=SinkhornConfig(epsilon=0.05, iterations=2, steps=2)),
    'temperature': GumbelConfig(**BOOK, steps=2),
    'basis': SimVQConfig(**BOOK),
    'levels': ResidualConfig(quantizer=VQConfig(**BOOK), levels=2),
}


@pytest.mark.parametrize('name', CODEBOOKS)
def test_a_tokenizer_that_learned_comes_back_into_another_bitwise(tmp_path, name):
  """The tokens, and the next step of training with its counts, sums and age."""
  config = AutoencoderConfig(image_size=(8, 8), channels=1, width=8, multipliers=(1,), blocks=0,
                             patch=4, quantizer=CODEBOOKS[name])
  x = jax.random.uniform(jax.random.key(1), (16, 8, 8, 1), minval=-1, maxval=1)
  z = jax.random.normal(jax.random.key(2), (16, 4, 4))

  @jax.jit
  def build(key):
    t = config.build(rngs=nnx.Rngs(key))
    t.quantizer.prepare(z, key=key)
    return t

  @jax.jit
  def step(t):
    out = t.quantizer(z, key=jax.random.key(3), train=True)
    absorb(t.quantizer, out.statistics)
    return t, (t.encode(x), out)

  learned, other = step(build(jax.random.key(0)))[0], build(jax.random.key(1))
  parts = dict(zip(('params', 'buffers'), states.Structure.of(learned).split(learned)))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, parts, {'spec': learned.spec.to_json()})
  shape = states.Structure.of(other)
  tree, item = checkpoints.restore(1, abstract(dict(zip(parts, shape.split(other)))))
  checkpoints.close()
  assert_equal(tree, parts)
  restored = shape.merge(**tree)
  assert item['spec'] == restored.spec.to_json()
  assert_equal(step(restored), step(learned))
  assert np.any(step(other)[1][0] != step(learned)[1][0])


def test_saved_arrays_may_be_donated(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  tree = {'a': jnp.arange(1 << 20, dtype=jnp.float32)}
  want = np.asarray(tree['a']).copy()
  step = jax.jit(lambda tree: {'a': tree['a'] * 0 - 1}, donate_argnums=0)
  checkpoints.save(1, tree, {})
  jax.block_until_ready(step(tree))
  assert np.array_equal(checkpoints.restore(1, None)[0]['a'], want)
  checkpoints.close()


def test_difference_names_the_leaf(folder):
  checkpoints = Checkpoints(folder)
  target = abstract(state())
  target['params']['block0']['kernel'] = jax.ShapeDtypeStruct((256, 16), jnp.bfloat16)
  with pytest.raises(ValueError, match=r'params/block0/kernel is float32\[256, 16\] .* bfloat16'):
    checkpoints.restore(2, target)
  target['params']['block0']['kernel'] = jax.ShapeDtypeStruct((256, 8), jnp.float32)
  with pytest.raises(ValueError, match=r'params/block0/kernel .* float32\[256, 8\]'):
    checkpoints.restore(2, target)
  del target['params']['block0']
  with pytest.raises(ValueError, match='has the leaf params/block0/kernel'):
    checkpoints.restore(2, target)


def test_other_format_is_refused(folder):
  path = folder / '2' / 'item' / 'metadata'
  content = json.loads(path.read_text())
  path.write_text(json.dumps(content | {'format': 2, 'smalti': '9.1'}))
  manifest.write(folder / '2')
  for call in (Checkpoints(folder).restore_newest, lambda _: Checkpoints(folder).read_item(2)):
    with pytest.raises(ValueError, match=r'format 2, written by smalti 9\.1'):
      call(None)


@pytest.mark.parametrize('bad', [{'a': [jnp.zeros(2)]}, {'a': (1, 2)}, {3: jnp.zeros(2)},
                                 {'a/b': jnp.zeros(2)}, {'a': 1}])
def test_state_must_be_a_nested_dict_of_arrays(tmp_path, bad):
  with pytest.raises(ValueError, match='nested dict of arrays|must be a string'):
    Checkpoints(tmp_path).save(1, bad, {})


def test_constructor_refuses():
  for options in ({'keep': 1}, {'keep_every': 0}, {'mode': 'best'}):
    with pytest.raises(ValueError, match=next(iter(options))):
      Checkpoints('x', **options)


# What is kept


def test_newest_and_best_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4, best='loss')
  # No metric at first, and a NaN: neither may be kept for ever or win.
  values = [None, float('nan'), 3., 5., 1., 50., 7., 8., 9.]
  for step, value in enumerate(values, 1):
    checkpoints.save(step, state(step), {}, {} if value is None else {'loss': value})
    checkpoints.wait()
    assert step in checkpoints.steps()
  assert checkpoints.steps() == [4, 5, 8, 9]  # multiples of four, the best, the newest two
  assert (checkpoints.best(), checkpoints.latest()) == (5, 9)
  checkpoints.close()
  again = Checkpoints(tmp_path, keep=2, keep_every=4, best='loss')
  assert again.best() == 5
  again.save(10, state(10), {}, {'loss': 2.})
  assert again.steps() == [4, 5, 8, 9, 10][0:2] + [8, 9, 10]
  again.save(11, state(11), {}, {'loss': .5})
  assert again.steps() == [4, 8, 10, 11] and again.best() == 11
  again.close()
  (tmp_path / '11' / 'item' / 'metadata').write_text('{')
  assert Checkpoints(tmp_path, best='loss').best() == 10
  assert Checkpoints(tmp_path, best='loss', mode='max').best() == 8


def test_older_step_is_refused_and_same_step_left_alone(folder):
  checkpoints = Checkpoints(folder)
  before = (folder / '2' / manifest.NAME).read_bytes()
  checkpoints.save(2, state(9), {})
  checkpoints.wait()
  assert (folder / '2' / manifest.NAME).read_bytes() == before
  with pytest.raises(ValueError, match='not newer than step 2'):
    checkpoints.save(0, state(0), {})
  checkpoints.close()


# Commit


def test_manifest_is_written_before_the_rename(tmp_path, monkeypatch):
  """The hook is Orbax's: pinned here, since a manifest after the rename could be lost by a kill."""
  seen, returned = [], threading.Event()
  write = manifest.write

  def held(path):
    seen.append(path)
    assert returned.wait(60), 'the save waited for the manifest: it is not asynchronous'
    time.sleep(0.3)  # long enough for a rename that does not wait for us
    assert path.exists() and not (tmp_path / '1').exists()
    write(path)
    assert not (tmp_path / '1').exists()

  monkeypatch.setattr(manifest, 'write', held)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state(), {})
  returned.set()
  checkpoints.close()
  assert seen == [tmp_path / '1.orbax-checkpoint-tmp'] and not seen[0].exists()
  # Nothing that matters came after the manifest.
  names = {path.relative_to(tmp_path / '1').as_posix() for path in listed(tmp_path / '1')}
  lines = (tmp_path / '1' / manifest.NAME).read_text().splitlines()[1:-1]
  assert names - {manifest.NAME} == {line.split(' ', 2)[2] for line in lines}
  assert manifest.damage(tmp_path / '1') is None


def test_folder_without_manifest_was_never_committed(folder):
  (folder / '2' / manifest.NAME).unlink()
  checkpoints = Checkpoints(folder)
  assert checkpoints.steps() == [1] and checkpoints.latest() == 1
  assert checkpoints.restore_newest(None)[0] == 1
  assert (folder / 'damaged-2').is_dir() and not (folder / '2').exists()
  checkpoints.save(2, state(2), {})  # the resumed run arrives there again
  assert checkpoints.latest() == 2
  checkpoints.close()


def test_async_error_is_raised_by_the_next_call(folder, monkeypatch):
  def fail(path):
    raise OSError(28, 'No space left on device', str(path))

  calls = {
      'save': lambda c: c.save(4, state(4), {}), 'wait': lambda c: c.wait(),
      'steps': lambda c: c.steps(), 'close': lambda c: c.close()}
  for call in calls.values():
    checkpoints = Checkpoints(folder)
    with monkeypatch.context() as patch:
      patch.setattr(manifest, 'write', fail)
      checkpoints.save(3, state(3), {})
      with pytest.raises(CheckpointError, match='step 3 could not be written .* free space'):
        call(checkpoints)
    assert checkpoints.steps() == [1, 2] and checkpoints.latest() == 2
  checkpoints.save(3, state(3), {})
  while not (folder / '3').exists():
    checkpoints.check()
    time.sleep(0.01)
  checkpoints.wait()
  assert checkpoints.steps() == [2, 3]
  assert not list(folder.glob('*tmp*'))


def test_error_that_is_no_full_disk_is_not_called_one(folder, monkeypatch):
  def fail(path):
    raise ZeroDivisionError('a mistake of ours')

  checkpoints = Checkpoints(folder)
  monkeypatch.setattr(manifest, 'write', fail)
  checkpoints.save(3, state(3), {})
  with pytest.raises(ZeroDivisionError):
    checkpoints.wait()
  assert checkpoints.steps() == [1, 2]


# Damage


def flip(path, rng):
  data = bytearray(path.read_bytes())
  position = rng.randrange(len(data) * 8)
  data[position // 8] ^= 1 << position % 8
  path.write_bytes(data)


def flips(folder, count, rng):
  """`count` single flipped bits, over all files of step 2 in turn; each is undone."""
  files = listed(folder / '2')
  for i in range(count):
    path = files[i % len(files)]
    before = path.read_bytes()
    flip(path, rng)
    yield path
    path.write_bytes(before)


def test_200_flipped_bits_are_noticed(folder):
  assert manifest.damage(folder / '2') is None
  kinds = set()
  for path in flips(folder, 200, random.Random(SEED)):
    reason = manifest.damage(folder / '2')
    assert reason is not None and path.name in reason
    kinds.add(path.name)
  assert manifest.damage(folder / '2') is None
  assert {manifest.NAME, '_METADATA', '_sharding', 'metadata', 'manifest.ocdbt'} <= kinds


def falls_back(folder, want):
  checkpoints = Checkpoints(folder)
  step, tree, item = checkpoints.restore_newest(abstract(state()))
  assert (step, item) == (1, {'step': 1})
  assert_equal(tree, want)
  assert checkpoints.latest() == 1
  (folder / 'damaged-2').rename(folder / '2')


@pytest.mark.parametrize('count', [16, pytest.param(200, marks=pytest.mark.slow)])
def test_flipped_bit_falls_back(folder, count):
  want = state(1)
  for _ in flips(folder, count, random.Random(SEED + 1)):
    falls_back(folder, want)


def test_every_file_lost_or_cut_is_noticed(folder):
  want = state(1)
  for i, path in enumerate(listed(folder / '2')):
    before = path.read_bytes()
    path.unlink()
    assert manifest.damage(folder / '2') is not None
    if i % 4 == 0:
      falls_back(folder, want)
    for size in {0, 1, len(before) // 2, len(before) - 1}:
      path.write_bytes(before[:size])
      assert manifest.damage(folder / '2') is not None
    if i % 4 == 1:
      falls_back(folder, want)
    path.write_bytes(before)
  assert manifest.damage(folder / '2') is None


def test_files_left_out_do_not_matter(folder):
  """Orbax finishes them after the manifest: nothing may be read from them."""
  rng = random.Random(SEED)
  for name in manifest._LEFT_OUT:
    path = folder / '2' / name
    before = path.read_bytes()
    for damage in ('lost', 'empty', 'flipped'):
      path.write_bytes(before if damage == 'flipped' else b'')
      if damage == 'flipped':
        flip(path, rng)
      elif damage == 'lost':
        path.unlink()
      checkpoints = Checkpoints(folder)
      step, tree, _ = checkpoints.restore_newest(abstract(state()))
      assert step == 2
      assert_equal(tree, state(2))
      checkpoints.save(3, state(3), {})
      checkpoints.close()
      shutil.rmtree(folder / '3')
      shutil.copytree(folder / '2', folder / '1', dirs_exist_ok=True)


def test_damage_is_reported_where_it_is_asked_for(folder, caplog):
  flip(next((folder / '2' / 'state' / 'd').iterdir()), random.Random(SEED))
  checkpoints = Checkpoints(folder)
  with pytest.raises(CheckpointError, match=r'is damaged: the content of state/d/.* changed'):
    checkpoints.restore(2, None)
  assert checkpoints.latest() == 1 and (folder / '2').is_dir()  # reading moves nothing
  assert checkpoints.read_item(2) == {'step': 2}  # the item is whole
  flip(folder / '2' / 'item' / 'metadata', random.Random(SEED))
  with pytest.raises(CheckpointError, match='is damaged: the content of item/metadata changed'):
    checkpoints.read_item(2)
  caplog.clear()
  checkpoints.restore_newest(None)
  assert 'set aside as damaged-2' in caplog.text


def test_no_whole_checkpoint_is_an_error_not_a_new_start(folder):
  for step in ('1', '2'):
    flip(folder / step / manifest.NAME, random.Random(SEED))
  with pytest.raises(CheckpointError, match='no checkpoint under .* is whole'):
    Checkpoints(folder).restore_newest(None)
  assert (folder / '1').is_dir() and (folder / '2').is_dir()


def test_set_aside_twice(folder):
  shutil.copytree(folder / '2', folder / 'damaged-2')
  (folder / '2' / manifest.NAME).unlink()
  Checkpoints(folder).restore_newest(None)
  assert (folder / 'damaged-2-2').is_dir()


def test_manifest_names_nothing_outside(tmp_path):
  (tmp_path / 'secret').write_text('x')
  (tmp_path / 'step').mkdir()
  (tmp_path / 'step' / 'file').write_text('x')
  manifest.write(tmp_path / 'step')
  path = tmp_path / 'step' / manifest.NAME
  body = path.read_bytes()[:-65].replace(b' file', b' ../secret')
  path.write_bytes(body + manifest.hashlib.sha256(body).hexdigest().encode() + b'\n')
  assert 'outside' in manifest.damage(tmp_path / 'step')
  for line in (b'x\n', b'0 1\n', b'0 -x file\n', b'\xff 1 file\n'):
    body = b'smalti manifest 1\n' + line
    path.write_bytes(body + manifest.hashlib.sha256(body).hexdigest().encode() + b'\n')
    assert 'is not a manifest' in manifest.damage(tmp_path / 'step')


@pytest.mark.filterwarnings('ignore:Sharding info not provided')
def test_orbax_alone_does_not_notice(folder):
  """Why there is a manifest; when this fails Orbax has learned to check."""
  rng, wrong = random.Random(SEED), 0
  path = max(listed(folder / '2'), key=lambda path: path.stat().st_size)
  before = path.read_bytes()
  for _ in range(20):
    flip(path, rng)
    try:
      tree = ocp.PyTreeCheckpointHandler().restore(folder / '2' / 'state')
      wrong += any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in zip(
          jax.tree.leaves(tree), jax.tree.leaves(state(2))))
    except ValueError:
      pass
    path.write_bytes(before)
  assert wrong > 0


# Kills and full disks: other processes


def run(code, *arguments, **options):
  return subprocess.Popen(
      [sys.executable, '-c', code, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, cwd=pathlib.Path(__file__).parent, **options)


LOOP = '''
import sys
import jax, jax.numpy as jnp
from smalti.launch.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
found = checkpoints.restore_newest(None)
step = found[0] if found else 0
if found:
  assert (found[1]['a']['kernel'] == step).all() and found[1]['step'] == step, found[1]
  assert found[2] == {'step': step}
while True:
  step += 1
  checkpoints.save(step, {'step': jnp.int32(step), 'a': {'kernel': jnp.full((256, 1024), step)}},
                   {'step': step})
'''


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, kills):
  """Whatever the moment: what is committed is whole, and the run goes on from the newest."""
  rng, folder, newest = random.Random(SEED), tmp_path / 'checkpoints', 0
  for _ in range(kills):
    process = run(LOOP, folder)
    start = time.monotonic()
    while not any((folder / str(newest + i)).exists() for i in (2, 3, 4, 5)):
      assert process.poll() is None, process.stdout.read()
      assert time.monotonic() - start < 100
      time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    assert len(steps) >= 2 and steps[-1] > newest
    assert all(manifest.damage(folder / str(step)) is None for step in steps)
    newest = checkpoints.latest()
    assert newest == steps[-1]
  step, tree, _ = Checkpoints(folder).restore_newest(None)
  assert step == newest and (tree['a']['kernel'] == step).all()
  assert not list(folder.glob('*tmp*')) and not list(folder.glob('damaged*'))


LIMIT = '''
import contextlib, gc, json, pathlib, resource, sys, threading
import jax, jax.numpy as jnp
from smalti.launch import manifest
from smalti.launch.checkpoint import CheckpointError, Checkpoints
checkpoints = Checkpoints(sys.argv[1])
# held while a thread starts; the collector may run just then
starting = getattr(threading, '_shutdown_locks_lock', contextlib.nullcontext())
def save(step, size=4096):
  key = jax.random.key(step)
  checkpoints.save(step, {'a': {'kernel': jax.random.bits(key, (size,))}}, {'text': 'x' * 9000})
  checkpoints.wait()
save(1)
save(2)
errors = []
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for step, limit in enumerate(map(int, sys.argv[3:]), 3):
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    save(step)
  except CheckpointError as error:
    errors.append(str(error))
  resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  with starting:
    gc.collect()
  assert checkpoints.steps() == [1, 2], checkpoints.steps()
  assert all(manifest.damage(f'{sys.argv[1]}/{step}') is None for step in (1, 2))
checkpoints.close()
checkpoints = Checkpoints(sys.argv[1])
assert checkpoints.restore_newest(None)[0] == 2
save(20)
assert checkpoints.steps() == [2, 20]
pathlib.Path(sys.argv[2]).write_text(json.dumps(errors))
'''


def test_write_that_the_kernel_refuses(tmp_path):
  """A limit of file size makes writes fail in the kernel, Tensorstore's as well as Python's."""
  limits = [0, 50, 200, 1000, 8000, 16000]
  process = run(LIMIT, tmp_path / 'checkpoints', tmp_path / 'report.json', *limits)
  output, _ = process.communicate(timeout=200)
  assert process.returncode == 0, output
  errors = json.loads((tmp_path / 'report.json').read_text())
  assert len(errors) == len(limits), output
  assert all(str(tmp_path) in error and 'free space' in error for error in errors)


FULL = '''
import ctypes, json, os, pathlib, sys
import jax, jax.numpy as jnp
from smalti.launch import manifest
from smalti.launch.checkpoint import CheckpointError, Checkpoints
folder, disk = pathlib.Path(sys.argv[1]), ctypes.CDLL(None)
checkpoints = Checkpoints(folder)
def save(step):
  key = jax.random.key(step)
  checkpoints.save(step, {'a': {'kernel': jax.random.bits(key, (4096,))}}, {'text': 'x' * 9000})
  checkpoints.wait()
save(1)
disk.full_disk_arm(os.fsencode(folder), 1 << 30)
save(2)
writes = disk.full_disk_disarm()
errors = []
for k in range(1, writes + 1):
  disk.full_disk_arm(os.fsencode(folder), k)
  try:
    save(2 + k)
  except CheckpointError as error:
    errors.append(str(error))
  disk.full_disk_disarm()
  assert checkpoints.steps() == [1, 2], checkpoints.steps()
  assert all(manifest.damage(folder / str(step)) is None for step in (1, 2))
checkpoints.close()
assert Checkpoints(folder).restore_newest(None)[0] == 2
assert sorted(path.name for path in folder.iterdir()) == ['1', '2']
save(99)
assert checkpoints.steps() == [2, 99]
pathlib.Path(sys.argv[2]).write_text(json.dumps({'writes': writes, 'errors': errors}))
'''


@pytest.mark.skipif(not sys.platform.startswith('linux') or shutil.which('cc') is None,
                    reason='needs a C compiler on Linux')
def test_disk_full_at_every_write(tmp_path):
  """ENOSPC from the k-th write on, for every k of one save, Tensorstore's writes included."""
  library = tmp_path / 'full_disk.so'
  subprocess.run(['cc', '-O1', '-shared', '-fPIC', '-o', library,
                  pathlib.Path(__file__).with_name('full_disk.c'), '-ldl'], check=True)
  process = run(FULL, tmp_path / 'checkpoints', tmp_path / 'report.json',
                env=os.environ | {'LD_PRELOAD': str(library)})
  output, _ = process.communicate(timeout=200)
  assert process.returncode == 0, output
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['writes'] > 20 and len(report['errors']) == report['writes'], output
  for error in report['errors']:
    assert 'No space left on device' in error and str(tmp_path) in error and 'free space' in error
  assert 'never retrieved' not in output, output  # Orbax's tracebacks beside our line


def test_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match='file.* make the folder writable'):
    Checkpoints(tmp_path / 'file' / 'checkpoints').save(1, state(), {})


# Several processes


TOGETHER = '''
import json, sys
import jax
address, index, folder, results = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from smalti.launch.checkpoint import CheckpointError, Checkpoints
from smalti.launch.signals import agreed
assert jax.device_count() == 8 and jax.local_device_count() == 4
mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec('fsdp'))
whole = NamedSharding(mesh, PartitionSpec())
def tree(step):
  kernel = np.arange(64 * 8, dtype=np.float32).reshape(64, 8) * step
  return {'step': jax.make_array_from_callback((), whole, lambda _: np.int32(step)),
          'kernel': jax.make_array_from_callback((64, 8), split, lambda i: kernel[i])}
abstract = {'step': jax.ShapeDtypeStruct((), np.int32, sharding=whole),
            'kernel': jax.ShapeDtypeStruct((64, 8), np.float32, sharding=split)}
report = {'agreed': [agreed(index == '1'), agreed(False)]}
checkpoints = Checkpoints(folder, best='loss')
found = checkpoints.restore_newest(abstract)
report['found'] = found and found[0]
if found:
  want = tree(found[0])
  for name in want:
    for a, b in zip(found[1][name].addressable_shards, want[name].addressable_shards):
      assert np.array_equal(a.data, b.data), name
start = found[0] if found else 0
for step in range(start + 1, start + 4):
  checkpoints.save(step, tree(step), {'step': step}, {'loss': float(step)})
report['steps'] = checkpoints.steps()
report['newest'], report['best'] = checkpoints.latest(), checkpoints.best()
checkpoints.close()
open(f'{results}/{index}.json', 'w').write(json.dumps(report))
'''


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
  """Two processes of four devices write together; one or two restore, and damage is agreed on."""
  folder = tmp_path / 'checkpoints'
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}

  def together():
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{probe.getsockname()[1]}'
    processes = [run(TOGETHER, address, i, folder, tmp_path, env=environment) for i in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], '\n'.join(outputs)
    reports = [json.loads((tmp_path / f'{i}.json').read_text()) for i in (0, 1)]
    assert reports[0] == reports[1]
    assert reports[0]['agreed'] == [True, False]
    return reports[0]

  report = together()
  assert report['found'] is None
  assert (report['steps'], report['newest'], report['best']) == ([1, 2, 3], 3, 1)
  one = Checkpoints(folder)  # restored by one process
  step, restored, item = one.restore_newest(None)
  assert (step, item) == (3, {'step': 3})
  assert np.array_equal(restored['kernel'].ravel(), np.arange(512, dtype=np.float32) * 3)
  flip(max(listed(folder / '3'), key=lambda path: path.stat().st_size), random.Random(SEED))
  report = together()  # restored by two
  assert report['found'] == 2 and report['steps'] == [1, 4, 5]
  assert (folder / 'damaged-3').is_dir()
