"""What a run's features know of labels: `smalti probe --workdir=RUN`.

A tokenizer is asked before and after its quantizer, a generator after some of its blocks, with a
share of the codes hidden where it is trained so; both over grids of means. The cell of this grid is
chosen on a validation part of the training split; the held-out split is read once, by that cell and
by the controls: pixels, the same cell of an untrained network, and counts of codes. A generator is
never told the label. Writes RUN/probe.json.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smalti.evaluation import features, probes
from smalti.evaluation.probes import Probe, Split
from smalti.generators.generator import check_null, example_keys, fold
from smalti.launch import cli, provenance, run as runs, state as states, trees
from smalti.launch.progress import say, track
from smalti.launch.serialization import to_json
from smalti.launch.step import ENCODE, encode_keys
from smalti.networks.pixels import to_float
from smalti.tokenizers.tokenizer import encode

BATCH = 128
NOISES = (0.0, 0.25, 0.5, 0.75)
POOLS = (1, 2, 4)

Extract = Callable[..., dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Cell:
  """One place to look at: a layer's name, a share of hidden codes, means over pool x pool parts."""
  layer: str
  noise: float
  pool: int


@dataclasses.dataclass
class Examples:
  """Rows of one split: uint8 images, labels, and their numbers in the split, for keys."""
  images: np.ndarray
  labels: np.ndarray
  index: np.ndarray


class Network:
  """A tokenizer or a generator, by layers.

  Attributes:
    layers: their names.
    noises: shares of hidden codes that it can be asked with.
  """

  def __init__(self, loaded: runs.Loaded, codec: runs.Loaded, blocks: tuple[int, ...] | None):
    self.spec = codec.spec
    self.noises: tuple[float, ...] = (0.0,)
    if codec is loaded:
      if blocks:
        raise ValueError(f'{blocks=} are of generators; a tokenizer has none.')
      self._models: tuple[Any, ...] = (loaded.model,)
      self.layers = [*(['latents'] if hasattr(loaded.model, 'latents') else []), 'quantized']
      function: Extract = _of_tokenizer
    else:
      if not hasattr(loaded.model, 'hidden'):
        raise ValueError(f'{type(loaded.model).__name__} does not show its hidden states; probe '
                         'its tokenizer, or a masked or autoregressive generator.')
      check_null(loaded.model, 'probe its tokenizer')
      depth = loaded.model.transformer.layers
      blocks = blocks or tuple(sorted({math.ceil(depth * part / 4) for part in (1, 2, 3, 4)}))
      self._models = loaded.model, codec.model
      self.layers = [f'block{i}' for i in blocks]
      if hasattr(loaded.model, 'elbo'):  # trained with hidden codes
        self.noises = NOISES
      function = lambda *arguments: _of_generator(blocks, *arguments)  # noqa: E731
    self._function = jax.jit(function)

  def features(self, examples: Examples, noise: float, pools: tuple[int, ...], *, seed: int,
               layers: list[str] | None = None) -> dict[tuple[str, int], np.ndarray]:
    """Rows by (layer, pool), computed in batches of one size."""
    wanted, parts = layers or self.layers, []
    starts = range(0, len(examples.index), BATCH)
    for start in track(starts, len(starts), 'batch'):
      rows = np.minimum(np.arange(start, start + BATCH), len(examples.index) - 1)
      keys = example_keys(states.stream(seed, 'eval'), jnp.asarray(examples.index[rows], jnp.int32))
      found = self._function(*self._models, jnp.asarray(examples.images[rows]), keys, noise)
      part = {}
      for layer in wanted:
        x = np.asarray(found[layer], np.float32)
        x = x.reshape(BATCH, self.spec.length, -1, x.shape[-1]).mean(2)  # codes of a position
        for pool in pools:
          part[layer, pool] = probes.pool(x, self.spec.grid, pool)
      parts.append(part)
    count = len(examples.index)
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def _of_tokenizer(tokenizer: Any, images: jax.Array, keys: jax.Array, noise: jax.Array
                  ) -> dict[str, jax.Array]:
  del noise  # nothing is hidden
  x = to_float(images)
  found = {'quantized': tokenizer.lookup(tokenizer.encode(x, keys=fold(keys, ENCODE)))}
  return {**found, 'latents': tokenizer.latents(x)} if hasattr(tokenizer, 'latents') else found


