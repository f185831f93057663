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
