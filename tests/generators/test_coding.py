"""Range coding: what goes in comes out, at the price of the distribution."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from smalti.generators.coding import BITS, Decoder, Encoder, frequencies


def coded(rows, symbols):
  encoder = Encoder()
  for counts, symbol in zip(rows, symbols, strict=True):
    encoder.encode(counts, symbol)
  return encoder.finish()


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(0, 2**32), st.integers(1, 300), st.integers(2, 40),
                  st.sampled_from([0.01, 0.3, 5.0]))
def test_messages_come_back_at_the_price_of_their_distributions(seed, length, size, spread):
  rng = np.random.default_rng(seed)
  p = rng.dirichlet(np.full(size, spread), length)
  symbols = [rng.choice(size, p=row) if rng.random() < 0.9 else rng.integers(size) for row in p]
  rows = frequencies(p)
  data = coded(rows, symbols)
  decoder = Decoder(data)
  assert [decoder.decode(row) for row in rows] == symbols
  price = sum(BITS - np.log2(row[s]) for row, s in zip(rows, symbols))
  assert price - 32 <= 8 * len(data) <= price + 9 + 1e-6 * length  # zeros at the end are saved


@pytest.mark.parametrize('symbol', [0, 1])
def test_long_runs_of_carries(symbol):
  """The first and the last of the interval again and again: bytes of zeros, bytes of 255."""
  counts = frequencies(np.array([1 / 3, 2 / 3]))
  tail = [1, 0, 0, 1, 1, 1, 0]
  for length in (5000, 5001, 5002, 5003):
    symbols = [symbol] * length + tail
    decoder = Decoder(coded([counts] * len(symbols), symbols))
    assert [decoder.decode(counts) for _ in symbols] == symbols


def test_certain_symbols_cost_nothing_and_impossible_ones_24_bits():
  counts = frequencies(np.array([1.0, 0.0, 0.0]))
  assert counts.tolist() == [2**24 - 2, 1, 1]
  assert len(coded([counts] * 10_000, [0] * 10_000)) <= 1
  assert 23 < 8 * len(coded([counts] * 10, [2] * 10)) / 10 < 25
  assert coded([], []) == b''


def test_frequencies_are_whole_and_sum_to_their_total(monkeypatch):
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.full(1000, 0.01), 50).astype(np.float32)
  counts = frequencies(p)
  assert (counts.sum(-1) == 1 << BITS).all() and counts.min() == 1
  np.testing.assert_allclose(counts / 2**24, p, atol=1e-4)
  tied = frequencies(np.full(3, 1 / 3))
  assert tied[0] >= tied[1] == tied[2]  # what is left over goes to the first


def test_what_is_no_distribution_is_refused():
  for p in ([0.5, np.nan], [0.5, 0.4], [1.5, -0.5]):
    with pytest.raises(ValueError, match='no distribution to code with'):
      frequencies(np.array(p))
  with pytest.raises(ValueError, match='split the codes'):
    frequencies(np.broadcast_to(np.float32(2.0 ** -24), 2 ** 24))
