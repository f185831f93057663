"""Ratio tables of our parts, the named peers beside them: `smalti bench quantizers|generators|...`.

On two CPU cores, in alternating rounds; ratios are ours over the peer's CPU time, median and
quartiles of the rounds (`launch/timing.py`). Peers run under the interpreter of --peer_python,
which has torch and transformers. Results go to OUT/bench_NAME.json with what repeats them.
"""

import contextlib
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from absl import flags

from smalti.launch import cli, provenance, timing, trees
from smalti.launch.timing import Bench, Row


def quantizers(bench: Bench) -> Iterator[Row]:
  """Search, training steps, convolutions, and growth with the codebook."""
  from smalti.launch import bench_quantizers
  yield from bench_quantizers.quantizers(bench)


def generators(bench: Bench) -> Iterator[Row]:
  """Decoding and training steps of a Llama, parallel decoding, and growth with the length."""
  from smalti.launch import bench_generators
  yield from bench_generators.generators(bench)


def train(bench: Bench) -> Iterator[Row]:
  """The loop around the step, and compile time by depth."""
  for config in ('digits_vq', 'digits_fsq'):
    yield Row(f'training loop, {config}', 'its compiled step alone', _loop(bench, config), 1.05)
  yield Row('compile 24 scanned layers', 'compile 2 scanned layers',
            timing.compare(_Compile(24), _Compile(2), rounds=bench.rounds, seconds=0), 1.3)


def _loop(bench: Bench, config: str) -> dict:
  import jax

  from smalti.launch.exits import Preempted
  from smalti.launch.job import Job
  from smalti.launch.train import loop as training
  experiment = trees.load_config(config)
  # what costs by the step stays: data, logging, flags; evaluation and saving have their own cadence
  experiment.steps, experiment.checkpoint.best = 10**6, None
  experiment.checkpoint.every = experiment.eval.every = experiment.steps
  job: Any = Job(experiment, bench.folder / config, None)
  job.compile()
  job.compile, job.save = (lambda: None), (lambda metrics: None)  # once; not at all

  class After:
    """Asks for the end when it was looked at `calls` times."""

    def __init__(self, calls: int):
      self.left = calls

    @property
    def requested(self) -> bool:
      self.left -= 1
      return self.left <= 0

  def loop(calls: int) -> None:
    job.start, stop = int(job.state['step']), After(calls)
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere):
      with contextlib.suppress(Preempted):
        training(job, cast(Any, stop))

  batch = next(job.batches(0))

  def bare(calls: int) -> None:
    for _ in range(calls):
      job.state, metrics = job.step(job.state, batch)
    jax.block_until_ready((job.state, metrics))

  try:
    with jax.set_mesh(job.mesh):
      return timing.compare(_Counted(loop), _Counted(bare), rounds=bench.rounds,
                            seconds=5 * bench.seconds)
  finally:
    job.close()


class _Counted:
  """A side that repeats by itself: `run(calls)`."""

  def __init__(self, run: Callable[[int], None]):
    self.run = run
    self.first = timing.first(functools.partial(run, 2))

  def measure(self, calls: int) -> timing.Timing:
    found = timing.measure(functools.partial(self.run, calls), 1)
    return timing.Timing(found.cpu / calls, found.wall / calls)


class _Compile:
  """Tracing and compiling the gradient of a transformer of so many layers, each time anew."""

  def __init__(self, layers: int):
    from smalti.launch import llama
    self.layers, self.sizes = layers, llama.Sizes(layers=layers, width=128, heads=4, vocab=256)
    self.first = timing.first(self._compile)

  def measure(self, calls: int) -> timing.Timing:
    del calls
    return timing.measure(self._compile, 1)

  def _compile(self) -> None:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    jax.clear_caches()
    model = nnx.eval_shape(self.sizes.build)
    graph, params = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((2, self.sizes.length, 1), jnp.int32)

    def loss(params, tokens):
      value, _ = nnx.merge(graph, params).loss(
          {'tokens': tokens}, step=jnp.zeros((), jnp.int32), key=jax.random.key(0))
      return value

    jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()


def data(bench: Bench) -> Iterator[Row]:
  """The pipeline over arrays in memory."""
  import numpy as np

  from smalti.data import pipeline
  from smalti.data.arrays import ArraysSource
  random, batch = np.random.default_rng(0), 64
  images = random.integers(0, 256, (4096, 64, 64, 3), np.uint8)
  stream = pipeline.batches(ArraysSource({'image': images}), batch_size=batch, seed=0)

  def plain() -> Iterator[dict]:
    while True:
      for index in random.permutation(len(images)).reshape(-1, batch):
        yield {'image': images[index], 'index': index}

  generator = plain()
  result = bench.compare(timing.Ours(lambda: next(stream)['image']),
                         timing.Ours(lambda: next(generator)['image']))
  yield Row(f'batches of {batch} from memory, 64 x 64 x 3', 'numpy indexing', result, 2.0)


