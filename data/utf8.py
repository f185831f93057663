"""Strings as bounded UTF-8: the bytes that `text` and `text_mask` of a batch hold."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8


def to_bytes(texts: Sequence[str], length: int
             ) -> tuple[UInt8[np.ndarray, 'b t'], Bool[np.ndarray, 'b t']]:
  """UTF-8 in `length` slots, and which of them are real; 0 where they are not.

  What does not fit is cut off at the border of a code point, so that what is left is UTF-8; lone
  surrogates, which have no bytes, become U+FFFD.
  """
  text = np.zeros((len(texts), length), np.uint8)
  mask = np.zeros((len(texts), length), bool)
  for i, string in enumerate(texts):
    # a code point has at least one byte: a hostile megabyte costs no more than its beginning
    whole = string[:length].encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode()
    size = min(len(whole), length)
    while size < len(whole) and whole[size] & 0xC0 == 0x80:  # inside a code point
      size -= 1
    text[i, :size] = np.frombuffer(whole[:size], np.uint8)
    mask[i, :size] = True
  return text, mask


def from_bytes(text: UInt8[np.ndarray, 'b t'], mask: Bool[np.ndarray, 'b t']) -> list[str]:
  """The strings of `to_bytes`; bytes that are no UTF-8 become U+FFFD."""
  return [row[real].tobytes().decode(errors='replace') for row, real in zip(text, mask)]
