"""Are tokens like a language? Frequencies, innovation, compression and n-grams, beside controls.

After "Analyzing the Language of Visual Tokens" (arXiv 2411.05001); its estimators are not all
published, so these are ours, fixed so that runs compare. One depth of the tokens is one stream: a
sequence per image along a scan. Every statement about structure needs the two controls that
`report_language` gives the same table for: tokens shuffled within each image (the same frequencies
and the same bag of tokens per image, no order), and independent draws from the overall frequencies.

Frequencies, innovation and compression describe the training images; perplexities and conditional
entropies are of held-out images under models counted on training images, because plug-in estimates
of n-gram entropies are the logarithm of the sample size.
"""

import dataclasses
import heapq
import lzma
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from smalti.evaluation import codes, ngrams, zipf
from smalti.evaluation.scans import Scan, path
from smalti.tokenizers.spec import TokenSpec

Control = Literal['shuffled', 'unigram'] | None
Tokens = Int[np.ndarray, '_b _n _d']
Stream = Int[np.ndarray, '_b _n']  # one token per place in scan order; -1 after the end

ORDERS = 5  # n of the longest n-gram model
RANKED = 4  # n of the longest ranked n-grams
SHUFFLES = 10  # orders of images that innovation is averaged over
SATURATED = .9  # of the alphabet: innovation is fitted below


@dataclasses.dataclass(frozen=True)
class Grams:
  """Ranked n-grams: how many types, tokens, share seen once, and Zipf's exponent."""
  n: int
  types: int
  tokens: int
  once: float
  exponent: float


@dataclasses.dataclass(frozen=True)
class Innovation:
  """V(n), the different codes among the first n tokens, averaged over orders of the images.

  Attributes:
    exponent: b of log V = log C + b log n below 0.9 of the alphabet; None below two points.
    scale: C.
    fitted: the largest n of the fit.
    curve: (n, V(n), V of uniform independent draws: K (1 - (1 - 1/K)^n)).
  """
  exponent: float | None
  scale: float | None
  fitted: int | None
  curve: tuple[tuple[int, float, float], ...]


@dataclasses.dataclass(frozen=True)
class Language:
  """One stream. Entropies and code lengths are in bits per token.

  Attributes:
    images, tokens: how many were described; held_out: tokens that perplexities are over.
    vocab: K; fixed: ceil(log2 K), the length of a code without any model.
    entropy: plug-in, of single tokens; entropy_corrected: with Miller's and Madow's term.
    huffman: mean length of an optimal prefix code; huffman_saved: 1 - huffman / fixed.
    lzma: length after packing tokens in `fixed` bits each; lzma_saved: 1 - lzma / fixed.
    perplexity: of held-out tokens for n = 1..5, Kneser-Ney; K for a uniform model. With
      n = 1 it is 2 to the cross-entropy, so it shows how unlike the held-out images are.
    given_left, given_left_up: held-out conditional entropy given grid neighbours; None off rasters.
    given_coarser: the same given the code one depth up; None for the first depth.
    codes: frequencies of single tokens and their laws.
    grams: ranked n-grams, n = 2..4.
  """
  images: int
  tokens: int
  held_out: int
  vocab: int
  fixed: int
  entropy: float
  entropy_corrected: float
  huffman: float
  huffman_saved: float
  lzma: float
  lzma_saved: float
  perplexity: tuple[float, ...]
  given_left: float | None
  given_left_up: float | None
  given_coarser: float | None
  codes: zipf.Ranks
  grams: tuple[Grams, ...]
  innovation: Innovation


def report_language(spec: TokenSpec, train: Tokens, held_out: Tokens, *,
                    scans: Sequence[Scan] = ('raster',), seed: int = 0) -> dict[str, Any]:
  """The table of every depth and scan, with controls: {depth: {scan: {variant: Language}}}.

  Variants are 'tokens', 'shuffled' and 'unigram'; values are plain numbers, ready for JSON.
  Raises ValueError for tokens that do not fit `spec`, an unknown scan, and no images.
  """
  variants: dict[str, Control] = {'tokens': None, 'shuffled': 'shuffled', 'unigram': 'unigram'}
  return {f'depth{depth}': {scan: {
      name: dataclasses.asdict(language(spec, train, held_out, depth=depth, scan=scan,
                                        control=control, seed=seed))
      for name, control in variants.items()} for scan in scans} for depth in range(spec.depth)}


