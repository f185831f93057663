"""Bytes of strings: round trip, bounded length, whole code points."""

import numpy as np
from hypothesis import given, strategies as st

from smalti.data.utf8 import from_bytes, to_bytes


@given(st.lists(st.text(max_size=40), max_size=4))
def test_what_fits_comes_back(texts):
  text, mask = to_bytes(texts, 160)
  assert text.shape == mask.shape == (len(texts), 160) and not text[~mask].any()
  assert from_bytes(text, mask) == texts
  np.testing.assert_array_equal(mask.sum(1), [len(t.encode()) for t in texts])


@given(st.text(max_size=30), st.integers(1, 40))
def test_what_does_not_fit_is_the_longest_beginning_of_whole_code_points(string, length):
  text, mask = to_bytes([string], length)
  found = bytes(text[0][mask[0]]).decode()  # strict: raises inside a code point
  assert string.startswith(found)
  assert len(found) == len(string) or len(string[:len(found) + 1].encode()) > length


def test_code_points_of_every_size_at_every_border():
  for string in ('é' * 4, '中文字符', '🀄🀄🀄', 'aé中🀄'):
    for length in range(1, 14):
      assert from_bytes(*to_bytes([string], length))[0] == next(
          string[:i] for i in range(len(string), -1, -1) if len(string[:i].encode()) <= length)


def test_what_has_no_bytes_is_replaced():
  assert from_bytes(*to_bytes(['a\ud800b'], 8)) == ['a\ufffdb']
  assert from_bytes(np.array([[0xC3, 0x28, 0]], np.uint8), np.array([[True, True, False]])) == [
      '\ufffd(']
  text, mask = to_bytes(['x' * 10**6, ''], 4)
  assert from_bytes(text, mask) == ['xxxx', ''] and not mask[1].any()
