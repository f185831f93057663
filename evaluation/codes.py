"""Statistics of codes: usage, perplexity, dead codes, entropy, and the bits of a unigram model.

Entropies are plug-in estimates in bits, per depth, over the tokens that were counted: a small batch
of a large codebook looks collapsed to all of them, so every result says how many tokens it saw and
how many codes uniform use would have shown.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from smalti.evaluation.subset import subset
from smalti.tokenizers.spec import TokenSpec

Tokens = Int[np.ndarray, '_b _n _d']


@dataclasses.dataclass(frozen=True)
class CodeUse:
  """How the codes of one depth are used.

  Attributes:
    vocab: V, size of the alphabet.
    tokens: how many tokens were counted.
    distinct: codes seen at least once.
    expected: distinct codes expected of uniform use, V (1 - (1 - 1/V)^tokens).
    dead: codes never seen.
    usage: distinct / V.
    entropy: H in bits, plug-in.
    entropy_corrected: H + (distinct - 1) / (2 tokens ln 2), Miller 1955; below 100 V tokens trust
      neither estimate much.
    perplexity: 2^H, between 1 and V.
    normalized: H / log2 V.
  """
  vocab: int
  tokens: int
  distinct: int
  expected: float
  dead: int
  usage: float
  entropy: float
  entropy_corrected: float
  perplexity: float
  normalized: float


def counts(spec: TokenSpec, tokens: Tokens) -> list[Int[np.ndarray, 'v']]:
  """How often every code occurs, per depth; what follows the first EOS does not count.

  Counts of several batches add. Raises ValueError for tokens outside the alphabet.
  """
  tokens = checked(spec, tokens)
  valid = np.asarray(spec.valid(tokens))
  return [np.bincount(tokens[:, :, d][valid[:, :, d]], minlength=v)
          for d, v in enumerate(spec.vocab)]


def code_use(count: Int[np.ndarray, 'v']) -> CodeUse:
  """The statistics of one depth from `counts`. Raises ValueError where nothing was counted."""
  total, vocab = int(count.sum()), len(count)
  if not total:
    raise ValueError('No tokens were counted; give at least one.')
  p = count[count > 0] / total
  entropy, distinct = max(float(-(p * np.log2(p)).sum()), 0.0), len(p)
  return CodeUse(
      vocab=vocab, tokens=total, distinct=distinct,
      expected=vocab * (1 - (1 - 1 / vocab) ** total), dead=vocab - distinct,
      usage=distinct / vocab, entropy=entropy,
      entropy_corrected=entropy + (distinct - 1) / (2 * total * float(np.log(2))),
      perplexity=2 ** entropy, normalized=entropy / float(np.log2(vocab)))


def unigram_bits(spec: TokenSpec, train: Tokens, held_out: Tokens, *,
                 positional: bool = False) -> float:
  """Bits per token of held-out tokens under add-one smoothed frequencies of training tokens.

  What a generator has to beat: a model of each token alone, one per depth.

  Args:
    positional: one table per position too, which knows where the empty border is; the harder
      baseline for images.
  """
  train, held_out = checked(spec, train), checked(spec, held_out)
  if not len(train) or not len(held_out):
    raise ValueError(f'{len(train)} training and {len(held_out)} held-out rows; give at least one.')
  places = [slice(n, n + 1) for n in range(spec.length)] if positional else [slice(None)]
  seen, asked = np.asarray(spec.valid(train)), np.asarray(spec.valid(held_out))
  nats, total = 0.0, 0
  for d, vocab in enumerate(spec.vocab):
    for place in places:
      count = np.bincount(train[:, place, d][seen[:, place, d]], minlength=vocab) + 1
      codes = held_out[:, place, d][asked[:, place, d]]
      nats -= float(np.log(count[codes] / count.sum()).sum())
      total += len(codes)
  return nats / np.log(2) / total


def neighbour_bits(spec: TokenSpec, train: Tokens, held_out: Tokens) -> float:
  """Bits per token of held-out tokens by counts of (left, up): the local structure of images.

  p(x | left, up) = (c(left, up, x) + a p(x | left)) / (c(left, up) + a), p(x | left) likewise over
  the add-one unigram; one table per depth, `a` the best of powers of 4 on a random tenth of the
  training rows, which the counts leave out. A grid of one axis has the two codes before instead. A
  generator that has learned more than which codes touch is below this.
  """
  train, held_out = checked(spec, train), checked(spec, held_out)
  if len(train) < 2 or not len(held_out):
    raise ValueError(f'{len(train)} training and {len(held_out)} held-out rows; give at least two '
                     'and one.')
  weights = [4.0 ** i for i in range(-1, 7)]
  asked = np.zeros(len(train), bool)
  asked[subset(len(train), max(1, len(train) // 10))] = True
  best = min(weights, key=lambda a: _neighbour_nats(spec, train[~asked], train[asked], a))
  valid = int(np.asarray(spec.valid(held_out)).sum())
  return _neighbour_nats(spec, train, held_out, best) / np.log(2) / valid


def _neighbour_nats(spec: TokenSpec, train: Tokens, asked: Tokens, weight: float) -> float:
  nats = 0.0
  for d, vocab in enumerate(spec.vocab):
    rows = []
    for tokens in (train, asked):
      valid = np.asarray(spec.valid(tokens))[:, :, d]
      codes = tokens[:, :, d].astype(np.int64)
      left, up = (_before(spec, codes, vocab, axis) for axis in (-1, -2))
      rows.append([x[valid] for x in (codes, left, up)])
    (x, left, up), (y, left_y, up_y) = rows
    p = (np.bincount(x, minlength=vocab) + 1) / (len(x) + vocab)
    p = p[y]
    size = vocab + 1  # the border is a context too
    for context, context_y in ((left, left_y), (left * size + up, left_y * size + up_y)):
      both = _occurrences(context * size + x, context_y * size + y)
      p = (both + weight * p) / (_occurrences(context, context_y) + weight)
    nats -= float(np.log(p).sum())
  return nats


def _before(spec: TokenSpec, codes: Int[np.ndarray, 'b n'], border: int, axis: int
            ) -> Int[np.ndarray, 'b n']:
  """The code one step earlier along an axis of the grid (two steps for -2 of a row)."""
  grid = spec.grid if len(spec.grid) > 1 else (1, *spec.grid)
  steps, axis = (1, axis) if len(spec.grid) > 1 else (-axis, -1)
  cells = codes.reshape(len(codes), *grid)
  out = np.full_like(cells, border)
  later = [slice(None)] * cells.ndim
  earlier = list(later)
  later[axis], earlier[axis] = slice(steps, None), slice(None, -steps)
  out[tuple(later)] = cells[tuple(earlier)]
  return out.reshape(codes.shape)


def _occurrences(known: Int[np.ndarray, 'n'], asked: Int[np.ndarray, 'm']) -> Int[np.ndarray, 'm']:
  """How often each asked value is among the known ones."""
  values, count = np.unique(known, return_counts=True)
  place = np.minimum(np.searchsorted(values, asked), len(values) - 1)
  return np.where(values[place] == asked, count[place], 0)


def checked(spec: TokenSpec, tokens: Tokens) -> Tokens:
  """`tokens` as an array. Raises ValueError where shape or values do not fit `spec`."""
  tokens = np.asarray(tokens)
  if tokens.ndim != 3 or tokens.shape[1:] != (spec.length, spec.depth):
    raise ValueError(f'Tokens of shape {tokens.shape} must be [B, {spec.length}, {spec.depth}].')
  if tokens.size and (tokens.min() < 0 or (tokens >= np.array(spec.vocab)).any()):
    raise ValueError(f'Tokens in {tokens.min()}..{tokens.max()} leave vocab={spec.vocab}.')
  return tokens
