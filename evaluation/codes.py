"""Statistics of codes: usage, perplexity, dead codes, entropy, and the bits of a unigram model.

Entropies are plug-in estimates in bits, per depth, over the tokens that were counted: a small batch
of a large codebook looks collapsed to all of them, so every result says how many tokens it saw and
how many codes uniform use would have shown.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

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


def checked(spec: TokenSpec, tokens: Tokens) -> Tokens:
  """`tokens` as an array. Raises ValueError where shape or values do not fit `spec`."""
  tokens = np.asarray(tokens)
  if tokens.ndim != 3 or tokens.shape[1:] != (spec.length, spec.depth):
    raise ValueError(f'Tokens of shape {tokens.shape} must be [B, {spec.length}, {spec.depth}].')
  if tokens.size and (tokens.min() < 0 or (tokens >= np.array(spec.vocab)).any()):
    raise ValueError(f'Tokens in {tokens.min()}..{tokens.max()} leave vocab={spec.vocab}.')
  return tokens
