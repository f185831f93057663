"""Token folders: what goes in comes out, and nothing damaged or foreign is read in silence."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from smalti.data import pipeline
from smalti.data.tokens import TokensConfig, TokensSource, TokenWriter
from smalti.tokenizers.spec import TokenSpec

SPEC = TokenSpec(grid=(2, 3), vocab=(300, 300))


def rows(first: int, count: int) -> dict[str, np.ndarray]:
  index = np.arange(first, first + count)
  tokens = (index[:, None, None] * 7 + np.arange(12).reshape(6, 2)) % 300
  return {'tokens': tokens.astype(np.int32), 'label': (index % 10).astype(np.int32),
          'index': index.astype(np.int64)}


def write(folder, batches=(10, 7, 8), shard_size=4, **options):
  writer = TokenWriter(folder, SPEC.to_json(), 'f' * 16, shard_size=shard_size, **options)
  first = writer.count
  for count in batches:
    writer.add(rows(first, count))
    first += count
  writer.close()
  return folder


def digest(folder) -> dict[str, str]:
  return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), shard_size=st.integers(1, 30))
def test_round_trip(tmp_path_factory, sizes, shard_size):
  folder = write(tmp_path_factory.mktemp('tokens'), sizes, shard_size, classes=('a', 'b'))
  source = TokensSource(folder)
  assert len(source) == sum(sizes) and source.spec == SPEC and source.classes == ('a', 'b')
  order = np.random.default_rng(0).permutation(len(source))
  expected = rows(0, len(source))
  for key, value in source.read(order).items():
    np.testing.assert_array_equal(value, expected[key][order])
  assert source.read(order)['tokens'].dtype == np.int32


def test_the_same_rows_make_the_same_bytes(tmp_path):
  one, two = write(tmp_path / 'one', (25,)), write(tmp_path / 'two', (1, 9, 15))
  assert digest(one) == digest(two)
  assert np.load(one / '00000.tokens.npy').dtype == np.uint16  # 300 ids need 9 bits
  assert sorted(digest(one))[-1] == 'index.json' and len(digest(one)) == 7 * 3 + 1


def test_splits_stream_through_the_pipeline(tmp_path):
  write(tmp_path / 'train')
  write(tmp_path / 'eval', (5,))
  config = TokensConfig(path=str(tmp_path))
  assert len(config.open('train')) == 25 and len(config.open('eval')) == 5
  batch = next(pipeline.batches(config.open('train'), batch_size=8, seed=0))
  assert set(batch) == {'tokens', 'label', 'index'}
  np.testing.assert_array_equal(batch['label'], batch['index'] % 10)
  assert len(TokensConfig(path=str(tmp_path / 'train')).open('train')) == 25
  with pytest.raises(FileNotFoundError, match='name the folder above'):
    TokensConfig(path=str(tmp_path / 'train')).open('eval')


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
  folder = write(tmp_path / 'tokens', (9,))
  names = [name for name in digest(folder) if name != 'index.json']
  generator = np.random.default_rng(0)
  for trial in range(60):
    path = folder / names[trial % len(names)]
    good = path.read_bytes()
    bad = bytearray(good)
    if trial % 3:
      place = generator.integers(len(good))
      bad[place] ^= 1 << generator.integers(8)
    else:
      del bad[generator.integers(len(good)):]
    path.write_bytes(bad)
    with pytest.raises(ValueError, match=f'{path.name} is damaged'):
      TokensSource(folder)
    path.write_bytes(good)
  for name in names:
    (folder / name).rename(folder / 'away')
    with pytest.raises(ValueError, match=f'{name} is missing'):
      TokensSource(folder)
    (folder / 'away').rename(folder / name)
  assert len(TokensSource(folder)) == 9


def edit(folder, **changes):
  item = json.loads((folder / 'index.json').read_text())
  (folder / 'index.json').write_text(json.dumps({**item, **changes}))


@pytest.mark.parametrize('changes, message', [
    ({'format': 2, 'version': '9.1'}, 'has format 2, written by smalti 9.1'),
    ({'spec': {'grid': [2, 3], 'vocab': [9, 9]}}, r'outside vocab=\(9, 9\)'),
    ({'spec': {'grid': [6, 1], 'vocab': [300]}}, 'the spec needs integers'),
    ({'count': 26}, 'contradicts itself: 25 rows in shards, 26 in all'),
    ({'keys': {'../../etc': {}}, 'shards': [{'rows': 25, 'sha256': {'../../etc': ''}}]},
     'names an entry'),
    ({'shards': [], 'count': 0}, 'contradicts itself'),
    ({'keys': {'tokens': {'shape': [12], 'dtype': '<u2'}}}, 'the index says'),
    ({'shards': 5}, 'not an index of tokens'),
])
def test_an_index_that_lies_is_refused(tmp_path, changes, message):
  folder = write(tmp_path / 'tokens')
  edit(folder, **changes)
  with pytest.raises(ValueError, match=message):
    TokensSource(folder)


def test_pickles_are_never_loaded(tmp_path):
  folder = write(tmp_path / 'tokens', (4,))
  np.save(folder / '00000.label.npy', np.array([print], object), allow_pickle=True)
  item = json.loads((folder / 'index.json').read_text())
  item['shards'][0]['sha256']['label'] = digest(folder)['00000.label.npy']
  edit(folder, **item)
  with pytest.raises(ValueError, match='[Oo]bject arrays|pickle|Python objects'):
    TokensSource(folder)


def test_an_interrupted_write_is_continued(tmp_path):
  whole = write(tmp_path / 'whole', (25,))
  part = tmp_path / 'part'
  writer = TokenWriter(part, SPEC.to_json(), 'f' * 16, shard_size=4)
  writer.add(rows(0, 10))
  assert writer.count == 8  # two whole shards; the other two rows are lost with the process
  with pytest.raises(FileNotFoundError, match='was not finished: run the same command again'):
    TokensSource(part)
  again = TokenWriter(part, SPEC.to_json(), 'f' * 16, shard_size=4, resume=True)
  assert again.count == 8
  again.add(rows(8, 17))
  again.close()
  assert digest(part) == digest(whole)
  done = TokenWriter(part, SPEC.to_json(), 'f' * 16, shard_size=4, resume=True)
  assert done.complete and done.count == 25
  other = TokenWriter(tmp_path / 'other', SPEC.to_json(), 'e' * 16, shard_size=4)
  other.add(rows(0, 10))
  assert TokenWriter(tmp_path / 'other', SPEC.to_json(), 'f' * 16, shard_size=4,
                     resume=True).count == 0  # another tokenizer: nothing of it is kept


def test_messages(tmp_path):
  with pytest.raises(ValueError, match='holds finished tokens already'):
    write(write(tmp_path / 'tokens'))
  with pytest.raises(FileNotFoundError, match='holds no tokens: write them with'):
    TokensConfig(path=str(tmp_path / 'gone')).open('train')
  with pytest.raises(ValueError, match='data.path is not set'):
    TokensConfig().open('train')
  writer = TokenWriter(tmp_path / 'new', SPEC.to_json(), '')
  with pytest.raises(ValueError, match='No rows were added'):
    writer.close()
  for batch, message in (
      ({'tokens': np.full((1, 6, 2), 300)}, r'outside vocab=\(300, 300\)'),
      ({'tokens': np.zeros((1, 6, 1), int)}, r'the spec needs integers \[B, 6, 2\]'),
      ({'tokens': np.zeros((1, 6, 2), int), 'label': np.zeros(2, int)}, 'as many rows'),
      ({'tokens': np.zeros((1, 6, 2), int), 'text': np.array(['a'])}, "Entry 'text'"),
  ):
    with pytest.raises(ValueError, match=message):
      writer.add(batch)
  writer.add(rows(0, 1))
  with pytest.raises(ValueError, match='entries of the first'):
    writer.add({'tokens': rows(0, 1)['tokens']})
