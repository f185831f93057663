"""A run folder of the first version: every later version loads it, or refuses it in one line."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from smalti.launch import run as runs
from smalti.launch.train import train

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'run'
FINGERPRINT = '6a464f3ecc0a038e'


@pytest.fixture
def golden(tmp_path):
  return shutil.copytree(GOLDEN, tmp_path / 'run')


def test_it_loads_with_its_fingerprint_or_is_refused(golden):
  item = json.loads((golden / 'config.json').read_text())
  if item['format'] != runs.FORMAT:
    with pytest.raises(ValueError, match=f'written by smalti {item["version"]}'):
      runs.load(golden)
    return
  loaded = runs.load(golden)
  assert loaded.fingerprint == FINGERPRINT
  assert loaded.spec.grid == (8, 8) and loaded.spec.vocab == (64,)
  tokens = loaded.model.encode(jnp.zeros((1, 8, 8, 1)))
  assert np.isfinite(loaded.model.decode(tokens)).all()


def test_it_can_be_trained_on(golden):
  experiment = runs.read_experiment(golden)
  experiment.steps = 3
  assert np.isfinite(train(experiment, golden)['eval/loss'])


def test_it_is_small():
  assert sum(p.stat().st_size for p in GOLDEN.rglob('*') if p.is_file()) < 300_000
