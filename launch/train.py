"""Trains a tokenizer or a generator: `smalti train --config=NAME[:size] --workdir=DIR`.

The same command again resumes. SIGTERM finishes the step, saves and exits with 75.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax

from smalti.launch import cli, locks, mesh as meshes
from smalti.launch.exits import Preempted
from smalti.launch.experiment import Experiment
from smalti.launch.job import Job
from smalti.launch.progress import Progress, say
from smalti.launch.signals import Preemption, agreed


def train(experiment: Experiment, workdir: str | pathlib.Path, *,
          init_from: str | None = None) -> dict[str, float]:
  """Runs `experiment` in `workdir` from its newest checkpoint, or from the start.

  Args:
    init_from: a run whose averaged weights a new run starts from, or PART=RUN for one part of
      the model; several are separated by commas.

  Returns:
    The last held-out metrics.

  Raises:
    ValueError: a config that cannot run, or that is not the one of `workdir`.
    Taken: another process trains in `workdir`.
    NonFinite: a loss, gradient or statistic was not finite; the state before it is kept.
    Preempted: SIGTERM or SIGINT; everything is saved.
  """
  workdir = pathlib.Path(workdir)
  with locks.hold(workdir, wait=True), Preemption() as preemption:
    job = Job(experiment, workdir, init_from)
    try:
      with jax.set_mesh(job.mesh):
        return loop(job, preemption)
    finally:
      job.close()


def loop(job: Job, preemption: Preemption) -> dict[str, float]:
  """The training loop. Metrics are read one step late, so that the device never waits for us."""
  experiment, tracker = job.experiment, job.tracker
  if job.step is None and job.start < experiment.steps:
    job.compile()
  progress = Progress(experiment.steps, 'step', job.start)
  batches = job.batches(job.start)
  waited, clock, logged, scores = 0.0, time.perf_counter(), job.start, {}
  pending = None
  try:
    for step in range(job.start + 1, experiment.steps + 1):
      before = time.perf_counter()
      batch = next(batches)
      waited += time.perf_counter() - before
      job.state, metrics = job.step(job.state, batch)
      if pending is not None:
        job.look(step - 1, pending)
      pending = metrics
      job.checkpoints.check()  # an asynchronous save that failed stops the run at once
      progress.advance()
      stop = preemption.requested if jax.process_count() == 1 else agreed(preemption.requested)
      last = step == experiment.steps or stop
      save = last or step % experiment.checkpoint.every == 0
      if last or save or step % experiment.log.every == 0 or step == job.start + 1:
        job.look(step, metrics)
        pending = None
        values = {k: float(v) for k, v in jax.device_get(metrics).items() if k != 'finite'}
        values['alarms'] = float(len(job.monitor.raised))
        now = time.perf_counter()
        each = (now - clock) / (step - logged)
        timing = {
            'rate': float(job.rate(step - 1)), 'seconds/step': each,
            'examples/second': experiment.batch_size / each,
            'seconds/data': waited / (step - logged)}
        if step == job.start + 1:
          timing['seconds/compile'] = job.compile_seconds
        tracker.log(step, {**values, **timing})
        progress.report(step, f'loss {values["loss"]:.4f}  {timing["examples/second"]:.0f} ex/s')
        waited, clock, logged = 0.0, time.perf_counter(), step
      tracked = save and experiment.checkpoint.best is not None
      pause = time.perf_counter()  # what follows is no part of a step
      if step % experiment.eval.every == 0 or (step == experiment.steps) or tracked:
        scores = job.evaluate()
        tracker.log(step, scores)
        say(f'held out, step {step}: ' + '  '.join(
            f'{k.removeprefix("eval/")} {v:.4f}' for k, v in scores.items()
            if k != 'eval/examples'))
      if save:
        job.save(_tracked(experiment, scores))
      clock += time.perf_counter() - pause
      if stop:
        job.checkpoints.wait()
        raise Preempted(f'Preempted at step {step}, and saved; run the same command to go on.')
    job.checkpoints.wait()
    return scores
  finally:
    progress.close()


def _tracked(experiment: Experiment, scores: dict[str, float]) -> dict[str, float]:
  """The metrics of a checkpoint: on every save or none."""
  best = experiment.checkpoint.best
  if best is None:
    return {}
  if best not in scores:
    raise ValueError(
        f'checkpoint.best={best!r} is not measured; held-out metrics are {", ".join(scores)}.')
  return scores


def define(values: Any) -> None:
  cli.define_config(values)
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run folder; the same again resumes.',
                      flag_values=values)
  flags.DEFINE_string('init_from', None, 'Start a new run from the weights of this run, or of '
                      'PART=RUN for one part; several with commas.',
                      flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Where the tokenizer of the config was moved to.',
                      flag_values=values)


def main(values: Any) -> int:
  if values.workdir is None:
    raise ValueError('train needs --workdir=DIR, the folder of the run.')
  meshes.distribute()
  experiment = values.config
  if values.tokenizer:
    experiment = dataclasses.replace(experiment, tokenizer=values.tokenizer)
  if experiment.deterministic:
    meshes.deterministic()
  train(experiment, values.workdir, init_from=values.init_from)
  return 0


if __name__ == '__main__':
  cli.run('train')
