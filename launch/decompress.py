"""Tokens of a compressed file: `smalti decompress --workdir=GENERATOR --file=FILE --out=FILE.npz`.

The generator must be the one that compressed, on the same kind of machine (`smalti compress`).
Writes `tokens` and, where there were labels, `arr_1`, as `smalti sample` does.
"""

import pathlib
from typing import Any

import numpy as np

from smalti.evaluation.files import whole
from smalti.launch import cli, compress, run as runs
from smalti.launch.progress import say


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The generator that compressed.', flag_values=values)
  flags.DEFINE_string('file', None, 'The compressed file.', flag_values=values)
  flags.DEFINE_string('out', None, 'The .npz to write.', flag_values=values)


def main(values: Any) -> int:
  if None in (values.workdir, values.file, values.out):
    raise ValueError('decompress needs --workdir=GENERATOR, --file=FILE and --out=FILE.npz.')
  data = pathlib.Path(values.file).read_bytes()
  compress.read_header(data)  # before anything is loaded for it
  tokens, labels = compress.decompress(runs.load(values.workdir), data)
  out = pathlib.Path(values.out)
  arrays: Any = {'tokens': tokens, **({} if labels is None else {'arr_1': labels})}
  with whole(out) as file:
    np.savez(file, **arrays)
  say(f'{len(tokens)} sequences: {out}')
  return 0


if __name__ == '__main__':
  cli.run('decompress')
