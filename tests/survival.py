"""Kills training runs at seeded moments and compares what is left with a run nobody killed.

  python tests/survival.py      # half an hour on two cores; writes docs/results/survival.json

A tokenizer run (digits_vq), one against a discriminator (adversarial) and a generator run
(digits_masked) are each trained once undisturbed and once under ten SIGKILLs and ten SIGTERMs:
between steps, inside a checkpoint write, while the step compiles, while a checkpoint is restored,
during an evaluation. After every one all checkpoints must be whole, and SIGTERM must have saved the
last step and ended with 75. At the end every leaf and every logged loss must be those of the
undisturbed run, bit for bit. Then 200 bits are flipped in the files of a checkpoint, and the disk
is full from the first, the second, ... the tenth write of a checkpoint on.

The runs say in their log where they are ('@ write begins 35'); what a kill met is read from there
and from the folder left behind, never assumed.
"""

import argparse
import collections
import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
MOMENTS = ('write', 'step', 'compile', 'step', 'write', 'evaluation', 'restore', 'step', 'write',
           'step')  # repeated over the kills of one kind; `restore` needs a checkpoint to be there
SMALL = ('--config.batch_size=16', '--config.log.every=1', '--config.eval.every=20',
         '--config.eval.batches=2')


def child(arguments: list[str]) -> None:
  """`smalti train` that says where it is, and whose disk may be full."""
  from smalti.launch import checkpoint, cli, job, manifest, signals

  def say(text):
    os.write(2, f'@ {text}\n'.encode())

  def between(owner, name, begins, ends):
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
      say(begins)
      try:
        return function(*args, **kwargs)
      finally:
        say(ends)
    setattr(owner, name, wrapper)

  between(signals.Preemption, '__enter__', 'run enters', 'run begins')
  between(job.Job, 'compile', 'compile begins', 'compile ends')
  between(job.Job, 'evaluate', 'evaluation begins', 'evaluation ends')
  between(checkpoint.Checkpoints, '_read', 'restore begins', 'restore ends')
  between(manifest, 'write', 'manifest begins', 'manifest ends')
  save, full = checkpoint.Checkpoints.save, int(os.environ.get('SURVIVAL_FULL', 0))

  def saving(self, step, *args, **kwargs):
    say(f'write begins {step}')
    if full:
      ctypes.CDLL(None).full_disk_arm(os.fsencode(self.folder), full)
    save(self, step, *args, **kwargs)
  checkpoint.Checkpoints.save = saving
  sys.exit(cli.main(['train', *arguments]))


