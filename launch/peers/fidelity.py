"""torch-fidelity's statistics of given features, run by an interpreter that has it.

Reads requests and writes answers, one line of JSON each, as `launch/timing.py` says. Nothing of
ours is imported here. Its functions take features as they come: float32 as its extractors give
them, or the same numbers in float64, which shows how much of a difference is its rounding.
"""

import importlib.metadata
import json
import os
import sys

import numpy as np
import torch
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

THREADS = int(os.environ.get('OMP_NUM_THREADS', '2'))


def statistics(path, dtype, kernel, k):
  """Every statistic of the arrays `generated`, `real` and `logits` of the .npz at `path`."""
  with np.load(path, allow_pickle=False) as arrays:
    generated, real, logits = (torch.from_numpy(arrays[name].astype(dtype))
                               for name in ('generated', 'real', 'logits'))
  moments = [metric_fid.fid_features_to_statistics(x) for x in (generated, real)]
  distance = metric_fid.fid_statistics_to_metric(*moments, verbose=False)
  polynomial = metric_kid.kid_features_to_metric(
      generated, real, kid_subsets=kernel['subsets'], kid_subset_size=kernel['size'],
      rng_seed=2020, verbose=False)
  entropy = metric_isc.isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
  shares = metric_prc.prc_features_to_metric(
      generated, real, prc_neighborhood=k, prc_batch_size=10_000, save_cpu_ram=True, verbose=False)
  return {'frechet': distance['frechet_inception_distance'],
          'kernel': polynomial['kernel_inception_distance_mean'],
          'kernel_deviation': polynomial['kernel_inception_distance_std'],
          'inception_score': entropy['inception_score_mean'],
          'inception_score_deviation': entropy['inception_score_std'],
          'precision': shares['precision'], 'recall': shares['recall']}


def answer(request):
  if request.pop('case') == 'versions':
    return {'python': sys.version.split()[0], 'torch': torch.__version__,
            'torch-fidelity': importlib.metadata.version('torch-fidelity'),
            'numpy': np.__version__}
  return statistics(**request)


def main():
  torch.set_num_threads(THREADS)
  answers = os.fdopen(os.dup(1), 'w')  # libraries that print must not spoil the answers
  os.dup2(2, 1)
  for line in sys.stdin:
    try:
      reply = answer(json.loads(line))
    except Exception as error:  # the other side raises it
      reply = {'error': f'{type(error).__name__}: {error}'}
    print(json.dumps(reply), file=answers, flush=True)


if __name__ == '__main__':
  main()