def _of_generator(blocks: tuple[int, ...], generator: Any, tokenizer: Any, images: jax.Array,
                  keys: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
  tokens = tokenizer.encode(to_float(images), keys=fold(keys, ENCODE))
  options = {'noise': noise} if hasattr(generator, 'elbo') else {}
  found = generator.hidden(tokens, blocks=blocks, keys=keys, **options)
  return {f'block{i}': x for i, x in zip(blocks, found)}


def probe(workdir: str, *, data: Any = None, train: int = 5000, validation: int = 1000,
          test: int = 5000, tokenizer: str | None = None, blocks: tuple[int, ...] | None = None,
          shots: tuple[int, ...] = probes.SHOTS, seed: int = 0, weights: str = 'ema'
          ) -> dict[str, Any]:
  """Chooses a cell, measures it and the controls, and returns the table.

  Args:
    data: a DataConfig with images and labels; None takes that of the run.
    train, validation, test: examples at most; a fifth of a small training split validates.
    shots: labelled examples per class, for probes with few.
  """
  loaded = runs.load(workdir, weights=weights)
  if runs.kind(loaded.model) not in ('tokenizer', 'generator'):
    raise ValueError(f'{workdir} is a {runs.kind(loaded.model)}; probe a tokenizer or a generator.')
  codec = loaded if hasattr(loaded.model, 'encode') else runs.load_tokenizer(loaded, tokenizer)
  data = data or (loaded.experiment and runs.pixels(loaded.experiment.data, codec))
  if data is None:
    raise ValueError(f'{workdir} is an exported file without data; name some with --data=CONFIG.')
  fitted, chosen_by, tested = _splits(data, train, validation, test, seed)
  network = Network(loaded, codec, blocks)
  pools = tuple(pool for pool in POOLS if pool <= min(network.spec.grid))
  grid: dict[Cell, float] = {}
  for noise in network.noises:
    x, y = (network.features(part, noise, pools, seed=seed) for part in (fitted, chosen_by))
    grid |= probes.choose({Cell(layer, noise, pool): (
        Split(x[layer, pool], fitted.labels), Split(y[layer, pool], chosen_by.labels))
        for layer, pool in itertools.product(network.layers, pools)})
  grid = dict(sorted(grid.items(), key=lambda item: -item[1]))
  for cell, score in grid.items():
    say(f'{cell.layer:10} noise {cell.noise:g}  pool {cell.pool}  validation {score:.4f}')
  best = next(iter(grid))

  def asked(network: Network) -> Probe:
    parts = [network.features(part, best.noise, (best.pool,), seed=seed, layers=[best.layer])
             for part in (fitted, chosen_by, tested)]
    return _probe([next(iter(part.values())) for part in parts])

  def _probe(parts: list[np.ndarray]) -> Probe:
    return probes.probe(*(Split(x, part.labels) for x, part in zip(
        parts, (fitted, chosen_by, tested))), shots=shots, seed=seed)

  images = [part.images for part in (fitted, chosen_by, tested)]
  found = {
      'model': asked(network),
      'untrained': asked(Network(*_untrained(loaded, codec, seed), blocks)),
      'pixels': _probe([features.shrink(x).reshape(len(x), -1) / np.float32(255) for x in images]),
      'codes': _probe([probes.bag(_tokens(codec, part, seed), codec.spec.vocab)
                       for part in (fitted, chosen_by, tested)])}
  for name, result in found.items():
    few = '  '.join(f'{x.shots} shot {x.mean:.3f} +- {x.deviation:.3f}' for x in result.few)
    say(f'{name:10} logreg {result.logreg.top1:.4f}  sgd {result.sgd.top1:.4f}  neighbours '
        f'{result.neighbours.top1:.4f}  {few}')
  if found['model'].logreg.top1 < found['pixels'].logreg.top1:
    say('The model is below the pixels: its features lost what a line through pixels sees.')
  return {
      'model': f'{loaded.fingerprint} {loaded.path.name}@{loaded.step}', 'weights': loaded.weights,
      'kind': runs.kind(loaded.model), 'data': to_json(data), 'seed': seed,
      'examples': {'train': len(fitted.labels), 'validation': len(chosen_by.labels),
                   'test': len(tested.labels)},
      'chosen': dataclasses.asdict(best),
      'grid': [{**dataclasses.asdict(cell), 'validation': score} for cell, score in grid.items()],
      'probes': {name: dataclasses.asdict(result) for name, result in found.items()}}


def _splits(data: Any, train: int, validation: int, test: int, seed: int) -> list[Examples]:
  """Disjoint parts of the training split to fit and to choose on, and the held-out test."""
  source, held_out = data.open('train'), data.open('eval')
  validation = min(validation, len(source) // 5)
  order = np.random.default_rng(seed).permutation(len(source))[:train + validation]
  last = np.random.default_rng(seed).permutation(len(held_out))[:test]
  return [_examples(*part) for part in (
      (source, order[validation:]), (source, order[:validation]), (held_out, last))]


def _examples(source: Any, index: np.ndarray) -> Examples:
  rows = source.read(index)
  if 'image' not in rows or 'label' not in rows:
    raise ValueError('Probes need images with labels, and this data has '
                     f'{", ".join(sorted(rows))}; name other data with --data=CONFIG.')
  return Examples(rows['image'], rows['label'], index)


def _untrained(loaded: runs.Loaded, codec: runs.Loaded, seed: int
               ) -> tuple[runs.Loaded, runs.Loaded]:
  """The same network before training; a generator keeps its trained tokenizer."""
  spec = None if codec is loaded else codec.spec
  model = runs.build(loaded.config, spec, nnx.Rngs(seed + 1))
  fresh = dataclasses.replace(loaded, model=model)
  return fresh, fresh if codec is loaded else codec


def _tokens(codec: runs.Loaded, examples: Examples, seed: int) -> np.ndarray:
  keys = encode_keys(jnp.asarray(examples.index, jnp.int32), seed)
  return np.concatenate([
      np.asarray(encode(codec.model, to_float(jnp.asarray(examples.images[i:i + BATCH])),
                        keys=keys[i:i + BATCH]))
      for i in range(0, len(examples.index), BATCH)])


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run of a tokenizer or a generator.',
                      flag_values=values)
  flags.DEFINE_string('data', None, "A packaged config's data; default the run's own.",
                      flag_values=values)
  for name, count in (('train', 5000), ('validation', 1000), ('test', 5000)):
    flags.DEFINE_integer(name, count, 'Examples at most.', flag_values=values)
  flags.DEFINE_list('blocks', None, 'Of a generator, 1 the first; default four of them.',
                    flag_values=values)
  flags.DEFINE_list('shots', [str(k) for k in probes.SHOTS],
                    'Labelled examples per class, of probes on few.', flag_values=values)
  flags.DEFINE_integer('seed', 0, 'Of the splits, subsets and hidden codes.', flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Where the tokenizer was moved to.', flag_values=values)
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'Averaged or last weights.',
                    flag_values=values)
  flags.DEFINE_string('out', None, 'The table; default RUN/probe.json.', flag_values=values)


def main(values: Any) -> int:
  if values.workdir is None:
    raise ValueError('probe needs --workdir=RUN, of a tokenizer or a generator.')
  if min(values.train, values.validation, values.test) < 1:
    raise ValueError(f'train={values.train}, validation={values.validation} and test={values.test} '
                     'must be 1 or more.')
  found = probe(
      values.workdir, data=trees.load_config(values.data).data if values.data else None,
      train=values.train, validation=values.validation, test=values.test,
      tokenizer=values.tokenizer, blocks=_numbers('blocks', values.blocks) or None,
      shots=_numbers('shots', values.shots), seed=values.seed, weights=values.weights)
  folder = runs.split_reference(values.workdir)[0]
  path = pathlib.Path(values.out or (
      folder if folder.is_dir() else folder.with_suffix('')) / 'probe.json')
  provenance.record(path, None, found, libraries=('scikit-learn',))
  say(f'{path}')
  return 0


def _numbers(name: str, texts: list[str] | None) -> tuple[int, ...]:
  if not all(str(text).isdigit() and int(text) for text in texts or ()):
    raise ValueError(f'{name}={",".join(map(str, texts))} must be numbers such as 2,4.')
  return tuple(map(int, texts or ()))


if __name__ == '__main__':
  cli.run('probe')
