"""The transformer of a generator: what its config must fit, and how the label enters."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smalti.networks.transformer import Transformer, TransformerConfig
from smalti.tokenizers.spec import TokenSpec


def check_body(body: TransformerConfig, classes: int, grid: tuple[int, ...]) -> None:
  """Raises ValueError where the label cannot modulate, or positions have other axes."""
  check_modulated(body, classes)
  check_axes(body, grid)


def check_modulated(body: TransformerConfig, classes: int) -> None:
  if body.modulated and not classes:
    raise ValueError('modulated=True needs classes > 0: the label is what modulates.')


def check_axes(body: TransformerConfig, grid: tuple[int, ...]) -> None:
  if body.axes not in (0, 1, len(grid)):
    raise ValueError(f'axes={body.axes} must be 0, 1 or {len(grid)} for the grid {grid}.')


def labelled(transformer: Transformer, spec: TokenSpec, x: Float[Array, 'b n c'],
             label: Float[Array, 'b c'] | None) -> tuple[Float[Array, 'b m c'], dict[str, Any]]:
  """What the transformer is given: vectors, their positions, and the label where it modulates."""
  positions = spec.coordinates() if transformer.axes > 1 else np.arange(spec.length)[:, None]
  modulation = None
  if transformer.modulated:
    modulation = label
  elif label is not None:  # a prefix at coordinate 0, which does not rotate
    x = jnp.concatenate([label[:, None], x], 1)
    positions = np.concatenate([np.zeros_like(positions[:1]), positions])
  return x, {'positions': jnp.asarray(positions), 'modulation': modulation}
