"""Kneser-Ney: the equations one word at a time, sums to one, uniform data, a known Markov chain."""

import collections

import numpy as np
import pytest

from smalti.evaluation import ngrams


def bits(train, held_out, order, vocab):
  """-log2 p, [order, held-out words]."""
  return -ngrams.kneser_ney(ngrams.preceding(train, order, vocab),
                            ngrams.preceding(held_out, order, vocab), vocab)


def by_hand(train, held_out, order, vocab):
  """p of every held-out word under the model of one order, from the equations with dictionaries."""
  sentences = [('^', *(w for w in row if w >= 0)) for row in train.tolist()]
  raw = {n: collections.Counter(s[i:i + n] for s in sentences for i in range(len(s) - n + 1))
         for n in range(1, order + 1)}
  table = {order: raw[order]}
  for n in range(1, order):
    before = collections.Counter(gram[1:] for gram in raw[n + 1])  # each extension once
    table[n] = {gram: c if gram[0] == '^' else before[gram] for gram, c in raw[n].items()}
  table[1].pop(('^',))

  def discount(n, count):
    seen = collections.Counter(table[n].values())
    k = min(count, 3)
    if not k:
      return 0
    value = -1.
    if seen[1] and seen[k]:
      y = seen[1] / (seen[1] + 2 * seen[2])
      value = k - (k + 1) * y * seen[k + 1] / seen[k]
    return value if 0 < value <= k else k / 2

  def probability(word, context):
    n = len(context) + 1
    lower = probability(word, context[1:]) if context else 1 / vocab
    kinds = [c for gram, c in table[n].items() if gram[:-1] == context]
    if not kinds:
      return lower
    freed = sum(discount(n, c) for c in kinds)
    own = table[n].get((*context, word), 0)
    return (own - discount(n, own) + freed * lower) / sum(kinds)

  out = []
  for row in held_out.tolist():
    sentence = ['^', *(w for w in row if w >= 0)]
    out += [probability(sentence[i], tuple(sentence[max(0, i - order + 1):i]))
            for i in range(1, len(sentence))]
  return np.array(out)


def words(count, time, vocab, seed=0):
  """Skewed tokens that repeat, in sequences of several lengths."""
  rng = np.random.default_rng(seed)
  out = np.minimum(rng.geometric(.35, (count, time)) - 1, vocab - 1)
  for t in range(1, time):
    out[:, t] = np.where(rng.random(count) < .4, (out[:, t - 1] * 2 + 1) % vocab, out[:, t])
  out[np.arange(time) >= rng.integers(1, time + 1, (count, 1))] = -1
  return out


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_against_the_equations_word_by_word(order):
  train, held_out = words(60, 9, 7), words(20, 9, 7, seed=1)
  expected = by_hand(train, held_out, order, 7)
  got = 2 ** -bits(train, held_out, order, 7)[order - 1]
  np.testing.assert_allclose(got, expected, atol=1e-12)


def test_probabilities_sum_to_one():
  vocab, order = 11, 5
  train = words(200, 12, vocab)
  rng = np.random.default_rng(2)
  for length in (0, 1, 2, 3, 6):
    context = rng.integers(0, vocab, (30, length))
    context[:10] = np.where(train[:10, :length] >= 0, train[:10, :length], 0)  # some were seen
    asked = np.concatenate([np.repeat(context, vocab, 0),
                            np.tile(np.arange(vocab), 30)[:, None]], 1)
    p = 2 ** -bits(train, asked, order, vocab).reshape(order, 30, vocab, length + 1)[..., -1]
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-12)
    assert (p > 0).all()


def test_a_uniform_model_has_the_perplexity_of_its_alphabet():
  vocab = 16
  every = np.arange(vocab)
  train = np.stack([np.roll(every, shift) for shift in range(vocab)] * 5)
  held_out = words(10, 8, vocab)
  np.testing.assert_allclose(2 ** bits(train, held_out, 1, vocab).mean(1), vocab, atol=1e-12)


def test_discounts_by_hand():
  counts = np.repeat([0, 1, 2, 3, 4, 9], [50, 10, 6, 4, 3, 7])
  y = 10 / (10 + 2 * 6)
  expected = [0, 1 - 2 * y * 6 / 10, 2 - 3 * y * 4 / 6, 3 - 4 * y * 3 / 4]
  np.testing.assert_allclose(ngrams.discounts(counts), expected)
  np.testing.assert_allclose(ngrams.discounts(np.ones(9, int)), [0, 1, 1, 1.5])  # all seen once
  np.testing.assert_allclose(ngrams.discounts(np.full(9, 30)), [0, .5, 1, 1.5])


def test_a_markov_chain_has_its_entropy_rate():
  """Order 2 finds it, order 1 sees the stationary entropy, and shuffling leaves only that."""
  vocab, rng = 8, np.random.default_rng(0)
  move = rng.dirichlet(np.full(vocab, .4), vocab)
  stationary = np.linalg.matrix_power(move, 200)[0]
  chain = np.zeros((2400, 64), int)
  chain[:, 0] = rng.choice(vocab, 2400, p=stationary)
  for t in range(1, 64):
    chain[:, t] = np.minimum((rng.random((2400, 1)) > move.cumsum(1)[chain[:, t - 1]]).sum(1),
                             vocab - 1)
  first = -(stationary * np.log2(stationary)).sum()
  rate = -(stationary[:, None] * move * np.log2(np.maximum(move, 1e-300))).sum()
  found = bits(chain[:2000], chain[2000:], 3, vocab).mean(1)
  assert 2 ** found[0] == pytest.approx(2 ** first, rel=.02)
  assert 2 ** found[1] == pytest.approx(2 ** (rate + (first - rate) / 64), rel=.02)
  assert 2 ** found[2] == pytest.approx(2 ** found[1], rel=.02)  # a third order tells no more
  mixed = rng.permuted(chain, axis=1)
  shuffled = bits(mixed[:2000], mixed[2000:], 2, vocab).mean(1)
  assert 2 ** shuffled[1] == pytest.approx(2 ** first, rel=.02)
  assert first - rate > .4  # or the above says little


def test_order_does_not_matter_and_empty_tails_do_not_count():
  train, held_out = words(50, 7, 5), words(9, 7, 5, seed=1)
  whole = bits(train, held_out, 3, 5)
  np.testing.assert_array_equal(bits(train[::-1], held_out, 3, 5), whole)
  longer = np.pad(train, ((0, 0), (0, 4)), constant_values=-1)
  np.testing.assert_array_equal(bits(longer, held_out, 3, 5), whole)
