"""`smalti bench generators`: decoding, training steps and parallel decoding, peers beside ours.

The peers are HuggingFace's Llama with our weights, eager and compiled, where --peer_python has
torch and transformers; they say the likelihood of our samples before the clock starts.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smalti.generators.autoregressive import Autoregressive, AutoregressiveSettings
from smalti.generators.generator import example_keys, generate
from smalti.generators.masked import Masked, MaskedConfig, MaskedSettings
from smalti.launch import llama, optimizer as optimizers, state as states, step as steps, timing
from smalti.launch.experiment import OptimizerConfig
from smalti.launch.timing import Bench, Row

LENGTHS = (64, 128, 256, 512)
PREFIX = 128  # known codes before the first that is drawn
PASSES = 8  # of MaskGIT
SQUARE = 2048  # of the product whose rate is what a training step could reach
EAGER, COMPILED = 'LlamaForCausalLM.generate', 'torch.compile, static cache'


def generators(bench: Bench) -> Iterator[Row]:
  """Decoding, a step, parallel decoding, what the cache saves, and growth with the length."""
  yield from _decoding(bench)
  yield _first_code(bench)
  yield from _growth(bench)
  yield from _steps(bench)
  yield from _parallel(bench)
  yield from _cached(bench)


def _decoding(bench: Bench) -> Iterator[Row]:
  """256 codes one by one, batch 1 and 16."""
  sizes = llama.Sizes()
  model = sizes.build()
  for batch in (1, 16):
    ours = _Sampling(model, batch)
    for peer, goal in ((EAGER, {1: 0.40, 16: 0.45}[batch]), (COMPILED, 0.55)):
      found = _against(bench, ours, sizes, compiled=peer == COMPILED)
      yield Row(f'{_name(sizes)}, batch {batch}', peer, bench.run(ours) | ours.program.costs, goal)
      if not found:
        break
      yield Row(f'first call, {_name(sizes)}, batch {batch}', peer,
                {'first_ratio': timing.spread([ours.first / found['first']])}, None, 'first_ratio')
    if batch == 1:
      full, keys = jax.jit(llama.uncached), example_keys(0, jnp.arange(batch))
      _check_uncached(np.asarray(full(model, keys))[0], np.asarray(generate(
          model, None, keys=keys, settings=AutoregressiveSettings()).tokens)[0, :, 0])
      yield Row(f'{_name(sizes)}, batch {batch}', 'ours without a cache',
                timing.compare(ours, timing.Ours(functools.partial(full, model, keys)),
                               rounds=min(bench.rounds, 3), seconds=0))  # one takes half a minute


def _first_code(bench: Bench) -> Row:
  """From a known prefix to the first code that is drawn."""
  sizes = llama.Sizes(length=PREFIX + 1)
  ours = _Sampling(sizes.build(), 1, known=PREFIX)
  _against(bench, ours, sizes, known=PREFIX)
  return Row(f'the first code after {PREFIX} known ones, {sizes.layers} x {sizes.width}, batch 1',
             EAGER, bench.run(ours) | ours.program.costs)


def _growth(bench: Bench, lengths: tuple[int, ...] = LENGTHS) -> Iterator[Row]:
  """Time and memory of a batch of 8 by the number of its codes."""
  shape: dict[str, Any] = dict(layers=4, width=384, heads=6, vocab=1024)
  sides = [_Sampling(llama.Sizes(length=length, **shape).build(), 8) for length in lengths]
  found = [[side.measure(1) for side in sides] for _ in range(min(bench.rounds, 3))]
  for i, (length, side) in enumerate(zip(lengths, sides)):
    yield Row(f'{_name(llama.Sizes(length=length, **shape))}, batch 8', '', {
        'our_time': timing.summary(side, [round[i] for round in found]), **side.program.costs})
  slope = lambda values: np.polyfit(np.log2(lengths), np.log2(values), 1)[0]  # noqa: E731
  span = f'{lengths[0]} to {lengths[-1]} codes'
  yield Row(f'exponent of CPU time in the length, {span}', 'proportional to the length',
            {'exponent': timing.spread([slope([t.cpu for t in round]) for round in found])}, 1.25,
            'exponent')
  yield Row(f'exponent of temporary memory in the length, {span}', 'proportional to the length',
            {'exponent': timing.spread([slope([side.program.bytes for side in sides])])}, 1.0,
            'exponent')


def _steps(bench: Bench, batch: int = 8) -> Iterator[Row]:
  """A training step against torch, and the share of what this machine multiplies."""
  sizes = llama.Sizes(remat=False)  # the peers recompute nothing either
  ours = _Step(sizes, batch)
  path = bench.folder / 'llama_step.npz'
  np.savez(path, **ours.weights)
  case = f'train step, {sizes.layers} x {sizes.width}, batch {batch} of {sizes.length}'
  for compiled, peer, goal in ((False, 'torch eager, fused AdamW', 1.0),
                               (True, 'torch.compile, fused AdamW', 1.10)):
    found = bench.against('train_step', path=str(path), batch=batch, length=sizes.length,
                          compiled=compiled, **sizes.peer())
    yield Row(case, peer, bench.run(ours) | ours.program.costs, goal)
    if not found:
      break
  x = jnp.asarray(np.random.default_rng(0).standard_normal((SQUARE, SQUARE), np.float32))
  product = timing.Ours(functools.partial(jax.jit(lambda x, y: x @ y), x, x.T))
  result = bench.compare(ours, product)
  share = sizes.flops(batch) / (2 * SQUARE**3)
  yield Row(f'{case}: model FLOP/s', f'those of a product of {SQUARE} x {SQUARE}', {
      **result, 'utilisation': _mapped(result['cpu_ratio'], lambda ratio: share / ratio)}, None,
      'utilisation')


def _parallel(bench: Bench, batch: int = 4) -> Iterator[Row]:
  """MaskGIT: as many passes as it says, and little beside them."""
  yield Row(f'MaskGIT, passes of the network in {PASSES} steps', f'{PASSES} passes',
            {'passes': timing.spread([_passes(PASSES) / PASSES])}, 1.0, 'passes')
  sizes = llama.Sizes()
  model = MaskedConfig(transformer=sizes.transformer).build(sizes.spec, rngs=nnx.Rngs(0))
  model.head.kernel[...] = 0.02 * jax.random.normal(jax.random.key(1), model.head.kernel.shape)
  ours = _Unmasking(model, batch, MaskedSettings(sampler='maskgit', steps=PASSES))
  one = jax.jit(lambda model, tokens: model.logits(tokens, tokens < sizes.vocab // 2, None))
  tokens = jnp.asarray(np.random.default_rng(0).integers(
      0, sizes.vocab, (batch, sizes.length), np.int32))
  network = timing.Ours(lambda: [one(model, tokens) for _ in range(PASSES)])
  result = bench.compare(ours, network)
  yield Row(f'MaskGIT, {PASSES} steps, {sizes.layers} x {sizes.width}, batch {batch}: share of '
            'time outside', f'{PASSES} passes of the network', {
                **result, **ours.program.costs,
                'outside': _mapped(result['cpu_ratio'], lambda ratio: 1 - 1 / ratio)},
            0.10, 'outside')


def _cached(bench: Bench, length: int = 32) -> Iterator[Row]:
  """Ancestral sampling in five steps per code, without those that reveal nothing in the batch."""
  sizes = llama.Sizes(layers=4, vocab=1024, length=length)
  model = MaskedConfig(transformer=sizes.transformer).build(sizes.spec, rngs=nnx.Rngs(0))
  steps = 5 * length
  for batch, goal in ((1, 0.40), (8, None)):
    sides = [_Unmasking(model, batch, MaskedSettings(sampler='ancestral', steps=steps, cache=cache))
             for cache in (True, False)]
    yield Row(f'ancestral, {steps} steps for {length} codes, {sizes.layers} x {sizes.width}, '
              f'batch {batch}: cached', 'every step a pass',
              bench.compare(*sides) | sides[0].program.costs, goal)


def _passes(steps: int) -> int:
  """How often the network of a small model runs while it draws."""
  seen: list[int] = []

  class Counted(Masked):
    def logits(self, *args, **options):
      jax.debug.callback(lambda: seen.append(1))
      return super().logits(*args, **options)

  sizes = llama.Sizes(layers=1, width=32, heads=2, vocab=8, length=16)
  model = Counted(MaskedConfig(transformer=sizes.transformer), sizes.spec, rngs=nnx.Rngs(0))
  jax.block_until_ready(generate(model, None, keys=example_keys(0, jnp.arange(2)),
                                 settings=MaskedSettings(sampler='maskgit', steps=steps)).tokens)
  jax.effects_barrier()
  return len(seen)


class _Sampling(timing.Ours):
  """Drawing a batch, each time from other keys; the first `known` codes are given."""

  def __init__(self, model: Autoregressive, batch: int, known: int = 0):
    self.model, self.batch = model, batch
    settings, seeds = AutoregressiveSettings(prefill=known), itertools.count()
    given: dict[str, Any] = {}
    if known:
      shape = (batch, model.spec.length, 1)
      codes = np.random.default_rng(0).integers(0, model.spec.vocab[0], shape, np.int32)
      mask = np.broadcast_to((np.arange(shape[1]) < known)[:, None], shape)
      given = {'known': jnp.asarray(codes), 'known_mask': jnp.asarray(mask)}
    keys = functools.partial(example_keys, index=jnp.arange(batch))
    self.program = timing.Program(generate, model, None, keys=keys(0), settings=settings, **given)
    super().__init__(lambda: self.program(
        model, None, keys=keys(next(seeds)), settings=settings, **given).tokens, self.program)


class _Unmasking(timing.Ours):
  """Drawing a batch of a masked model, each time from other keys."""

  def __init__(self, model: Masked, batch: int, settings: MaskedSettings):
    seeds, keys = itertools.count(), functools.partial(example_keys, index=jnp.arange(batch))
    self.program = timing.Program(generate, model, None, keys=keys(0), settings=settings)
    super().__init__(lambda: self.program(
        model, None, keys=keys(next(seeds)), settings=settings).tokens, self.program)


class _Step(timing.Ours):
  """A training step, its state given away."""

  def __init__(self, sizes: llama.Sizes, batch: int):
    model = sizes.build()
    self.weights = llama.weights(model)
    structure = states.Structure.of(model)
    rule = optimizers.make(OptimizerConfig(rate=1e-4, clip=None), None, 10**6)
    params, buffers = structure.split(model)
    self.state = {'step': jnp.zeros((), jnp.int32), 'params': params, 'buffers': buffers,
                  'ema': {}, 'optimizer': states.to_dict(rule.init(params))}
    step = jax.jit(functools.partial(
        steps.train_step, structure=structure, optimizer=rule), donate_argnums=0)
    tokens = np.random.default_rng(0).integers(0, sizes.vocab, (batch, sizes.length, 1), np.int32)
    rows, key = {'tokens': jnp.asarray(tokens)}, jax.random.key(0)
    self.program = timing.Program(step, self.state, rows, key)

    def run() -> Any:
      self.state, metrics = self.program(self.state, rows, key)
      return metrics['loss']

    super().__init__(run, self.program)


def _against(bench: Bench, ours: _Sampling, sizes: llama.Sizes, *, known: int = 0,
             compiled: bool = False) -> dict | None:
  """Prepares the peer with our weights; it must find a sample of ours as likely as we do."""
  path = bench.folder / 'llama.npz'
  np.savez(path, **llama.weights(ours.model))
  tokens = np.asarray(ours.run())[0]
  found = bench.against('decode', path=str(path), tokens=tokens[:, 0].tolist(), batch=ours.batch,
                        length=sizes.length, known=known, compiled=compiled, **sizes.peer())
  if found:
    log_prob = float(jax.jit(lambda model, tokens: model.log_prob({'tokens': tokens}))(
        ours.model, jnp.asarray(tokens)[None])[0])
    if abs(log_prob - sum(found['check'])) > 1e-4 * abs(log_prob):
      raise RuntimeError(f'the peer says {sum(found["check"]):.4f} nats, we say {log_prob:.4f}.')
  return found


def _check_uncached(full: np.ndarray, cached: np.ndarray) -> None:
  """The same codes up to a tie, which goes to a neighbour: the last bits of the sums differ."""
  differ = np.flatnonzero(full != cached)
  if len(differ) and abs(int(full[differ[0]]) - int(cached[differ[0]])) != 1:
    raise RuntimeError(f'without the cache code {differ[0]} is {full[differ[0]]}, with it '
                       f'{cached[differ[0]]}, and no neighbour of it.')


def _name(sizes: llama.Sizes) -> str:
  return (f'sampling {sizes.length} codes, {sizes.layers} x {sizes.width}, '
          f'vocabulary {sizes.vocab}')


def _mapped(spread: dict[str, float], rule: Callable[[float], float]) -> dict[str, float]:
  """The median and quartiles of a monotone function of a ratio."""
  median, low, high = (rule(spread[name]) for name in ('median', 'q1', 'q3'))
  return {name: float(f'{value:.4g}') for name, value in (
      ('median', median), ('q1', min(low, high)), ('q3', max(low, high)))}
