"""Accumulators: what is counted is exact whatever the batches, the processes, the kills."""

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from smalti.evaluation import summary as summaries
from smalti.evaluation.entropy import inception_score
from smalti.evaluation.features import identity
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.manifold import manifold
from smalti.evaluation.summary import Accumulator, Summary, summarize

NAME = f'toy:{"0" * 64}:none'
N, KEEP = 217, 50


class Toy:
  """All three outputs, from the images' numbers: no batch size can change them."""
  name, sha256, dim, resize = 'toy', '0' * 64, 6, 'none'

  def __call__(self, images):
    x = np.asarray(images).reshape(len(images), -1)[:, :12].astype(np.float64)
    return {'features': (100 + np.sin(x[:, :6])).astype(np.float32),
            'logits': (3 * np.cos(x[:, 2:7])).astype(np.float32),
            'spatial': np.sin(x[:, 6:10] + 1).astype(np.float32)}


IMAGES = np.random.default_rng(0).integers(0, 256, (N, 2, 2, 3), np.uint8)
OUTPUTS = Toy()(IMAGES)


def rows(index):
  """A batch with those images; a number outside 0..N-1 is padding, and holds no number."""
  index = np.asarray(index)
  inside = (index >= 0) & (index < N)
  return {name: np.where(inside[:, None], values[np.clip(index, 0, N - 1)], np.nan)
          for name, values in OUTPUTS.items()}, index


def empty():
  return Accumulator(NAME, N, keep=KEEP, source='x')


def streamed(batches):
  total = empty()
  for index in batches:
    total.add(*rows(index))
  return total


def arrays(summary):
  out = {'features': summary.features}
  for name in ('moments', 'spatial', 'shuffled', 'consecutive'):
    part = getattr(summary, name)
    out |= {f'{name}.{field.name}': getattr(part, field.name)
            for field in dataclasses.fields(part) if field.name != 'extractor'}
  return out


def assert_same(a, b, tolerance=0):
  assert (a.n, a.extractor, a.source) == (b.n, b.extractor, b.source)
  a, b = arrays(a), arrays(b)
  assert a.keys() == b.keys()
  for name in b:
    if tolerance and name != 'features':
      np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)
    else:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope='module', autouse=True)
def small_blocks():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(summaries, 'BLOCK', 32)
    yield


@pytest.fixture(scope='module')
def expected(small_blocks):
  return streamed([np.arange(N)]).finish()


