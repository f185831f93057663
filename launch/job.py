"""A run from its mesh to its compiled step: what `launch/train.py` loops over."""

import dataclasses
import functools
import math
import operator
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import smalti
from smalti.data import pipeline
from smalti.evaluation.subset import subset
from smalti.generators.generator import GeneratorConfig
from smalti.launch import (
  codebooks,
  mesh as meshes,
  optimizer as optimizers,
  perceptual,
  run as runs,
  state as states,
  step as steps,
  teacher,
  warmstart,
)
from smalti.launch.checkpoint import Checkpoints
from smalti.launch.collapse import Monitor
from smalti.launch.exits import NonFinite
from smalti.launch.experiment import Experiment
from smalti.launch.progress import say
from smalti.launch.serialization import to_json
from smalti.launch.tracker import Tracker, redact


class Job:
  """What a run needs before its first step: mesh, data, model, state; then its compiled step."""

  def __init__(self, experiment: Experiment, workdir: pathlib.Path, init_from: str | None):
    self.experiment, self.workdir = experiment, workdir
    _check_counts(experiment)
    self.mesh = meshes.make(experiment.mesh)
    _check_batch(experiment, meshes.batch_devices(self.mesh))
    options = experiment.checkpoint
    workdir.mkdir(parents=True, exist_ok=True)
    self.checkpoints = Checkpoints(
        workdir / 'checkpoints', keep=options.keep, keep_every=options.keep_every,
        best=options.best, mode=options.mode)
    started = bool(self.checkpoints.steps())
    self.source = experiment.data.open('train')
    self.held_out = experiment.data.open('eval')
    self.tokenizer = _tokenizer(experiment, self.mesh, self.source)
    _check_tokens(self.source, self.tokenizer)
    self.spec = self.fingerprint = None
    if isinstance(experiment.model, GeneratorConfig):  # text is tokens without a tokenizer
      origin: Any = self.source if self.tokenizer is None else self.tokenizer
      self.spec, self.fingerprint = origin.spec, origin.fingerprint
    self.frozen = _frozen(experiment, self.tokenizer, self.mesh)
    changes = runs.check_config(workdir, experiment, started=started)
    self.build = functools.partial(runs.build, experiment.model, self.spec)
    self.structure = states.structure(lambda: self.build(_rngs(0)))
    self.optimizer = optimizers.make(
        experiment.optimizer, _discriminator(experiment), experiment.steps, experiment.fixed)
    self.rate = optimizers.schedule(experiment.optimizer, experiment.steps)
    self.state = self._state(init_from)
    runs.write_config(workdir, experiment, changes)  # what was refused above has changed nothing
    for change in changes or ():
      say(f'config: {change}')
    self.start = int(self.state['step'])
    if self.start >= experiment.steps:
      say(f'finished: {workdir} is at step {self.start} of {experiment.steps}')
    self.tracker = Tracker(
        workdir, wandb=experiment.log.wandb, project=experiment.log.project,
        config=redact(to_json(experiment)), resume_step=self.start)
    self.step: Any = None  # until `compile`
    self.monitor = monitor(self.structure.merge(self.state['params'], self.state['buffers']),
                            experiment.batch_size // experiment.accumulate)
    self._evaluate = jax.jit(functools.partial(steps.eval_step, structure=self.structure))

  def _state(self, init_from: str | None) -> dict:
    experiment = self.experiment
    init = functools.partial(
        states.init, self.build, self.optimizer, ema=experiment.ema is not None)
    key = states.stream(experiment.seed, 'init')
    abstract = jax.eval_shape(init, key)
    shardings = meshes.shardings(self.mesh, abstract)
    self.shardings = shardings
    found = self.checkpoints.restore_newest(jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings))
    if found:
      step, state, item = found
      runs.check_format(item, self.workdir)
      if item.get('fingerprint') != self.fingerprint:
        raise ValueError(
            f'{self.workdir} was trained on tokenizer {item.get("fingerprint")}, and '
            f'{experiment.tokenizer or "the data"} is {self.fingerprint}; name the old one with '
            '--config.tokenizer=RUN@STEP.')
      say(f'resume: step {step}')
      return state
    with jax.set_mesh(self.mesh):
      state = jax.jit(init, out_shardings=shardings, compiler_options=unoptimized())(key)
      copied = warmstart.copy(state, init_from) if init_from else set()
      model = self.structure.merge(state['params'], state['buffers'])
      warmstart.check_frozen(model, state['buffers'], copied)
      return self._prepare(state, copied)

  def _prepare(self, state: dict, copied: set[str]) -> dict:
    """Data-dependent initialisation from batch 0, sparing leaves that came from another run.

    A generator with `vectors` is given those of its tokenizer, whatever run the rest came from.
    """
    if not hasattr(self.structure.merge(state['params'], state['buffers']), 'prepare'):
      return state
    copied = copied - {'vectors'}

    def prepare(params, buffers, batch, key, frozen):
      model, given = self.structure.merge(params, buffers), steps.inputs(batch, frozen)
      if hasattr(model, 'vectors'):
        given = {**given, 'vectors': codebooks.vectors(frozen['tokenizer'])}
      model.prepare(given, key=key)
      return self.structure.split(model)

    batch = next(self.batches(0))
    outputs = self.shardings['params'], self.shardings['buffers']
    params, buffers = jax.jit(
        prepare, out_shardings=outputs, compiler_options=unoptimized())(
        state['params'], state['buffers'], batch, states.stream(self.experiment.seed, 'prepare'),
        self.frozen)
    keep = lambda path, old, new: old if _join(path) in copied else new  # noqa: E731
    params = jax.tree_util.tree_map_with_path(keep, state['params'], params)
    buffers = jax.tree_util.tree_map_with_path(keep, state['buffers'], buffers)
    average = jax.tree.map(jnp.copy, states.released(params)) if state['ema'] else {}
    return {**state, 'params': params, 'buffers': buffers, 'ema': average}

  def batches(self, start: int) -> Any:
    """Global arrays of training batches from step `start` on; batch i is a function of i."""
    experiment = self.experiment
    for rows in pipeline.batches(
        self.source, batch_size=experiment.batch_size, seed=experiment.seed, start=start,
        process=jax.process_index(), processes=jax.process_count(),
        augment=getattr(experiment.data, 'augment', None)):
      yield self._put(rows)

  def _put(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The rows on their devices. A label past the last row of a table would become the last."""
    classes = getattr(self.experiment.model, 'classes', 0)
    if classes and 'label' not in rows and isinstance(self.experiment.model, GeneratorConfig):
      raise ValueError(f'The data has no labels, and classes={classes}; set '
                       '--config.model.classes=0.')
    if classes and 'label' in rows and np.any(rows['label'] >= classes):
      raise ValueError(f'The data has label {rows["label"].max()}, and classes={classes}: labels '
                       'are 0..classes - 1; set --config.model.classes.')
    return meshes.put(self.mesh, rows)

  def compile(self) -> None:
    """Makes `step`, and `names` behind its `finite` flags; prints what a step will cost."""
    experiment = self.experiment
    step = functools.partial(
        steps.train_step, structure=self.structure, optimizer=self.optimizer,
        accumulate=experiment.accumulate, ema=experiment.ema)
    everywhere = meshes.replicated(self.mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, everywhere))
    key = jax.device_put(states.stream(experiment.seed, 'step'), everywhere)
    arguments = self.state, next(self.batches(self.start)), key, self.frozen
    begin = time.perf_counter()
    with jax.set_mesh(self.mesh):
      compiled = jitted.lower(*arguments).compile()
      _, rows, _, _ = arguments
      shapes = jax.eval_shape(self._loss, self.state['params'], self.state['buffers'], rows, key,
                              self.frozen)
    self.compile_seconds = time.perf_counter() - begin
    value, aux = shapes
    self.names = steps.guarded({'loss': value, **aux['metrics']}, self.state['params'],
                               aux['statistics'])
    memory = compiled.memory_analysis()
    size = lambda tree: sum(  # noqa: E731 - bytes on one device
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree))
    say(f'{type(experiment.model).__name__}: {states.count(self.state["params"]):,} parameters; '
        f'per device {_mib(size(self.state["params"]))} parameters, '
        f'{_mib(size(self.state["optimizer"]))} optimizer, {_mib(size(self.state["ema"]))} ema, '
        f'{_mib(memory.temp_size_in_bytes)} temporary; compiled in {self.compile_seconds:.1f} s')
    self.step = functools.partial(_call, compiled, key, self.frozen)

  def _loss(self, params, buffers, rows, key, frozen):
    return self.structure.merge(params, buffers).loss(
        {**steps.inputs(rows, frozen), **steps.networks(frozen)},
        step=jnp.zeros((), jnp.int32), key=key, train=True)

  def evaluate(self) -> dict[str, float]:
    """Held-out metrics of the averaged weights, each the mean over what its loss counts.

    The last, smaller batch is cut to a multiple of the batch devices; `eval/examples` says how
    many examples were used.
    """
    experiment, sums, total, examples = self.experiment, {}, 0.0, 0
    key = states.stream(experiment.seed, 'eval')
    params = {**self.state['params'], **self.state['ema']}
    size = min(experiment.batch_size, len(self.held_out))
    count = len(self.held_out) if experiment.eval.batches is None else min(
        len(self.held_out), experiment.eval.batches * size)
    chosen = subset(len(self.held_out), count)
    devices = meshes.batch_devices(self.mesh)
    for i, first in enumerate(range(0, count, size)):
      number = min(size, count - first) // devices * devices
      if not number:
        continue
      share = number // jax.process_count()
      offset = first + share * jax.process_index()
      index = chosen[offset:offset + share]
      rows = {**self.held_out.read(index), 'index': index.astype(np.int32)}
      weight, metrics = jax.device_get(self._evaluate(
          params, self.state['buffers'], self._put(rows), jax.random.fold_in(key, i),
          self.frozen))
      total, examples = total + weight, examples + number
      for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + float(value) * weight
    means = {f'eval/{name}': float(value / total) for name, value in sums.items()}
    return {**means, 'eval/examples': examples} if total else {}

  def save(self, metrics: dict[str, float]) -> None:
    """Starts an asynchronous save of the state; the caller has read the step's flags."""
    model = self.structure.merge(self.state['params'], self.state['buffers'])
    spec = self.spec or getattr(model, 'spec', None)
    item = {
        'format': runs.FORMAT, 'version': smalti.__version__,
        'config': redact(to_json(self.experiment)),
        'spec': spec and spec.to_json(),
        'fingerprint': self.fingerprint,
        'metrics': metrics,
    }
    self.checkpoints.save(int(self.state['step']), self.state, item, metrics)

  def look(self, step: int, metrics: dict) -> None:
    """Stops the run after a step that was not finite; says it when the codes collapse."""
    watched = {k: v for k, v in metrics.items() if k == 'finite' or k in self.monitor.limits}
    watched = jax.device_get(watched)
    check(step, watched, self.names)
    for alarm in self.monitor.see(watched):
      say(f'collapse, step {step}: {alarm}')

  def close(self) -> None:
    self.checkpoints.close()
    if hasattr(self, 'tracker'):
      self.tracker.finish()


def check(step: int, metrics: dict, names: list[str]) -> None:
  """Stops the run if a step was not finite: the state before it is untouched."""
  finite = np.asarray(jax.device_get(metrics['finite']))
  if finite.all():
    return
  bad = [name for name, fine in zip(names, finite) if not fine]
  terms = [name for name in bad if name.startswith('loss term')]
  shown = terms or bad
  raise NonFinite(
      f'Step {step} is not finite in {", ".join(shown[:6])}'
      f'{f" and {len(shown) - 6} more" if len(shown) > 6 else ""}; the update was not made and the '
      'last checkpoint is good: lower the rate, or look at the batch of this step.')


def monitor(model: Any, rows: int) -> Monitor:
  """Of a tokenizer's codes; generators and classifiers have none."""
  quantizer = getattr(model, 'quantizer', None)
  if quantizer is None:
    return Monitor((), 1)
  scales = np.diff(model.spec.budgets, prepend=0) if model.spec.order == 'scale' else ()
  return Monitor(quantizer.vocab, rows * model.spec.length, [rows * int(n) for n in scales])


def unoptimized() -> dict | None:
  """For programs that run once: on CPU, LLVM takes 15 times longer than the drawing of weights."""
  return {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None


def _call(compiled: Any, key: jax.Array, frozen: dict, state: dict, batch: dict) -> Any:
  try:
    return compiled(state, batch, key, frozen)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise ValueError(
        'Out of device memory; raise --config.accumulate or lower --config.batch_size.') from error


def _check_counts(experiment: Experiment) -> None:
  for name in ('steps', 'batch_size', 'accumulate', 'log.every', 'eval.every', 'eval.batches',
               'checkpoint.every'):
    value = operator.attrgetter(name)(experiment)
    if value is not None and value < 1:
      raise ValueError(f'{name}={value} must be 1 or more.')


def _check_batch(experiment: Experiment, devices: int) -> None:
  unit = devices * experiment.accumulate
  if experiment.batch_size % unit:
    nearest = max(unit, round(experiment.batch_size / unit) * unit)
    raise ValueError(
        f'batch_size={experiment.batch_size} must be a multiple of batch devices x accumulate = '
        f'{devices} x {experiment.accumulate}; the nearest is {nearest}.')


def _tokenizer(experiment: Experiment, mesh: jax.sharding.Mesh, source: Any
               ) -> runs.Loaded | None:
  """The generator's tokenizer, on every device; None where the data is tokens without one."""
  if not isinstance(experiment.model, GeneratorConfig):
    return None
  if experiment.tokenizer is None and hasattr(source, 'spec'):
    return None
  if experiment.tokenizer is None:
    raise ValueError('A generator needs --config.tokenizer=RUN, the run of a tokenizer.')
  loaded = runs.load(experiment.tokenizer)
  if not hasattr(loaded.model, 'encode'):
    raise ValueError(f'{experiment.tokenizer} is a {runs.kind(loaded.model)}; name a tokenizer '
                     'with --config.tokenizer=RUN.')
  return dataclasses.replace(loaded, model=_everywhere(loaded.model, mesh))


def _frozen(experiment: Experiment, tokenizer: runs.Loaded | None, mesh: jax.sharding.Mesh
            ) -> dict[str, Any]:
  """The networks that are arguments of the step, by name, on every device."""
  frozen = {} if tokenizer is None else {'tokenizer': tokenizer.model}
  for name, found in (('perceptual', perceptual.load(experiment.model)),
                      ('teacher', teacher.load(experiment.model))):
    if found is not None:
      frozen[name] = _everywhere(found, mesh)
  return frozen


def _everywhere(module: Any, mesh: jax.sharding.Mesh) -> Any:
  """A module with its leaves on every device."""
  structure = states.Structure.of(module)
  return structure.merge(*jax.device_put(
      jax.device_get(structure.split(module)), meshes.replicated(mesh)))


def _discriminator(experiment: Experiment) -> Any:
  """The discriminator's optimizer, which begins with the adversary; None without one.

  Raises:
    ValueError: it has a start of its own, or there is no discriminator.
  """
  adversary, options = getattr(experiment.model, 'adversary', None), experiment.discriminator
  if adversary is None:
    if options is not None:
      raise ValueError('The experiment has an optimizer for a discriminator and its model none; '
                       'give the model an adversary, or leave discriminator at none.')
    return None
  options = options or experiment.optimizer
  if options.start not in (0, adversary.start):
    raise ValueError(
        f'discriminator.start={options.start} is not the first step of the adversary '
        f'({adversary.start}); leave it at 0, which follows model.adversary.start.')
  return dataclasses.replace(options, start=adversary.start)


def _check_tokens(source: Any, tokenizer: runs.Loaded | None) -> None:
  mark = getattr(source, 'fingerprint', None)
  if mark is not None and tokenizer is not None and mark != tokenizer.fingerprint:
    raise ValueError(
        f'The stored tokens are of tokenizer {mark}, and the generator names {tokenizer.path} '
        f'({tokenizer.fingerprint}); tokenize again, or name the tokenizer they were made with.')


def _rngs(seed: int) -> Any:
  from flax import nnx
  return nnx.Rngs(seed)


def _join(path: Any) -> str:
  return '/'.join(str(entry.key) for entry in path)


def _mib(size: int) -> str:
  return f'{size / 2**20:.1f} MiB'