def checkpoint(bench: Bench) -> Iterator[Row]:
  """Save and restore of 256 MiB."""
  import jax
  import numpy as np

  from smalti.launch.checkpoint import Checkpoints
  random = np.random.default_rng(0)
  state = {f'array_{i}': jax.device_put(random.standard_normal((1448, 1448), np.float32))
           for i in range(32)}
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  checkpoints = Checkpoints(bench.folder / 'checkpoints')
  plain = bench.folder / 'arrays.npz'
  count = itertools.count(1)

  def save() -> None:
    checkpoints.save(next(count), state, {})
    checkpoints.wait()

  def load() -> dict:
    with np.load(plain, allow_pickle=False) as arrays:
      return {name: arrays[name] for name in arrays.files}

  def start() -> None:
    checkpoints.save(next(count), state, {})

  ours, other = timing.Ours(save), timing.Ours(lambda: np.savez(plain, **state))
  yield Row('save of 256 MiB, with its digests', 'np.savez', bench.compare(ours, other), 2.0,
            'wall_ratio_all')
  size = sum(p.stat().st_size for p in (
      bench.folder / 'checkpoints' / str(checkpoints.latest())).rglob('*') if p.is_file())
  restore = timing.Ours(lambda: checkpoints.restore(checkpoints.latest(), abstract)[0])
  yield Row('restore of 256 MiB, digests verified', 'np.load',
            bench.compare(restore, timing.Ours(load)), 2.0, 'wall_ratio_all')
  blocking = [(timing.measure(start, 1).wall, timing.measure(checkpoints.wait, 1).wall)
              for _ in range(bench.rounds)]
  share = timing.spread([a / (a + b) for a, b in blocking])
  yield Row('what a save blocks', 'the whole save', {'wall_ratio_all': share}, 0.25,
            'wall_ratio_all')
  bytes_ratio = size / sum(x.nbytes for x in state.values())
  yield Row('bytes on disk', 'bytes of the arrays',
            {'bytes_ratio': timing.spread([bytes_ratio])}, 1.05, 'bytes_ratio')
  checkpoints.close()


def extractors(bench: Bench) -> Iterator[Row]:
  """Images per second of every extractor: 128 images of 32 pixels, Inception at 299."""
  import numpy as np
  from flax import nnx

  from smalti.evaluation.inception import InceptionExtractor
  from smalti.launch import extractors as known
  from smalti.networks.inception import Inception
  images = np.random.default_rng(0).integers(0, 256, (128, 32, 32, 3), np.uint8)
  graph, state = nnx.split(Inception(rngs=nnx.Rngs(0)))
  cases: dict[str, Any] = {'inception:tf1': InceptionExtractor('0' * 64, 'tf1', graph, state)}
  for name in known.PACKAGED:
    if (known.FOLDER / f'{name}.safetensors').is_file():
      cases[name] = known.load(name)
  for name, extractor in cases.items():
    grey = images[..., :1] if name == 'mnist' else images
    result = timing.alone(timing.Ours(functools.partial(_features, extractor, grey)),
                          rounds=bench.rounds, seconds=bench.seconds)
    seconds = result['our_time']
    rates = {f'images_per_{clock}_second': round(128 / seconds[f'{clock}_seconds']['median'], 1)
             for clock in ('cpu', 'wall')}
    yield Row(f'{name}, 128 images of 32 pixels', '', {**result, **rates})


def _features(extractor: Any, images: Any) -> Any:
  return extractor(images)['features']


BENCHES = {'quantizers': quantizers, 'generators': generators, 'train': train, 'data': data,
           'checkpoint': checkpoint, 'extractors': extractors}


def define(values: flags.FlagValues) -> None:
  cli.define_choice(values, 'bench', list(BENCHES), 'What to time; all where none is named.')
  flags.DEFINE_string('out', 'runs/bench', 'The folder of results.', flag_values=values)
  flags.DEFINE_string('peer_python', None, 'An interpreter that has torch and transformers.',
                      flag_values=values)
  flags.DEFINE_integer('rounds', 7, 'Alternating rounds.', lower_bound=1, flag_values=values)
  flags.DEFINE_float('seconds', 1.0, 'Length of a side of a round.', flag_values=values)


def main(values: flags.FlagValues) -> int | None:
  timing.two_cores()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax
  jax.config.update('jax_enable_compilation_cache', False)  # first calls are reported as they are
  names = [values.bench] if values.bench else list(BENCHES)
  for name in names:
    with tempfile.TemporaryDirectory() as folder:
      peer = timing.Peer(values.peer_python) if values.peer_python else None
      try:
        bench = Bench(values.rounds, values.seconds, peer, Path(folder))
        rows = []
        for row in BENCHES[name](bench):
          rows.append(row.to_json())
          print(_line(rows[-1]), flush=True)
      finally:
        if peer:
          peer.close()
    path = Path(values.out) / f'bench_{name}.json'
    provenance.record(path, None, rows, rounds=values.rounds, threads=timing.THREADS,
                      peers=peer.versions if peer else None)
    print(f'written: {path}')
  return None


def _line(row: dict) -> str:
  ratio = row.get(row['measure'])
  if ratio is None:
    seconds = row['our_time']['cpu_seconds']['median'] if 'our_time' in row else float('nan')
    said = ''.join(f', {row[name]} {unit}' for name, unit in (
        ('images_per_wall_second', 'images/s'), ('vectors_per_cpu_second', 'vectors/s'),
        ('temporary_mib', 'MiB'), ('compile_seconds', 's to compile')) if name in row)
    return f'{row["case"]:<60} {seconds:9.4f} s of CPU time{said} (no peer)'
  goal = '' if row['goal'] is None else (
      f'  goal {row["goal"]:.2f} {"met" if row["met"] else "MISSED"}')
  return (f'{row["case"]:<60} {ratio["median"]:6.3f} [{ratio["q1"]:.3f}, {ratio["q3"]:.3f}] of '
          f'{row["peer"]}{goal}')


if __name__ == '__main__':
  cli.run('bench')
