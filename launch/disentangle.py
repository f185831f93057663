"""InfoMEC of three bottlenecks on one factor set: `python -m smalti.launch.disentangle`.

QLAE, an autoencoder and VQ-VAE (configs/shapes_qlae.py), three weight decays, three seeds: 27 runs
of one network. A finished cell is a file of its own in --out and is skipped; the same command goes
on where it was stopped, within a run too. What is finished is summarised in `OUT.json` and
`OUT_order.json`; `--cells=` does that alone.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smalti.evaluation import latents as measures, reconstruction
from smalti.launch import exits, provenance, run as runs, trees
from smalti.launch.progress import say
from smalti.launch.train import train
from smalti.networks.pixels import to_float, to_uint8
from smalti.tokenizers.tokenizer import Tokenizer

MODELS = {'qlae': 'base', 'ae': 'ae', 'vq': 'vq'}  # to sizes of the config
DECAYS = (1.0, 0.1, 3.0)  # the likeliest first; 0.1 is the paper's, for 70 times as many steps
SEEDS = (0, 1, 2)
MEASURES = ('infom', 'infoc', 'infoe', 'psnr')
PUBLISHED = {'infom': 'qlae', 'infoe': 'qlae'}  # who is first in arXiv 2305.18378, abstract


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run."""
  model: str
  decay: float
  seed: int

  @property
  def name(self) -> str:
    return f'{self.model}-{self.decay:g}-{self.seed}'

  def experiment(self) -> Any:
    experiment = trees.load_config(f'shapes_qlae:{MODELS[self.model]}')
    experiment.optimizer.weight_decay = self.decay
    return dataclasses.replace(experiment, seed=self.seed)


CELLS = {cell.name: cell for cell in (
    Cell(model, decay, seed) for decay in DECAYS for model in MODELS for seed in SEEDS)}


def measure(model: Any, images: np.ndarray, factors: np.ndarray, batch_size: int = 500
            ) -> dict[str, Any]:
  """InfoMEC and PSNR of a trained `Styled` model, on images and their factors."""
  quantized = isinstance(model, Tokenizer)

  @jax.jit
  def both_ways(model, x):
    if quantized:
      tokens = model.encode(to_float(x))
      return tokens[..., 0], to_uint8(model.decode(tokens))
    vectors = model.latents(to_float(x))
    return vectors[..., 0], to_uint8(model.decode_latents(vectors))

  parts = [jax.device_get(both_ways(model, jnp.asarray(images[i:i + batch_size])))
           for i in range(0, len(images), batch_size)]
  latents, decoded = (np.concatenate(part) for part in zip(*parts))
  psnr = reconstruction.psnr(images, decoded)
  found = measures.infomec(factors, latents)
  return {**found.to_json(), 'psnr': float(psnr[np.isfinite(psnr)].mean()),
          'latents': 'codes' if quantized else 'real',
          'values': [len(np.unique(column)) for column in latents.T] if quantized else None}


def run_cell(cell: Cell, out: pathlib.Path, folder: pathlib.Path) -> None:
  """Trains (or finishes) one run, and writes its file."""
  clock = provenance.Clock()
  experiment = cell.experiment()
  train(experiment, folder / cell.name)
  loaded = runs.load(folder / cell.name, weights='raw')
  source = experiment.data.open('eval')
  rows = source.read(np.arange(len(source)))
  found = measure(loaded.model, rows['image'], rows['factors'])
  found = {'model': cell.model, 'weight_decay': cell.decay, 'seed': cell.seed, **found}
  say('  '.join(f'{name} {found[name]}' for name in ('model', 'weight_decay', 'seed', *MEASURES)))
  provenance.record(
      out / f'{cell.name}.json',
      f'python -m smalti.launch.disentangle --cells={cell.name}', found,
      libraries=('scikit-learn',), clock=clock, fingerprint=loaded.fingerprint,
      factors=list(source.lattice.names), data='shapes3d_like', config='shapes_qlae')


