"""What int8 costs and saves: `python -m smalti.launch.quantization --workdir=RUN --out=FILE.json`.

Held-out tokens are scored code by code through the cache, as sampling computes them: as trained, in
the other float dtype, with an int8 cache, with int8 weights, with both. Beside the bits per token
stand the bytes of the cache of a sequence and of the blocks' weights, the temporary memory of the
sampling program, and codes drawn per second, timed in turns.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smalti.evaluation.subset import subset
from smalti.generators.autoregressive import Autoregressive, AutoregressiveSettings
from smalti.generators.generator import example_keys, generate
from smalti.launch import cli, provenance, run as runs, state as states, timing
from smalti.launch.progress import say
from smalti.launch.reconstruct import tokenized
from smalti.networks.quantized import nbytes, quantized

# What is rounded, and the relative rise of the bits that is accepted for it.
CASES: dict[str, tuple[dict[str, Any], float | None]] = {
    'as trained': ({}, None), 'int8 cache': ({'cache': 'int8'}, 0.005),
    'int8 weights': ({'weights': 'int8'}, 0.01),
    'both': ({'cache': 'int8', 'weights': 'int8'}, None)}


def measure(model: Autoregressive, tokens: np.ndarray, labels: np.ndarray | None = None, *,
            other: tuple[str, Autoregressive] | None = None, batch: int = 64, rounds: int = 5
            ) -> list[dict[str, Any]]:
  """One row per case, the model as trained first.

  Args:
    tokens, labels: int32[n, N, D] held-out tokens, and int32[n] or None.
    other: the name of a second case, and the model with these weights that it measures.
    batch: sequences side by side, scored and drawn.
    rounds: in which the cases draw in turns.
  """
  count = np.asarray(model.spec.valid(tokens)).sum((1, 2))
  valid = np.asarray(model.flat.valid(model.spec.to('flat', tokens)))[..., 0]
  cases = {name: (model, *case) for name, case in CASES.items()}
  if other is not None:
    plain, *rest = cases.items()
    cases = dict([plain, (other[0], (other[1], {}, None)), *rest])
  sides = {name: _Draw(one, batch, settings) for name, (one, settings, _) in cases.items()}
  timings: dict[str, list[timing.Timing]] = {name: [] for name in cases}
  for i in range(rounds):
    for name in list(cases)[::1 if i % 2 == 0 else -1]:
      timings[name].append(sides[name].measure(1))
  rows, first = [], None
  for name, (one, settings, goal) in cases.items():
    nats, likeliest = score(one, tokens, labels, batch=batch, **settings)
    bits = nats.sum(-1) / np.log(2)
    first = (bits, likeliest) if first is None else first
    extra = bits - first[0]
    rise = float(extra.sum() / first[0].sum())
    error = float(extra.std() / len(bits)**0.5 / first[0].mean())
    codes = batch * model.flat.length
    rows.append({
        'case': name, 'bits_per_token': float(bits.sum() / count.sum()), 'rise': rise,
        'rise_error': error, 'goal': goal, 'met': None if goal is None else rise <= goal,
        'agreement': float((likeliest == first[1])[valid].mean()),
        'cache_bytes': _size(jax.eval_shape(functools.partial(
            one.transformer.cache, 1, one.flat.length, settings.get('cache')))),
        'weight_bytes': nbytes(quantized(one) if 'weights' in settings else one),
        'temporary_bytes': sides[name].program.bytes,
        **{f'codes_per_{clock}_second': round(codes / np.median(
            [getattr(t, clock) for t in timings[name]])) for clock in ('cpu', 'wall')}})
  return rows


def score(model: Autoregressive, tokens: np.ndarray, labels: np.ndarray | None = None, *,
          batch: int = 64, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
  """Nats of every code float64[n, N D] and the likeliest codes, by `Autoregressive.forced`."""
  forced = jax.jit(functools.partial(Autoregressive.forced, **settings))
  found = []
  for i in range(0, len(tokens), batch):
    index = np.minimum(np.arange(i, i + batch), len(tokens) - 1)  # one shape, one program
    rows = {'tokens': jnp.asarray(tokens[index])}
    if labels is not None:
      rows['label'] = jnp.asarray(labels[index])
    found.append([np.asarray(x) for x in forced(model, rows)])
  nats, likeliest = (np.concatenate(x)[:len(tokens)] for x in zip(*found))
  return nats.astype(np.float64), likeliest


def in_other_dtype(loaded: runs.Loaded) -> tuple[str, Autoregressive]:
  """bfloat16 of a model of float32 and the reverse, with the same weights."""
  config: Any = loaded.config
  dtype = 'bfloat16' if config.transformer.dtype == 'float32' else 'float32'
  config = dataclasses.replace(
      config, transformer=dataclasses.replace(config.transformer, dtype=dtype))
  structure = states.structure(lambda: runs.build(config, loaded.spec, nnx.Rngs(0)))
  return dtype, structure.merge(*states.Structure.of(loaded.model).split(loaded.model))


class _Draw(timing.Ours):
  """Drawing a batch."""

  def __init__(self, model: Autoregressive, batch: int, settings: dict[str, Any]):
    arguments: dict[str, Any] = dict(keys=example_keys(0, jnp.arange(batch)),
                                     settings=AutoregressiveSettings(**settings))
    self.program = timing.Program(generate, model, None, **arguments)
    super().__init__(lambda: self.program(model, None, **arguments).tokens, self.program)


def _size(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run of an autoregressive generator.',
                      flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Where its tokenizer is now.', flag_values=values)
  flags.DEFINE_integer('n', 1000, 'Held-out sequences.', lower_bound=2, flag_values=values)
  flags.DEFINE_integer('batch_size', 64, 'Sequences side by side.', lower_bound=1,
                       flag_values=values)
  flags.DEFINE_integer('rounds', 5, 'In which the cases draw in turns.', lower_bound=1,
                       flag_values=values)
  flags.DEFINE_string('out', None, 'A .json for the numbers; default in the run.',
                      flag_values=values)


def main(values: Any) -> int:
  if values.workdir is None:
    raise ValueError('quantization needs --workdir=RUN, the run of an autoregressive generator.')
  loaded = runs.load(values.workdir)
  if not isinstance(loaded.model, Autoregressive):
    raise ValueError(f'{values.workdir} is a {runs.kind(loaded.model)}, which keeps no cache; name '
                     'the run of an autoregressive generator.')
  if loaded.model.text is not None:
    raise ValueError(f'{values.workdir} reads text, which has no place where codes are scored one '
                     'by one; name the run of a generator of labels, or without a condition.')
  data, codec = loaded.data, runs.load_tokenizer(loaded, values.tokenizer)
  source = runs.pixels(data, codec).open('eval')
  rows = source.read(subset(len(source), values.n))
  labels = rows.get('label') if loaded.model.classes else None
  found = measure(loaded.model, tokenized(codec, rows['image']), labels,
                  other=in_other_dtype(loaded), batch=values.batch_size, rounds=values.rounds)
  for row in found:
    say(f'{row["case"]:<13} {row["bits_per_token"]:.4f} bits per token ({row["rise"]:+.3%}, '
        f'standard error {row["rise_error"]:.3%}), {row["agreement"]:.2%} of the likeliest codes; '
        f'cache {row["cache_bytes"]:,}, weights {row["weight_bytes"]:,} bytes; '
        f'{row["codes_per_wall_second"]:,} codes/s')
  folder = runs.split_reference(values.workdir)[0]
  path = pathlib.Path(values.out) if values.out else folder / 'int8.json'
  provenance.record(path, None, found, run=f'{folder.name}@{loaded.step}', config=loaded.stored,
                    sequences=len(rows['image']), batch=values.batch_size, rounds=values.rounds)
  say(f'{path}')
  return 0


if __name__ == '__main__':
  cli.run('quantization')
