"""A data set to stored tokens: `smalti tokenize --workdir=TOKENIZER --out=DIR [--data=...]`.

Writes DIR/train and DIR/eval: sharded token files with the tokenizer's spec and fingerprint. Train
on them with the data config `TokensConfig(path=DIR)`.
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from smalti.data.tokens import TokenWriter
from smalti.launch import cli, run as runs, trees
from smalti.launch.progress import say, track
from smalti.launch.reconstruct import encoded
from smalti.launch.serialization import to_json


def tokenize(tokenizer: runs.Loaded, data: Any, out: pathlib.Path, *, batch_size: int = 256
             ) -> None:
  """Encodes both splits of `data` (a DataConfig) into `out`."""
  for split in ('train', 'eval'):
    source = data.open(split)
    writer = TokenWriter(
        out / split, tokenizer.spec.to_json(), tokenizer.fingerprint,
        tokenizer=os.path.abspath(tokenizer.path) + f'@{tokenizer.step}'
        if tokenizer.experiment else os.path.abspath(tokenizer.path),
        classes=source.classes, data=to_json(data), resume=True)
    if writer.complete:
      say(f'{split}: finished before, {out / split}')
      continue
    starts = range(writer.count, len(source), batch_size)
    for first in track(starts, len(starts), 'batch'):
      indices = np.arange(first, min(first + batch_size, len(source)))
      rows = source.read(indices)
      tokens = encoded(tokenizer, rows.pop('image'), first=first)
      writer.add({**rows, 'tokens': np.asarray(tokens), 'index': indices})
    writer.close()
    say(f'{split}: {len(source)} examples of {tokenizer.spec.length} x {tokenizer.spec.depth} '
        f'tokens in {out / split}')


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The tokenizer: a run, RUN@STEP or an exported file.',
                      flag_values=values)
  flags.DEFINE_string('data', None, "A packaged config's data, or a folder of images; "
                      "default the run's own data.", flag_values=values)
  flags.DEFINE_string('out', None, 'Where the token folder goes.', flag_values=values)
  flags.DEFINE_integer('batch_size', 256, 'Examples per call.', flag_values=values,
                       lower_bound=1)


def main(values: Any) -> int:
  if values.workdir is None or values.out is None:
    raise ValueError('tokenize needs --workdir=TOKENIZER and --out=DIR.')
  tokenizer = runs.load(values.workdir)
  if not hasattr(tokenizer.model, 'encode'):
    raise ValueError(f'{values.workdir} is a {runs.kind(tokenizer.model)}; tokenize with a '
                     'tokenizer.')
  tokenize(tokenizer, _data(values.data, tokenizer), pathlib.Path(values.out),
           batch_size=values.batch_size)
  return 0


def _data(name: str | None, tokenizer: runs.Loaded) -> Any:
  if name is None:
    if tokenizer.experiment is None:
      raise ValueError('An exported tokenizer has no data of its own; name some with --data=....')
    return tokenizer.experiment.data
  if os.path.isdir(name):
    data = tokenizer.experiment.data if tokenizer.experiment else None
    from smalti.data.folder import FolderConfig
    if isinstance(data, FolderConfig):
      return dataclasses.replace(data, path=name)
    config: Any = tokenizer.config
    return FolderConfig(path=name, size=config.image_size[0], channels=config.channels)
  return trees.load_config(name).data


if __name__ == '__main__':
  cli.run('tokenize')