def test_the_definitions(expected):
  np.testing.assert_allclose(expected.moments.mean, OUTPUTS['features'].mean(0, np.float64),
                             rtol=1e-12)
  for name, moments in (('features', expected.moments), ('spatial', expected.spatial)):
    np.testing.assert_allclose(moments.covariance, np.cov(OUTPUTS[name].T.astype(np.float64)),
                               rtol=1e-10, atol=1e-12)
  order = np.random.RandomState(2020).permutation(N)
  np.testing.assert_array_equal(expected.features, OUTPUTS['features'][np.sort(order[:KEEP])])

  def score(logits, bounds):
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    return [np.exp((x * np.log(x / x.mean(0))).sum(1).mean()) for x in np.split(p, bounds)]

  splits = score(OUTPUTS['logits'][order], [i * N // 10 for i in range(1, 10)])
  assert inception_score(expected.shuffled) == pytest.approx(
      (np.mean(splits), np.std(splits)), rel=1e-10)
  assert inception_score(expected.consecutive)[0] == pytest.approx(
      score(OUTPUTS['logits'], [])[0], rel=1e-10)


@pytest.mark.parametrize('devices', [1, 8])
def test_devices_give_the_same_file(tmp_path, devices):
  """Images over 1 or 8 devices, outputs that stay there: the file is the host's, byte for byte."""
  mesh = jax.make_mesh((devices,), ('data',), devices=jax.devices()[:devices])
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  network = jax.jit(lambda x: {'features': x.reshape(len(x), -1).astype(jnp.float32) / 256})
  on_host, on_devices = (Accumulator(NAME, N, keep=KEEP) for _ in range(2))
  for start in range(0, N, 64):
    index = np.arange(start, start + 64)
    images = IMAGES[np.minimum(index, N - 1)]
    on_host.add({'features': images.reshape(64, -1).astype(np.float32) / np.float32(256)}, index)
    on_devices.add(network(jax.device_put(images, spread)), index)
  on_host.finish().save(tmp_path / 'host.npz')
  on_devices.finish().save(tmp_path / 'devices.npz')
  assert (tmp_path / 'devices.npz').read_bytes() == (tmp_path / 'host.npz').read_bytes()


def test_consecutive_splits(monkeypatch):
  monkeypatch.setattr(summaries, 'CONSECUTIVE', 100)
  assert streamed([np.arange(N)]).finish().consecutive.count.tolist() == [100, 100, 17]


@settings(max_examples=25, deadline=None, report_multiple_bugs=False)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(0, 9))
def test_batches_and_padding_do_not_change_a_bit(expected, sizes, padding):
  batches, start = [], 0
  while start < N:
    size = sizes[len(batches) % len(sizes)]
    batches.append([*range(start, min(start + size, N)), *[-1, N, N + 7] * padding])
    start += size
  assert_same(streamed(batches).finish(), expected)


@pytest.mark.parametrize('size', [64, 100])
def test_the_order_of_images_costs_nothing_but_rounding(expected, size):
  order = np.random.default_rng(size).permutation(N)
  assert_same(streamed(np.array_split(order, range(size, N, size))).finish(), expected, 1e-10)


@settings(max_examples=25, deadline=None, report_multiple_bugs=False)
@given(st.integers(1, 9), st.integers(0, 10_000))
def test_any_partition_over_processes_merges(expected, processes, seed):
  rng = np.random.default_rng(seed)
  owner = rng.integers(0, processes, N)  # some may own nothing
  parts = [streamed(np.array_split(np.flatnonzero(owner == p), rng.integers(1, 5)))
           for p in range(processes)]
  total = parts[0]
  for part in parts[1:]:
    total.merge(part)
  assert total.count == N
  assert_same(total.finish(), expected, 1e-10)


def test_parts_merge_through_files(expected, tmp_path):
  total = empty()
  for p in range(3):
    streamed([np.arange(p, N, 3)]).save(tmp_path / f'{p}.npz', 0)
    total.merge(Accumulator.resume(tmp_path / f'{p}.npz', NAME, N, keep=KEEP, source='x')[0])
  assert_same(total.finish(), expected, 1e-10)
  with pytest.raises(ValueError, match='Image 0 was counted by two parts'):
    total.merge(streamed([np.arange(5)]))
  with pytest.raises(ValueError, match='n=217 .now 9'):
    total.merge(Accumulator(NAME, 9, keep=KEEP, source='x'))


@pytest.mark.parametrize('size', [64, 100, 7])
def test_a_resume_anywhere_is_the_unbroken_run(expected, tmp_path, size):
  batches = np.array_split(np.arange(N), range(size, N, size))
  for stop in range(len(batches) + 1):
    streamed(batches[:stop]).save(tmp_path / 'part.npz', stop)
    total, cursor = Accumulator.resume(tmp_path / 'part.npz', NAME, N, keep=KEEP, source='x')
    assert (cursor, total.count) == (stop, sum(map(len, batches[:stop])))
    for index in batches[cursor:]:
      total.add(*rows(index))
    assert_same(total.finish(), expected)


KILLED = """
    import os, signal, sys
    import numpy as np
    from smalti.evaluation import archive, summary

    path, when = sys.argv[1], sys.argv[2]
    summary.BLOCK = 32
    outputs = dict(np.load(sys.argv[3]))
    total = summary.Accumulator(sys.argv[4], 217, keep=50, source='x')

    def die(*_):
      os.kill(os.getpid(), signal.SIGKILL)

    for batch, start in enumerate(range(0, 217, 10)):
      index = np.arange(start, min(start + 10, 217))
      total.add({name: values[index] for name, values in outputs.items()}, index)
      if batch == 6:  # at 30 %, inside a save
        if when == 'writing':
          original = np.savez
          def half(file, **arrays):
            original(file, **arrays)
            file.truncate(file.tell() // 2)
            file.flush()
            die()
          np.savez = half
        else:
          setattr(os, when, die)
      total.save(path, batch + 1)
"""


@pytest.mark.parametrize('when', ['writing', 'replace'])
def test_a_kill_inside_a_save(expected, tmp_path, when):
  path, outputs = tmp_path / 'part.npz', tmp_path / 'outputs.npz'
  np.savez(outputs, **OUTPUTS)
  done = subprocess.run([sys.executable, '-c', textwrap.dedent(KILLED), path, when, outputs, NAME])
  assert done.returncode == -signal.SIGKILL
  assert len(list(tmp_path.iterdir())) == 3  # the unfinished file is beside
  total, cursor = Accumulator.resume(path, NAME, N, keep=KEEP, source='x')
  assert (cursor, total.count) == (6, 60)  # the save before
  assert len(list(tmp_path.iterdir())) == 2
  for start in range(10 * cursor, N, 10):
    total.add(*rows(np.arange(start, min(start + 10, N))))
  found = total.finish()
  assert_same(found, expected)
  real = OUTPUTS['features'][:100]
  assert manifold(real=real, generated=found.features) == manifold(
      real=real, generated=expected.features)
  assert inception_score(found.shuffled) == inception_score(expected.shuffled)


def test_exactly_n_images_count():
  total = streamed([np.arange(100)])
  with pytest.raises(ValueError, match='100 of n=217 .* image 100 is the first of 117'):
    total.finish()
  for again in ([99], [150, 151, 150]):
    with pytest.raises(ValueError, match='was counted before'):
      total.add(*rows(again))
  assert total.count == 100  # a refused batch leaves nothing behind
  total.add(*rows(np.arange(100, N + 30)))
  assert total.finish().n == total.count == N


def test_what_add_refuses():
  total = streamed([np.arange(3)])
  outputs, index = rows([5, 6])
  outputs['spatial'][1, 2] = np.inf
  with pytest.raises(ValueError, match='The spatial of image 6 are not finite'):
    total.add(outputs, index)
  with pytest.raises(ValueError, match='dimensions'):
    total.add({'features': np.zeros((2, 7))}, index)
  with pytest.raises(ValueError, match='follow others'):
    total.add({'features': np.zeros((2, 6))}, index)
  with pytest.raises(ValueError, match='no features'):
    empty().add({'logits': np.zeros((2, 6))}, index)
  with pytest.raises(ValueError, match='must be .2, dimensions'):
    empty().add({'features': np.zeros((3, 6))}, index)
  with pytest.raises(ValueError, match='name:sha256:resize'):
    Accumulator('inception', 5)
  with pytest.raises(ValueError, match='n=0'):
    Accumulator(NAME, 0)


def test_what_resume_refuses(tmp_path):
  path = tmp_path / 'part.npz'
  streamed([np.arange(100)]).save(path, 3)
  with pytest.raises(ValueError, match='begun with n=217 .now 218.; delete it'):
    Accumulator.resume(path, NAME, 218, keep=KEEP, source='x')
  with pytest.raises(ValueError, match="source='x'"):
    Accumulator.resume(path, NAME, N, keep=KEEP, source='y')
  with pytest.raises(ValueError, match="kind 'accumulator', not 'summary'"):
    Summary.load(path)
  whole = path.read_bytes()
  for damaged in (whole[:-30], whole[:len(whole) // 2], b'',
                  whole[:3000] + bytes([whole[3000] ^ 4]) + whole[3001:]):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='part.npz holds no unfinished statistics') as error:
      Accumulator.resume(path, NAME, N, keep=KEEP, source='x')
    assert '\n' not in str(error.value)
  fields = dict(np.load(save_and_name(path)))
  for name, value in (('kept', fields['kept'][1:]), ('seen', fields['seen'][1:]),
                      ('moments_scatter', fields['moments_scatter'][1:]),
                      ('waiting_logits', fields['waiting_logits'][1:]),
                      ('shuffled_inner', fields['shuffled_inner'][1:]), ('format', 99),
                      ('moments_mean', fields['moments_mean'] * np.nan)):
    np.savez(path, **fields | {name: value})
    with pytest.raises(ValueError, match='part.npz holds no unfinished statistics'):
      Accumulator.resume(path, NAME, N, keep=KEEP, source='x')


def save_and_name(path):
  streamed([np.arange(100)]).save(path, 3)
  return path


def test_a_written_summary_is_the_same(expected, tmp_path):
  path = tmp_path / 'summary.npz'
  expected.save(path)
  again = Summary.load(path)
  np.testing.assert_array_equal(again.features, expected.features)
  assert (again.n, again.extractor, again.source, again.verified) == (N, NAME, 'x', True)
  other = streamed([np.arange(N)[::-1]]).finish().moments
  for a, b in ((again.moments, expected.moments), (again.spatial, expected.spatial)):
    np.testing.assert_array_equal(a.covariance, b.covariance)
  assert frechet_distance(other, again.moments) == frechet_distance(other, expected.moments)
  assert inception_score(again.shuffled) == inception_score(expected.shuffled)
  again.save(tmp_path / 'again.npz')
  assert (tmp_path / 'again.npz').read_bytes() == path.read_bytes()
  with np.load(path) as file:  # as the tools of others read it
    assert file['mu'].shape == (6,) and file['sigma'].shape == (6, 6)
  plain = Accumulator(NAME, 4)
  plain.add({'features': np.eye(4, 6)}, np.arange(4))
  plain.finish().save(path)
  found = Summary.load(path)
  assert found.spatial is found.shuffled is found.consecutive is None


def test_a_damaged_summary_is_refused(expected, tmp_path):
  path = tmp_path / 'summary.npz'
  expected.save(path)
  whole = path.read_bytes()
  for place in range(100, len(whole), 211):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1:])
    try:
      found = Summary.load(path)
    except ValueError as error:
      assert str(error).startswith(f'{path} holds no summary') and '\n' not in str(error)
    else:
      np.testing.assert_array_equal(found.moments.covariance, expected.moments.covariance)
      np.testing.assert_array_equal(found.features, expected.features)


