"""Text as tokens: windows of the file, parts apart, and nothing strange in silence."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from smalti.data import pipeline, text
from smalti.data.text import TEXT8, TextConfig, TextSource
from smalti.launch import serialization


def written(tmp_path, content):
  path = tmp_path / 'text'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def test_ids_are_the_letters_and_then_the_space(tmp_path):
  source = TextSource(written(tmp_path, 'az by'), length=5, alphabet=TEXT8)
  tokens = source.read(np.array([0]))['tokens']
  np.testing.assert_array_equal(tokens[0, :, 0], (0, 25, 26, 1, 24))
  assert tokens.dtype == np.int32 and source.spec.vocab == (27,) and len(TEXT8) == 27
  assert source.decode(tokens) == ['az by']


@settings(max_examples=30, deadline=None)
@given(content=st.binary(min_size=20, max_size=200), length=st.integers(1, 9),
       stride=st.integers(1, 12))
def test_windows_are_ranges_of_the_file(tmp_path_factory, content, length, stride):
  path = written(tmp_path_factory.mktemp('text'), content)
  source = TextSource(path, length=length, stride=stride, part=(.1, .9))
  part = content[round(.1 * len(content)):round(.9 * len(content))]
  windows = [part[i:i + length] for i in range(0, len(part) - length + 1, stride)]
  assert len(source) == len(windows)
  rows = source.read(np.arange(len(source)))['tokens'][..., 0]
  assert [bytes(row.astype(np.uint8)) for row in rows] == windows


def test_parts_share_no_character_and_held_out_windows_do_not_overlap(tmp_path):
  content = ''.join(TEXT8[i % 27] for i in range(1000))
  config = TextConfig(path=str(written(tmp_path, content)), length=10, alphabet=TEXT8, stride=1,
                      train=(0., .9), eval=(.9, .95))
  train, held_out = config.open('train'), config.open('eval')
  assert (len(train), len(held_out)) == (891, 5)
  assert train.start + (len(train) - 1) * train.stride + 10 == 900 == held_out.start
  assert ''.join(held_out.decode(held_out.read(np.arange(5))['tokens'])) == content[900:950]
  batch = next(iter(pipeline.batches(train, batch_size=4, seed=0)))
  assert batch['tokens'].shape == (4, 10, 1)


def test_the_fingerprint_is_of_the_alphabet_not_of_the_text(tmp_path):
  path = written(tmp_path, 'ab' * 40)
  one, two = (TextSource(path, length=4, alphabet='ab', part=part).fingerprint
              for part in ((0., .5), (.5, 1.)))
  assert one == two != TextSource(path, length=4, alphabet='ba').fingerprint
  assert one != TextSource(path, length=5, alphabet='ab').fingerprint


def test_bytes_of_any_encoding(tmp_path):
  source = TextSource(written(tmp_path, 'né'), length=3)
  tokens = source.read(np.array([0]))['tokens']
  assert source.decode(tokens) == ['né'] and source.spec.vocab == (256,)
  assert source.decode(tokens[:, :2]) == ['n\ufffd']


def test_strange_characters_are_named_with_their_place(tmp_path, monkeypatch):
  monkeypatch.setattr(text, 'CHUNK', 4)  # found in a later chunk too
  path = written(tmp_path, 'abcabcaXbc')
  with pytest.raises(ValueError, match=r"b'X' at byte 7, which is not in the alphabet 'abc'"):
    TextSource(path, length=2, alphabet='abc')
  assert len(TextSource(path, length=2, alphabet='abc', part=(0., .7))) == 3


def test_refusals_say_why(tmp_path):
  path = str(written(tmp_path, 'ab' * 10))
  for options, message in (
      ({'path': None}, 'data.path is not set'), ({'length': 100}, '19 of 20 characters'),
      ({'length': 0}, '1 character'), ({'alphabet': 'aab'}, 'different ASCII'),
      ({'alphabet': 'aé'}, 'different ASCII'), ({'train': (.5, .2)}, 'increasing pair'),
      ({'train': (0., .97)}, 'overlap')):
    with pytest.raises(ValueError, match=message):
      TextConfig(**{'path': path, 'length': 4, **options}).open('train')
  with pytest.raises(FileNotFoundError, match='not a file'):
    TextConfig(path=str(tmp_path), length=4).open('train')


def test_a_large_file_is_not_read_to_open_bytes(tmp_path):
  path = tmp_path / 'large'
  with open(path, 'wb') as file:
    file.truncate(1 << 40)  # a sparse terabyte: reading it would not end
  source = TextSource(path, length=16, stride=1 << 20, part=(0., .5))
  assert len(source) == 1 << 19
  assert not source.read(np.array([0, 500_000]))['tokens'].any()


def test_the_config_survives_json():
  config = TextConfig(path='text8', alphabet=TEXT8, stride=16)
  assert serialization.from_json(serialization.to_json(config), TextConfig) == config
