"""The training step: one pure function for tokenizers and generators alike.

Gradients over micro-batches, the non-finite guard, the optimizer, the codebooks, the averaged
weights; nothing is read or written here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from smalti.generators.generator import example_keys, fold
from smalti.generators.schedules import stratified
from smalti.launch import state as states
from smalti.networks.pixels import to_float
from smalti.tokenizers.quantizer import absorb, combine

STRATA = 2**31 - 1  # folded into a step's key, beyond all micro-batches
ENCODE = 2**31 - 2  # folded into an example's key, beyond what generators and decoders fold into it


def encode_keys(index: jax.Array, seed: int = 0) -> jax.Array:
  """Keys for `encode`, which a tokenizer that draws in evaluation needs: one per example.

  Example i has the draw of (seed, i), whatever batch it comes in; i is its number in the data, and
  in scores and pictures its place among the examples read.
  """
  return fold(example_keys(states.stream(seed, 'eval'), index), ENCODE)


def inputs(batch: dict, frozen: dict | None = None) -> dict:
  """Pixels to float; tokens by the frozen 'tokenizer', where the batch has none.

  A tokenizer that draws goes by `index`, the examples' numbers in their source; without it by their
  places in the batch.
  """
  if 'image' in batch:
    batch = {**batch, 'image': to_float(batch['image'])}
  tokenizer = (frozen or {}).get('tokenizer')
  if tokenizer is not None and 'tokens' not in batch:
    index = batch.get('index', jnp.arange(len(batch['image'])))
    tokens = tokenizer.encode(batch['image'], keys=encode_keys(index))
    batch = {**batch, 'tokens': jax.lax.stop_gradient(tokens)}
  return batch


def networks(frozen: dict | None) -> dict:
  """The frozen networks that a loss finds in its batch, by name: all but the tokenizer."""
  return {name: network for name, network in (frozen or {}).items() if name != 'tokenizer'}


def train_step(state: dict, batch: dict, key: jax.Array, frozen: dict | None = None, *,
               structure: states.Structure, optimizer: optax.GradientTransformation,
               accumulate: int = 1, ema: float | None = None) -> tuple[dict, dict]:
  """One update. A step with a non-finite loss, gradient or statistic returns the state unchanged.

  Args:
    state: step, params, buffers, ema, optimizer (see `launch/state.py`); donate it.
    batch: arrays with a leading batch axis; micro-batch i is rows i::accumulate.
    key: the key of all steps; the step is folded in, then the micro-batch. Times of a diffusion are
      spread over the whole batch: its entry `strata` is one number in [0, 1) for every example.
    frozen: modules that are not trained: 'tokenizer' encodes images where the batch holds no
      tokens, the others are entries of the batch for the loss.

  Returns:
    The next state, and metrics: scalars, and `finite` (bool per name of `guarded`).
  """
  batch, step = inputs(batch, frozen), state['step']
  key = jax.random.fold_in(key, step)
  size = jax.tree.leaves(batch)[0].shape[0]
  batch = {**batch, 'strata': stratified(jax.random.fold_in(key, STRATA), size)}

  def loss(params, rows, key):
    model = structure.merge(params, state['buffers'])
    return model.loss({**rows, **networks(frozen)}, step=step, key=key, train=True)

  def micro(rows, i):
    (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(
        state['params'], rows, jax.random.fold_in(key, i))
    means = {'loss': value, **aux['metrics']}, gradients
    weight = jnp.asarray(aux['weight'], jnp.float32)
    return weight, jax.tree.map(lambda x: weight * x, means), aux['statistics']

  def add(total, part):
    return total[0] + part[0], jax.tree.map(jnp.add, total[1], part[1]), combine(total[2], part[2])

  if accumulate == 1:
    weight, sums, statistics = micro(batch, 0)
  else:
    rows = jax.tree.map(  # i::k, so that no example changes device
        lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
        micro, jax.tree.map(lambda x: x[0], rows), 0))
    (weight, sums, statistics), _ = jax.lax.scan(
        lambda total, x: (add(total, micro(*x)), None), zero, (rows, jnp.arange(accumulate)),
        unroll=jax.default_backend() == 'cpu')  # a convolution in a loop is 20 times slower there
  metrics, gradients = jax.tree.map(lambda x: x / weight, sums)
  finite = jnp.stack([jnp.isfinite(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(
      (metrics, gradients, statistics))])

  def update(state):
    moments = states.from_dict(jax.eval_shape(optimizer.init, state['params']), state['optimizer'])
    updates, moments = optimizer.update(gradients, moments, state['params'])
    model = structure.merge(optax.apply_updates(state['params'], updates), state['buffers'])
    absorb(model, statistics)
    params, buffers = structure.split(model)
    average = state['ema']
    if ema is not None:
      decay = jnp.minimum(ema, (1.0 + step) / (10.0 + step))
      average = jax.tree.map(
          lambda a, p: decay * a + (1 - decay) * p, average, states.released(params))
    return {'step': step + 1, 'params': params, 'buffers': buffers, 'ema': average,
            'optimizer': states.to_dict(moments)}

  state = jax.lax.cond(jnp.all(finite), update, lambda state: state, state)
  metrics['gradient_norm'] = optax.tree.norm(gradients)
  return state, {**metrics, 'finite': finite}


def guarded(metrics: dict, params: dict, statistics: Any) -> list[str]:
  """The names behind `finite`: loss terms, then gradient leaves, then statistics."""
  named = {'loss term': metrics, 'gradient': params, 'statistics': statistics}
  return [f'{kind} {path}' for kind, tree in named.items() for path in states.paths(tree)]


def eval_step(params: dict, buffers: dict, batch: dict, key: jax.Array,
              frozen: dict | None = None, *, structure: states.Structure) -> tuple[Any, dict]:
  """(weight, metrics) of one held-out batch, without any randomness of training."""
  model = structure.merge(params, buffers)
  value, aux = model.loss({**inputs(batch, frozen), **networks(frozen)},
                          step=jnp.zeros((), jnp.int32), key=key, train=False)
  return jnp.asarray(aux['weight'], jnp.float32), {'loss': value, **aux['metrics']}
