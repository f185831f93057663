"""One of several processes of a training run: started by test_processes.py, never imported.

Usage: processes.py WORKDIR TOKENIZER STEPS OUT. Reads SMALTI_COORDINATOR and friends.
"""

import json
import sys

import jax

from smalti.launch import job, mesh, train, trees


def main(workdir, tokenizer, steps, out):
  mesh.distribute()
  experiment = trees.load_config('digits_ar:debug', [
      ('tokenizer', tokenizer), ('steps', steps), ('batch_size', '16'), ('mesh.data', '2'),
      ('mesh.fsdp', '-1'), ('checkpoint.best', 'none'), ('log.every', '1'),
      ('model.label_dropout', '0.0'), ('model.transformer.dropout', '0.0')])
  seen = []
  batches = job.pipeline.batches

  def watched(*args, **kwargs):
    for rows in batches(*args, **kwargs):
      seen.append(rows['index'].tolist())
      yield rows

  job.pipeline.batches = watched
  scores = train.train(experiment, workdir)
  with open(f'{out}.{jax.process_index()}', 'w') as file:
    json.dump({'index': seen, 'scores': scores, 'devices': len(jax.devices())}, file)


if __name__ == '__main__':
  main(*sys.argv[1:])
