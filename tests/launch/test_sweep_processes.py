"""The processes of a cluster share every cell of a sweep and write what one process writes."""

import csv
import json
import os
import socket
import subprocess
import sys

import pytest

from smalti.launch import trees
from smalti.launch.train import train


def sweep(count, *arguments):
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
        [sys.executable, '-m', 'smalti.launch.sweep', *arguments], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
  for process in processes:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text[-3000:]


@pytest.mark.slow
def test_two_processes_sweep_as_one(tmp_path):
  train(trees.load_config('digits_vq:debug', [('mesh.data', '1')]), tmp_path / 'tokenizer')
  train(trees.load_config('digits_ar:debug', [
      ('mesh.data', '1'), ('tokenizer', str(tmp_path / 'tokenizer'))]), tmp_path / 'ar')
  asked = [f'--workdir={tmp_path / "ar"}', '--settings.temperature=1,0.9', '--n=40',
           '--batch_size=16']
  tables = {}
  for count in (1, 2):
    out = tmp_path / f'sweep{count}'
    sweep(count, *asked, f'--out={out}')
    with open(out / 'results.csv') as file:
      tables[count] = list(csv.DictReader(file))
    drawn = [json.loads(line)['batch'] for path in sorted((out / 'logs').glob('*.jsonl'))
             for line in path.read_text().splitlines() if json.loads(line)['event'] == 'batch']
    assert sorted(drawn) == sorted([0, 1, 2] * 2)  # three batches of a cell, each by one process
    assert len(list((out / 'logs').glob('*.jsonl'))) == count
  for one, two in zip(tables[1], tables[2]):
    assert one.keys() == two.keys() and one['cell'] == two['cell']
    for name in one:
      if name[:2] in ('fd', 'kd') or name.startswith(('precision', 'recall', 'density')):
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-6), name
