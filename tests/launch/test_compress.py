"""Compressed tokens: every sequence comes back, at the price of its own log-probability."""

import dataclasses
import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.generators.autoregressive import AutoregressiveConfig, AutoregressiveSettings
from smalti.generators.generator import example_keys, generate
from smalti.generators.masked import MaskedConfig
from smalti.generators.text import TextConfig
from smalti.launch import cli, compress as codec, provenance, run as runs
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

BODY = TransformerConfig(layers=2, width=16, heads=2)
SPECS = {'deep': TokenSpec(grid=(2, 3), vocab=(12, 12), order='depth'),
         'ends': TokenSpec(grid=(9,), vocab=(6,), eos=5)}


@functools.cache
def loaded(name, seed=0):
  config = AutoregressiveConfig(transformer=BODY, classes=3)
  model = config.build(SPECS[name], rngs=nnx.Rngs(seed))
  model.head.kernel[...] = 0.5 * jax.random.normal(jax.random.key(7), model.head.kernel.shape)
  model.token.embedding[...] *= 50
  return runs.Loaded(model, config, {'seed': seed}, SPECS[name], 'of the tokenizer', None, 0,
                     pathlib.Path('generator'), 'raw')


@functools.cache
def drawn(name, n):
  label = jnp.arange(n) % 3
  tokens = generate(loaded(name).model, {'label': label}, keys=example_keys(1, jnp.arange(n)),
                    settings=AutoregressiveSettings()).tokens
  return np.asarray(tokens), np.asarray(label)


@pytest.mark.parametrize('name', SPECS)
@pytest.mark.parametrize('labelled', [True, False])
def test_drawn_sequences_come_back_at_the_price_of_their_log_probability(name, labelled):
  model, (tokens, labels) = loaded(name).model, drawn(name, 300)
  given = labels if labelled else None
  data = codec.compress(loaded(name), tokens, given)
  found, found_labels = codec.decompress(loaded(name), data)
  np.testing.assert_array_equal(found, tokens)
  assert (found_labels is None) == (given is None)
  if labelled:
    np.testing.assert_array_equal(found_labels, labels)
  batch = {'tokens': jnp.asarray(tokens), **({'label': jnp.asarray(labels)} if labelled else {})}
  price = -float(np.sum(np.asarray(model.log_prob(batch), np.float64))) / np.log(2)
  price += labelled * 300 * np.log2(3)
  nothing = codec.compress(loaded(name), tokens[:0], labels[:0] if labelled else None)
  size = 8 * (len(data) - len(nothing))
  assert abs(size - price) < 0.01 * price + 32
  assert size < 0.9 * loaded(name).spec.bits * 300  # raw packing


@pytest.mark.parametrize('name', SPECS)
def test_rivals_are_what_they_say(name):
  """A coder that counts, symbol by symbol; LZMA's bytes hold the codes."""
  spec, (tokens, labels) = SPECS[name], drawn(name, 300)
  found, there = codec.rivals(spec, tokens), np.asarray(spec.valid(tokens))
  bits = 0.0
  for d, vocab in enumerate(spec.vocab):
    count = np.ones(vocab)
    for code in tokens[..., d][there[..., d]]:
      bits -= np.log2(count[code] / count.sum())
      count[code] += 1
  np.testing.assert_allclose(found['unigram'], bits / 8, rtol=1e-9)
  assert found['packed'] == spec.bits * 300 / 8
  assert found['lzma'] < there.sum()  # a byte each
  same = codec.rivals(spec, np.broadcast_to(tokens[:1], tokens.shape))
  assert same['lzma'] < 0.2 * found['lzma'] and same['unigram'] < found['unigram']
  assert codec.rivals(spec, tokens[:0])['unigram'] == 0
  ours = codec.likelihood(loaded(name), tokens, labels)
  data = codec.compress(loaded(name), tokens, labels)
  head = codec.compress(loaded(name), tokens[:0], labels[:0])
  assert abs(len(data) - len(head) - ours) < 0.01 * ours + 4


@pytest.mark.parametrize('name', SPECS)
def test_whatever_is_in_range_comes_back_and_nothing_too(name):
  spec, rng = SPECS[name], np.random.default_rng(0)
  random = spec.canonical(rng.integers(0, spec.vocab[0], (70, spec.length, spec.depth)))
  for tokens in (random.astype(np.int32), random[:1], random[:0]):
    data = codec.compress(loaded(name), tokens, batch=32)
    found, labels = codec.decompress(loaded(name), data)
    np.testing.assert_array_equal(found, tokens)
    assert labels is None and found.dtype == np.int32


