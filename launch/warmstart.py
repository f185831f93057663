"""Starts a run from the weights of others: `smalti train ... --init_from=RUN` or `PART=RUN`."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from smalti.launch import run as runs, state as states
from smalti.launch.progress import say


def copy(state: dict, references: str) -> set[str]:
  """Copies other runs' averaged weights where path and shape agree; says what it did.

  Args:
    references: RUN, or PART=RUN for one part of the model (`vae=runs/klvae`); several with commas.

  Raises:
    ValueError: the model has no such part.
  """
  copied = set()
  for reference in references.split(','):
    part, run = re.fullmatch(r'(?:(\w+)=)?(.*)', reference).groups()
    loaded = runs.load(run, whole=True)
    prefix = f'{part}/' if part else ''
    # by path alone: what is a parameter there may be frozen here
    theirs = {prefix + path: leaf for tree in states.Structure.of(loaded.model).split(loaded.model)
              for path, leaf in states.paths(tree).items()}
    ours = {path: (group, leaf) for group in ('params', 'buffers')
            for path, leaf in states.paths(state[group]).items() if path.startswith(prefix)}
    if not ours:
      raise ValueError(f'init_from={reference}: the model has no part {part}; leave out {part}=, '
                       'or name one of its parts.')
    for path, (group, leaf) in ours.items():
      if path not in theirs:
        say(f'init_from: missing {path} {leaf.shape}')
      elif theirs[path].shape != leaf.shape:
        say(f'init_from: other shape {path} {theirs[path].shape}, here {leaf.shape}')
      else:
        node = state[group]
        *parents, name = path.split('/')
        for parent in parents:
          node = node[parent]
        node[name] = jax.device_put(theirs[path].astype(leaf.dtype), leaf.sharding)
        copied.add(path)
        say(f'init_from: copied {path} {leaf.shape}')
  if state['ema']:
    state['ema'] = jax.tree.map(jnp.copy, states.released(state['params']))
  return copied


def check_frozen(model: Any, buffers: dict, copied: set[str]) -> None:
  """Refuses a part that is not trained here and came from nowhere."""
  for part in getattr(model, 'frozen', ()):
    if any(path.startswith(f'{part}/') and path not in copied for path in states.paths(buffers)):
      raise ValueError(f'{part} of {type(model).__name__} is not trained with it; name the run it '
                       f'was trained in with --init_from={part}=RUN.')
