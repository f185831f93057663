"""What 1,000 steps against a discriminator give.

`python -m smalti.launch.adversarial --runs=DIR --out=FILE.json`.

Per seed, one tokenizer is trained on squared error to the end of its schedule, and goes on from
there twice, with and without a discriminator (configs/adversarial.py). Each of the three is scored
on held-out images: PSNR, and the Frechet distance between them and their reconstructions in the
features of the packaged network of such images, which no loss here has seen, and of its untrained
twin. Runs go on where they were stopped; what is finished is not scored again. Needs the data set
(SMALTI_DATA_DIR).
"""

import json
import pathlib
from typing import Any

import numpy as np

from smalti.evaluation import features, frechet, reconstruction
from smalti.launch import cli, extractors, provenance, run as runs, trees
from smalti.launch.progress import say
from smalti.launch.reconstruct import decoded, encoded
from smalti.launch.train import train

CONFIG = 'adversarial'
ARMS = ('l2', 'more', 'gan')  # the first stage, then what goes on from it
IMAGES = 10_000  # held-out images
BATCH = 250


def score(workdir: pathlib.Path, images: np.ndarray, networks: list[Any]) -> dict[str, float]:
  """PSNR and SSIM of a run's reconstructions, and Frechet distances to the images themselves."""
  loaded = runs.load(workdir)
  parts = [images[i:i + BATCH] for i in range(0, len(images), BATCH)]
  remade = [decoded(loaded, encoded(loaded, part, first=i * BATCH), first=i * BATCH)
            for i, part in enumerate(parts)]
  errors = reconstruction.summarize(
      [reconstruction.measure(a, b) for a, b in zip(parts, remade)])
  found = {'psnr': errors.psnr, 'ssim': errors.ssim}
  for network in networks:
    found[f'r{features.score_name(network)}'] = frechet.frechet_distance(
        features.moments(network, np.concatenate(remade)), features.moments(network, images))
  return found


def seconds(workdir: pathlib.Path) -> float:
  """The median time of a step."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return float(np.median([row['seconds/step'] for row in rows if 'seconds/step' in row]))


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Every number of an arm by seed and its mean, and what the adversary changed, seed by seed."""
  found: dict[str, Any] = {}
  names = [name for name in rows[0] if name not in ('seed', 'arm')]
  by = {(row['arm'], row['seed']): row for row in rows}
  for arm in ARMS:
    each = {name: [row[name] for row in rows if row['arm'] == arm] for name in names}
    found[arm] = _means(each) if each['images'] else {'state': 'not run'}
  pairs = [(by['gan', seed], by['more', seed]) for arm, seed in by
           if arm == 'gan' and ('more', seed) in by]
  if pairs:
    found['gan - more'] = _means({name: [a[name] - b[name] for a, b in pairs] for name in names
                                  if name != 'images'})
  return found


def _means(each: dict[str, list[float]]) -> dict[str, Any]:
  return {name: {'mean': float(np.mean(values)), 'each': values} for name, values in each.items()}


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('runs', None, 'The folder of the runs.', flag_values=values)
  flags.DEFINE_string('out', None, 'The file of the results.', flag_values=values)
  flags.DEFINE_integer('seeds', 2, 'How many seeds.', flag_values=values, lower_bound=1)


def main(values: Any) -> int:
  if values.runs is None or not (values.out or '').endswith('.json'):
    raise ValueError('adversarial needs --runs=DIR and --out=FILE.json.')
  rows: list[dict[str, Any]] = []
  network: Any = extractors.load('cifar10')
  networks = [network, network.random(0)]
  for seed in range(values.seeds):
    first = pathlib.Path(values.runs) / f'l2-{seed}'
    for arm in ARMS:
      workdir = pathlib.Path(values.runs) / f'{arm}-{seed}'
      kept = workdir / 'row.json'
      if not kept.exists():
        experiment = trees.load_config(f'{CONFIG}:{arm}', [('seed', str(seed))])
        train(experiment, workdir, init_from=None if arm == 'l2' else str(first))
        source = experiment.data.open('eval')
        images = source.read(np.arange(min(IMAGES, len(source))))['image']
        runs.write_json(kept, {'seed': seed, 'arm': arm, **score(workdir, images, networks),
                               'seconds_per_step': seconds(workdir), 'images': len(images)})
      rows.append(json.loads(kept.read_text()))
      say('  '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}'
                    for k, v in rows[-1].items()))
      provenance.record(values.out, None, compare(rows), seeds=values.seeds, finished=len(rows),
                        planned=values.seeds * len(ARMS))
  return 0


if __name__ == '__main__':
  cli.run('adversarial')