def test_any_flipped_bit_and_any_missing_byte_are_noticed():
  tokens, labels = drawn('ends', 300)
  data = codec.compress(loaded('ends'), tokens[:20], labels[:20])
  for i in range(8 * len(data)):
    other = bytearray(data)
    other[i // 8] ^= 1 << (i % 8)
    with pytest.raises(ValueError, match='damaged|not a file|another format'):
      codec.read_header(bytes(other))
  for length in range(len(data)):
    with pytest.raises(ValueError, match='damaged|not a file|another format'):
      codec.read_header(data[:length])


@pytest.mark.parametrize('change', [
    {'sequences': -1}, {'sequences': True}, {'sequences': '9'}, {'batch': 0}, {'batch': 10**9},
    {'batch': 2.0}, {'labels': 1}, {'check': None}, {'check': ...}])
def test_a_header_that_no_writer_wrote_is_refused_before_anything_is_made_for_it(change):
  tokens, labels = drawn('ends', 300)
  data = codec.compress(loaded('ends'), tokens[:3], labels[:3])
  header = {**codec.read_header(data), **change}
  text = json.dumps({k: v for k, v in header.items() if v is not ...}).encode()
  forged = codec.MAGIC + len(text).to_bytes(4, 'little') + text
  with pytest.raises(ValueError, match='the header of the file'):
    codec.read_header(forged + hashlib.sha256(forged).digest())


def test_another_generator_is_refused():
  tokens, labels = drawn('ends', 300)
  data = codec.compress(loaded('ends'), tokens[:5])
  with pytest.raises(ValueError, match='name the one that wrote it'):
    codec.decompress(loaded('ends', seed=1), data)
  masked = MaskedConfig(transformer=BODY).build(SPECS['deep'], rngs=nnx.Rngs(0))
  other = runs.Loaded(masked, None, {}, SPECS['deep'], '', None, 0, pathlib.Path('m'), 'raw')
  with pytest.raises(ValueError, match='compress with an autoregressive generator'):
    codec.compress(other, tokens)
  with pytest.raises(ValueError, match='are not of this generator'):
    codec.compress(loaded('deep'), tokens)
  with pytest.raises(ValueError, match='after their EOS'):
    codec.compress(loaded('ends'), np.array([[[5], *[[1]] * 8]]))
  text = AutoregressiveConfig(transformer=BODY, text=TextConfig(length=4, width=16))
  reader = dataclasses.replace(
      loaded('ends'), model=text.build(SPECS['ends'], rngs=nnx.Rngs(0)), config=text)
  for attempt in (codec.compress, codec.likelihood):
    with pytest.raises(ValueError, match='not kept with compressed codes'):
      attempt(reader, tokens)


def test_labels_go_with_a_generator_that_was_always_told_them():
  tokens, labels = drawn('ends', 300)
  config = dataclasses.replace(loaded('ends').config, label_dropout=0.0)
  told = dataclasses.replace(loaded('ends'), model=config.build(SPECS['ends'], rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match='label_dropout=0 never trains .* give an .npz with labels'):
    codec.compress(told, tokens[:5])
  found = codec.decompress(told, codec.compress(told, tokens[:5], labels[:5]))
  np.testing.assert_array_equal(found[0], tokens[:5])
  unlabelled = dataclasses.replace(config, classes=0).build(SPECS['ends'], rngs=nnx.Rngs(0))
  never = dataclasses.replace(told, model=unlabelled)
  np.testing.assert_array_equal(
      codec.decompress(never, codec.compress(never, tokens[:5]))[0], tokens[:5])


@pytest.mark.parametrize('dtype', [np.float32, bool, 'm8[s]', object])
def test_only_integers_are_codes(tmp_path, monkeypatch, capsys, dtype):
  monkeypatch.setattr(runs, 'load', lambda reference: loaded('ends'))
  tokens, labels = drawn('ends', 300)
  ones = np.ones_like(tokens[:3]).astype(dtype)
  with pytest.raises(ValueError, match='tokens of dtype .* write them as int32'):
    codec.compress(loaded('ends'), ones)
  with pytest.raises(ValueError, match='labels of dtype'):
    codec.compress(loaded('ends'), tokens[:3], labels[:3].astype(dtype))
  np.savez(tmp_path / 'tokens.npz', tokens=ones)
  assert cli.main(['compress', '--workdir=w', f'--tokens={tmp_path}/tokens.npz',
                   f'--out={tmp_path}/file.smtc']) == 2
  [line] = capsys.readouterr().err.strip().splitlines()
  assert 'must be integers' in line or 'holds object' in line
  assert [path.name for path in tmp_path.iterdir()] == ['tokens.npz']


@pytest.mark.parametrize('dtype', [np.uint8, np.int64, np.uint64, '>i4'])
def test_any_integers_are_codes(tmp_path, monkeypatch, dtype):
  monkeypatch.setattr(runs, 'load', lambda reference: loaded('ends'))
  tokens, labels = drawn('ends', 300)
  np.savez(tmp_path / 'tokens.npz', tokens=tokens[:3].astype(dtype), arr_1=labels[:3].astype(dtype))
  assert cli.main(['compress', '--workdir=w', f'--tokens={tmp_path}/tokens.npz',
                   f'--out={tmp_path}/file.smtc', f'--results={tmp_path}/sizes.json']) == 0
  found = codec.decompress(loaded('ends'), (tmp_path / 'file.smtc').read_bytes())
  np.testing.assert_array_equal(found[0], tokens[:3])
  np.testing.assert_array_equal(found[1], labels[:3])


def test_a_label_of_64_bits_is_not_cut():
  tokens, _ = drawn('ends', 300)
  with pytest.raises(ValueError, match='do not fit'):
    codec.compress(loaded('ends'), tokens[:1], np.array([1 << 32]))


def test_probabilities_of_a_parallel_pass_lose_the_message(monkeypatch):
  """The control: the same model, another program."""
  tokens, labels = drawn('deep', 300)
  data = codec.compress(loaded('deep'), tokens, labels)
  model, read = loaded('deep').model, []
  forward = jax.jit(lambda codes, label: model._logits(codes, label, None))

  def parallel(_, cache, previous, label, i):
    if i == 0:
      read.clear()
    read.append(np.array(previous))
    codes = np.zeros((len(previous), 12), np.int32)
    codes[:, :len(read) - 1] = np.stack(read[1:], 1) if len(read) > 1 else 0
    logits = forward(codes, label)
    return jax.nn.softmax(logits[:, int(i)], -1), cache

  monkeypatch.setattr(codec, 'probabilities', parallel)
  with pytest.raises(ValueError, match='decompress where it was compressed'):
    codec.decompress(loaded('deep'), data)


def test_commands_write_what_sample_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(runs, 'load', lambda reference: loaded('ends'))
  tokens, labels = drawn('ends', 300)
  np.savez(tmp_path / 'samples.npz', tokens=tokens, arr_1=labels)
  paths = [str(tmp_path / name) for name in ('samples.npz', 'file.smtc', 'back.npz')]
  assert cli.main(['compress', '--workdir=w', f'--tokens={paths[0]}', f'--out={paths[1]}',
                   f'--results={tmp_path}/sizes.json']) == 0
  assert 'bits per token' in capsys.readouterr().err
  sizes = provenance.load(tmp_path / 'sizes.json')
  assert sizes['exact'] is True and sizes['sequences'] == 300
  ours = sizes['results']['smalti']['bytes']
  assert ours == (tmp_path / 'file.smtc').stat().st_size
  assert abs(ours - sizes['head_bytes'] - sizes['results']['likelihood']['bytes']) < 0.01 * ours + 4
  assert cli.main(['decompress', '--workdir=w', f'--file={paths[1]}', f'--out={paths[2]}']) == 0
  with np.load(paths[2]) as found:
    np.testing.assert_array_equal(found['tokens'], tokens)
    np.testing.assert_array_equal(found['arr_1'], labels)
  (tmp_path / 'file.smtc').write_bytes((tmp_path / 'file.smtc').read_bytes()[:-1])
  assert cli.main(['decompress', '--workdir=w', f'--file={paths[1]}', f'--out={paths[2]}']) == 2
  assert 'damaged or not whole' in capsys.readouterr().err


@pytest.mark.parametrize('name, content, message', [
    ('bytes.npz', b'not an archive', 'not a zip'), ('empty.npz', b'', 'not a zip'),
    ('missing.npz', None, 'is no file'), ('array.npy', np.zeros(3), 'not a zip'),
    ('others.npz', {'x': np.zeros(3)}, 'it has no tokens, only x'),
    ('objects.npz', {'tokens': np.full(3, None)}, 'holds object')])
def test_files_without_tokens_are_refused_in_one_line(
    tmp_path, monkeypatch, capsys, name, content, message):
  monkeypatch.setattr(runs, 'load', lambda reference: loaded('ends'))
  path = tmp_path / name
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif isinstance(content, dict):
    np.savez(path, **content)
  elif content is not None:
    np.save(path, content)
  assert cli.main(['compress', '--workdir=w', f'--tokens={path}', f'--out={tmp_path}/x.smtc']) == 2
  [line] = capsys.readouterr().err.strip().splitlines()
  assert message in line and 'give an .npz with `tokens`' in line
  assert not (tmp_path / 'x.smtc').exists()


def test_a_flipped_byte_of_the_tokens_is_noticed(tmp_path):
  tokens, labels = drawn('ends', 300)
  path = tmp_path / 'tokens.npz'
  np.savez(path, tokens=tokens[:3], arr_1=labels[:3])
  data = path.read_bytes()
  for array in (tokens[:3], labels[:3]):
    start = data.index(array.astype('<i4').tobytes())
    for i in range(start, start + array.nbytes):
      path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:])
      with pytest.raises(ValueError, match='holds no tokens'):
        codec.read_tokens(path)
