"""A run killed twice ends as the one nobody killed; `make survival` kills forty times."""

import importlib.util
import pathlib
import signal
import sys

import pytest


def survival():
  """tests/survival.py, which is a script."""
  path = pathlib.Path(__file__).parent.parent / 'survival.py'
  spec = importlib.util.spec_from_file_location('survival', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules['survival'] = module
  spec.loader.exec_module(module)
  return module


def test_killed_run_ends_as_the_undisturbed_one(tmp_path):
  """SIGKILL inside a checkpoint write, SIGTERM between steps: same leaves, same losses, bitwise."""
  module = survival()
  result = module.kill_run(
      'digits_vq', ['--config=digits_vq:debug'], tmp_path, steps=30, every=5, seed=0,
      plan=[(signal.SIGKILL, 'write'), (signal.SIGTERM, 'step')],
      environment=module.compiled_once(tmp_path))
  first, second = result['events']
  assert first['met'] and first['write'] and first['code'] == -signal.SIGKILL
  assert second['met'] and second['code'] == 75 and second['step'] == second['checkpoint']
  assert result['leaves'] > 10 and result['leaves_different'] == 0


@pytest.mark.slow
def test_killed_adversary_plays_on_as_the_undisturbed_one(tmp_path):
  """Both players, their moments, LeCAM's averages and a codebook of averages, bitwise."""
  module = survival()
  result = module.kill_run(
      'adversarial', ['--config=adversarial:debug'], tmp_path, steps=24, every=4, seed=0,
      plan=[(signal.SIGKILL, 'write'), (signal.SIGKILL, 'step'), (signal.SIGTERM, 'step')],
      environment=module.compiled_once(tmp_path))
  assert all(event['met'] for event in result['events'])
  assert result['leaves_different'] == 0
  leaves = module.leaves(tmp_path / 'adversarial-killed', 24)
  for part in ("['buffers']['discriminator']['lecam']['average']",
               "['buffers']['quantizer']['codebook']",
               "['params']['discriminator']['network']['output']['kernel']"):
    assert part in leaves
