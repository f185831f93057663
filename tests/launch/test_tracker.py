"""The metrics file reads as if never interrupted; wandb never ends a run; no secret leaks."""

import copy
import json
import logging
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from smalti.launch.tracker import REDACTED, Tracker, redact


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_one_flushed_json_line_per_step(tmp_path):
  tracker = Tracker(tmp_path / 'run')
  tracker.log(1, {'loss': jnp.float32(0.5), 'count': np.int64(3), 'bad': float('nan'),
                  'good': np.bool_(True), 'bf16': jnp.bfloat16(2)})
  assert lines(tmp_path / 'run') == [  # before the end: flushed
      {'step': 1, 'loss': 0.5, 'count': 3, 'bad': 'nan', 'good': 1, 'bf16': 2.0}]
  assert isinstance(lines(tmp_path / 'run')[0]['count'], int)
  tracker.finish()
  tracker.finish()


def test_resumed_file_equals_uninterrupted(tmp_path):
  """A run killed at step 7 with a half-written line goes on from its checkpoint of step 4."""
  def train(workdir, first, last, resume_step):
    tracker = Tracker(workdir, resume_step=resume_step)
    for step in range(first, last + 1):
      tracker.log(step, {'loss': 1 / step})
    tracker.finish()

  train(tmp_path / 'straight', 1, 10, None)
  train(tmp_path / 'killed', 1, 7, None)
  with open(tmp_path / 'killed' / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 8, "lo')
  train(tmp_path / 'killed', 5, 10, 4)
  straight, killed = (tmp_path / name / 'metrics.jsonl' for name in ('straight', 'killed'))
  assert killed.read_bytes() == straight.read_bytes()
  # Killed before the first checkpoint: the run starts at step 0, and so does the file.
  train(tmp_path / 'killed', 1, 10, None)
  assert killed.read_bytes() == straight.read_bytes()
  assert sorted(path.name for path in killed.parent.iterdir()) == ['metrics.jsonl']


@pytest.mark.parametrize('cut', range(1, 24))
def test_line_cut_anywhere_is_tolerated(tmp_path, cut):
  whole = '{"step": 1, "x": 1}\n{"step": 2, "x": 23456}\n'
  (tmp_path / 'metrics.jsonl').write_text(whole[:-cut])
  Tracker(tmp_path, resume_step=2).finish()
  assert lines(tmp_path) == [{'step': 1, 'x': 1}]


def test_only_process_zero_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  tracker = Tracker(tmp_path / 'run', wandb='offline')
  tracker.log(1, {'loss': 1.0})
  tracker.finish()
  assert not (tmp_path / 'run').exists()


def test_arguments_are_checked(tmp_path):
  with pytest.raises(ValueError, match='wandb'):
    Tracker(tmp_path, wandb='on')


def test_wandb_offline_needs_no_account(tmp_path, monkeypatch):
  """Two starts of one run are one wandb run; neither config nor files hold the secret."""
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('WANDB_API_KEY', raising=False)
  for resume_step in (None, 1):
    tracker = Tracker(tmp_path, wandb='offline', resume_step=resume_step,
                      config={'seed': 1, 'api_key': 'planted-secret-value'})
    tracker.log(2, {'loss': 0.5})
    tracker.finish()
  runs = list((tmp_path / 'wandb').glob('offline-run-*'))
  assert runs and len({path.name.split('-')[-1] for path in runs}) == 1
  files = [path for path in tmp_path.rglob('*') if path.is_file()]
  assert any(path.suffix == '.wandb' and path.stat().st_size > 0 for path in files)
  assert not any(b'planted-secret-value' in path.read_bytes() for path in files)


def test_online_without_a_key_goes_offline(tmp_path, monkeypatch, caplog):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('WANDB_API_KEY', raising=False)
  monkeypatch.delenv('WANDB_MODE', raising=False)
  monkeypatch.delenv('NETRC', raising=False)
  tracker = Tracker(tmp_path, wandb='online')
  tracker.log(1, {'loss': 0.5})
  tracker.finish()
  assert 'no API key' in caplog.text
  assert list((tmp_path / 'wandb').glob('offline-run-*'))


@pytest.mark.parametrize('when', ['init', 'log', 'finish'])
def test_failing_wandb_is_reported_once(tmp_path, monkeypatch, caplog, when):
  import wandb

  class Run:
    def log(self, *_, **__):
      if when == 'log':
        raise RuntimeError('no route\nto host')

    def finish(self):
      if when == 'finish':
        raise OSError('gone')

  def init(**_):
    if when == 'init':
      raise wandb.errors.UsageError('No API key configured. key=hf_abcdefghijklmnopqrstuvwxyz')
    return Run()

  monkeypatch.setattr(wandb, 'init', init)
  with caplog.at_level(logging.WARNING):
    tracker = Tracker(tmp_path, wandb='offline')
    for step in (1, 2, 3):
      tracker.log(step, {'loss': 0.5})
    tracker.finish()
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3]
  assert caplog.text.count('wandb failed') == 1
  assert 'hf_abc' not in caplog.text


