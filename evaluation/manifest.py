"""Score: a number with everything that is needed to make it again, and `scores.json`.

No field has a default: a score cannot be built, nor written, without saying how it was made. The
file holds the request that made it, which `smalti evaluate --repeat=FILE` asks again, and a SHA-256
over its canonical JSON: a field edited by hand is refused.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
from typing import Any

from smalti.evaluation.files import whole

FORMAT = 2
# The files of the FID Inception network of 2015-12-05: as a state dict, TorchScript and a graph.
INCEPTION = (
    '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
    'f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4',
    '009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6')
RESERVED = ('fid', 'sfid', 'is', 'kid', 'lpips', 'cmmd')  # names of measures with published weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """One number, and how it was made; None where a field does not apply, said explicitly.

  Attributes:
    name: of the measure, such as 'fd_digits_mlp64_1a2b3c4d' or 'psnr'.
    value: finite.
    unit: 'bits per token', 'dB', 'share', or '' for none.
    higher_is_better: True, False, or None where neither is.
    samples: how many examples were scored.
    seeds: of the samples; () where nothing was drawn.
    settings: of the sampler; {} where nothing was sampled.
    weights: 'ema' or 'raw' or 'none'; which weights of the model were used.
    model: fingerprint, run folder and step, or whatever names the model.
    extractor: name of the feature extractor.
    sha256: its hash, full.
    resize: how images reached the extractor's size.
    uint8: how floats became uint8: 'round' is clip(rint(127.5 (x + 1)), 0, 255).
    reference: what it was compared with, with its hash or fingerprint.
    reference_samples: how many examples that is; 0 where a file of statistics does not say.
    versions: of smalti, Python and the libraries that computed it; see `versions`.
    beside: numbers without which the value misleads: the floor between real halves, the accuracy of
      the judge, the count of tokens.
  """
  name: str
  value: float
  unit: str
  higher_is_better: bool | None
  samples: int
  seeds: tuple[int, ...]
  settings: dict[str, Any]
  weights: str
  model: str
  extractor: str | None
  sha256: str | None
  resize: str | None
  uint8: str | None
  reference: str | None
  reference_samples: int | None
  versions: dict[str, str]
  beside: dict[str, Any]

  def __post_init__(self):
    if not math.isfinite(self.value):
      raise ValueError(f'The score {self.name} is {self.value}; only finite values are scores.')
    if not re.fullmatch(r'[a-z][a-z0-9_]*', self.name):
      raise ValueError(f'A score is named in a-z, 0-9 and _, not {self.name!r}.')
    if self.samples < 1:
      raise ValueError(f'The score {self.name} of samples={self.samples} is none; give 1 or more.')
    if self.weights not in ('ema', 'raw', 'none'):
      raise ValueError(f"weights={self.weights!r} is not one of 'ema', 'raw', 'none'.")
    if not self.model or not self.versions:
      raise ValueError(f'The score {self.name} must name its model and versions.')
    try:
      json.dumps([self.settings, self.beside, self.versions], allow_nan=False)
    except (TypeError, ValueError) as error:
      raise ValueError(f'The score {self.name} holds what is no JSON ({error}).') from error
    if self.extractor is not None:
      missing = [f for f in ('sha256', 'resize', 'uint8', 'reference') if not getattr(self, f)]
      missing += ['reference_samples'] if self.reference_samples is None else []
      if missing:
        raise ValueError(f'The score {self.name} has an extractor, and needs {", ".join(missing)}.')
      if not re.fullmatch('[0-9a-f]{64}', self.sha256):
        raise ValueError(f'sha256={self.sha256!r} of {self.name} must be 64 hex digits.')
    self._check_name()

  def _check_name(self):
    base = self.name.split('_')[0]
    inception = base in ('fid', 'sfid', 'kid') or self.name == 'is'
    if base in RESERVED and (self.sha256 is None or (
        inception and self.sha256 not in INCEPTION)):
      raise ValueError(
          f'{self.name!r} is the name of a measure with published weights; a proxy is named '
          'fd_<extractor>_<first 8 digits of its hash>.')
    if base == 'fd' and self.name != f'fd_{self.extractor}_{(self.sha256 or "")[:8]}':
      raise ValueError(
          f'{self.name!r} must be fd_<extractor>_<first 8 digits of its hash>, got extractor '
          f'{self.extractor!r} with hash {self.sha256!r}.')


def canonical(value: Any) -> bytes:
  """The one JSON text of a value: sorted keys, no spaces, floats by repr; what hashes are over."""
  return json.dumps(value, sort_keys=True, separators=(',', ':'), allow_nan=False).encode()


def seal(value: Any) -> str:
  """SHA-256 of the canonical JSON, in hex."""
  return hashlib.sha256(canonical(value)).hexdigest()


def write_scores(path: str | os.PathLike, scores: list[Score],
                 request: dict[str, Any] | None = None) -> None:
  """Writes `scores.json`, whole or not at all.

  Args:
    request: what was asked, as JSON; `smalti evaluate --repeat` asks it again. None where the
      scores did not come from one command.

  Raises:
    ValueError: two scores of one name.
  """
  names = [score.name for score in scores]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f'Two scores are named {twice[0]}; one file holds each name once.')
  fields = {'format': FORMAT, 'request': request,
            'scores': [dataclasses.asdict(score) for score in scores]}
  fields = {**fields, 'sha256': seal(fields)}
  with whole(path) as file:
    file.write((json.dumps(fields, indent=1) + '\n').encode())


def read_scores(path: str | os.PathLike) -> list[Score]:
  """The scores that `write_scores` wrote; see `read_file`."""
  return read_file(path)[0]


def read_file(path: str | os.PathLike) -> tuple[list[Score], dict[str, Any] | None]:
  """(scores, request) of what `write_scores` wrote.

  Raises:
    ValueError: another format, missing or unknown fields, or a file that was edited.
  """
  try:
    with open(path, encoding='utf-8') as file:
      fields = json.load(file)
    rows, request = fields['scores'], fields['request']
    written, found = fields['format'], fields['sha256']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} holds no scores ({error}); run `smalti evaluate` again.') from error
  if written != FORMAT:
    raise ValueError(f'{path} has format {written}, this version reads {FORMAT}.')
  expected = seal({name: value for name, value in fields.items() if name != 'sha256'})
  if found != expected:
    raise ValueError(f'{path} was edited: its content has SHA-256 {expected[:16]}, and it says '
                     f'{str(found)[:16]}; run `smalti evaluate` again.')
  known = {field.name for field in dataclasses.fields(Score)}
  for row in rows:
    if not isinstance(row, dict) or set(row) != known:
      odd = sorted(known ^ set(row)) if isinstance(row, dict) else [repr(row)[:40]]
      raise ValueError(f'{path} has a score with missing or unknown fields: {", ".join(odd)}.')
  try:
    return [Score(**{**row, 'seeds': tuple(row['seeds'])}) for row in rows], request
  except TypeError as error:
    raise ValueError(f'{path} has a score with a field of another type ({error}).') from error


def versions(*libraries: str) -> dict[str, str]:
  """Of smalti, Python, NumPy, and the named installed libraries."""
  names = ('smalti', 'numpy', *libraries)
  return {'python': platform.python_version(),
          **{name: importlib.metadata.version(name) for name in names}}