def language(spec: TokenSpec, train: Tokens, held_out: Tokens, *, depth: int = 0,
             scan: Scan = 'raster', control: Control = None, seed: int = 0) -> Language:
  """Everything about one depth along one scan, of the tokens or of a control."""
  if not len(train) or not len(held_out):
    raise ValueError(f'{len(train)} training and {len(held_out)} held-out images; '
                     'give at least one of each.')
  vocab, rng = spec.vocab[depth], np.random.default_rng((seed, depth))
  levels, asked_levels = (streams(spec, x, scan) for x in (train, held_out))
  own, asked = levels[depth], asked_levels[depth]
  counts = np.bincount(own[own >= 0], minlength=vocab)
  if control == 'shuffled':
    own, asked = (shuffled(x, rng, spec.eos) for x in (own, asked))
  elif control == 'unigram':
    own, asked = (unigram(x, counts, rng, spec.eos) for x in (own, asked))
    counts = np.bincount(own[own >= 0], minlength=vocab)
  use, fixed = codes.code_use(counts), (vocab - 1).bit_length()
  prefix, packed = huffman(counts), 8 * len(compress(own, vocab)) / use.tokens

  def bits(rows: ngrams.Rows, asked_rows: ngrams.Rows) -> list[float]:
    return [-float(x) for x in ngrams.kneser_ney(rows, asked_rows, vocab).mean(1)]

  orders = bits(ngrams.preceding(own, ORDERS, vocab), ngrams.preceding(asked, ORDERS, vocab))
  near = coarse = None
  if scan == 'raster' and len(spec.grid) == 2 and spec.eos is None:
    near = bits(_neighbours(own, spec.grid, vocab), _neighbours(asked, spec.grid, vocab))
  if depth:
    coarse = bits(_given(own, levels[depth - 1]), _given(asked, asked_levels[depth - 1]))
  return Language(
      images=len(train), tokens=use.tokens, held_out=int((asked >= 0).sum()), vocab=vocab,
      fixed=fixed, entropy=use.entropy, entropy_corrected=use.entropy_corrected, huffman=prefix,
      huffman_saved=1 - prefix / fixed, lzma=packed, lzma_saved=1 - packed / fixed,
      perplexity=tuple(2 ** x for x in orders), given_left=near[1] if near else None,
      given_left_up=near[2] if near else None, given_coarser=coarse[1] if coarse else None,
      codes=zipf.ranks(counts), grams=tuple(grams(own, vocab)),
      innovation=innovation(own, vocab, rng))


def streams(spec: TokenSpec, tokens: Tokens, scan: Scan = 'raster') -> list[Stream]:
  """The tokens of every depth along a scan, -1 after the first EOS."""
  tokens = codes.checked(spec, tokens)
  if spec.eos is not None and scan != 'raster':
    raise ValueError(f'Strings with an EOS have no {scan!r} scan; give raster.')
  present = np.asarray(spec.valid(tokens))
  order = path(spec.grid, scan)
  return [np.where(present, tokens, -1)[:, order, d].astype(np.int64) for d in range(spec.depth)]


def shuffled(stream: Stream, rng: np.random.Generator, eos: int | None = None) -> Stream:
  """Every sequence in an order of its own; what ends it stays at the end."""
  keys = rng.random(stream.shape)
  keys[stream < 0] = 3
  if eos is not None:
    keys[stream == eos] = 2
  return np.take_along_axis(stream, np.argsort(keys, 1), 1)


def unigram(stream: Stream, counts: Int[np.ndarray, 'v'], rng: np.random.Generator,
            eos: int | None = None) -> Stream:
  """Independent draws with the frequencies of `counts` in place of every token but EOS."""
  weights = counts.astype(np.float64)
  replaced = stream >= 0
  if eos is not None:
    weights[eos] = 0
    replaced &= stream != eos
  out = stream.copy()
  if replaced.any():
    out[replaced] = rng.choice(len(counts), int(replaced.sum()), p=weights / weights.sum())
  return out


