"""Two processes of four devices train as one of eight: same indices, same loss, one checkpoint."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from smalti.launch import run as runs, state as states, trees
from smalti.launch.checkpoint import Checkpoints
from smalti.launch.train import train

SCRIPT = pathlib.Path(__file__).parent / 'processes.py'


def start(count, workdir, tokenizer, steps, out):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  processes = []
  for i in range(count):
    environment = {
        **os.environ, 'XLA_FLAGS': f'--xla_force_host_platform_device_count={8 // count}'}
    if count > 1:
      environment |= {'SMALTI_COORDINATOR': f'127.0.0.1:{port}', 'SMALTI_PROCESSES': str(count),
                      'SMALTI_PROCESS': str(i)}
    processes.append(subprocess.Popen(
        [sys.executable, str(SCRIPT), str(workdir), str(tokenizer), str(steps), str(out)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
  for process in processes:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text[-3000:]
  return [json.loads(pathlib.Path(f'{out}.{i}').read_text()) for i in range(count)]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
  tokenizer = tmp_path / 'tokenizer'
  train(trees.load_config('digits_vq:debug', [('mesh.data', '8')]), tokenizer)
  one, = start(1, tmp_path / 'one', tokenizer, 3, tmp_path / 'a')
  two = start(2, tmp_path / 'two', tokenizer, 3, tmp_path / 'b')
  assert [part['devices'] for part in two] == [8, 8]
  joined = [a + b for a, b in zip(*(part['index'] for part in two))]
  assert joined == one['index']
  assert two[0]['scores'] == two[1]['scores']
  np.testing.assert_allclose(
      two[0]['scores']['eval/loss'], one['scores']['eval/loss'], rtol=1e-5)
  logged = [[json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').open()]
            for name in ('one', 'two')]
  losses = [[row['loss'] for row in rows if 'loss' in row] for rows in logged]
  assert len(losses[0]) == 3
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)

  # what two processes wrote together, one restores, on 1, 2 and 8 devices
  checkpoints = Checkpoints(tmp_path / 'two' / 'checkpoints')
  step = checkpoints.latest()
  leaves = []
  for count in (1, 2, 8):
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((count,), ('data',), devices=jax.devices()[:count]), jax.P())
    model = runs.load(tmp_path / 'two').model
    params, buffers = states.Structure.of(model).split(model)
    target = jax.tree.map(
        lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        {'ema': params, 'buffers': buffers})
    leaves.append(jax.device_get(checkpoints.restore_part(step, target)))
  for other in leaves[1:]:
    jax.tree.map(np.testing.assert_array_equal, leaves[0], other)
  checkpoints.close()

  # and two processes go on from it
  again = start(2, tmp_path / 'two', tokenizer, 5, tmp_path / 'c')
  straight, = start(1, tmp_path / 'straight', tokenizer, 5, tmp_path / 'd')
  assert [a + b for a, b in zip(*(p['index'] for p in again))][-2:] == straight['index'][-2:]
