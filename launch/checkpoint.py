"""Checkpoints that survive kills, full disks and flipped bits.

Orbax writes the arrays, asynchronously and from all processes together; a manifest of SHA-256
digests (`launch/manifest.py`) is written into the step's temporary folder before Orbax renames
it. So a folder without a manifest was never committed, and whatever changed later is noticed.

On disk: `<folder>/<step>/state` (a pure nested dict of arrays), `<step>/item` (JSON),
`<step>/MANIFEST.sha256`; what was found damaged is kept as `<folder>/damaged-<step>`.
"""

import json
import logging as standard_logging
import math
import os
import pathlib
import re
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

import smalti
from smalti.launch import manifest

FORMAT = 1
_TEMPORARY = '.orbax-checkpoint-tmp'
# Orbax moves what is to be deleted here, at once, and we delete: a kill in the middle of deleting a
# step in its place would leave a damaged one.
_DELETED = 'deleted'
# Managers of failed saves are kept: what Orbax does when one is collected takes a lock of Python's
# threads, and waits for ever where the collector happens to run in the start of a new thread.
_FAILED: list[ocp.CheckpointManager] = []


class CheckpointError(OSError):
  """A checkpoint could not be written, or none that is whole is there to be read."""


class Checkpoints:
  """The checkpoints of one run.

  Reading changes nothing, so that other programs may read while the run goes on; only
  `restore_newest` and `save`, which belong to the run itself, clean up. With several processes
  all of them call every method; the folder is shared.

  Old steps are deleted after a newer one was committed, never before, so the newest verified
  checkpoint is never deleted.

  Args:
    folder: where the steps are; made by the first save.
    keep: how many of the newest stay, 2 or more.
    keep_every: steps whose multiples stay for good.
    best: the metric whose best checkpoint stays too.
    mode: whether the smallest or the largest is the best.
  """

  def __init__(self, folder: str | os.PathLike, *, keep: int = 2, keep_every: int | None = None,
               best: str | None = None, mode: Literal['min', 'max'] = 'min'):
    if keep < 2:
      raise ValueError(f'{keep=} must be 2 or more: one could be damaged; take 2.')
    if keep_every is not None and keep_every < 1:
      raise ValueError(f'{keep_every=} must be 1 or more, or None.')
    if mode not in ('min', 'max'):
      raise ValueError(f"{mode=} must be 'min' or 'max'.")
    self.folder = pathlib.Path(folder).absolute()
    self._best = best
    self._sign = 1 if mode == 'max' else -1
    policies = [checkpoint_managers.LatestN(keep)]
    if keep_every is not None:
      policies.append(checkpoint_managers.EveryNSteps(keep_every))
    if best is not None:
      policies.append(_Best(self._score))
    self._policy = checkpoint_managers.AnyPreservationPolicy(policies)
    self._scores: dict[int, float] = {}  # of the steps this object saved, known before the commit
    self._manager: ocp.CheckpointManager | None = None
    self._writing: int | None = None

  # Writing

  def save(self, step: int, state: Mapping[str, Any], item: Mapping[str, Any],
           metrics: Mapping[str, float] | None = None) -> None:
    """Starts to write a checkpoint and returns; an error is raised by the next call.

    A step that is already there is left as it is: a step determines its state.

    Args:
      step: number of finished optimizer steps; larger than that of all earlier checkpoints.
      state: nested dict of arrays. They may be donated as soon as this returns.
      item: what JSON can hold: config, spec, fingerprint, versions.
      metrics: numbers known at this step; `best` is looked up here.

    Raises:
      CheckpointError: this save could not begin, or the one before could not be finished.
    """
    step, metrics = int(step), {k: float(v) for k, v in (metrics or {}).items()}
    _leaves(state)
    content = {'format': FORMAT, 'smalti': smalti.__version__, 'step': step,
               'metrics': {k: v if math.isfinite(v) else None for k, v in metrics.items()},
               'item': item}
    content = json.loads(json.dumps(content))  # refuses what JSON cannot hold before writing
    self.wait()
    self._writing = step
    try:
      manager = self._manager or self._open()
      if step in manager.all_steps():
        return
      value = metrics.get(self._best, math.nan)
      self._scores[step] = self._sign * value if math.isfinite(value) else math.nan
      saved = manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), item=ocp.args.JsonSave(content)))
    except Exception as error:
      self._fail(error)
    if not saved:
      raise ValueError(f'{step=} is not newer than step {manager.latest_step()} of {self.folder}; '
                       'take another --workdir.')

  def check(self) -> None:
    """Raises the error of a save that failed meanwhile; does not wait for one that goes on."""
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when the last save is committed, or raises why it could not be."""
    if self._manager is not None:
      try:
        self._manager.wait_until_finished()
      except Exception as error:
        self._fail(error)
      if jax.process_index() == 0:
        shutil.rmtree(self.folder / _DELETED, ignore_errors=True)

  def close(self) -> None:
    """Waits for the last save and frees threads."""
    self.wait()
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  # Reading

  def steps(self) -> list[int]:
    """The committed steps, ascending; whether they are whole is not looked at."""
    self.wait()
    return self._together(lambda: [
        step for step in self._folders() if (self.folder / str(step) / manifest.NAME).exists()])

  def latest(self) -> int | None:
    """The newest step whose files are all as they were written."""
    return self._first_whole(self.steps()[::-1])

  def best(self) -> int | None:
    """The whole step with the best metric, the newest of equals; None if no step has one."""
    scores = {step: score for step in self.steps() if not math.isnan(score := self._score(step))}
    return self._first_whole(sorted(scores, key=lambda step: (scores[step], step), reverse=True))

  def restore(self, step: int, abstract: Mapping[str, Any] | None) -> tuple[dict, dict]:
    """State and item of `step`, after its manifest was verified.

    Args:
      step: one of `steps()`.
      abstract: nested dict of `jax.ShapeDtypeStruct`, placed by their shardings; leaves without
        one, and all leaves if this is None, come as numpy arrays.

    Raises:
      CheckpointError: the checkpoint is missing or damaged.
      ValueError: `abstract` does not fit, or the format is unknown.
    """
    self._verify(step)
    item = self.read_item(step)
    return self._read(step, abstract, whole=True), item

  def restore_part(self, step: int, abstract: Mapping[str, Any]) -> dict:
    """Like `restore`, for a part of the state: nothing else is read from disk."""
    self._verify(step)
    self.read_item(step)
    return self._read(step, abstract, whole=False)

  def read_item(self, step: int) -> dict:
    """The item given to `save`; the arrays are neither read nor verified."""
    self.wait()
    self._verify(step, 'item/')
    return self._content(step)['item']

  def restore_newest(self, abstract: Mapping[str, Any] | None) -> tuple[int, dict, dict] | None:
    """Step, state and item of the newest whole checkpoint; None if nothing was committed.

    Newer ones that are damaged, and folders that were never committed, are renamed to
    `damaged-<step>`, with a message: a resumed run will write those steps again.

    Raises:
      CheckpointError: checkpoints were committed, but none of them is whole.
      ValueError: `abstract` does not fit, or the format is unknown.
    """
    steps = self.steps()
    step = self._first_whole(steps[::-1], say=False)  # said below, with what is done about it
    if steps and step is None:
      reason = manifest.damage(self.folder / str(steps[-1]))
      raise CheckpointError(
          f'no checkpoint under {self.folder} is whole (step {steps[-1]}: {reason}); restore the '
          'folder from a backup, or delete it to start from step 0.')
    self._together(lambda: self._clean(-1 if step is None else step))
    if self._manager is not None:
      self._manager.reload()
    if step is None:
      return None
    item = self.read_item(step)
    return step, self._read(step, abstract, whole=True), item

  # Inside

  def _open(self) -> ocp.CheckpointManager:
    for logger in (logging.get_absl_logger(), standard_logging.getLogger('asyncio')):
      logger.addFilter(_not_reported_by_us)
    self._together(self._sweep)
    self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        cleanup_tmp_directories=False,  # swept above, before anything else looks at the folder
        todelete_subdir=_DELETED,
        lightweight_initialize=True,  # metadata of old steps may be damaged, and is not needed
        # Folders first: made in the background, one that cannot be made leaves threads that wait
        # for it, and the process does not end for 20 minutes.
        async_options=ocp.options.AsyncOptions(
            create_directories_asynchronously=False, post_finalization_callback=self._seal)))
    return self._manager

  def _seal(self) -> None:
    """Writes the manifest; Orbax calls this on process 0 after all writes, before the rename."""
    manifest.write(self.folder / f'{self._writing}{_TEMPORARY}')

  def _fail(self, error: Exception) -> NoReturn:
    # What the manager believes no longer holds; the next save starts with a fresh one.
    if self._manager is not None:
      _FAILED.append(self._manager)
      self._manager = None
    code = re.search(r"os_error_code='(\d+)'", str(error))  # of Tensorstore, after its call chain
    if code is None and not isinstance(error, OSError):
      raise error
    raise CheckpointError(
        f'step {self._writing} could not be written to {self.folder} '
        f'({os.strerror(int(code[1])) if code else error}); earlier checkpoints are intact: free '
        'space or make the folder writable, then run the same command again.') from error

  def _folders(self) -> list[int]:
    if not self.folder.is_dir():
      return []
    return sorted(int(path.name) for path in self.folder.iterdir()
                  if path.name.isdecimal() and str(int(path.name)) == path.name and path.is_dir())

  def _sweep(self) -> None:
    """Deletes what a killed or failed save left behind."""
    for path in [*self.folder.glob(f'*{_TEMPORARY}*'), *self.folder.glob(_DELETED)]:
      logging.info('%s is not a committed checkpoint; deleted.', path)
      for _ in range(20):  # threads of a failed save may still be writing
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
          break
        time.sleep(0.05)

  def _clean(self, newest: int) -> None:
    self._sweep()
    for step in self._folders():
      path = self.folder / str(step)
      if step > newest or not (path / manifest.NAME).exists():
        aside = self.folder / f'damaged-{step}'
        count = 1
        while aside.exists():
          count += 1
          aside = self.folder / f'damaged-{step}-{count}'
        logging.warning('checkpoint %s is damaged: %s; set aside as %s.', path,
                        manifest.damage(path), aside.name)
        path.rename(aside)

  def _first_whole(self, steps: list[int], say: bool = True) -> int | None:
    def find():
      for step in steps:
        reason = manifest.damage(self.folder / str(step))
        if reason is None:
          return step
        if say:
          logging.warning('checkpoint %s is damaged: %s.', self.folder / str(step), reason)
      return None
    return self._together(find)

  def _verify(self, step: int, under: str = '') -> None:
    path = self.folder / str(step)
    if step not in self.steps():
      raise CheckpointError(f'{path} is not a committed checkpoint; take a step of {self.steps()}.')
    reason = self._together(lambda: manifest.damage(path, under))
    if reason is not None:
      raise CheckpointError(
          f'checkpoint {path} is damaged: {reason}; take another step of {self.steps()}.')

  def _together(self, function: Callable[[], Any]) -> Any:
    """What `function` returns on process 0, JSON-able, on all processes."""
    if jax.process_count() == 1:
      return function()
    from jax.experimental import multihost_utils
    text = json.dumps(function()).encode() if jax.process_index() == 0 else b''
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    data = np.frombuffer(text.ljust(size, b' ')[:size], np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8)))

  def _score(self, step: int) -> float:
    """The metric, larger is better; NaN where there is none."""
    if step not in self._scores:
      try:
        value = self._content(step)['metrics'].get(self._best)
      except (OSError, ValueError, LookupError, TypeError):
        value = None  # damaged, or written by another version: not the best of ours
      self._scores[step] = math.nan if value is None else self._sign * value
    return self._scores[step]

  def _content(self, step: int) -> dict:
    path = self.folder / str(step)
    content = json.loads((path / 'item' / 'metadata').read_text())
    if content['format'] != FORMAT:
      raise ValueError(
          f'{path} has format {content["format"]}, written by smalti {content["smalti"]}; smalti '
          f'{smalti.__version__} reads format {FORMAT}: install the version that wrote it.')
    return content

  def _read(self, step: int, abstract: Mapping[str, Any] | None, *, whole: bool) -> dict:
    path = self.folder / str(step)
    reader = ocp.PyTreeCheckpointHandler()
    saved = reader.metadata(path / 'state').tree
    if abstract is None:
      arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
      return reader.restore(path / 'state', args=ocp.args.PyTreeRestore(restore_args=arguments))
    wanted = _leaves(abstract)
    _compare(wanted, _leaves(saved), whole, path)
    # Nested by path rather than as given: Orbax drops or refuses branches without leaves.
    wanted = _nested(wanted)
    found = _leaves(reader.restore(path / 'state', args=ocp.args.PyTreeRestore(
        item=wanted, partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))))
    return _filled(abstract, found)


class _Best(checkpoint_managers.PreservationPolicy):
  """Keeps the step with the best score; unlike Orbax's BestN, steps without one are not kept."""

  def __init__(self, score: Callable[[int], float]):
    self._score = score

  def should_preserve(self, checkpoints, *, context):
    del context
    scores = [(self._score(info.step), info.step) for info in checkpoints]
    best = max((pair for pair in scores if not math.isnan(pair[0])), default=(0, None))[1]
    return [info.step == best for info in checkpoints]