@dataclasses.dataclass
class Attempt:
  """One process of a run, and what is known about it from outside."""
  arguments: list[str]
  workdir: pathlib.Path
  log: pathlib.Path
  environment: dict

  def __post_init__(self):
    with open(self.log, 'wb') as log:
      self.process = subprocess.Popen(
          [sys.executable, __file__, 'child', *self.arguments, f'--workdir={self.workdir}'],
          stdout=log, stderr=log, env=os.environ | self.environment, cwd=self.workdir.parent)

  def said(self, text: str) -> int:
    return self.log.read_text(errors='replace').count(f'@ {text}')

  def inside(self, what: str) -> bool:
    return self.said(f'{what} begins') > self.said(f'{what} ends')

  def step(self) -> int:
    """The last whole line of metrics.jsonl."""
    path = self.workdir / 'metrics.jsonl'
    lines = path.read_bytes().split(b'\n')[:-1] if path.exists() else []
    return json.loads(lines[-1])['step'] if lines else 0

  def writing(self) -> list[str]:
    """The temporary folders of checkpoints that are being written."""
    return [p.name for p in (self.workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp')]

  def until(self, condition, seconds: float = 300) -> bool:
    """Waits; False if the process ended first."""
    end = time.monotonic() + seconds
    while not condition():
      if self.process.poll() is not None:
        return False
      if time.monotonic() > end:
        self.process.kill()
        raise TimeoutError(f'{self.log} never got there.')
      time.sleep(0.001)
    return True


def disturb(attempt: Attempt, number: int, moment: str, target: int, rng: random.Random) -> dict:
  """Sends the signal at the moment, waits for the end; says what it met."""
  reached = {
      'step': lambda: attempt.said('compile ends') and attempt.step() >= target,
      'write': lambda: any(int(name.split('.')[0]) >= target for name in attempt.writing()),
      'compile': lambda: attempt.inside('compile'),
      'restore': lambda: attempt.inside('restore'),
      'evaluation': lambda: attempt.inside('evaluation') and attempt.step() >= target,
  }[moment]
  if not attempt.until(lambda: attempt.said('run begins') and reached()):
    raise RuntimeError(f'{attempt.log}: ended with {attempt.process.returncode} before {moment}.')
  # Into the moment: the length of a write, a restore or a step is tens of milliseconds.
  time.sleep(rng.uniform(0, {'compile': 0.5, 'step': 0.05, 'write': 0.01}.get(moment, 0)))
  during = attempt.writing()
  start = time.monotonic()
  attempt.process.send_signal(number)
  if number == signal.SIGTERM:
    during = [name for name in attempt.writing() if name in during]
  attempt.process.wait(timeout=300)
  if number == signal.SIGKILL:
    during = attempt.writing()  # left behind: the proof
  # What the log says up to the handler's own line, or up to the end.
  log = attempt.log.read_text(errors='replace').split('SIGTERM: ')[0]
  inside = {what: log.count(f'@ {what} begins') > log.count(f'@ {what} ends')
            for what in ('compile', 'restore', 'evaluation')}
  inside |= {'write': bool(during), 'step': '@ compile ends' in log}
  return {'signal': signal.Signals(number).name, 'moment': moment, 'met': inside[moment],
          'write': bool(during), 'code': attempt.process.returncode,
          'seconds': round(time.monotonic() - start, 2)}


def whole(workdir: pathlib.Path) -> list[int]:
  """The steps there, after checking that each can be read."""
  from smalti.launch import manifest
  from smalti.launch.checkpoint import Checkpoints
  folder = workdir / 'checkpoints'
  steps = Checkpoints(folder).steps()
  for step in steps:
    reason = manifest.damage(folder / str(step))
    assert reason is None, f'{folder / str(step)}: {reason}'
  named = [int(path.name) for path in folder.glob('*') if path.name.isdigit()]
  assert sorted(named) == steps, f'{folder} holds {named}, of which only {steps} are committed'
  assert not list(folder.glob('damaged*')), f'{folder}: a kill damaged a checkpoint'
  return steps


def leaves(workdir: pathlib.Path, step: int) -> dict[str, str]:
  """SHA-256 of every leaf of a checkpoint."""
  import jax
  import numpy as np

  from smalti.launch.checkpoint import Checkpoints
  tree, _ = Checkpoints(workdir / 'checkpoints').restore(step, None)
  return {jax.tree_util.keystr(path): hashlib.sha256(
      f'{leaf.dtype}{leaf.shape}'.encode() + np.ascontiguousarray(leaf).tobytes()).hexdigest()
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def losses(workdir: pathlib.Path) -> dict[int, dict]:
  """What each step logged but its times; twice the same step is an error."""
  found: dict[int, dict] = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    values = json.loads(line)
    if 'loss' in values:
      assert values['step'] not in found, f'{workdir} logged step {values["step"]} twice'
      found[values['step']] = {name: value for name, value in values.items()
                               if not name.startswith(('seconds', 'examples'))}
  return found


def finish(arguments, workdir: pathlib.Path, log: pathlib.Path, environment: dict) -> None:
  attempt = Attempt(arguments, workdir, log, environment)
  if attempt.process.wait(timeout=1200):
    raise RuntimeError(f'{log}: {log.read_text(errors="replace")[-2000:]}')


def kill_run(name: str, arguments: list[str], scratch: pathlib.Path, *,
             plan: list[tuple[int, str]], steps: int, every: int, seed: int,
             environment: dict) -> dict:
  """One run under the signals and moments of `plan`, against the same run left alone."""
  rng = random.Random(f'{seed} {name}')
  straight, killed = scratch / f'{name}-straight', scratch / f'{name}-killed'
  arguments = [*arguments, *SMALL, f'--config.steps={steps}', f'--config.checkpoint.every={every}']
  finish(arguments, straight, scratch / f'{name}-straight.log', environment)
  events, newest = [], 0
  for i, (number, moment) in enumerate(plan):
    target = max(1, (i + 1) * steps // (len(plan) + 1) + rng.randint(-1, 1))
    attempt = Attempt(arguments, killed, scratch / f'{name}-{i:03}.log', environment)
    event = disturb(attempt, number, moment, target, rng)
    checkpoints, logged = whole(killed), attempt.step()
    now = checkpoints[-1] if checkpoints else 0
    assert now >= newest, f'{attempt.log}: went back from step {newest} to {now}'
    if number == signal.SIGTERM:
      assert event['code'] == 75, f'{attempt.log}: ended with {event["code"]}, not 75'
      assert now == logged, f'{attempt.log}: at step {logged}, but saved {now}'
      assert event['seconds'] < 30, f'{attempt.log}: took {event["seconds"]} s to end'
    else:
      assert event['code'] == -signal.SIGKILL, f'{attempt.log}: ended with {event["code"]}'
      assert logged - now <= 2 * every, f'{attempt.log}: step {logged}, checkpoint {now}'
    newest = now
    events.append({**event, 'step': logged, 'checkpoint': now})
    print(name, events[-1], flush=True)
  finish(arguments, killed, scratch / f'{name}-last.log', environment)
  want, got = leaves(straight, steps), leaves(killed, steps)
  different = sorted(path for path in want.keys() | got.keys() if want.get(path) != got.get(path))
  assert not different, f'{name}: leaves that differ from the undisturbed run: {different}'
  assert losses(killed) == losses(straight), f'{name}: logged losses differ'
  met = collections.Counter(event['moment'] for event in events if event['met'])
  terms = [event['seconds'] for event in events if event['signal'] == 'SIGTERM']
  return {
      'arguments': [a.replace(f'{scratch}/', '') for a in arguments],
      'kills': len(events), 'met': dict(met),
      'inside_a_write': sum(event['write'] for event in events),
      'unreadable': 0, 'leaves': len(want), 'leaves_different': 0,
      'steps_lost_by_sigterm': 0, 'slowest_sigterm_seconds': max(terms),
      'most_steps_lost_by_sigkill': max(
          event['step'] - event['checkpoint'] for event in events if event['signal'] == 'SIGKILL'),
      'events': events}


def flip_bits(workdir: pathlib.Path, scratch: pathlib.Path, *, count: int, seed: int) -> dict:
  """Single flipped bits over all files of the newest checkpoint: each noticed, the older used."""
  from smalti.launch import manifest
  from smalti.launch.checkpoint import Checkpoints
  folder = scratch / 'flipped'
  shutil.copytree(workdir / 'checkpoints', folder)
  older, newest = Checkpoints(folder).steps()[-2:]
  want = leaves(workdir, older)
  rng = random.Random(f'{seed} flips')
  files = sorted(path for path in (folder / str(newest)).rglob('*') if path.is_file()
                 and path.relative_to(folder / str(newest)).as_posix() not in manifest._LEFT_OUT)
  for i in range(count):
    path = files[i % len(files)]
    before = path.read_bytes()
    data = bytearray(before)
    at = rng.randrange(8 * len(data))
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)
    step, _, _ = Checkpoints(folder).restore_newest(None)
    assert step == older, f'bit {at} of {path} went unnoticed'
    (folder / f'damaged-{newest}').rename(folder / str(newest))
    path.write_bytes(before)
  (scratch / 'flipped-run').mkdir()
  folder.rename(scratch / 'flipped-run' / 'checkpoints')
  assert leaves(scratch / 'flipped-run', older) == want
  return {'flips': count, 'files': len(files), 'unnoticed': 0}


def fill_disk(workdir: pathlib.Path, arguments: list[str], scratch: pathlib.Path, *, writes: int,
              steps: int, every: int, environment: dict) -> dict:
  """A run whose disk is full from the k-th write of its checkpoint on, for k = 1, 2, ..."""
  library = scratch / 'full_disk.so'
  subprocess.run(['cc', '-O1', '-shared', '-fPIC', '-o', library,
                  HERE / 'launch' / 'full_disk.c', '-ldl'], check=True)
  full = scratch / 'full-disk'
  shutil.copytree(workdir, full)
  before = whole(full)
  arguments = [*arguments, *SMALL, f'--config.steps={steps + every}',
               f'--config.checkpoint.every={every}']
  for k in range(1, writes + 1):
    log = scratch / f'full-disk-{k:02}.log'
    attempt = Attempt(arguments, full, log, environment | {
        'SURVIVAL_FULL': str(k), 'LD_PRELOAD': str(library)})
    code = attempt.process.wait(timeout=300)
    said = [line for line in log.read_text().splitlines() if line.startswith('smalti: ')]
    assert code == 2 and len(said) == 1, f'{log}: ended with {code}, said {said}'
    assert str(full) in said[0] and 'No space left' in said[0] and 'free space' in said[0], said
    assert whole(full) == before, f'{log}: {before} became {whole(full)}'
    print('full disk', k, code, flush=True)
  finish(arguments, full, scratch / 'full-disk-last.log', environment)
  assert whole(full)[-1] == steps + every
  return {'writes': writes, 'earlier_checkpoints_lost': 0, 'exit_code': 2}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=10, help='of either signal, per run')
  parser.add_argument('--steps', type=int, default=240)
  parser.add_argument('--every', type=int, default=5, help='steps between checkpoints')
  parser.add_argument('--flips', type=int, default=200)
  parser.add_argument('--writes', type=int, default=10, help='k = 1..writes of the full disk')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', default='docs/results/survival.json')
  options = parser.parse_args()
  from smalti.launch import provenance
  clock = provenance.Clock()
  scratch = pathlib.Path(tempfile.mkdtemp(prefix='survival-'))
  environment = compiled_once(scratch)
  size = {'steps': options.steps, 'every': options.every, 'environment': environment}
  vq, adversarial = ['--config=digits_vq:debug'], ['--config=adversarial:debug']
  masked = ['--config=digits_masked:debug',
            f'--config.tokenizer={scratch / "digits_vq-straight"}']
  plan = [(number, MOMENTS[i % len(MOMENTS)]) for i in range(options.kills)
          for number in (signal.SIGKILL, signal.SIGTERM)]
  results = {}
  runs = {'digits_vq': vq, 'adversarial': adversarial, 'digits_masked': masked}
  for name, arguments in runs.items():
    results[name] = kill_run(
        name, arguments, scratch, plan=plan, seed=options.seed, **size)
  results['flipped_bits'] = flip_bits(
      scratch / 'digits_vq-straight', scratch, count=options.flips, seed=options.seed)
  results['full_disk'] = fill_disk(
      scratch / 'digits_vq-straight', vq, scratch, writes=options.writes, **size)
  for name in runs:  # a line each
    results[name]['events'] = [', '.join(f'{k} {v}' for k, v in event.items())
                               for event in results[name]['events']]
  writes = sum(results[name]['inside_a_write'] for name in runs)
  assert writes >= 5, f'only {writes} signals met a checkpoint write'
  for moment in ('compile', 'restore'):
    assert any(results[name]['met'].get(moment) for name in runs), moment
  provenance.record(options.out, ['python', 'tests/survival.py', *sys.argv[1:]], results,
                    seed=options.seed,
                    libraries=('orbax-checkpoint', 'tensorstore', 'grain'),
                    clock=clock)
  shutil.rmtree(scratch)
  print(f'survived; written to {options.out}')


def compiled_once(scratch: pathlib.Path) -> dict:
  """The environment of all processes: CPU, and one cache of compiled programs."""
  return {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'SMALTI_TRACEBACK': '',
          'JAX_COMPILATION_CACHE_DIR': os.environ.get(
              'JAX_COMPILATION_CACHE_DIR', str(scratch / 'compiled')),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}


if __name__ == '__main__':
  if sys.argv[1:2] == ['child']:
    child(sys.argv[2:])
  else:
    main()
