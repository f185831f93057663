"""Scores a run: `smalti evaluate --workdir=RUN [--n=1000 --settings.guidance=2]`.

A tokenizer is scored on held-out reconstructions and code use; a generator on held-out likelihood
beside the unigram's, and on samples: Frechet distance, class agreement, copies. Writes
`scores.json` (`scores_NAME.json` with --name), every number with all that repeats it. With
--samples=FILE.npz, it scores uint8 images from anywhere against the data of a config.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smalti.evaluation import agreement, codes, features, frechet, memorization, reconstruction
from smalti.evaluation.manifest import Score, versions, write_scores
from smalti.launch import cli, run as runs, state as states
from smalti.launch.progress import say
from smalti.launch.reconstruct import reconstruct
from smalti.launch.sample import Samples, draw, resolve_settings
from smalti.launch.serialization import to_json
from smalti.networks.pixels import to_float
from smalti.tokenizers.tokenizer import encode

LARGEST = 20_000  # real images read for references and judges


@dataclasses.dataclass
class Split:
  """Real examples of one split, in memory: images, labels or None."""
  images: np.ndarray
  labels: np.ndarray | None

  @classmethod
  def read(cls, data: Any, split: str) -> 'Split':
    source = data.open(split)
    rows = source.read(np.arange(min(len(source), LARGEST)))
    if 'image' not in rows:
      raise ValueError(f'{type(data).__name__} holds no images to compare with; '
                       'evaluate with --data=CONFIG, whose data has.')
    return cls(rows['image'], rows.get('label'))

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(np.ascontiguousarray(self.images)).hexdigest()[:16]


class Scores:
  """Collects scores that share a model, weights, settings and seeds."""

  def __init__(self, loaded: runs.Loaded | None, name: str, settings: Any, seeds: tuple[int, ...]):
    self.common: dict[str, Any] = dict(
        model=name if loaded is None else f'{loaded.fingerprint} {loaded.path.name}@{loaded.step}',
        weights='none' if loaded is None else loaded.weights,
        settings={} if settings is None else to_json(settings), seeds=seeds,
        versions=versions('jax', 'flax', 'scikit-learn'))
    self.rows: list[Score] = []

  def add(self, name: str, value: float, *, samples: int, unit: str = '',
          higher: bool | None = None, extractor: Any = None, reference: str | None = None,
          reference_samples: int | None = None, **beside: Any) -> None:
    self.rows.append(Score(
        name=name, value=value, unit=unit, higher_is_better=higher, samples=samples,
        extractor=extractor and extractor.name, sha256=extractor and extractor.sha256,
        resize=extractor and extractor.resize, uint8='round', reference=reference,
        reference_samples=reference_samples, beside=beside, **self.common))
    shown = '  '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}'
                      for k, v in beside.items())
    say(f'{name} {value:.4f} {unit}  {f"({shown})" if shown else ""}')


def evaluate_tokenizer(loaded: runs.Loaded, scores: Scores, held_out: Split) -> None:
  """PSNR, SSIM and code use over all held-out examples."""
  for keep in loaded.spec.budgets or (None,):
    images, tokens = reconstruct(loaded, held_out.images, keep=keep)
    result = reconstruction.compare(held_out.images, images)
    suffix = '' if keep is None else f'_keep{keep}'
    common: dict[str, Any] = dict(samples=result.images, reference=held_out.fingerprint,
                  reference_samples=result.images)
    if result.psnr is not None:
      scores.add(f'psnr{suffix}', result.psnr, unit='dB', higher=True, exact=result.exact,
                 bits_per_example=loaded.spec.bits, **common)
    scores.add(f'{result.ssim_name}{suffix}', result.ssim, higher=True, **common)
  for d, count in enumerate(codes.counts(loaded.spec, tokens)):
    use = codes.code_use(count)
    suffix = '' if loaded.spec.depth == 1 else f'_depth{d}'
    scores.add(f'usage{suffix}', use.usage, unit='share', higher=True, samples=len(tokens),
               tokens=use.tokens, dead=use.dead, vocab=use.vocab)
    scores.add(f'perplexity{suffix}', use.perplexity, higher=True, samples=len(tokens),
               tokens=use.tokens, vocab=use.vocab)


def tokenize(tokenizer: runs.Loaded, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
  return np.concatenate([
      np.asarray(encode(tokenizer.model, to_float(jnp.asarray(images[i:i + batch_size]))))
      for i in range(0, len(images), batch_size)])


def bits_per_token(loaded: runs.Loaded, tokens: np.ndarray, labels: np.ndarray | None,
                   *, key: jax.Array, batch_size: int = 256) -> tuple[float, float, str]:
  """(mean bits per valid token, its standard error over examples, 'exact' or 'bound')."""
  exact = hasattr(loaded.model, 'log_prob')
  # one compiled function per kind, so that all batches but the last share a program
  function = jax.jit(lambda model, batch, key: (
      model.log_prob(batch) if exact else model.elbo(batch, key=key)))
  nats = []
  for i in range(0, len(tokens), batch_size):
    batch = {'tokens': jnp.asarray(tokens[i:i + batch_size])}
    if labels is not None:
      batch['label'] = jnp.asarray(labels[i:i + batch_size])
    nats.append(np.asarray(function(loaded.model, batch, jax.random.fold_in(key, i)), np.float64))
  valid = np.asarray(loaded.spec.valid(tokens)).sum((1, 2))
  bits = -np.concatenate(nats) / np.log(2)
  mean = bits.sum() / valid.sum()
  error = np.std(bits - mean * valid) / valid.mean() / len(bits)**0.5
  return float(mean), float(error), 'exact' if exact else 'bound'


def evaluate_generator(loaded: runs.Loaded, tokenizer: runs.Loaded, scores: Scores,
                       train: Split, held_out: Split, samples: Samples, *, seed: int) -> None:
  """Likelihood on real tokens, then everything `evaluate_samples` says, then copies."""
  real = tokenize(tokenizer, train.images), tokenize(tokenizer, held_out.images)
  conditional = getattr(loaded.config, 'classes', 0) > 0
  key = states.stream(seed, 'eval')
  unigram = codes.unigram_bits(loaded.spec, *real)
  positional = codes.unigram_bits(loaded.spec, *real, positional=True)
  for name, tokens, split in zip(('train', 'held_out'), real, (train, held_out)):
    bits, error, kind = bits_per_token(
        loaded, tokens, split.labels if conditional else None, key=key)
    scores.add(f'bits_per_token_{name}', bits, unit='bits per token', higher=False, likelihood=kind,
               samples=len(tokens), reference=split.fingerprint, reference_samples=len(tokens),
               standard_error=error, unigram=unigram, positional_unigram=positional)
  copied = memorization.copies(samples.tokens, *real)
  scores.add('copies', copied.share, unit='share', higher=False, samples=copied.samples,
             distinct=copied.distinct, held_out=copied.held_out_share,
             reference=train.fingerprint, reference_samples=len(train.images))


def evaluate_samples(scores: Scores, images: np.ndarray, labels: np.ndarray | None, train: Split,
                     held_out: Split) -> None:
  """Frechet distance with a named extractor, distance to the training data, class agreement."""
  if images.shape[1:] != train.images.shape[1:]:
    raise ValueError(f'The samples are {images.shape[1:]}, and the data {train.images.shape[1:]}; '
                     'name data of the same size with --data=CONFIG.')
  judged = train.labels is not None and len(np.unique(train.labels)) > 1
  small = images[0].size <= 4096
  extractor: Any = (features.Classifier.fit('mlp64', (train.images, train.labels),
                                       (held_out.images, held_out.labels))
               if judged and small else features.Principal.fit(
                   train.images, min(64, len(train.images) - 1, images[0].size)))
  moments = [features.moments(extractor, x) for x in (images, train.images, held_out.images)]
  scores.add(features.score_name(extractor), frechet.frechet_distance(moments[0], moments[1]),
             higher=False, samples=len(images), extractor=extractor, reference=train.fingerprint,
             reference_samples=len(train.images),
             floor_held_out=float(frechet.frechet_distance(moments[2], moments[1])),
             floor_samples=len(held_out.images))
  near = memorization.nearest(
      *(features.shrink(x) for x in (images, train.images, held_out.images)))
  if np.isfinite(near.ratio):  # not where every held-out image is a training image
    scores.add('nearest_train_ratio', near.ratio, samples=len(images), distance=near.samples,
               held_out_distance=near.held_out, zero=near.zero, reference=train.fingerprint,
               reference_samples=len(train.images))
  if judged and small and labels is not None:
    judge = agreement.class_agreement(
        (images, labels), (train.images, train.labels), (held_out.images, held_out.labels))
    scores.add('class_agreement', judge.agreement, unit='share', higher=True,
               samples=judge.samples, judge=judge.judge, judge_accuracy=judge.judge_accuracy,
               reference=train.fingerprint, reference_samples=judge.train)


def evaluate(workdir: str, *, n: int = 1000, seed: int = 0, name: str | None = None,
             tokenizer: str | None = None, settings: dict[str, str] | None = None,
             weights: str = 'ema') -> list[Score]:
  """Scores a run and writes its `scores.json` (or `scores_NAME.json`)."""
  loaded = runs.load(workdir, weights=weights)
  data = loaded.experiment.data if loaded.experiment else None
  if data is None:
    raise ValueError(f'{workdir} is an exported file without data; evaluate a run folder.')
  if hasattr(loaded.model, 'encode'):
    scores = Scores(loaded, '', None, ())
    evaluate_tokenizer(loaded, scores, Split.read(data, 'eval'))
  else:
    codec = runs.load_tokenizer(loaded, tokenizer)
    chosen = resolve_settings(loaded, settings or {})
    train, held_out = (Split.read(_pixels(data, codec), split) for split in ('train', 'eval'))
    samples = draw(loaded, codec, n=n, seed=seed, settings=chosen)
    scores = Scores(loaded, '', chosen, (seed,))
    evaluate_generator(loaded, codec, scores, train, held_out, samples, seed=seed)
    evaluate_samples(scores, samples.images, samples.labels, train, held_out)
  file = 'scores.json' if name is None else f'scores_{name}.json'
  path = runs.split_reference(workdir)[0] / file
  write_scores(path, scores.rows)
  say(f'{len(scores.rows)} scores: {path}')
  return scores.rows


def _pixels(data: Any, tokenizer: runs.Loaded) -> Any:
  """The images behind a generator's data: its own, or for stored tokens those of the tokenizer."""
  from smalti.data.tokens import TokensConfig
  if isinstance(data, TokensConfig) and tokenizer.experiment is not None:
    return tokenizer.experiment.data
  return data


