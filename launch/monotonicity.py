"""What our extractors see: `python -m smalti.launch.monotonicity --out=docs/results`.

Real images go through five ladders of degradation (see `evaluation/monotonicity.py`), and each rung
is measured with the packaged network of its data and with that network's untrained twin. Writes
`monotonicity.json`. Needs the data sets (SMALTI_DATA_DIR).
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from smalti.data.downloads import CifarJpegConfig, MnistConfig
from smalti.evaluation import features, monotonicity
from smalti.launch import cli, extractors, provenance
from smalti.launch.progress import say

DATA: dict[str, Any] = {'mnist': MnistConfig(), 'cifar10': CifarJpegConfig()}


def climb(name: str, network: Any, n: int) -> dict[str, Any]:
  """One network's rungs and verdicts, on images of the training split.

  Held-out images are too few where half of the classes are missing.
  """
  source = DATA[name].open('train')
  rows = source.read(np.random.default_rng(0).permutation(len(source)))
  images, labels = rows['image'], rows['label']
  rungs = monotonicity.climb(network, images[:n], images[n:], labels[n:], n=n)
  verdicts = monotonicity.verdicts(rungs)
  say(features.score_name(network))
  for ladder in monotonicity.LADDERS:
    chosen = [rung for rung in rungs if rung.ladder == ladder]
    say(f'  {ladder:8} ' + '  '.join(
        f'{r.level:g}: fd {r.fd:.4f} others {r.fd_others:.4f} kd {r.kd_others:.5f}' + (
            '' if r.recall is None else f' p {r.precision:.3f} r {r.recall:.3f}') for r in chosen))
  say('  does not hold: ' + (', '.join(k for k, v in verdicts.items() if not v) or 'none'))
  return {'data': name, 'network': features.identity(network), 'n': n,
          'rungs': [dataclasses.asdict(rung) for rung in rungs], 'holds': verdicts}


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('out', None, 'The folder of the results.', flag_values=values)
  flags.DEFINE_list('extractors', list(DATA), 'Packaged networks.', flag_values=values)
  flags.DEFINE_integer('n', 5000, 'Images per rung, and of the reference.', flag_values=values,
                       lower_bound=2)


def main(values: Any) -> int:
  if unknown := [name for name in values.extractors if name not in DATA]:
    raise ValueError(f'extractors={",".join(unknown)} must be of {", ".join(DATA)}.')
  found = {}
  for name in values.extractors:
    network: Any = extractors.load(name)
    for which in (network, network.random(0)):
      found[features.score_name(which)] = climb(name, which, values.n)
  if values.out:
    path = pathlib.Path(values.out) / 'monotonicity.json'
    provenance.record(path, None, found, libraries=('pillow', 'scikit-learn'))
    say(f'{path}')
  return 0


if __name__ == '__main__':
  cli.run('monotonicity')
