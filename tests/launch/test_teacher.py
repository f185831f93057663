"""Which frozen network an alignment gets, its refusals, and a run that trains with it."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from smalti.configs import flextok
from smalti.data.folder import FolderConfig
from smalti.evaluation import dinov2
from smalti.launch import run as runs, state as states, teacher
from smalti.launch.experiment import LogConfig, MeshConfig
from smalti.launch.train import train
from smalti.networks.flow import lean
from smalti.networks.teacher import DINOv2
from smalti.tokenizers.alignment import AlignmentConfig
from smalti.tokenizers.flexible import FlexTokConfig

CONFIG = FlexTokConfig(
    image_size=(32, 32), patch=16, registers=2, encoder=lean(1, 16, head=8),
    decoder=lean(2, 16, head=8),
    alignment=AlignmentConfig(teacher='cifar10', block=1, hidden=16))


def test_the_teacher_is_named_after_its_network_and_hash(capsys):
  network = teacher.load(CONFIG)
  said = capsys.readouterr()
  assert (said.out + said.err).strip() == 'alignment: cifar10net_433e2195'
  x = np.zeros((2, 32, 32, 3), np.float32)
  assert network(x, (2, 2)).shape == (2, 4, network.width)
  for nothing in (dataclasses.replace(CONFIG, alignment=None), object()):
    assert teacher.load(nothing) is None


def test_images_that_a_teacher_does_not_see_and_absent_weights_are_refused(monkeypatch):
  with pytest.raises(ValueError, match='mnist does not see images of .32, 32, 3.'):
    teacher.load(dataclasses.replace(CONFIG, alignment=AlignmentConfig(teacher='mnist')))
  monkeypatch.delenv(dinov2.FILE, raising=False)
  large = dataclasses.replace(CONFIG, alignment=AlignmentConfig(teacher='dinov2_large'))
  with pytest.raises(ValueError, match='SMALTI_DINOV2=FILE. Or set model.alignment=none') as error:
    teacher.load(large)
  assert '\n' not in str(error.value)
  small = DINOv2(1, 384, rngs=nnx.Rngs(0))
  monkeypatch.setattr(dinov2, 'load', lambda dtype: ('dinov2_384', small))
  with pytest.raises(ValueError, match='width 384, and alignment.teacher=dinov2_large has 1024'):
    teacher.load(large)


def test_a_run_with_an_alignment_trains_and_is_released_without_it(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(40):
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f'{i}.png')
  experiment = dataclasses.replace(
      flextok.get_config('debug'), model=CONFIG, steps=2, batch_size=8,
      mesh=MeshConfig(data=1),
      data=FolderConfig(path=str(tmp_path), size=32, eval_fraction=0.3), log=LogConfig(every=1))
  train(experiment, tmp_path / 'run')
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  found = [row['alignment'] for row in rows if 'alignment' in row]
  assert found and all(-1 <= value <= 1 for value in found)
  loaded = runs.load(tmp_path / 'run')
  assert loaded.model.alignment is None
  params, _ = states.Structure.of(loaded.model).split(loaded.model)
  assert params and 'alignment' not in params
