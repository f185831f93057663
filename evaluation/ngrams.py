"""Interpolated Kneser-Ney n-gram models of token sequences, all orders in one pass.

Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section
3 (modified Kneser-Ney): with c the count of a gram, h its context and h' the context without its
farthest symbol,

  p(w | h) = (c(h w) - D(c)) / c(h .) + gamma(h) p(w | h'),  gamma(h) = sum_w D(c(h w)) / c(h .)

down to the uniform 1 / V. Below the highest order a count is the number of different symbols that
precede the gram (its continuations), except for grams that begin at the start symbol, which nothing
precedes and which keep their counts. The three discounts of each order come from how many grams
were seen once to four times. A sequence begins with one start symbol, which is never predicted.

Everything is sorting and counting of packed integers: no loop over tokens.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

FALLBACK = np.arange(4) / 2


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """Words with what is around them, one row per token.

  Attributes:
    words: tokens in 0..V-1.
    contexts: symbols of any finite alphabet, nearest first; tokens, or V for what lies outside.
    extent: how many of the contexts a row has: one at the start has no farther ones. Rows of equal
      contexts have equal extents.
  """
  words: Int[np.ndarray, 'r']
  contexts: tuple[Int[np.ndarray, 'r'], ...]
  extent: Int[np.ndarray, 'r']


def preceding(stream: Int[np.ndarray, 'b t'], order: int, vocab: int) -> Rows:
  """The rows of an n-gram model: contexts are the `order - 1` tokens before; -1 is no token."""
  count, time = stream.shape
  padded = np.concatenate([np.full((count, order), vocab), stream], 1)
  present = stream >= 0
  contexts = tuple(padded[:, order - i:order - i + time][present] for i in range(1, order))
  extent = np.minimum(np.arange(time) + 1, order - 1)
  return Rows(stream[present], contexts, np.broadcast_to(extent, stream.shape)[present])


def kneser_ney(train: Rows, held_out: Rows, vocab: int) -> Float[np.ndarray, 'n held']:
  """log2 p of every held-out word under models of orders 1, 2, ...: of 0, 1, ... contexts."""
  count = len(train.words)
  words = np.concatenate([train.words, held_out.words]).astype(np.int64)
  extent = np.concatenate([train.extent, held_out.extent])
  seen = np.arange(len(words)) < count
  context, orders = np.zeros(len(words), np.int64), [(np.zeros(len(words), np.int64), words)]
  for symbols in map(np.concatenate, zip(train.contexts, held_out.contexts)):
    context = _identify(context * (int(symbols.max()) + 1) + symbols)
    orders.append((context, _identify(context * vocab + words)))

  lower, out = np.full(len(words) - count, 1 / vocab), []
  for n, (context, gram) in enumerate(orders):
    counted = seen & (extent >= n)
    counts = np.bincount(gram[counted], minlength=gram.max() + 1)
    asked = extent[count:] >= n  # the others have their full context already
    out.append(np.where(asked, _interpolated(counts, context, gram, counted, count, lower), lower))
    if n + 1 < len(orders):
      row = _representative(orders[n + 1][1], counted)  # one for every different extension
      continuations = np.bincount(gram[row], minlength=len(counts))
      closed = np.zeros(len(counts), bool)
      closed[gram[counted & (extent == n)]] = True
      counts = np.where(closed, counts, continuations)
      lower = np.where(asked, _interpolated(counts, context, gram, counted, count, lower), lower)
  return np.log2(np.stack(out))


def discounts(counts: Int[np.ndarray, 'g']) -> Float[np.ndarray, '4']:
  """D(0), D(1), D(2), D(3 and more) of Chen and Goodman 1999, equation 26.

  Where no gram was seen k times, or chance puts D(k) outside 0..k, it is k / 2 (as in KenLM, but
  each by itself: in a sparse table all grams are seen once, and D(1) must stay near 1).
  """
  n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
  out = FALLBACK.copy()
  for k in (1, 2, 3):
    if n[0] and n[k - 1]:
      value = k - (k + 1) * n[0] / (n[0] + 2 * n[1]) * n[k] / n[k - 1]
      out[k] = value if 0 < value <= k else out[k]
  return out


def _interpolated(counts: np.ndarray, context: np.ndarray, gram: np.ndarray, counted: np.ndarray,
                  first: int, lower: np.ndarray) -> Float[np.ndarray, 'held']:
  """p of the rows from `first` on, of one order, given their p of the order below."""
  row = _representative(gram, counted)
  kinds, owner = counts[gram[row]], context[row]  # of every gram that was seen, and its context
  discount = discounts(counts)
  total = np.bincount(owner, kinds, minlength=context.max() + 1)[context[first:]]
  freed = np.bincount(owner, discount[np.minimum(kinds, 3)],
                      minlength=context.max() + 1)[context[first:]]
  own = counts[gram[first:]]
  own = own - discount[np.minimum(own, 3)]
  return np.where(total > 0, (own + freed * lower) / np.maximum(total, 1), lower)


def _identify(packed: Int[np.ndarray, 'r']) -> Int[np.ndarray, 'r']:
  """Equal numbers to equal ids 0, 1, ..."""
  return np.unique(packed, return_inverse=True)[1]


def _representative(ids: Int[np.ndarray, 'r'], among: Bool[np.ndarray, 'r']) -> np.ndarray:
  """One row of every id that occurs among some rows."""
  row = np.full(ids.max() + 1, -1)
  row[ids[among]] = np.flatnonzero(among)
  return row[row >= 0]
