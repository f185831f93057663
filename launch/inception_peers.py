"""Converted networks against the ones they were converted from.

    python -m smalti.launch.inception_peers --peer_python=PYTHON [--out=docs/results]

PYTHON has torch, torch-fidelity, torchvision, lpips and clean-fid. It draws random weights, saves
them in the formats that weights are published in, and writes what its networks make of some images
(`launch/peers/inception.py`); here the files are read, the same images go through our networks, and
the largest differences are recorded in OUT/inception_peers.json. The published weights themselves
are not needed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

from smalti.evaluation import inception, perceptual, resize
from smalti.launch import provenance
from smalti.networks.inception import SIDE, Inception

SCRIPT = Path(__file__).parent / 'peers' / 'inception.py'
FILES = {'random.pth': 'random', 'random_legacy.pth': 'random', 'plain.pt': 'plain'}


def measure(peer_python: str) -> tuple[list[dict], dict]:
  """The rows of the table, and the peer's versions."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / 'names.json').write_text(json.dumps(script_names()))
    subprocess.run([peer_python, str(SCRIPT), name], check=True)
    with np.load(folder / 'outputs.npz', allow_pickle=False) as file:
      want = {key: file[key] for key in file.files}
    versions = json.loads((folder / 'versions.json').read_text())
    rows = []
    for size in ('small', 'large'):
      images = want[f'{size}/images']
      for mode in ('tf1', 'legacy_pytorch', 'clean'):
        levels = images / np.float32(255) if mode == 'legacy_pytorch' else images.astype(np.float32)
        got = np.asarray(getattr(resize, mode)(levels, SIDE))
        rows.append(_row(f'resize {mode}, {_shape(images)}', got, want[f'{size}/{mode}']))
    for file_name, weights in FILES.items():
      extractor = inception.load(folder / file_name, batch=2)
      for size in ('small', 'large') if file_name == 'random.pth' else ('small',):
        images = want[f'{size}/images']
        for key, value in extractor(images).items():
          case = f'{key} of {_shape(images)}, {file_name}'
          rows.append(_row(case, value, want[f'{size}/{weights}/{key}']))
          if (size, file_name) == ('small', 'random.pth'):
            exact = want[f'small/exact/{key}']
            rows.append(_row(f'{case}, against float64', value, exact))
            rows.append(_row(f'{case}, the peer itself against float64',
                             want[f'small/random/{key}'], exact))
    for net in perceptual.CHANNELS:
      distance = perceptual.load(net, folder / f'{net}_trunk.pth', folder / f'{net}_heads.pth')
      got = distance(want['pairs/x'], want['pairs/y'])
      rows.append(_row(f'lpips {net}, random trunk', got, want[f'lpips/{net}']))
  return rows, versions


def script_names() -> dict[str, str]:
  """torch's names of all tensors to those of the TorchScript file."""
  state = nnx.state(nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0))))
  found = [inception.names(path) for path, _ in nnx.to_flat_state(state)]
  return {name['torch']: name['torchscript'] for name in found}


def _shape(images: np.ndarray) -> str:
  return ' x '.join(map(str, images.shape[:3]))


def _row(case: str, got: np.ndarray, want: np.ndarray) -> dict:
  if got.shape != want.shape:
    raise ValueError(f'{case}: {got.shape} here, {want.shape} there.')
  difference = np.abs(got.astype(np.float64) - want)
  return {'case': case, 'max_abs': float(difference.max()), 'mean_abs': float(difference.mean()),
          'scale': float(np.sqrt(np.mean(np.square(want, dtype=np.float64))))}


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--peer_python', required=True)
  parser.add_argument('--out', default='runs/peers')
  values = parser.parse_args(arguments)
  rows, versions = measure(values.peer_python)
  for row in rows:
    print(f'{row["case"]:<75} max {row["max_abs"]:.2e}  mean {row["mean_abs"]:.2e}  '
          f'of {row["scale"]:.3g}')
  provenance.record(Path(values.out) / 'inception_peers.json', None, rows, peers=versions,
                    libraries=('pillow',))


if __name__ == '__main__':
  main(sys.argv[1:])
