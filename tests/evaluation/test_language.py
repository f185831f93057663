"""Statistics of streams: golden codes, and controls beside chains of known entropy."""

import json
import lzma

import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans

from smalti.data import downloads
from smalti.evaluation import language, scans
from smalti.tokenizers.spec import TokenSpec


def test_huffman_golden():
  assert language.huffman(np.ones(8, int)) == 3
  assert language.huffman(np.array([4, 2, 1, 1, 0])) == 1.75
  assert language.huffman(np.array([0, 9])) == 0
  counts = np.random.default_rng(0).multinomial(10**6, 1 / np.arange(1, 1025) / 7.509176)
  p = counts / counts.sum()
  assert -(p * np.log2(p)).sum() == pytest.approx(7.5106, abs=.01)
  assert language.huffman(counts) == pytest.approx(7.5370, abs=.01)


def test_lzma_sees_repetition_and_packs_tightly():
  rng = np.random.default_rng(0)
  random = rng.integers(0, 8, (400, 64))
  length = lambda x, k: 8 * len(language.compress(x, k)) / x.size  # noqa: E731
  assert length(random, 8) == pytest.approx(3, rel=.01)  # of int32 it would be near 4 or more
  assert length(random[:, :32].repeat(2, 0).reshape(400, 64), 8) < 2.6
  assert length(np.tile(random[:8], (50, 1)), 8) < .3
  assert length(rng.permuted(np.tile(random[:1], (400, 1)), axis=1), 8) > 2
  # the packed bits, most significant first, and no token where there is none
  tokens = np.array([[5, 2, 7, 0], [1, 6, -1, -1]])
  packed = lzma.decompress(language.compress(tokens, 8), lzma.FORMAT_RAW,
                           filters=[{'id': lzma.FILTER_LZMA2, 'preset': 6}])
  assert packed == int('101' '010' '111' '000' '001' '110' '000000', 2).to_bytes(3, 'big')


def field(count, side, vocab, seed, stay=.8):
  """Chains along rows: a token stays with probability `stay`, else it is drawn anew."""
  rng = np.random.default_rng(seed)
  out = rng.integers(0, vocab, (count, side, side))
  keep = rng.random(out.shape) < stay
  for column in range(1, side):
    out[:, :, column] = np.where(keep[:, :, column], out[:, :, column - 1], out[:, :, column])
  return out.reshape(count, side * side, 1).astype(np.int32)


SPEC = TokenSpec(grid=(8, 8), vocab=(6,))


@pytest.fixture(scope='module')
def report():
  return language.report_language(SPEC, field(600, 8, 6, 0), field(150, 8, 6, 1),
                                  scans=('raster', 'column'))


def test_controls_show_what_order_is_worth(report):
  table = report['depth0']['raster']
  changed = .2 * 5 / 6
  rate = -(1 - changed) * np.log2(1 - changed) - changed * np.log2(changed / 5)
  inside = (np.log2(6) + 7 * rate) / 8  # the first of every row is drawn anew
  assert table['tokens']['given_left'] == pytest.approx(inside, rel=.02)
  assert table['tokens']['given_left_up'] == pytest.approx(inside, rel=.03)  # up says nothing
  # along the raster a row's first token follows the last of the row before, with no sign of it
  assert inside < np.log2(table['tokens']['perplexity'][1]) < inside + .1 * np.log2(6)
  for control in ('shuffled', 'unigram'):
    flat = table[control]
    # tokens of one image still share its frequencies when shuffled: a little is left to learn
    assert 5.5 < flat['perplexity'][1] < 6.1
    assert flat['given_left'] == pytest.approx(np.log2(6), rel=.02)
    assert flat['lzma'] > table['tokens']['lzma'] + .3
    assert flat['entropy'] == pytest.approx(table['tokens']['entropy'], abs=.01)
  assert table['shuffled']['entropy'] == table['tokens']['entropy']
  assert table['shuffled']['huffman'] == table['tokens']['huffman']
  assert table['unigram']['perplexity'][0] == pytest.approx(6, rel=.005)


def test_scans_read_other_chains(report):
  rows, columns = report['depth0']['raster']['tokens'], report['depth0']['column']['tokens']
  assert columns['perplexity'][1] == pytest.approx(6, rel=.02)  # down the columns there is no chain
  assert rows['perplexity'][0] == columns['perplexity'][0]
  assert columns['given_left'] is None and rows['codes'] == columns['codes']


def test_the_report_is_json(report):
  text = json.dumps(report, allow_nan=False)
  assert json.loads(text)['depth0']['raster']['tokens']['vocab'] == 6
  again = language.report_language(SPEC, field(600, 8, 6, 0), field(150, 8, 6, 1),
                                   scans=('raster', 'column'))
  assert json.dumps(again) == text


