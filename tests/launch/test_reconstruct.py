"""`smalti reconstruct`: which held-out examples it shows."""

import numpy as np

from smalti.data.digits import DigitsConfig
from smalti.evaluation.subset import subset
from smalti.launch import cli, pictures, reconstruct, trees
from smalti.launch.train import train


def test_the_examples_shown_are_random_ones(tmp_path, monkeypatch):
  train(trees.load_config('digits_vq:debug', [('mesh.data', '1'), ('steps', '1')]),
        tmp_path / 'run')
  shown, measured = [], []
  monkeypatch.setattr(pictures, 'save_grid', lambda path, images, **_: shown.append(images))
  compare = reconstruct.compare
  monkeypatch.setattr(reconstruct, 'compare', lambda images, result: (
      measured.append(images), compare(images, result))[1])
  assert cli.main(['reconstruct', f'--workdir={tmp_path}/run', '--n=16']) == 0
  rows = DigitsConfig().open('eval').read(subset(360, 16))['image']
  np.testing.assert_array_equal(measured[0], rows)
  np.testing.assert_array_equal(shown[0][:16], rows)