# Secrets. None of these is real.

SECRETS = {
    'api_key': 'a', 'wandb_api_key': 'b', 'WANDB_API_KEY': 'c', 'apiKey': 'd', 'hf_token': 'e',
    'token': 'f', 'access_token': 'g', 'authToken': 'h', 'password': 'i', 'db_password': 'j',
    'client_secret': 'k', 'aws_secret_access_key': 'l', 'private_key': 'm', 'passphrase': 'n',
    'Authorization': 'Basic abc', 'session_token': 'o', 'credentials': 'p', 'ssh_key': 'q',
    'pwd': 12345, 'secrets': ['r', 's'], 'github_token': 't', 'X-Api-Key': 'u'}

ALPHABET = string.ascii_letters + string.digits


def letters(count, salt=1):
  return ''.join(ALPHABET[(i * 17 + i * i + salt) % 62] for i in range(count))


VALUES = [
    'hf_' + letters(34), 'sk-' + letters(48), 'sk-ant-api03-' + letters(40),
    'ghp_' + letters(36), 'github_pat_' + letters(60), 'glpat-' + letters(20),
    'AKIA' + 'QWERTYUIOPASDFGH', 'AIza' + letters(35), 'xoxb-1234567890-' + letters(20),
    '0123456789abcdef' * 2 + '01234567', 'eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTYifQ.abc-def',
    '-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----',
    'npm_' + letters(36), 'pypi-' + letters(80), 'wandb_v1_' + letters(40)]

# (text, what must go, what must stay)
TEXTS = [
    ('https://user:hunter22@host/path', 'hunter22', 'host/path'),
    ('postgres://me:pw12345@db:5432/x', 'pw12345', '@db:5432/x'),
    ('https://host/x?token=abc123&page=2', 'abc123', 'page=2'),
    ('https://bucket/x?X-Amz-Signature=0badc0de&y=1', '0badc0de', 'y=1'),
    ('WANDB_API_KEY=abc123 python -m train --seed=3', 'abc123', '--seed=3'),
    ('--config.password=abc123 --steps=5', 'abc123', '--steps=5'),
    ('curl -H "Authorization: Bearer abcdef123456"', 'abcdef123456', 'curl'),
    ('https://hooks.example.org/' + '0123456789abcdef' * 2 + '01234567 x', '89abcdef01', ' x'),
    ('prefix hf_' + letters(34) + ' suffix', 'hf_' + letters(34), 'suffix')]

HARMLESS = {
    'num_mask_tokens': 4, 'mask_token': '[MASK]', 'cls_token': '[CLS]', 'eos_token': 'end',
    'tokenizer': 'runs/digits', 'tokens': 'folder/of/tokens', 'token_dropout': 0.1,
    'key': 'label', 'keys': ['image', 'label'], 'key_width': 64, 'kv_heads': 2, 'qk_norm': True,
    'author': 'Ada', 'passes': 3, 'path': 'gs://bucket/data', 'url': 'https://arxiv.org/abs/1711',
    'fingerprint': '0123456789abcdef', 'commit': '0123456789abcdef' * 2 + '01234567',
    'type': 'smalti.tokenizers.vq:VQConfig', 'monkey': 'x', 'donkey_access': 'y', 'secretary': 'z',
    'time': '12:30: noon', 'override': 'config.optimizer.rate=3e-4', 'none': None,
    'cache': '/hub/models--x/snapshots/' + '0123456789abcdef' * 2 + '01234567/config.json',
    'blob': 'hub/blobs/' + '0123456789abcdef' * 2 + '01234567',
    'mail': 'ada@example.org', 'vocab': (16384,), 'sk-learn': 'sk-learn', 'empty_token': ''}


def test_secret_names_and_values_go():
  for name, value in SECRETS.items():
    redacted = redact({'outer': [{name: value}]})['outer'][0][name]
    assert redacted == ([REDACTED] * 2 if isinstance(value, list) else REDACTED), name
  for value in VALUES:
    assert value not in redact({'note': f'see {value} there'})['note'], value
    assert redact([value]) == [REDACTED]
  for text, gone, stays in TEXTS:
    redacted = redact(text)
    assert gone not in redacted and stays in redacted and REDACTED in redacted


def test_harmless_names_stay():
  assert redact(HARMLESS) == HARMLESS
  assert type(redact(HARMLESS)['vocab']) is tuple


json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@settings(max_examples=60, deadline=None)
@given(json_trees)
def test_redact_is_idempotent_and_changes_nothing_it_is_given(tree):
  before = copy.deepcopy(tree)
  once = redact(tree)
  assert tree == before and redact(once) == once


@settings(max_examples=60, deadline=None)
@given(json_trees, st.sampled_from(VALUES), st.text(alphabet=' ,;"\'\n', min_size=1))
def test_planted_secret_is_never_found(tree, secret, between):
  tree = {'x': tree, 'y': [f'a{between}{secret}{between}b']}
  assert secret not in json.dumps(redact(tree), ensure_ascii=False)
