"""TrainState: step, params, buffers, ema and optimizer, as pure nested dicts of arrays.

A model is split once into a `Structure` and dicts with string keys; `Structure.merge` puts them
back inside jitted functions. What a checkpoint holds is exactly this tree.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

# Every stream of randomness is folded from key(seed) by purpose first, then by step or index.
PURPOSES = ('init', 'prepare', 'step', 'sample', 'eval')

TrainState = dict[str, Any]


def stream(seed: int, purpose: str) -> jax.Array:
  """The key of one purpose of a run: 'init', 'prepare', 'step', 'sample' or 'eval'.

  Raises:
    ValueError: a seed that has more than 32 bits, or a sign: keys would be those of another seed.
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed={seed} must be in 0..2**32 - 1.')
  return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))


@dataclasses.dataclass(frozen=True)
class Structure:
  """The static part of a model: how dicts of arrays become the module again."""
  graphdef: Any
  params: tuple[tuple[str, ...], ...]
  buffers: tuple[tuple[str, ...], ...]
  definitions: tuple[Any, ...]

  @classmethod
  def of(cls, model: nnx.Module) -> 'Structure':
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, buffers = (tuple(_names(path) for path, _ in _leaves(state)) for state in states)
    return cls(graphdef, params, buffers, tuple(jax.tree.structure(state) for state in states))

  def split(self, model: nnx.Module) -> tuple[dict, dict]:
    """(params, buffers) of a module with this structure."""
    _, *states = nnx.split(model, nnx.Param, ...)
    params, buffers = (
        _nest({_names(path): leaf for path, leaf in _leaves(state)}) for state in states)
    return params, buffers

  def merge(self, params: dict, buffers: dict) -> Any:
    """The module with these arrays (or abstract arrays)."""
    states = [
        jax.tree.unflatten(definition, [_at(tree, path) for path in paths])
        for definition, paths, tree in zip(
            self.definitions, (self.params, self.buffers), (params, buffers))]
    return nnx.merge(self.graphdef, *states)


def structure(build: Callable[[], nnx.Module]) -> Structure:
  """The structure of what `build` makes, without allocating it."""
  return Structure.of(nnx.eval_shape(build))


def init(build: Callable[[nnx.Rngs], nnx.Module], optimizer: optax.GradientTransformation,
         key: jax.Array, *, ema: bool) -> TrainState:
  """The state before step 0; call it under jit with out_shardings, so that it is born sharded."""
  model = build(nnx.Rngs(key))
  params, buffers = Structure.of(model).split(model)
  return {
      'step': jnp.zeros((), jnp.int32),
      'params': params,
      'buffers': buffers,
      'ema': jax.tree.map(jnp.copy, released(params)) if ema else {},
      'optimizer': to_dict(optimizer.init(params)),
  }


def released(tree: dict) -> dict:
  """Parameters or buffers without those of training alone: averaged, fingerprinted, exported."""
  return {name: part for name, part in tree.items() if name not in ('discriminator', 'alignment')}


def to_dict(tree: Any) -> dict:
  """Any pytree as a nested dict keyed by path: the portable form of optimizer states."""
  return _nest({_names(path) or ('value',): leaf for path, leaf in _leaves(tree)})


def from_dict(template: Any, tree: dict) -> Any:
  """The inverse of `to_dict`, for a template with the structure of the original."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: _at(tree, _names(path) or ('value',)), template)


def paths(tree: Any) -> dict[str, Any]:
  """Leaves by their 'a/b/c' path."""
  return {'/'.join(_names(path)): leaf for path, leaf in _leaves(tree)}


def count(tree: Any) -> int:
  """The number of elements of all leaves."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_flatten_with_path(tree)[0]


def _names(path: Any) -> tuple[str, ...]:
  names = []
  for entry in path:
    # nnx.Variable leaves end in an attribute '.value', which is not part of a parameter's name
    if isinstance(entry, jax.tree_util.GetAttrKey) and entry.name == 'value':
      continue
    names.append(str(getattr(entry, 'key', getattr(entry, 'idx', getattr(entry, 'name', entry)))))
  return tuple(names)


def _nest(flat: dict[tuple[str, ...], Any]) -> dict:
  tree: dict = {}
  for path, leaf in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree


def _at(tree: Any, path: tuple[str, ...]) -> Any:
  for name in path:
    tree = tree[name]
  return tree
