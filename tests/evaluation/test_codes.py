"""Code statistics: closed forms, counts by hand, and what uniform use would show."""

import numpy as np
import pytest

from smalti.evaluation import codes
from smalti.tokenizers.spec import TokenSpec


def test_uniform_and_constant_codes():
  spec = TokenSpec(grid=(4, 4), vocab=(8, 4))
  tokens = np.stack([np.arange(64).reshape(4, 16) % 8, np.zeros((4, 16), int)], -1)
  even, constant = map(codes.code_use, codes.counts(spec, tokens))
  assert (even.vocab, even.tokens, even.distinct, even.dead, even.usage) == (8, 64, 8, 0, 1)
  assert even.entropy == pytest.approx(3) and even.perplexity == pytest.approx(8)
  assert even.normalized == pytest.approx(1)
  assert (constant.distinct, constant.dead, constant.usage) == (1, 3, .25)
  assert (constant.entropy, constant.perplexity) == (0, 1)


def test_entropy_by_hand():
  use = codes.code_use(np.array([4, 2, 1, 1, 0]))
  assert use.entropy == pytest.approx(1.75)
  assert use.entropy_corrected == pytest.approx(1.75 + 3 / (16 * np.log(2)))
  assert use.perplexity == pytest.approx(2 ** 1.75)


@pytest.mark.parametrize('n, expected', [(100, 95.3), (1000, 638.5), (4096, 1005.3)])
def test_uniform_use_of_a_small_batch_is_not_collapse(n, expected):
  rng = np.random.default_rng(0)
  draws = [codes.code_use(np.bincount(rng.integers(0, 1024, n), minlength=1024))
           for _ in range(30)]
  assert draws[0].expected == pytest.approx(expected, abs=0.05)
  assert np.mean([d.distinct for d in draws]) == pytest.approx(expected, rel=0.02)


def test_tokens_after_the_first_end_do_not_count():
  spec = TokenSpec(grid=(5,), vocab=(4,), eos=3)
  tokens = np.array([0, 1, 3, 3, 3, 2, 3, 3, 3, 3]).reshape(2, 5, 1)
  np.testing.assert_array_equal(codes.counts(spec, tokens)[0], [1, 1, 1, 2])


def test_counts_of_batches_add_to_those_of_the_whole():
  spec = TokenSpec(grid=(6,), vocab=(7, 5))
  tokens = np.random.default_rng(0).integers(0, 5, (20, 6, 2))
  parts = [codes.counts(spec, part) for part in np.split(tokens, [3, 11])]
  for d, whole in enumerate(codes.counts(spec, tokens)):
    np.testing.assert_array_equal(sum(part[d] for part in parts), whole)


def test_unigram_bits_by_hand():
  spec = TokenSpec(grid=(2,), vocab=(3,))
  train = np.array([[0, 1], [0, 1], [0, 0]])[..., None]  # counts 4, 2, 0; smoothed 5, 3, 1 of 9
  held_out = np.array([[0, 2]])[..., None]
  assert codes.unigram_bits(spec, train, held_out) == pytest.approx(-np.log2(5 / 9 * 1 / 9) / 2)
  # by position: 3, 0, 0 and 1, 2, 0; smoothed 4 of 6 and 1 of 6
  assert codes.unigram_bits(spec, train, held_out, positional=True) == pytest.approx(
      -np.log2(4 / 6 * 1 / 6) / 2)


def test_unigram_bits_reach_the_entropy_of_independent_tokens():
  rng, spec = np.random.default_rng(0), TokenSpec(grid=(50,), vocab=(4, 4))
  p = np.array([.5, .25, .125, .125])
  train, held_out = (rng.choice(4, (400, 50, 2), p=p) for _ in range(2))
  assert codes.unigram_bits(spec, train, held_out) == pytest.approx(1.75, abs=0.02)
  assert codes.unigram_bits(spec, train, held_out) < codes.unigram_bits(
      spec, train, held_out, positional=True)  # more tables, no more to know