def summary(out: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Mean and deviation of every model and decay that has finished cells, and who comes first.

  The deviation is over seeds, n - 1 in the denominator; None for one seed. A model is ranked at the
  decay that is best for it by the mean of InfoM and InfoC, on the numbers that are then reported:
  the same advantage for all three.
  """
  cells = [json.loads(path.read_text())['results'] for path in sorted(out.glob('*.json'))]
  rows, best = {}, {}
  for model in MODELS:
    for decay in sorted(DECAYS):
      chosen = [c for c in cells if (c['model'], c['weight_decay']) == (model, decay)]
      if not chosen:
        continue
      row: dict[str, Any] = {
          'model': model, 'weight_decay': decay, 'seeds': len(chosen),
          'active': float(np.mean([sum(c['active']) for c in chosen])),
          **{name: _spread([c[name] for c in chosen]) for name in MEASURES}}
      rows[f'{model} {decay:g}'] = row
      if model not in best or _chosen_by(row) > _chosen_by(best[model]):
        best[model] = row
  order = []
  for name in MEASURES:
    ranked = sorted(best.values(), key=lambda row: _mean(row, name), reverse=True)
    first = ranked[0]['model'] if ranked else None
    order.append({
        'measure': name, 'first': first,
        'as_published': first == PUBLISHED[name] if name in PUBLISHED and first else None,
        'order': ' > '.join(f'{row["model"]} {row[name]["text"]}' for row in ranked)})
  return rows, order


def _chosen_by(row: dict[str, Any]) -> float:
  return _mean(row, 'infom') + _mean(row, 'infoc')


def _mean(row: dict[str, Any], name: str) -> float:
  value = row[name]['mean']
  return -math.inf if value is None else value


def write_summary(out: pathlib.Path) -> None:
  """`OUT.json`, a row per model and decay, and `OUT_order.json`, a row per measure."""
  rows, order = summary(out)
  command = 'python -m smalti.launch.disentangle'
  parts = [provenance.load(path) for path in sorted(out.glob('*.json'))]
  for path, results in ((out.with_name(f'{out.name}.json'), rows),
                        (out.with_name(f'{out.name}_order.json'), order)):
    provenance.record(path, command, results, libraries=('scikit-learn',), parts=parts,
                      finished=len(parts), cells=len(CELLS))


def _spread(values: list[float | None]) -> dict[str, Any]:
  known = [v for v in values if v is not None]
  if not known:
    return {'mean': None, 'deviation': None, 'text': 'undefined'}
  mean = float(np.mean(known))
  deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
  digits = 3 if abs(mean) < 10 else 2
  text = f'{mean:.{digits}f}' + (f' ± {deviation:.{digits}f}' if deviation is not None else '')
  return {'mean': mean, 'deviation': deviation, 'text': text}


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
      'python -m smalti.launch.disentangle', description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('docs/results/infomec'),
                      help='folder of the results, one file per finished cell')
  parser.add_argument('--runs', type=pathlib.Path, default=pathlib.Path('runs/infomec'),
                      help='folder of the training runs')
  parser.add_argument('--cells', default=','.join(CELLS),
                      help='comma-separated MODEL-DECAY-SEED; all by default')
  options = parser.parse_args(arguments)
  names = [name for name in options.cells.split(',') if name]
  if unknown := sorted(set(names) - set(CELLS)):
    parser.error(f'unknown cells {unknown}; there are {", ".join(CELLS)}')
  for name in names:
    if not (options.out / f'{name}.json').exists():
      try:
        run_cell(CELLS[name], options.out, options.runs)
      except exits.Preempted as error:
        say(str(error))
        return exits.PREEMPTED
      write_summary(options.out)
  write_summary(options.out)
  return exits.FINISHED


if __name__ == '__main__':
  raise SystemExit(main())
