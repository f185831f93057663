"""Optimizers by group: clipping, schedule and start live inside the group."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

DECAYED = ('kernel', 'embedding')


def schedule(config: Any, steps: int) -> Callable[[Any], Any]:
  """The learning rate by the group's own step; `steps` is the length of the run."""
  length = max(steps - config.start - config.warmup, 1)
  end = config.rate * config.final
  after = {
      'constant': optax.constant_schedule(config.rate),
      'cosine': optax.cosine_decay_schedule(config.rate, length, config.final),
      'linear': optax.linear_schedule(config.rate, end, length),
  }[config.schedule]
  # step 0 already moves: (n + 1) / warmup instead of n / warmup
  warm = optax.linear_schedule(config.rate / max(config.warmup, 1), config.rate,
                               max(config.warmup - 1, 1))
  return optax.join_schedules([warm, after], [config.warmup])


def make(config: Any, discriminator: Any | None, steps: int, fixed: tuple[str, ...] = ()
         ) -> optax.GradientTransformation:
  """AdamW for all parameters; those under `discriminator` have a group of their own.

  Parameters under the paths `fixed` are not moved, and have no moments.

  A group that has not started is masked with its state: its moments and count begin at its own
  first step. (Idle zero gradients would spend Adam's bias correction.)
  """
  groups = {'model': _group(config, steps)}
  if discriminator is not None:
    groups['discriminator'] = _group(discriminator, steps)
  if fixed:
    groups['fixed'] = optax.set_to_zero()
  if len(groups) == 1:
    return groups['model']
  return optax.partition(groups, functools.partial(_labels, fixed=fixed))


def _group(config: Any, steps: int) -> optax.GradientTransformation:
  parts = [] if config.clip_each is None else [optax.clip(config.clip_each)]
  if config.clip is not None:
    parts.append(optax.clip_by_global_norm(config.clip))
  parts.append(optax.adamw(
      schedule(config, steps), *config.betas, eps=config.epsilon,
      weight_decay=config.weight_decay, mask=_decayed))
  group = optax.chain(*parts)
  if config.start:
    group = optax.transforms.conditionally_mask(
        group, should_transform_fn=lambda step: step >= jnp.int32(config.start))
  return group


def _labels(params: Any, fixed: tuple[str, ...] = ()) -> Any:
  unused = set(fixed)

  def label(path: tuple, _: Any) -> str:
    name = '/'.join(str(entry.key) for entry in path)
    for part in fixed:
      if f'{name}/'.startswith(f'{part}/'):
        unused.discard(part)
        return 'fixed'
    return 'discriminator' if path[0].key == 'discriminator' else 'model'

  labels = jax.tree_util.tree_map_with_path(label, params)
  if unused:
    raise ValueError(f'fixed={sorted(unused)[0]} is no part of the model; it has '
                     f'{", ".join(params)}.')
  return labels


def _decayed(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
