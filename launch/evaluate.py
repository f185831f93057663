"""Scores a run: `smalti evaluate --workdir=RUN [--n=1000 --settings.guidance=2]`.

A tokenizer is scored on held-out reconstructions and code use; a generator on held-out likelihood
beside the unigram's, and on samples: distances of features beside their floor and an untrained
network's, class agreement, copies. Writes `scores.json` (`scores_NAME.json` with --name), every
number with all that repeats it; `--repeat=scores.json` asks again and prints both. With
--samples=FILE.npz or a folder of PNGs it scores uint8 images from anywhere, against the data of a
config (--data) or a file of statistics (--reference).
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from smalti.data.captions import CaptionsConfig
from smalti.evaluation import agreement, captions, features, memorization
from smalti.evaluation.manifest import Score, read_file, write_scores
from smalti.evaluation.perceptual import Net
from smalti.evaluation.subset import subset
from smalti.launch import cli, extractors, provenance, run as runs, trees
from smalti.launch.fidelity import tokenizer_scores
from smalti.launch.gallery import open_gallery
from smalti.launch.judge import (
  BATCH,
  Accumulation,
  Judge,
  accumulate,
  judge_of_file,
  open_judge,
  references,
)
from smalti.launch.likelihood import add_likelihood
from smalti.launch.progress import say, track
from smalti.launch.real import Split
from smalti.launch.reconstruct import settings_of, tokenized
from smalti.launch.sample import (
  Sampler,
  Samples,
  captions as captions_of,
  in_turn,
  resolve_settings,
)
from smalti.launch.scores import Scores

KEPT = 2_000  # samples whose images are kept for distances to the training images
SMALL = 4096  # values of an image that a support vector machine judges


def evaluate_generator(loaded: runs.Loaded, tokenizer: runs.Loaded, scores: Scores,
                       train: Split, held_out: Split, samples: Samples, *, seed: int,
                       settings: Any = None) -> None:
  """Likelihood on real tokens, where the model has one, and copies.

  Of samples that are prefixes of `settings.keep` positions, as many are compared. A model of
  densities (ResGen) has no likelihood; what it has is among its held-out metrics.
  """
  real = tokenized(tokenizer, train.images), tokenized(tokenizer, held_out.images)
  if kind := loaded.model.likelihood(settings):
    add_likelihood(loaded, scores, real, (train, held_out), kind, seed=seed, settings=settings)
  copied = memorization.copies(samples.tokens, *real, getattr(settings, 'keep', None))
  scores.add('copies', copied.share, unit='share', higher=False, samples=copied.samples,
             distinct=copied.distinct, held_out=copied.held_out_share, train_share=train.share,
             reference=train.fingerprint, reference_samples=len(train.images))


def evaluate_captions(scores: Scores, data: Any, images: np.ndarray,
                      texts: dict[str, np.ndarray] | None, held_out: Split) -> None:
  """Whether samples show what their captions claim, where the data know what captions claim.

  Digits are read by the extractor for images of one, where it knows classes, or the judge of class
  agreement, fitted on real ones.
  """
  if not isinstance(data, CaptionsConfig) or texts is None or 'claims' not in texts:
    return
  name = extractors.default_for((images.shape[1] // 2, images.shape[2] // 2, images.shape[3]))
  network = extractors.load(name) if name else None
  if network is not None:
    read = lambda cells: np.asarray(network(cells)['logits']).argmax(-1)  # noqa: E731
  else:
    digits = Split.read(data.digits, 'train')
    read = agreement.fit((digits.images, digits.labels))
  found = captions.caption_agreement(
      (images, texts['claims'][:len(images)]), (held_out.images, held_out.texts['claims']), read)
  kinds: dict[str, Any] = {k: v for k, v in found.per_kind.items() if v is not None}
  common: dict[str, Any] = dict(
      unit='share', higher=True, samples=found.samples, extractor=network,
      judge=network.name if network else 'svc_rbf_c10', reference=held_out.fingerprint,
      reference_samples=found.held_out)
  scores.add('caption_agreement', found.agreement, shuffled=found.shuffled, chance=found.chance,
             real=found.real, **kinds, **common)
  scores.add('whole_captions', found.whole, shuffled=found.shuffled_whole,
             chance=found.chance_whole, real=found.real_whole, **common)


def evaluate_samples(scores: Scores, judge: Judge, images: np.ndarray, labels: np.ndarray | None,
                     train: Split, held_out: Split) -> None:
  """Distance to the training images; class agreement, where the extractor does not know classes."""
  judged = train.labels is not None and len(np.unique(train.labels)) > 1
  near = memorization.nearest(
      *(features.shrink(x) for x in (images, train.images, held_out.images)))
  if np.isfinite(near.ratio):  # not where every held-out image is a training image
    scores.add('nearest_train_ratio', near.ratio, samples=len(images), distance=near.samples,
               held_out_distance=near.held_out, zero=near.zero, train_share=train.share,
               reference=train.fingerprint, reference_samples=len(train.images))
  if judged and judge.accuracy is None and images[0].size <= SMALL and labels is not None:
    found = agreement.class_agreement(
        (images, labels), (train.images, train.labels), (held_out.images, held_out.labels))
    scores.add('class_agreement', found.agreement, unit='share', higher=True,
               samples=found.samples, judge=found.judge, judge_accuracy=found.judge_accuracy,
               reference=train.fingerprint, reference_samples=found.train)


def sample(loaded: runs.Loaded, codec: runs.Loaded, judge: Judge, *, n: int, seed: int,
           settings: Any, batch_size: int) -> tuple[Samples, Accumulation]:
  """Draws n examples; all are accumulated and their tokens kept, and the first images."""
  sampler = Sampler(min(batch_size, n))
  models = sampler.place(loaded), sampler.place(codec)
  accumulation = Accumulation(judge, n, source=loaded.fingerprint)
  tokens, images, nfe, held = [], [], 0, 0
  batches = sampler.batches(*models, n=n, seed=seed, settings=settings)
  for batch in track(batches, -(-n // sampler.batch_size), 'batch'):
    accumulation.add(batch.images, batch.index, batch.labels)
    rows = batch.index >= 0
    tokens.append(np.asarray(batch.tokens)[rows])
    if held < KEPT:
      images.append(np.asarray(batch.images)[rows])
      held += len(images[-1])
    accumulation.nfe = nfe = batch.nfe
  labels, texts = in_turn(loaded, n), captions_of(loaded, n)
  shown = np.concatenate(images)[:KEPT]
  samples = Samples(np.concatenate(tokens), shown, labels, nfe, texts)
  return samples, accumulation


def generator_scores(loaded: runs.Loaded, codec: runs.Loaded, scores: Scores, judge: Judge,
                     data: Any, *, n: int, seed: int, settings: Any, batch_size: int = 64
                     ) -> Samples:
  """All scores of a generator: likelihood, n samples against real images, copies. The samples."""
  train, held_out = (Split.read(data, split) for split in ('train', 'eval'))
  samples, accumulation = sample(loaded, codec, judge, n=n, seed=seed, settings=settings,
                                 batch_size=batch_size)
  evaluate_generator(loaded, codec, scores, train, held_out, samples, seed=seed,
                     settings=settings)
  scores.add_judged(judge, accumulation.finish(), accumulation)
  evaluate_samples(scores, judge, samples.images, _first(samples.labels, samples.images), train,
                   held_out)
  evaluate_captions(scores, data, samples.images, samples.texts, held_out)
  return samples


def table(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
  """What `provenance.record` keeps of scores: each with the numbers beside it, by name."""
  return {score.name: {'value': score.value, **score.beside} for score in scores}


def evaluate(workdir: str, *, n: int = 1000, seed: int = 0, name: str | None = None,
             tokenizer: str | None = None, settings: dict[str, str] | None = None,
             weights: str = 'ema', extractor: str | None = None, batch_size: int = 64,
             inception_weights: str | None = None, lpips: Net | None = None,
             write: bool = True, kept: pathlib.Path | None = None) -> list[Score]:
  """Scores a run and writes its `scores.json` (or `scores_NAME.json`).

  Args:
    n, seed, settings: of generators, and of tokenizers whose decoder draws.
    write: False returns the scores and writes nothing but what `kept` is for.
    kept: the folder for summaries of real images; None takes one in the run.
  """
  loaded = runs.load(workdir, weights=weights)
  data = loaded.data
  folder = runs.split_reference(workdir)[0]
  kept = kept or references(folder)
  # with the step, so that a run which is trained further is asked for what was scored
  named = workdir if runs.split_reference(workdir)[1] else f'{workdir}@{loaded.step}'
  request: dict[str, Any] = {'verb': 'evaluate', 'workdir': str(named), 'weights': weights,
             'extractor': extractor, 'inception_weights': inception_weights, 'name': name}
  if hasattr(loaded.model, 'encode'):
    drawn = settings_of(loaded, settings or {})
    scores = Scores(loaded, settings=drawn, seeds=() if drawn is None else (seed,))
    judge = open_judge(data, kept, n=10**9 if drawn is None else n, extractor=extractor,
                       weights=inception_weights)
    tokenizer_scores(loaded, scores, judge, data, lpips=lpips, settings=drawn, seed=seed,
                     tables=folder / 'evaluation' if write else None)
    request |= {'lpips': lpips}
    if drawn is not None:
      request |= {'n': n, 'seed': seed, 'settings': settings or {}}
  elif hasattr(loaded.model, 'sample'):
    codec = runs.load_tokenizer(loaded, tokenizer)
    chosen = resolve_settings(loaded, settings or {})
    real = runs.pixels(data, codec)
    judge = open_judge(real, kept, n=n, extractor=extractor,
                       weights=inception_weights)
    scores = Scores(loaded, settings=chosen, seeds=(seed,))
    generator_scores(loaded, codec, scores, judge, real, n=n, seed=seed, settings=chosen,
                     batch_size=batch_size)
    request |= {'n': n, 'seed': seed, 'settings': settings or {}, 'batch_size': batch_size,
                'tokenizer': tokenizer}
  else:
    raise ValueError(f'{workdir} is neither a tokenizer nor a generator; its held-out metrics are '
                     'in metrics.jsonl.')
  if write:
    path = folder / ('scores.json' if name is None else f'scores_{name}.json')
    write_scores(path, scores.rows, request)
    say(f'{len(scores.rows)} scores: {path}')
  return scores.rows


def _first(labels: np.ndarray | None, images: np.ndarray) -> np.ndarray | None:
  return None if labels is None else labels[:len(images)]


def evaluate_file(path: pathlib.Path, config: str | None, *, reference: pathlib.Path | None = None,
                  extractor: str | None = None, inception_weights: str | None = None,
                  write: bool = True) -> list[Score]:
  """Scores images of a file or folder against the data of a config, or a file of statistics."""
  gallery = open_gallery(path)
  scores = Scores(None, gallery.source)
  request = {'verb': 'evaluate', 'samples': str(path), 'data': config,
             'reference': reference and str(reference), 'extractor': extractor,
             'inception_weights': inception_weights}
  if config is None:
    judge = judge_of_file(reference, extractor, gallery.shape, inception_weights)
  else:
    data = trees.load_config(config).data
    judge = open_judge(data, references(path.resolve().parent), n=gallery.n, extractor=extractor,
                       reference=reference, weights=inception_weights)
    if gallery.shape != judge.shape:
      raise ValueError(f'The samples are {gallery.shape}, and the data {judge.shape}; '
                       'name data of the same size with --data=CONFIG.')
  kept, shown = subset(gallery.n, KEPT), []

  def batches() -> Iterator[np.ndarray]:
    first = 0
    for images in gallery.batches(BATCH):
      inside = kept[(kept >= first) & (kept < first + len(images))]
      shown.append(images[inside - first])
      first += len(images)
      yield images

  accumulation = accumulate(judge, batches(), gallery.n, gallery.source, gallery.labels)
  scores.add_judged(judge, accumulation.finish(), accumulation)
  if config is not None:
    train, held_out = (Split.read(data, split) for split in ('train', 'eval'))
    labels = None if gallery.labels is None else gallery.labels[kept]
    evaluate_samples(scores, judge, np.concatenate(shown), labels, train, held_out)
  if write:
    place = path.resolve()  # '.' has no name of its own
    out = place.with_name(f'{place.name.removesuffix(".npz")}.scores.json')
    write_scores(out, scores.rows, request)
    say(f'{len(scores.rows)} scores: {out}')
  return scores.rows


def repeat(path: pathlib.Path, workdir: str | None = None) -> int:
  """Asks again what made a file of scores and prints both values; 1 where any differs.

  Args:
    workdir: where the run is now; None takes the path in the file.
  """
  before, request = read_file(path)
  if request is None or request.get('verb') not in ('evaluate', 'sweep'):
    raise ValueError(f'{path} was not written by one command, so that it cannot be repeated.')
  request = dict(request)
  verb = request.pop('verb')
  if workdir is not None:
    step = runs.split_reference(request.get('workdir', ''))[1] if verb == 'evaluate' else ''
    named = not step or runs.split_reference(workdir)[1]
    request['workdir'] = workdir if named else f'{workdir}@{step}'
  say(f'repeating {path}')
  if verb == 'sweep':
    from smalti.launch import sweep
    after = sweep.repeat(request)
  elif 'samples' in request:
    request.pop('workdir', None)
    given = request.pop('reference')
    after = evaluate_file(pathlib.Path(request.pop('samples')), request.pop('data'), write=False,
                          reference=given and pathlib.Path(given), **request)
  else:
    after = evaluate(write=False, **request)
  return compare(before, after)


def compare(before: list[Score], after: list[Score]) -> int:
  """Prints both columns; returns 1 where a score differs beyond 1e-6 of itself, or is missing."""
  now = {score.name: score for score in after}
  different = sorted({score.name for score in before} ^ set(now))
  for name in different:
    say(f'{name}: in one of both only')
  for old in before:
    if old.name not in now:
      continue
    new = now[old.name]
    equal = abs(old.value - new.value) <= 1e-6 * max(abs(old.value), 1e-9)
    if not equal:
      different.append(old.name)
    changed = [key for key in old.versions if old.versions[key] != new.versions.get(key)]
    note = '' if equal else f'  DIFFERS by {new.value - old.value:.3g}' + (
        f'; other versions of {", ".join(changed)}' if changed else '')
    say(f'{old.name}  written {old.value:.8g}  now {new.value:.8g}{note}')
  say(f'{len(before)} scores, {len(different)} differ')
  return 1 if different else 0


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run to score.', flag_values=values)
  flags.DEFINE_string('samples', None, 'An .npz of uint8 images, or a folder of PNGs, to score '
                      'instead.', flag_values=values)
  flags.DEFINE_string('data', None, 'For --samples: the config whose data they are compared with.',
                      flag_values=values)
  flags.DEFINE_string('reference', None, 'For --samples: a file of statistics (ours, ADM, '
                      'clean-fid, pytorch-fid) instead of the training images.',
                      flag_values=values)
  flags.DEFINE_string('extractor', None, 'A name or a file; default by the size of the images.',
                      flag_values=values)
  flags.DEFINE_string('inception_weights', None, 'The weights of --extractor=inception; default '
                      'SMALTI_INCEPTION_WEIGHTS.', flag_values=values)
  flags.DEFINE_enum('lpips', None, ['vgg', 'alex', 'squeeze'], 'For tokenizers: LPIPS, with the '
                    'files named by SMALTI_LPIPS_TRUNK and SMALTI_LPIPS_HEADS.', flag_values=values)
  flags.DEFINE_string('repeat', None, 'A scores.json: asks again what made it, prints both.',
                      flag_values=values)
  flags.DEFINE_integer('n', 1000, 'How many samples of a generator.', flag_values=values)
  flags.DEFINE_integer('seed', 0, 'The seed of the samples.', flag_values=values)
  flags.DEFINE_integer('batch_size', 64, 'Samples per call.', flag_values=values)
  flags.DEFINE_string('name', None, 'Writes scores_NAME.json.', flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Where the tokenizer was moved to.', flag_values=values)
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'Averaged or last weights.',
                    flag_values=values)
  flags.DEFINE_string('results', None, 'Also records the scores of a run in this JSON file.',
                      flag_values=values)
  cli.define_settings(values)


def main(values: Any) -> int:
  if values.repeat:
    return repeat(pathlib.Path(values.repeat), values.workdir)
  if values.samples:
    if not values.data and not values.reference:
      raise ValueError('evaluate --samples needs --data=CONFIG, the data to compare with, or '
                       '--reference=FILE.npz.')
    evaluate_file(pathlib.Path(values.samples), values.data, extractor=values.extractor,
                  inception_weights=values.inception_weights,
                  reference=values.reference and pathlib.Path(values.reference))
    return 0
  if values.workdir is None:
    raise ValueError('evaluate needs --workdir=RUN, or --samples=FILE.npz --data=CONFIG.')
  if values.n < 2 or values.batch_size < 1:
    raise ValueError(f'n={values.n} must be 2 or more, and batch_size={values.batch_size} 1.')
  found = evaluate(
      values.workdir, n=values.n, seed=values.seed, name=values.name, tokenizer=values.tokenizer,
      settings=values.settings, weights=values.weights, extractor=values.extractor,
      batch_size=values.batch_size, lpips=values.lpips, inception_weights=values.inception_weights)
  if values.results:
    provenance.record(values.results, None, table(found), seed=values.seed)
  return 0


if __name__ == '__main__':
  cli.run('evaluate')