def evaluate_file(path: pathlib.Path, config: str, out: pathlib.Path) -> list[Score]:
  """Scores uint8 images of an ADM-style .npz (`arr_0`, labels `arr_1`) against a config's data."""
  try:
    with np.load(path, allow_pickle=False) as file:
      images, labels = file['arr_0'], file['arr_1'] if 'arr_1' in file else None
  except (KeyError, ValueError, OSError) as error:
    raise ValueError(f'{path} holds no samples ({error}); give an .npz with arr_0.') from error
  if images.dtype != np.uint8 or images.ndim != 4:
    raise ValueError(f'arr_0 of {path} is {images.dtype}{images.shape}; it must be uint8[n,h,w,c].')
  data = cli.load_config(config).data
  scores = Scores(None, path.name, None, ())
  evaluate_samples(scores, images, labels, Split.read(data, 'train'), Split.read(data, 'eval'))
  write_scores(out, scores.rows)
  say(f'{len(scores.rows)} scores: {out}')
  return scores.rows


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run to score.', flag_values=values)
  flags.DEFINE_string('samples', None, 'An .npz of uint8 images to score instead.',
                      flag_values=values)
  flags.DEFINE_string('data', None, 'For --samples: the config whose data they are compared with.',
                      flag_values=values)
  flags.DEFINE_integer('n', 1000, 'How many samples of a generator.', flag_values=values)
  flags.DEFINE_integer('seed', 0, 'The seed of the samples.', flag_values=values)
  flags.DEFINE_string('name', None, 'Writes scores_NAME.json.', flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Where the tokenizer was moved to.', flag_values=values)
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'Averaged or last weights.',
                    flag_values=values)
  cli.define_settings(values)


def main(values: Any) -> int:
  if values.samples:
    if not values.data:
      raise ValueError('evaluate --samples needs --data=CONFIG, the data to compare with.')
    path = pathlib.Path(values.samples)
    evaluate_file(path, values.data, path.with_suffix('.scores.json'))
    return 0
  if values.workdir is None:
    raise ValueError('evaluate needs --workdir=RUN, or --samples=FILE.npz --data=CONFIG.')
  if values.n < 2:
    raise ValueError(f'n={values.n} samples make no distribution; draw 2 or more.')
  evaluate(values.workdir, n=values.n, seed=values.seed, name=values.name,
           tokenizer=values.tokenizer, settings=values.settings, weights=values.weights)
  return 0


if __name__ == '__main__':
  cli.run('evaluate')
