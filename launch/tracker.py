"""Metrics of a run: one JSON line per logged step in `metrics.jsonl`, and wandb on request.

A resumed run cuts the lines after the step it resumes from, so that the file reads as if the run
had never stopped. wandb is a mirror: whatever happens to it, the run goes on. What leaves the
process, and `config.json`, passes through `redact`.
"""

import json
import logging
import math
import netrc
import os
import pathlib
import re
import secrets
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from smalti.evaluation.files import whole

_log = logging.getLogger(__name__)

REDACTED = '<redacted>'


class Tracker:
  """Logs scalars; on process 0 only, the others do nothing.

  Args:
    workdir: the run's folder, made where missing.
    wandb: 'off', 'offline' (files under `workdir/wandb`, for `wandb sync`; needs no account), or
      'online', which becomes 'offline' with a message when no API key is configured.
    project: wandb's project.
    config: the resolved config as a JSON tree; redacted here.
    resume_step: the checkpoint's step the run goes on from; None starts the file anew.
  """

  def __init__(self, workdir: str | os.PathLike, *,
               wandb: Literal['off', 'offline', 'online'] = 'off', project: str = 'smalti',
               config: Mapping[str, Any] | None = None, resume_step: int | None = None):
    if wandb not in ('off', 'offline', 'online'):
      raise ValueError(f"{wandb=} must be 'off', 'offline' or 'online'.")
    self._file = None
    self._run: Any = None
    if jax.process_index() != 0:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'metrics.jsonl'
    _cut(path, -1 if resume_step is None else resume_step)
    self._file = open(path, 'a', encoding='utf-8')
    if wandb != 'off':
      self._mirror(lambda: self._start(workdir, wandb, project, config or {}))

  def log(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line: the step and the metrics, as plain numbers (non-finite as strings)."""
    if self._file is None:
      return
    line = {'step': int(step), **{name: _number(value) for name, value in metrics.items()}}
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    if self._run is not None:
      self._mirror(lambda: self._run.log(
          {name: float(value) for name, value in line.items() if name != 'step'}, step=int(step)))

  def finish(self) -> None:
    """Closes the file and the wandb run."""
    if self._run is not None:
      self._mirror(lambda: self._run.finish())
      self._run = None
    if self._file is not None:
      self._file.close()
      self._file = None

  def _start(self, workdir: pathlib.Path, mode: Any, project: str, config: Mapping) -> None:
    import wandb  # 1.2 s, and only for those who ask for it
    if mode == 'online' and not _has_key():
      _log.warning('wandb has no API key; logging offline (`wandb login`, then `wandb sync %s`).',
                   workdir / 'wandb')
      mode = 'offline'
    # One wandb run per run folder, whatever the number of restarts, also when the folder moves.
    identity = workdir / 'wandb_id'
    if not identity.exists():
      identity.write_text(secrets.token_hex(8))
    self._run = wandb.init(
        project=project, dir=str(workdir), id=identity.read_text().strip(), resume='allow',
        mode=mode, config=redact(config),
        settings=wandb.Settings(silent=True, console='off', init_timeout=60))

  def _mirror(self, action) -> None:
    try:
      action()
    except Exception as error:  # the run must not die of its mirror
      self._run = None
      reason = next(iter(str(error).splitlines()), '')
      _log.warning('wandb failed and is off from here on (%s: %s); metrics.jsonl goes on.',
                   type(error).__name__, _redact_text(reason))


def _has_key() -> bool:
  """Whether wandb would find an API key without asking for one, which would hang the run."""
  if os.environ.get('WANDB_API_KEY'):
    return True
  host = urllib.parse.urlsplit(os.environ.get('WANDB_BASE_URL', 'https://api.wandb.ai')).hostname
  try:
    files = [os.environ['NETRC']] if 'NETRC' in os.environ else ['~/.netrc', '~/_netrc']
    return any(netrc.netrc(path).authenticators(host or '')
               for file in files if os.path.exists(path := os.path.expanduser(file)))
  except (OSError, netrc.NetrcParseError):
    return False


def _cut(path: pathlib.Path, last: int) -> None:
  """Keeps the lines of steps up to `last`, atomically; drops a line cut short by a kill."""
  if not path.exists():
    return
  kept = []
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      step = json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
      continue
    if line.endswith(b'\n') and step <= last:
      kept.append(line)
  with whole(path) as file:
    file.writelines(kept)


def _number(value: Any) -> int | float | str:
  if isinstance(value, (bool, np.bool_)):
    return int(value)
  if isinstance(value, (int, np.integer)):
    return int(value)
  value = np.asarray(value)
  if value.dtype.kind in 'iub':
    return int(value)
  value = float(value)
  return value if math.isfinite(value) else str(value)  # JSON has no NaN; float() reads it back


# Words that make a key secret by themselves, and words that make a `key` or a `token` secret.
# `num_mask_tokens`, `cls_token`, `key_width` and `tokenizer` are none of them.
_SECRET = {'password', 'passwd', 'passphrase', 'pwd', 'secret', 'secrets', 'credential',
           'credentials', 'apikey', 'authorization', 'cookie', 'accesskey', 'privatekey',
           'accesstoken', 'authtoken', 'clientsecret'}
_OWNERS = {'api', 'access', 'auth', 'bearer', 'client', 'private', 'secret', 'session', 'refresh',
           'oauth', 'id', 'bot', 'personal', 'hf', 'hub', 'huggingface', 'wandb', 'github', 'gh',
           'gitlab', 'slack', 'openai', 'anthropic', 'aws', 'gcp', 'azure', 'signing',
           'encryption', 'ssh', 'deploy', 'service', 'user', 'login', 'webhook', 'security',
           'amz', 'goog'}
_DIGESTS = {'sha', 'sha1', 'commit', 'revision', 'hash', 'digest', 'fingerprint', 'git', 'md5'}
_SHAPES = re.compile(
    r'''-----BEGIN[A-Z ]*PRIVATE\ KEY-----(?s:.*?)(?:-----END[A-Z ]*PRIVATE\ KEY-----|$)
    | \bsk-[A-Za-z0-9_-]{20,} | \bhf_[A-Za-z0-9]{20,} | \bwandb_v\d_[A-Za-z0-9_]{20,}
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_[A-Za-z0-9_]{20,} | \bglpat-[A-Za-z0-9_-]{16,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b | \bAIza[A-Za-z0-9_-]{30,} | \bya29\.[A-Za-z0-9_-]{20,}
    | \bxox[abeoprs]-[A-Za-z0-9-]{10,} | \bnpm_[A-Za-z0-9]{30,} | \bpypi-[A-Za-z0-9_-]{40,}
    | \bey[A-Za-z0-9_-]{8,}\.ey[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]* | (?<=\bBearer\ )[^\s'"]{8,}
    | (?<=://)[^/\s@'"]+(?=@)
    ''', re.VERBOSE)
# NAME=value and ?name=value, in commands, environments and URLs.
_ASSIGNED = re.compile(r'''([A-Za-z0-9_-]+)(=|:\ )([^\s&'",;]+)''')
_HEX40 = re.compile(r'\b[0-9a-f]{40}\b')  # a wandb key, or a git commit


def redact(tree: Any, name: str = '') -> Any:
  """A copy of a JSON tree without secrets, recognised by the name of a key or the form of a value.

  User names and passwords in URLs go too. Numbers stay, except under names such as `password`:
  a count of tokens is not a token.
  """
  if isinstance(tree, Mapping):
    return {key: redact(value, str(key)) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return type(tree)(redact(value, name) for value in tree)
  if isinstance(tree, (str, bytes)):
    if tree and _secret(name):
      return REDACTED
    return _redact_text(tree, name) if isinstance(tree, str) else tree
  if isinstance(tree, (int, float)) and not isinstance(tree, bool) and _words(name) & {
      'password', 'passwd', 'passphrase', 'pwd'}:
    return REDACTED
  return tree


def _words(name: str) -> set[str]:
  spaced = re.sub(r'([a-z0-9])([A-Z])', r'\1_\2', name)
  return {word for word in re.split(r'[^A-Za-z0-9]+', spaced.lower()) if word}


def _secret(name: str) -> bool:
  words = _words(name)
  return bool(words & _SECRET) or words in ({'token'}, {'key', 'ssh'}) or bool(
      words & {'key', 'keys', 'token', 'signature', 'sig'} and words & _OWNERS)


def _redact_text(text: str, name: str = '') -> str:
  text = _SHAPES.sub(REDACTED, text)
  text = _ASSIGNED.sub(
      lambda match: match[1] + match[2] + REDACTED if _secret(match[1]) else match[0], text)
  return text if _words(name) & _DIGESTS else _HEX40.sub(_redact_hex, text)


def _redact_hex(match: re.Match) -> str:
  """What is part of a path is a revision, as in a cache of models; in a URL it may be a key."""
  text, (first, last) = match.string, match.span()
  inside = any(mark in ('/', '\\') for mark in (text[first - 1:first], text[last:last + 1]))
  return match[0] if inside and '://' not in re.split(r'\s', text[:first])[-1] else REDACTED
