"""Range coding: symbols to bytes at the price that a model says, and back.

Integers alone, of any size Python likes, so that the same numbers give the same bytes everywhere
(Martin 1979, "Range encoding"; carries run back into what is written). A distribution is integer
frequencies that sum to 2^24, each at least 1: whatever a model thinks impossible still has a code.
"""

import numpy as np
from jaxtyping import Float, Int

BITS = 24  # of the total of all frequencies
_WIDE, _LOW = 1 << 64, 1 << 56


def frequencies(probability: Float[np.ndarray, '*b v']) -> Int[np.ndarray, '*b v']:
  """1 + floor(p (2^24 - V)) of every symbol, and what is left over to the first largest.

  Raises:
    ValueError: more symbols than there are frequencies, or what is no distribution.
  """
  size = probability.shape[-1]
  if size > 1 << (BITS - 1):
    raise ValueError(f'{size} symbols do not fit frequencies of {BITS} bits; split the codes.')
  p = probability.astype(np.float64)
  if not (np.isfinite(p).all() and (p >= 0).all() and (abs(p.sum(-1) - 1) < 1e-3).all()):
    raise ValueError('no distribution to code with: negative, not finite, or not of sum 1.')
  counts = 1 + np.floor(p / p.sum(-1, keepdims=True) * ((1 << BITS) - size)).astype(np.int64)
  rest = (1 << BITS) - counts.sum(-1, keepdims=True)
  largest = np.argmax(counts, -1)[..., None]
  np.put_along_axis(counts, largest, np.take_along_axis(counts, largest, -1) + rest, -1)
  return counts


class Encoder:
  """Symbols in, `finish()` out."""

  def __init__(self):
    self.low, self.range, self.out = 0, _WIDE, bytearray()

  def encode(self, counts: Int[np.ndarray, 'v'], symbol: int) -> None:
    """Adds a symbol of the distribution `counts`."""
    unit = self.range >> BITS
    self.low += unit * int(counts[:symbol].sum())
    self.range = unit * int(counts[symbol])
    if self.low >= _WIDE:
      self.low -= _WIDE
      self._carry()
    while self.range < _LOW:
      self.out.append(self.low >> 56)
      self.low = (self.low << 8) & (_WIDE - 1)
      self.range <<= 8

  def finish(self) -> bytes:
    """The shortest bytes of this message; those that would follow are zeros."""
    for count in range(9):
      unit = _WIDE >> (8 * count)
      value = -(-self.low // unit) * unit
      if value < self.low + self.range:
        break
    if value >= _WIDE:
      value -= _WIDE
      self._carry()
    self.out += value.to_bytes(8, 'big')[:count]
    return bytes(self.out).rstrip(b'\0')

  def _carry(self) -> None:
    i = len(self.out) - 1
    while self.out[i] == 255:
      self.out[i] = 0
      i -= 1
    self.out[i] += 1


class Decoder:
  """Bytes in, the symbols out, given the same distributions; given others, other symbols."""

  def __init__(self, data: bytes):
    self.data, self.next = data, 8
    self.code, self.range = int.from_bytes(data[:8].ljust(8, b'\0'), 'big'), _WIDE

  def decode(self, counts: Int[np.ndarray, 'v']) -> int:
    unit = self.range >> BITS
    target = min(self.code // unit, (1 << BITS) - 1)
    ends = np.cumsum(counts)
    symbol = int(np.searchsorted(ends, target, side='right'))
    start = int(ends[symbol] - counts[symbol])
    self.code -= unit * start
    self.range = unit * int(counts[symbol])
    while self.range < _LOW:
      byte = self.data[self.next] if self.next < len(self.data) else 0
      self.code, self.next = (self.code << 8) | byte, self.next + 1
      self.range <<= 8
    return symbol