def test_a_depth_is_conditioned_on_the_one_above():
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 4, (500, 16))
  fine = np.where(rng.random((500, 16)) < .9, coarse + 3, rng.integers(0, 8, (500, 16)))
  tokens = np.stack([coarse, fine], -1).astype(np.int32)
  spec = TokenSpec(grid=(4, 4), vocab=(4, 8))
  result = language.language(spec, tokens[:400], tokens[400:], depth=1)
  p = np.full(8, .1 / 8)
  p[0] += .9
  assert result.given_coarser == pytest.approx(-(p * np.log2(p)).sum(), abs=.05)
  control = language.language(spec, tokens[:400], tokens[400:], depth=1, control='shuffled')
  assert control.given_coarser == pytest.approx(control.entropy, abs=.06)
  assert control.entropy == result.entropy > result.given_coarser + 1
  assert language.language(spec, tokens, tokens, depth=0).given_coarser is None


def test_innovation_of_uniform_draws_is_the_closed_form():
  rng = np.random.default_rng(0)
  stream = rng.integers(0, 1024, (64, 64))
  result = language.innovation(stream, 1024, rng)
  sizes, found, uniform = np.array(result.curve).T
  np.testing.assert_allclose(np.interp([100, 1000, 4096], sizes, uniform),
                             [95.3, 638.5, 1005.3], rtol=.003)
  np.testing.assert_allclose(found, uniform, atol=12)
  assert found[0] == 1 and sizes[-1] == 4096 and found[-1] == len(np.unique(stream))
  assert .8 < result.exponent < 1 and found[sizes == result.fitted] < .9 * 1024
  few = language.innovation(np.zeros((3, 4), int), 1024, rng)
  assert few.exponent == pytest.approx(0, abs=1e-9)  # one code: nothing is new
  assert language.innovation(np.zeros((1, 1), int), 2, rng).exponent is None


def test_grams_by_hand():
  stream = np.array([[0, 1, 0, 1], [0, 1, 1, -1], [2, -1, -1, -1]])
  two, three, four = language.grams(stream, 3)
  assert (two.n, two.types, two.tokens, two.once) == (2, 3, 5, 2 / 3)  # 01 three times, 10, 11
  assert (three.types, three.tokens, three.once) == (3, 3, 1)  # 010, 101, 011
  assert (four.n, four.types, four.tokens) == (4, 1, 1)
  assert language.grams(stream[2:], 3) == []


def test_strings_end_once_in_every_control():
  spec = TokenSpec(grid=(6,), vocab=(5,), eos=4)
  tokens = np.array([[0, 1, 2, 4, 4, 4], [3, 4, 4, 4, 4, 4], [0, 0, 1, 2, 3, 0]], np.int32)
  tokens = np.tile(tokens[..., None], (40, 1, 1))
  stream, = language.streams(spec, tokens)
  assert stream[:3].tolist() == [[0, 1, 2, 4, -1, -1], [3, 4, -1, -1, -1, -1], [0, 0, 1, 2, 3, 0]]
  rng = np.random.default_rng(0)
  mixed = language.shuffled(stream, rng, 4)
  drawn = language.unigram(stream, np.array([1, 1, 1, 1, 9]), rng, 4)
  for other in (mixed, drawn):
    np.testing.assert_array_equal(other == 4, stream == 4)
    np.testing.assert_array_equal(other < 0, stream < 0)
  np.testing.assert_array_equal(np.sort(mixed, 1), np.sort(stream, 1))
  assert (mixed != stream).any() and (drawn != stream).any()
  result = language.language(spec, tokens, tokens)
  assert (result.tokens, result.given_left) == (40 * 12, None)
  with pytest.raises(ValueError, match='raster'):
    language.language(spec, tokens, tokens, scan='snake')


def test_refusals():
  tokens = field(4, 8, 6, 0)
  with pytest.raises(ValueError, match='at least one'):
    language.language(SPEC, tokens, tokens[:0])
  with pytest.raises(ValueError, match='leave vocab'):
    language.language(SPEC, tokens + 1, tokens)
  with pytest.raises(ValueError, match='raster, snake'):
    language.language(SPEC, tokens, tokens, scan='spiral')


@pytest.mark.slow
@pytest.mark.needs_data
def test_patches_of_photographs_have_order():
  """256 mean patches of 4x4 pixels as codes: neighbours tell, and controls know nothing of it."""
  pixels = downloads.CifarJpegConfig().open('eval').read(np.arange(5000))['image']
  patches = pixels.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
  model = MiniBatchKMeans(256, random_state=0, n_init=1).fit(patches[:64_000].astype(np.float32))
  tokens = model.predict(patches.astype(np.float32)).reshape(-1, 64, 1)
  spec = TokenSpec(grid=(8, 8), vocab=(256,))
  result = language.report_language(spec, tokens[:4000], tokens[4000:], scans=scans.SCANS)
  for scan, table in result['depth0'].items():
    for name, row in table.items():
      print(scan, name, {k: v for k, v in row.items() if k not in ('codes', 'grams', 'innovation')})
  for table in result['depth0'].values():
    real, mixed, drawn = (min(table[x]['perplexity']) for x in ('tokens', 'shuffled', 'unigram'))
    assert real < .8 * mixed < .8 * drawn  # order within images, then what images share
    assert table['tokens']['lzma'] < table['shuffled']['lzma'] < table['unigram']['lzma']
  raster = result['depth0']['raster']['tokens']
  assert raster['given_left_up'] < raster['given_left'] - .2