@pytest.mark.parametrize('size', [64, 100, 217, 300])
def test_summarize(expected, size):
  batches = lambda n: (IMAGES[i:min(i + size, n)] for i in range(0, n, size))  # noqa: E731
  shapes = []

  class Watched(Toy):
    def __call__(self, images):
      shapes.append(len(images))
      return super().__call__(images)

  found = summarize(Watched(), batches(N), N, keep=KEEP)
  assert len(set(shapes)) == 1  # a compiled extractor sees one shape
  assert found.source != 'x' and len(found.source) == 16
  assert_same(dataclasses.replace(found, source='x'), expected)
  assert identity(Toy()) == found.extractor
  first = summarize(Toy(), batches(N), 100, keep=KEEP)
  assert first.n == 100 and first.source != found.source
  assert first.source == summarize(Toy(), batches(100), 100).source
  with pytest.raises(ValueError, match='100 of n=217'):
    summarize(Toy(), batches(100), N)


MEASURE = """
    import json, resource, sys
    import numpy as np
    from smalti.evaluation import reference, summary

    class Projection:
      name, sha256, dim, resize = 'projection', '0' * 64, 128, 'none'
      matrix = np.random.default_rng(0).normal(size=(32 * 32 * 3, 128)).astype(np.float32) / 1000

      def __call__(self, images):
        x = images.reshape(len(images), -1).astype(np.float32) @ self.matrix
        return {'features': x, 'logits': x[:, :100]}

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = summary.summarize(Projection(), reference.images(sys.argv[1], 100), int(sys.argv[2]))
    print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                      len(found.features)]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
  """Peak of 50,000 images of 32 x 32 beside that of 5,000: less than 60 MiB more."""
  path, peaks = tmp_path / 'samples.npz', {}
  rng = np.random.default_rng(0)
  np.savez(path, arr_0=rng.integers(0, 256, (50_000, 32, 32, 3), np.uint8))
  for n in (5_000, 50_000):
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(MEASURE), path, str(n)],
                          check=True, capture_output=True)
    _, peaks[n], kept = json.loads(done.stdout)
    assert kept == min(n, 10_000)
  unit = 1 if sys.platform == 'darwin' else 1024
  assert (peaks[50_000] - peaks[5_000]) * unit < 60 * 2**20, peaks
