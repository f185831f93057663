"""What a tokenizer is scored on: distortion per bit, stability of its tokens, and the codes.

Beside the scores, two tables for the page of the run: `evaluation/distortion.json`, the errors of
the tokenizer and of JPEG, principal components and k-means over bits, and
`evaluation/language.json`, frequencies, n-grams and compression of the tokens with both controls.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from smalti.evaluation import (
    baselines,
    codes,
    language,
    perceptual,
    reconstruction,
    robustness,
)
from smalti.evaluation.files import whole
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.subset import subset
from smalti.launch import run as runs
from smalti.launch.judge import BATCH, Judge, accumulate
from smalti.launch.reconstruct import decoded, encoded, lengths
from smalti.launch.scores import Scores

LARGEST = 10_000  # real images per split whose tokens are counted, whatever the images' size
ERRORS = 2_000  # held-out images that baselines and repeated encoding are measured on
PIXELS = 1 << 25  # values of all images in memory, for baselines and repeated encoding, at most
ROUNDS = 3  # of decoding and encoding
SIDES = (4, 8, 16)  # of the patches of baselines


def tokenizer_scores(loaded: runs.Loaded, scores: Scores, judge: Judge, data: Any, *,
                     lpips: perceptual.Net | None = None,
                     tables: pathlib.Path | None = None, beside: bool = True,
                     settings: Any = None, seed: int = 0) -> None:
  """All scores of a tokenizer on held-out images.

  Args:
    lpips: the network of LPIPS, whose files the environment names; None leaves it out.
    tables: the folder for the tables of the page; None writes none.
    beside: also what is beside the tokenizer's own errors and codes: baselines of as many bits,
      stability of the tokens, the tokens as a language.
    settings: of decoders that draw.
    seed: of tokenizers that draw.
  """
  held_out, train = data.open('eval'), data.open('train')
  n = judge.held_out[0].n
  digest = hashlib.sha256()
  points = []
  distance = None if lpips is None else perceptual.load(lpips)
  decode = functools.partial(decoded, loaded, settings=settings, seed=seed)
  for keep in lengths(loaded.spec):
    errors, distances = [], []

    def remade(keep=keep, errors=errors, distances=distances) -> Iterator[np.ndarray]:
      for i, images in enumerate(_batches(held_out, n)):
        found = decode(encoded(loaded, images, first=i * BATCH, seed=seed), keep=keep,
                       first=i * BATCH)
        errors.append(reconstruction.measure(images, found))
        if distance is not None:
          distances.append(distance(images, found))
        if not points:
          digest.update(np.ascontiguousarray(images).tobytes())
        yield found

    summaries = accumulate(judge, remade(), n, loaded.fingerprint).finish()
    result = reconstruction.summarize(errors)
    points.append((keep, result))
    _add_errors(scores, loaded, keep, result, digest.hexdigest()[:16])
    _add_frechet(scores, judge, keep, summaries)
    if distance is not None:
      suffix = '' if keep is None else f'_keep{keep}'
      scores.add(f'{distance.name}{suffix}', float(np.concatenate(distances).mean()), higher=False,
                 samples=n, extractor=distance, reference=judge.held_out[0].source,
                 reference_samples=n)
  if not beside:
    _add_use(scores, loaded.spec, _tokens(loaded, held_out, seed))
    return
  rest = _take(held_out, min(ERRORS, n))
  own = points[-1][1]
  if len(rest) < n:  # PSNRs of other images have no difference
    own = reconstruction.summarize(_errors(loaded, rest, decode, seed))
  _add_baselines(scores, loaded, own, _take(train, ERRORS * 5), rest, points, tables)
  _add_stability(scores, loaded, rest, decode, seed)
  _add_codes(scores, loaded.spec, loaded.fingerprint,
             [_tokens(loaded, source, seed) for source in (train, held_out)], tables)


def _add_errors(scores: Scores, loaded: runs.Loaded, keep: int | None,
                result: reconstruction.Reconstruction, reference: str) -> None:
  suffix = '' if keep is None else f'_keep{keep}'
  common: dict[str, Any] = dict(samples=result.images, reference=reference,
                                reference_samples=result.images)
  if result.psnr is not None:
    scores.add(f'psnr{suffix}', result.psnr, unit='dB', higher=True, exact=result.exact,
               psnr_of_mean=result.psnr_of_mean, bits_per_example=loaded.spec.bits, **common)
  scores.add(f'{result.ssim_name}{suffix}', result.ssim, higher=True, **common)
  if result.ms_ssim is not None:
    scores.add(f'ms_ssim{suffix}', result.ms_ssim, higher=True, **common)
  scores.add(f'l1{suffix}', result.l1, higher=False, **common)


def _add_frechet(scores: Scores, judge: Judge, keep: int | None, summaries: list) -> None:
  """rFD: reconstructions of the held-out images against the same images."""
  values = [frechet_distance(x.moments, real.moments)
            for x, real in zip(summaries, judge.held_out)]
  suffix = '' if keep is None else f'_keep{keep}'
  extractor, real = judge.extractor, judge.held_out[0]
  scores.add(f'rfd_{extractor.name}_{extractor.sha256[:8]}{suffix}', values[0], higher=False,
             samples=real.n, extractor=extractor, reference=real.source, reference_samples=real.n,
             untrained=values[1])


def _add_baselines(scores: Scores, loaded: runs.Loaded, result: reconstruction.Reconstruction,
                   train: np.ndarray, images: np.ndarray, points: list,
                   tables: pathlib.Path | None) -> None:
  """The PSNR that JPEG, principal components and k-means reach with as many bits.

  Args:
    result: the tokenizer's errors on `images`, those of the baselines.
    points: its errors on all held-out images, by budget.
  """
  height, width = images.shape[1:3]
  sides = [side for side in SIDES if height % side == width % side == 0 and side < height]
  bits = loaded.spec.bits
  found = baselines.baselines(train, images, bits=bits, sides=sides)
  if result.psnr is not None and found.at:
    best = max(found.at, key=lambda x: x.psnr)
    curves: dict[str, Any] = {x.curve: x.psnr for x in found.at}
    scores.add('psnr_over_baselines', result.psnr - best.psnr, unit='dB', higher=True,
               samples=result.images, bits_per_example=bits, best=best.curve,
               tokenizer=result.psnr, **curves)
  if tables is not None:
    shares = [(keep, bits if keep is None else bits * _share(loaded.spec, keep), error)
              for keep, error in points]
    own = [{'keep': keep, 'bits': at, 'psnr': error.psnr, 'ssim': error.ssim}
           for keep, at, error in shares]
    _write(tables / 'distortion.json', {
        'fingerprint': loaded.fingerprint, 'tokenizer': own,
        'points': [dataclasses.asdict(point) for point in found.points]})


def _share(spec: Any, keep: int) -> float:
  """The share of all bits that a prefix holds, for equal alphabets along the order."""
  mask = np.asarray(spec.mask(np.array([keep], np.int32)))[0]
  cost = np.log2(np.array(spec.vocab, np.float64))
  return float((mask * cost).sum() / (np.ones_like(mask, np.float64) * cost).sum())


def _add_stability(scores: Scores, loaded: runs.Loaded, images: np.ndarray, decode: Any,
                   seed: int) -> None:
  """Wrong tokens, and tokens of its own images."""
  def encode(x: np.ndarray, first: int) -> np.ndarray:
    return np.asarray(encoded(loaded, x, first=first, seed=seed))

  def remade(tokens: np.ndarray, first: int) -> np.ndarray:
    return decode(tokens, first=first)

  table = getattr(getattr(loaded.model, 'quantizer', None), 'codes', None)
  near = [np.asarray(table())] if table is not None and loaded.spec.depth == 1 else None
  if near is not None and len(near[0]) != loaded.spec.vocab[0]:
    near = None
  wrong = robustness.perturbed(
      encode, remade, loaded.spec, images, codes=near, batch=BATCH,
      delta=min(robustness.DELTA, loaded.spec.vocab[0]))
  if wrong.perturbed.psnr is not None:
    scores.add('psnr_perturbed', wrong.perturbed.psnr, unit='dB', higher=True, samples=len(images),
               alpha=wrong.alpha, delta=wrong.delta, changed=wrong.changed, drop=wrong.psnr_drop)
  again = robustness.recode(encode, remade, loaded.spec, images, rounds=ROUNDS, batch=BATCH)
  scores.add('tokens_kept', again.unchanged[0], unit='share', higher=True, samples=len(images),
             rounds=list(again.unchanged), of_the_first=list(again.kept), psnr_drift=again.drift)


def _add_codes(scores: Scores, spec: Any, fingerprint: str, tokens: list[np.ndarray],
               tables: pathlib.Path | None) -> None:
  """Use of the held-out codes, and the tokens of both splits as a language, with both controls
  beside every number."""
  _add_use(scores, spec, tokens[1])
  found = language.report_language(spec, *tokens)
  for depth, scans in found.items():
    suffix = '' if spec.depth == 1 else f'_{depth}'
    own, shuffled, unigram = (scans['raster'][k] for k in ('tokens', 'shuffled', 'unigram'))

    def add(name: str, get: Any, unit: str = '', own=own, shuffled=shuffled, unigram=unigram,
            suffix=suffix, **beside: Any) -> None:
      scores.add(f'{name}{suffix}', get(own), unit=unit, samples=own['images'],
                 tokens=own['tokens'], shuffled=get(shuffled), unigram=get(unigram), **beside)

    add('entropy', lambda x: x['entropy_corrected'], 'bits per token')
    add('lzma', lambda x: x['lzma'], 'bits per token')
    add('zipf_exponent', lambda x: x['codes']['zipf']['parameters']['a'])
    best = min(range(len(own['perplexity'])), key=lambda i: own['perplexity'][i])
    add('ngram_perplexity', lambda x, i=best: x['perplexity'][i], n=best + 1)
  if tables is not None:
    _write(tables / 'language.json', {'fingerprint': fingerprint, 'depths': found})


def _add_use(scores: Scores, spec: Any, tokens: np.ndarray) -> None:
  for d, count in enumerate(codes.counts(spec, tokens)):
    use = codes.code_use(count)
    suffix = '' if spec.depth == 1 else f'_depth{d}'
    scores.add(f'usage{suffix}', use.usage, unit='share', higher=True, samples=len(tokens),
               tokens=use.tokens, dead=use.dead, vocab=use.vocab, expected=use.expected)
    scores.add(f'perplexity{suffix}', use.perplexity, higher=True, samples=len(tokens),
               tokens=use.tokens, vocab=use.vocab, normalized=use.normalized)


def _tokens(loaded: runs.Loaded, source: Any, seed: int) -> np.ndarray:
  """Tokens of `LARGEST` images at most, of which one batch at a time is in memory."""
  batches = _batches(source, min(LARGEST, len(source)))
  return np.concatenate([np.asarray(encoded(loaded, images, first=i * BATCH, seed=seed))
                         for i, images in enumerate(batches)])


def _errors(loaded: runs.Loaded, images: np.ndarray, decode: Any, seed: int) -> list:
  """What `reconstruction.measure` finds of every batch, as decoded from all tokens."""
  keep, errors = lengths(loaded.spec)[-1], []
  for first in range(0, len(images), BATCH):
    part = images[first:first + BATCH]
    tokens = encoded(loaded, part, first=first, seed=seed)
    errors.append(reconstruction.measure(part, decode(tokens, keep=keep, first=first)))
  return errors


def _batches(source: Any, n: int) -> Iterator[np.ndarray]:
  chosen = subset(len(source), n)
  for first in range(0, n, BATCH):
    yield source.read(chosen[first:first + BATCH])['image']


def _take(source: Any, n: int) -> np.ndarray:
  """Of the images n, or as many as fit."""
  size = source.read(np.arange(1))['image'].size
  n = max(1, min(n, len(source), PIXELS // size))
  return np.concatenate(list(itertools.chain(_batches(source, n))))


def _write(path: pathlib.Path, value: Any) -> None:
  with whole(path) as file:
    file.write((json.dumps(value) + '\n').encode())
