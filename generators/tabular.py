"""The exact generator: one table with the probability of every token array.

For arrays small enough to enumerate. Its conditionals are exact for any set of observed codes, so
it makes every sampler testable without training, and infills exactly for every mask.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.generators import logits as ids
from smalti.generators.generator import (
    Generator,
    GeneratorConfig,
    Sample,
    Settings,
    check_request,
    fold,
    settings,
)
from smalti.tokenizers.spec import TokenSpec

LARGEST = 2 ** 16  # entries of a table
NEVER = -1e4  # exp(NEVER) is zero in float32, and a checkpoint may hold it


def conditionals(table: Float[Array, '...'], tokens: Int[Array, 'b n d'],
                 observed: Bool[Array, 'b n d']) -> Float[Array, 'b n d v']:
  """log p(x_i = v | the observed codes) for every code i, exactly.

  Args:
    table: joint probabilities (any positive multiple) with one axis per code, row-major (n, d).
    tokens: the values of the observed codes; others are ignored.

  Returns:
    Log-probabilities, -inf beyond a code's alphabet; an observed code has log 1 at its value. An
    observation of probability zero gives NaN.
  """
  batch, n, d = tokens.shape
  vocab = max(table.shape)

  def single(tokens, observed):
    joint = table
    for i, size in enumerate(table.shape):
      match = ~observed[i] | (jnp.arange(size) == tokens[i])
      joint = joint * match.reshape([-1 if axis == i else 1 for axis in range(table.ndim)])
    rows = []
    for i, size in enumerate(table.shape):
      row = jnp.sum(joint, [axis for axis in range(table.ndim) if axis != i])
      rows.append(jnp.pad(row / jnp.sum(row), (0, vocab - size)))
    return jnp.log(jnp.stack(rows))

  flat = jax.vmap(single)(tokens.reshape(batch, -1), observed.reshape(batch, -1))
  return flat.reshape(batch, n, d, vocab)


@dataclasses.dataclass(kw_only=True, slots=True)
class TabularConfig(GeneratorConfig):
  """A learned table, uniform at first; at most 2^16 token arrays."""

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'TabularGenerator':
    del rngs  # the uniform table needs no draw
    return TabularGenerator(spec)


@settings
class TabularSettings(Settings):
  """Sampling temperature, of every conditional in row-major order."""
  temperature: float = 1.0


class TabularGenerator(Generator):
  """softmax over all token arrays; those with codes after an EOS that are not EOS have no mass."""

  settings = TabularSettings

  def __init__(self, spec: TokenSpec, table: Float[Array, '...'] | None = None):
    """Args: table: initial probabilities, one axis per code, row-major (n, d); None is uniform."""
    shape = spec.vocab * spec.length
    if math.prod(shape) > LARGEST:
      raise ValueError(
          f'A table over grid={spec.grid} and vocab={spec.vocab} has {math.prod(shape)} entries, '
          f'more than {LARGEST}; use another generator.')
    if table is not None and table.shape != shape:
      raise ValueError(f'table has the shape {table.shape}; one axis per code is {shape}.')
    self.spec = spec
    weights = jnp.ones(shape) if table is None else jnp.asarray(table, jnp.float32)
    # log-probabilities are the bias of a head without inputs
    self.bias = nnx.Param(jnp.maximum(jnp.log(weights), NEVER))

  def table(self) -> Float[Array, '...']:
    """Joint probabilities with one axis per code."""
    shape = self.spec.vocab * self.spec.length
    flat = np.indices(shape).reshape(len(shape), -1).T
    arrays = flat.reshape(-1, self.spec.length, self.spec.depth)
    legal = np.all(arrays == self.spec.canonical(arrays), (1, 2)).reshape(shape)
    logits = jnp.where(legal, self.bias[...], -jnp.inf)
    return jnp.exp(logits - jax.nn.logsumexp(logits))

  def log_prob(self, batch: dict[str, Array]) -> Float[Array, 'b']:
    """Exact log p(tokens) in nats."""
    tokens = batch['tokens'].reshape(batch['tokens'].shape[0], -1)
    return jnp.log(self.table())[tuple(tokens.T)]

  def loss(self, batch, *, step, key, train=True):
    """Mean nats per valid token."""
    del step, key, train  # nothing is drawn
    count = jnp.sum(self.spec.valid(batch['tokens'])).astype(jnp.float32)
    nll = -jnp.sum(self.log_prob(batch)) / count
    metrics = {'nll': nll, 'bits_per_token': nll / math.log(2)}
    return nll, {'metrics': metrics, 'weight': count, 'statistics': None}

  def sample(self, condition, *, keys, settings, known=None, known_mask=None) -> Sample:
    """The chain rule in row-major order, given everything known: exact for every mask."""
    del condition  # a table has none
    check_request(self, None, known, known_mask, None)
    shape = (keys.shape[0], self.spec.length, self.spec.depth)
    if known is None:
      known, known_mask = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    table = self.table()

    def step(state, i):
      tokens, observed, log_prob = state
      logits = conditionals(table, tokens, observed).reshape(shape[0], -1, max(table.shape))[:, i]
      logits = ids.process(logits, temperature=settings.temperature)
      new = ids.draw(logits, fold(keys, i))
      here = (jnp.arange(shape[1] * shape[2]) == i).reshape(shape[1:])
      fresh = here & ~observed
      score = jnp.take_along_axis(jax.nn.log_softmax(logits), new[:, None], 1)[:, 0]
      log_prob += jnp.where(jnp.any(fresh, (1, 2)), score, 0)
      return (jnp.where(fresh, new[:, None, None], tokens), observed | here, log_prob), None

    start = (jnp.where(known_mask, known, 0).astype(jnp.int32), known_mask,
             jnp.zeros(shape[0], jnp.float32))
    (tokens, _, log_prob), _ = jax.lax.scan(step, start, jnp.arange(shape[1] * shape[2]))
    return Sample(tokens=tokens, nfe=shape[1] * shape[2], exact=jnp.full(shape[0], True),
                  log_prob=log_prob)
