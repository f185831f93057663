"""A sampling job in parts: `smalti sample --workdir=RUN --n=50000 --out=DIR`.

DIR gets `job.json` (what is drawn), `samples-00000.npz` and so on (`arr_0` images, `arr_1` labels,
`tokens`, `index`), each whole or not there, and `index.json` with their SHA-256 once all are. The
same command goes on where it was stopped; several share a job by --worker=i --num_workers=k, on one
folder. Example i is the same whatever the parts.
"""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from smalti.evaluation.files import whole
from smalti.launch import run as runs
from smalti.launch.exits import Preempted
from smalti.launch.progress import say, track
from smalti.launch.sample import Sampler, captions, in_turn
from smalti.launch.signals import Preemption

JOB, INDEX = 'job.json', 'index.json'


def run(generator: runs.Loaded, tokenizer: runs.Loaded, folder: pathlib.Path, item: dict, *,
        settings: Any, labels: np.ndarray | None, batch_size: int, size: int, worker: int = 0,
        workers: int = 1, texts: dict[str, np.ndarray] | None = None) -> bool:
  """Draws this worker's parts that are not there; whether the whole job is done.

  Args:
    item: `sample.record` of the job: its n and seed say what is drawn.
    labels: int32[n]; None takes the classes in turn, where the generator has any.
    size: examples of a part, rounded up to whole batches.
    texts: as of `sample.captions`.

  Raises:
    ValueError: the folder holds another job.
    Preempted: SIGTERM or SIGINT; parts that are there stay.
  """
  n, seed = item['n'], item['seed']
  sampler = Sampler(min(batch_size, n))
  each = -(-size // sampler.batch_size)  # batches of a part
  size = each * sampler.batch_size
  labels = in_turn(generator, n) if labels is None else labels
  job = {**item, 'size': size, 'labels': None if labels is None else _sha256(labels.tobytes())}
  texts = captions(generator, n) if texts is None else texts
  if texts is not None:
    job['texts'] = _sha256(b''.join(np.ascontiguousarray(x).tobytes() for x in texts.values()))
  job = json.loads(json.dumps(job))
  _begin(folder, job)
  parts = -(-n // size)
  todo = [i for i in range(worker, parts, workers) if not part(folder, i).exists()]
  say(f'{parts} parts of {size}, {len(todo)} to draw here: {folder}')
  placed = sampler.place(generator), sampler.place(tokenizer)
  with Preemption() as preemption:
    for i in track(todo, len(todo), 'part'):
      stop = min(n, (i + 1) * size)
      drawn: dict[str, list] = {'arr_0': [], 'tokens': [], 'index': []}
      for batch in sampler.batches(
          *placed, n=stop, seed=seed, settings=settings, start=i * each,
          labels=None if labels is None else labels[:stop],
          texts=texts and {name: rows[:stop] for name, rows in texts.items()}):
        if preemption.requested:
          raise Preempted(f'Preempted in part {i}; run the same command to go on.')
        real = batch.index >= 0
        for name, rows in zip(drawn, (batch.images, batch.tokens, batch.index)):
          drawn[name].append(np.asarray(rows)[real])
      arrays: Any = {name: np.concatenate(rows) for name, rows in drawn.items()}
      if labels is not None:
        arrays['arr_1'] = labels[arrays['index']]
      arrays |= {name: rows[arrays['index']] for name, rows in (texts or {}).items()}
      with whole(part(folder, i)) as file:
        np.savez(file, **arrays)
  return _finish(folder, job, parts)


def part(folder: pathlib.Path, i: int) -> pathlib.Path:
  return folder / f'samples-{i:05d}.npz'


def files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
  """The parts of a finished job, each as it was written.

  Raises:
    ValueError: a job that is not finished, or a part that is missing or damaged.
  """
  if not (folder / INDEX).exists():
    raise ValueError(f'{folder} holds a sampling job that is not finished; run its `smalti sample` '
                     'again.')
  found = []
  for entry in json.loads((folder / INDEX).read_text())['parts']:
    path = folder / entry['file']
    if not path.exists() or _sha256(path.read_bytes()) != entry['sha256']:
      raise ValueError(f'{path} is missing or damaged; delete it and {folder / INDEX}, and run '
                       '`smalti sample` again: it draws what is not there.')
    found.append(path)
  return tuple(found)


def _begin(folder: pathlib.Path, job: dict) -> None:
  path = folder / JOB
  if not path.exists():
    runs.write_json(path, job)
    return
  before = json.loads(path.read_text())
  if changed := sorted(k for k in job.keys() | before.keys() if job.get(k) != before.get(k)):
    raise ValueError(f'{folder} holds another job, with other {", ".join(changed)}; choose another '
                     '--out.')


def _finish(folder: pathlib.Path, job: dict, parts: int) -> bool:
  """Writes the index once all parts are there, whoever drew the last."""
  paths = [part(folder, i) for i in range(parts)]
  missing = sum(not path.exists() for path in paths)
  if missing:
    say(f'{missing} parts are left for other workers')
    return False
  runs.write_json(folder / INDEX, {'job': job, 'parts': [
      {'file': path.name, 'first': i * job['size'],
       'count': min(job['size'], job['n'] - i * job['size']),
       'sha256': _sha256(path.read_bytes())} for i, path in enumerate(paths)]})
  say(f'{job["n"]} samples: {folder}')
  return True


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()