def test_refusals():
  spec = TokenSpec(grid=(2,), vocab=(3,))
  for tokens, message in [(np.zeros((1, 3, 1), int), 'must be'), (np.full((1, 2, 1), 3), 'leave'),
                          (np.full((1, 2, 1), -1), 'leave')]:
    with pytest.raises(ValueError, match=message):
      codes.counts(spec, tokens)
  with pytest.raises(ValueError, match='No tokens'):
    codes.code_use(np.zeros(4, int))
  with pytest.raises(ValueError, match='at least one'):
    codes.unigram_bits(spec, np.zeros((0, 2, 1), int), np.zeros((1, 2, 1), int))


def test_counts_of_neighbours_see_what_touches_and_nothing_else():
  rng = np.random.default_rng(0)
  grid = TokenSpec(grid=(6, 6), vocab=(5,))
  # every code is that on its left plus that above, with a coin: one bit of noise
  def draw(n):
    x = np.zeros((n, 6, 6), np.int32)
    for i in range(6):
      for j in range(6):
        left = x[:, i, j - 1] if j else 0
        up = x[:, i - 1, j] if i else 1
        x[:, i, j] = (left + up + rng.integers(0, 2, n)) % 5
    return x.reshape(n, 36, 1)

  train, held_out = draw(3000), draw(500)
  assert codes.neighbour_bits(grid, train, held_out) == pytest.approx(1.0, abs=0.01)
  assert codes.unigram_bits(grid, train, held_out) > 2.3
  # in a row the two codes before
  row = TokenSpec(grid=(36,), vocab=(5,))
  x = rng.integers(0, 5, (3000, 36), np.int32)
  for i in range(2, 36):
    x[:, i] = (x[:, i - 1] + x[:, i - 2] + rng.integers(0, 2, 3000)) % 5
  x = x[..., None]
  exact = (2 * np.log2(5) + 34) / 36
  assert codes.neighbour_bits(row, x[:2500], x[2500:]) == pytest.approx(exact, abs=0.02)
  # independent codes have nothing to tell: the unigram, up to what smoothing costs
  x = rng.choice(5, (3000, 36, 1), p=[.6, .1, .1, .1, .1]).astype(np.int32)
  found = codes.neighbour_bits(grid, x[:2500], x[2500:])
  assert found == pytest.approx(codes.unigram_bits(grid, x[:2500], x[2500:]), abs=0.01)


def test_the_order_of_training_rows_says_nothing():
  rng, spec = np.random.default_rng(0), TokenSpec(grid=(4, 4), vocab=(6,))
  # nine classes of one code each, and a last one of noise, as a folder holds them
  classes = [np.full((100, 16, 1), i % 6, np.int32) for i in range(9)]
  train = np.concatenate([*classes, rng.integers(0, 6, (100, 16, 1), np.int32)])
  held_out = train[::7]
  known, mixed = train[rng.permutation(1000)], codes.neighbour_bits(spec, train, held_out)
  assert mixed == pytest.approx(codes.neighbour_bits(spec, known, held_out), rel=1e-3)


def test_counts_of_neighbours_are_a_distribution():
  """Probabilities of all values at one place, given the same neighbours, sum to one."""
  spec = TokenSpec(grid=(2, 2), vocab=(3, 3))
  train = np.random.default_rng(1).integers(0, 3, (50, 4, 2), np.int32)
  row = train[:1].repeat(3, 0)
  row[:, 3, 1] = np.arange(3)  # the last position is nobody's neighbour
  nats = np.array([codes._neighbour_nats(spec, train, row[i:i + 1], 4.0) for i in range(3)])
  probability = np.exp(nats.min() - nats) / np.exp(nats.min() - nats).sum()  # the rest is the same
  # by hand: counts of (left, up), of (left) and of the code, smoothed with 4
  x = train[:, :, 1]
  left, up = row[0, 2, 1], row[0, 1, 1]
  lefts = np.stack([np.full(50, 3), x[:, 0], np.full(50, 3), x[:, 2]], 1)
  ups = np.stack([np.full(50, 3), np.full(50, 3), x[:, 0], x[:, 1]], 1)
  p = (np.bincount(x.ravel(), minlength=3) + 1) / (x.size + 3)
  for near in (lefts == left, (lefts == left) & (ups == up)):
    p = (np.bincount(x[near], minlength=3) + 4 * p) / (near.sum() + 4)
  np.testing.assert_allclose(probability, p, rtol=1e-9)
