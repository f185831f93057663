"""Our statistics beside torch-fidelity's on the same features.

  python -m smalti.launch.statistics_peers .../python docs/results/statistics_peers.json

The first argument is an interpreter that has torch-fidelity, which stays out of our environment
(`launch/peers/fidelity.py`). Features are float32, made here from a seed: rectified mixtures, as
the last layer of a network gives. The goal is 1e-4 relative.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from smalti.evaluation.entropy import inception_score
from smalti.evaluation.frechet import Moments, frechet_distance
from smalti.evaluation.kernel import kernel_distance
from smalti.evaluation.manifold import manifold
from smalti.evaluation.summary import Accumulator
from smalti.launch import provenance, timing

SCRIPT = timing.PYTORCH.with_name('fidelity.py')
GOAL = 1e-4
K, MODES = 3, 12
# generated rows, real rows, dimensions, classes, modes that the generated rows have, and the kernel
# distance's subsets and their size
CASES = ((5000, 4000, 64, 10, 9, 100, 1000), (3000, 2500, 256, 100, 9, 100, 1000),
         (3000, 3000, 256, 100, 12, 100, 1000), (200, 190, 256, 10, 9, 100, 100),
         (1200, 1100, 2048, 1008, 9, 20, 1000))


def draw(generated: int, real: int, dim: int, classes: int, kinds: int) -> dict[str, Any]:
  """Two sets of features, which differ in scale and modes unless the first has all, and logits."""
  random = np.random.default_rng(dim + real)
  hidden = max(dim // 4, 8)
  mix = random.normal(size=(hidden, dim)) / hidden**0.5
  modes = random.normal(size=(MODES, hidden))

  def features(rows: int, kinds: int, scale: float) -> np.ndarray:
    z = modes[random.integers(0, kinds, rows)] + scale * random.normal(size=(rows, hidden))
    return np.maximum(z @ mix + .1 * random.normal(size=(rows, dim)) + .2, 0).astype(np.float32)

  return {'generated': features(generated, kinds, 1.0 if kinds == MODES else .9),
          'real': features(real, MODES, 1.0),
          'logits': (3 * random.normal(size=(generated, classes))).astype(np.float32)}


def ours(arrays: dict[str, Any], subsets: int, size: int) -> dict[str, float]:
  """The statistics that the peer is asked for, from the code that `evaluate` uses."""
  generated, real, n = arrays['generated'], arrays['real'], len(arrays['generated'])
  total = Accumulator('drawn:0:none', n, keep=0)
  for rows in np.array_split(np.arange(n), range(64, n, 64)):  # streamed, in batches
    total.add({'features': generated[rows], 'logits': arrays['logits'][rows]}, rows)
  summary = total.finish()
  kernel = kernel_distance(generated, real, subsets=subsets, size=size)
  score, deviation = inception_score(summary.shuffled)
  shares = manifold(real=real, generated=generated, k=K)
  return {'frechet': frechet_distance(summary.moments, Moments.of(real, summary.extractor)),
          'kernel': kernel.mean, 'kernel_deviation': kernel.deviation, 'inception_score': score,
          'inception_score_deviation': deviation, 'precision': shares.precision,
          'recall': shares.recall}


def main(python: str, out: str) -> None:
  results = []
  with tempfile.TemporaryDirectory() as folder, timing.Peer(python, SCRIPT) as peer:
    for generated, real, dim, classes, kinds, subsets, size in CASES:
      arrays, path = draw(generated, real, dim, classes, kinds), Path(folder) / 'features.npz'
      np.savez(path, **arrays)
      found = ours(arrays, subsets, size)
      theirs = {dtype: peer.ask({'case': 'statistics', 'path': str(path), 'dtype': dtype, 'k': K,
                                 'kernel': {'subsets': subsets, 'size': size}})
                for dtype in ('float32', 'float64')}
      for name, value in found.items():
        relative = {dtype: abs(value - answer[name]) / abs(answer[name])
                    for dtype, answer in theirs.items()}
        alike = ', alike' if kinds == MODES else ''
        results.append(row := {
            'case': f'{generated} and {real} rows of {dim}{alike}', 'statistic': name,
            'ours': value, 'peer': theirs['float32'][name], 'relative': relative['float32'],
            'relative_float64': relative['float64'], 'goal': GOAL,
            'met': relative['float32'] <= GOAL})
        print(f'{row["case"]:34} {name:26} {value:14.8f}  {row["relative"]:8.1e}, and '
              f'{row["relative_float64"]:8.1e} where the peer computes in float64', flush=True)
    versions = peer.versions
  provenance.record(out, None, results, peers=versions)


if __name__ == '__main__':
  main(*sys.argv[1:])