def huffman(counts: Int[np.ndarray, 'v']) -> float:
  """Mean bits per token of Huffman's code for `counts`; 0 where a single code occurs."""
  heap = [int(c) for c in counts if c]
  total, bits = sum(heap), 0
  heapq.heapify(heap)
  while len(heap) > 1:  # every merge puts one more bit on all below it
    merged = heapq.heappop(heap) + heapq.heappop(heap)
    heapq.heappush(heap, merged)
    bits += merged
  return bits / total


def compress(stream: Stream, vocab: int) -> bytes:
  """LZMA of the tokens, each in ceil(log2 K) bits: whole integers would hold zeros to compress."""
  tokens, width = stream[stream >= 0], (vocab - 1).bit_length()
  places = np.arange(width - 1, -1, -1)
  encoder = lzma.LZMACompressor(
      format=lzma.FORMAT_RAW, filters=[{'id': lzma.FILTER_LZMA2, 'preset': 6}])
  chunk = 1 << 18  # a multiple of 8 tokens fills whole bytes
  parts = [encoder.compress(np.packbits((tokens[i:i + chunk, None] >> places & 1).astype(bool))
                            .tobytes()) for i in range(0, len(tokens), chunk)]
  return b''.join([*parts, encoder.flush()])


def grams(stream: Stream, vocab: int) -> list[Grams]:
  """Ranked n-grams within sequences, n = 2..4, as far as sequences are that long."""
  out, ids = [], stream
  for n in range(2, min(RANKED, stream.shape[1]) + 1):
    ids, later = ids[:, :-1], stream[:, n - 1:]
    present = later >= 0
    if not present.any():
      break
    kinds, place, counts = np.unique(ids[present] * vocab + later[present], return_inverse=True,
                                     return_counts=True)
    ids = np.full(later.shape, -1, np.int64)
    ids[present] = place
    out.append(Grams(n=n, types=len(kinds), tokens=int(counts.sum()),
                     once=float((counts == 1).mean()),
                     exponent=zipf.zipf(counts).parameters['a']))
  return out


def innovation(stream: Stream, vocab: int, rng: np.random.Generator) -> Innovation:
  """How fast new codes appear, image after image."""
  total = int((stream >= 0).sum())
  sizes = np.unique(np.geomspace(1, total, zipf.POINTS).round().astype(int))
  found = np.zeros(len(sizes), int)
  for _ in range(SHUFFLES):
    tokens = stream[rng.permutation(len(stream))]
    tokens = tokens[tokens >= 0]
    first = np.full(vocab, total)
    first[tokens[::-1]] = np.arange(total)[::-1]  # the last one written is the earliest
    found += np.searchsorted(np.sort(first), sizes)
  found = found / SHUFFLES
  uniform = -vocab * np.expm1(sizes * np.log1p(-1 / vocab))
  fit = found < SATURATED * vocab
  exponent, scale = (np.polyfit(np.log(sizes[fit]), np.log(found[fit]), 1) if fit.sum() > 1
                     else (None, None))
  return Innovation(
      exponent=None if exponent is None else float(exponent),
      scale=None if scale is None else float(np.exp(scale)),
      fitted=int(sizes[fit][-1]) if fit.sum() > 1 else None,
      curve=tuple((int(n), float(v), float(u)) for n, v, u in zip(sizes, found, uniform)))


def _neighbours(stream: Stream, grid: tuple[int, ...], vocab: int) -> ngrams.Rows:
  """Contexts left and up on a grid, `vocab` beyond its border."""
  cells = stream.reshape(-1, *grid)
  left, up = np.full_like(cells, vocab), np.full_like(cells, vocab)
  left[:, :, 1:], up[:, 1:] = cells[:, :, :-1], cells[:, :-1]
  return ngrams.Rows(cells.reshape(-1), (left.reshape(-1), up.reshape(-1)), np.full(cells.size, 2))


def _given(stream: Stream, context: Stream) -> ngrams.Rows:
  return ngrams.Rows(stream.reshape(-1), (context.reshape(-1),), np.full(stream.size, 1))