def _not_reported_by_us(record: standard_logging.LogRecord) -> bool:
  """A logging filter: what Orbax logs with a traceback reaches the user as our one line."""
  if not record.exc_info:
    return True
  files = [record.pathname, *(
      frame.f_code.co_filename for frame, _ in traceback.walk_tb(record.exc_info[2]))]
  # an error of Tensorstore's threads has no frames, but names the temporary folder
  return not any('orbax' in text for text in (*files, str(record.exc_info[1])))


def _leaves(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """The leaves of a pure nested dict by path; refuses any other container."""
  leaves = {}
  for name, value in tree.items():
    path = f'{prefix}{name}'
    if not isinstance(name, str) or '/' in name:
      raise ValueError(f'the key {name!r} of {prefix or "the state"} must be a string without /.')
    if isinstance(value, Mapping):
      leaves.update(_leaves(value, path + '/'))
    elif hasattr(value, 'shape') and hasattr(value, 'dtype'):
      leaves[path] = value
    else:
      raise ValueError(f'{path} is a {type(value).__name__}; a state is a nested dict of arrays: '
                       'convert it first.')
  return leaves


def _nested(leaves: Mapping[str, Any]) -> dict:
  tree: dict = {}
  for path, leaf in leaves.items():
    *branches, name = path.split('/')
    branch = tree
    for part in branches:
      branch = branch.setdefault(part, {})
    branch[name] = leaf
  return tree


def _filled(tree: Mapping[str, Any], leaves: Mapping[str, Any], prefix: str = '') -> dict:
  """`tree` with the leaves of the same paths, branches without leaves included."""
  return {name: _filled(value, leaves, f'{prefix}{name}/') if isinstance(value, Mapping)
          else leaves[prefix + name] for name, value in tree.items()}


def _compare(wanted: dict, saved: dict, whole: bool, path: pathlib.Path) -> None:
  """Orbax casts silently where dtypes differ; here every difference is an error."""
  for name, leaf in wanted.items():
    if name not in saved:
      raise ValueError(f'{path} has no leaf {name}; the run was written by another config.')
    if (tuple(leaf.shape), leaf.dtype) != (tuple(saved[name].shape), saved[name].dtype):
      raise ValueError(
          f'{name} is {saved[name].dtype}{list(saved[name].shape)} in {path}, but '
          f'{leaf.dtype}{list(leaf.shape)} is wanted; use the config of the run.')
  if whole and (extra := sorted(saved.keys() - wanted.keys())):
    raise ValueError(f'{path} has the leaf {extra[0]} ({len(extra)} in all) that the model lacks; '
                     'use the config of the run.')
