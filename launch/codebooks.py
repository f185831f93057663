"""Codebooks: the vector that every code of a residual tokenizer adds to its position.

For generators that predict vectors (ResGen): they have a buffer `vectors`, which a new run fills
once, so that checkpoints, samples and evaluation carry it.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from smalti.tokenizers.grouped import Grouped
from smalti.tokenizers.partitioned import Partitioned
from smalti.tokenizers.projected import Projected
from smalti.tokenizers.residual import Residual

REASONS = (
    (Projected, 'projects the sum of its codes, and what a projection adds is of no code'),
    (Grouped, 'has codes of a part of the channels each'),
    (Partitioned, 'quantizes parts of the channels first, not what is left over'),
)


def vectors(tokenizer: Any) -> Float[Array, 'd v c']:
  """What code v of depth d adds to the sum; 0 past the end of a smaller alphabet.

  Raises:
    ValueError: the codes of the tokenizer are not one vector per code and depth, each the nearest
      to what those before it leave over.
  """
  q = getattr(tokenizer, 'quantizer', None)
  name = type(tokenizer if q is None else q).__name__
  for kind, reason in REASONS:
    if isinstance(q, kind):
      raise ValueError(f'{name} {reason}; ResGen needs the sums of a plain ResidualConfig.')
  if not isinstance(q, Residual) or q.width != 1:
    raise ValueError(f'{name} does not add up one vector per code; ResGen needs the sums of a '
                     'plain ResidualConfig with one code per level.')
  sizes, depth = jnp.array(q.vocab), len(q.vocab)
  code = jnp.arange(max(q.vocab))[:, None]
  tokens = jnp.minimum(code, sizes - 1)[None]  # [1, v, d]
  alone = [q.lookup(tokens, mask=jnp.broadcast_to(jnp.arange(depth) == d, tokens.shape))[0]
           for d in range(depth)]
  return jnp.where((code < sizes).T[..., None], jnp.stack(alone), 0)
