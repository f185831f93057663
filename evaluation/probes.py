"""Probes: how well frozen features say what is in an image.

Two linear protocols, and neighbours as a check without parameters:

- `logreg`: multinomial logistic regression by L-BFGS (scikit-learn) on standardised features, its
  penalty chosen on a validation split from C = logspace(-6, 5, 12);
- `sgd`: as masked autoencoders are probed (He et al. 2022, arXiv 2111.06377, table 10): batch
  normalisation without gain and bias, then a linear map, 90 epochs, no weight decay, rate
  0.1 * batch / 256 with a cosine to zero; momentum SGD in place of LARS, whose large batches we
  have not;
- `neighbours`: cosine similarity, k = 20, votes exp(similarity / 0.07) (arXiv 1805.01978).

Whatever is fitted (means and deviations too) is fitted on the training split, whatever is chosen is
chosen on the validation split, and the test split is read once.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

PENALTIES = tuple(float(c) for c in np.logspace(-6, 5, 12))  # scikit-learn's C
SHOTS = (1, 5, 10)  # labelled examples per class
SUBSETS = 5
ITERATIONS = 1000  # of L-BFGS, at most
EPOCHS, LARGEST = 90, 16384  # of SGD, and its batch
NEIGHBOURS, TEMPERATURE = 20, 0.07

Rows = Shaped[np.ndarray, '_n c']
Labels = Int[np.ndarray, '_n']


@dataclasses.dataclass(frozen=True)
class Split:
  """Features and labels 0..classes - 1 of the same examples."""
  features: Rows
  labels: Labels

  def __post_init__(self):
    if len(self.features) != len(self.labels) or not len(self.labels):
      raise ValueError(f'{len(self.features)} rows of features and {len(self.labels)} labels; '
                       'give one label per row, and one row at least.')

  def take(self, rows: Int[np.ndarray, '_m']) -> 'Split':
    return Split(self.features[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Shares in 0..1 of one test split.

  Attributes:
    top1, top5: the label is the likeliest class, or among the five; top5 is None for five classes
      or fewer, where it would say nothing.
    per_class: the mean over classes of their own top1.
    n: examples.
  """
  top1: float
  top5: float | None
  per_class: float
  n: int


@dataclasses.dataclass(frozen=True)
class Few:
  """Mean and deviation of top1 over subsets with so many labelled examples per class."""
  shots: int
  mean: float
  deviation: float
  subsets: int


@dataclasses.dataclass(frozen=True)
class Probe:
  """All protocols on one kind of features.

  Attributes:
    logreg, sgd, neighbours: by protocol.
    penalty: C of `logreg`; converged: whether L-BFGS stopped by itself.
    few: logistic regression on a few examples, each subset with its own C.
    validation: top1 of `logreg` on the validation split: what choices are made by.
    dim, train: length and number of training rows.
  """
  logreg: Accuracy
  sgd: Accuracy
  neighbours: Accuracy
  penalty: float
  converged: bool
  few: tuple[Few, ...]
  validation: float
  dim: int
  train: int


def probe(train: Split, validation: Split, test: Split, *, shots: Sequence[int] = SHOTS,
          subsets: int = SUBSETS, seed: int = 0) -> Probe:
  """Every protocol, each trained on `train` and measured on `test`."""
  model, score = fit(train, validation)
  return Probe(
      logreg=measure(model(test.features), test.labels),
      sgd=measure(descend(train, seed=seed)(test.features), test.labels),
      neighbours=measure(vote(train, test.features), test.labels),
      penalty=model.penalty, converged=model.converged,
      few=tuple(few(train, validation, test, k, subsets=subsets, seed=seed) for k in shots
                if k <= np.bincount(train.labels).min()),
      validation=score, dim=train.features.shape[1], train=len(train.labels))


@dataclasses.dataclass(frozen=True)
class Linear:
  """Scores of the classes from features: standardised, then a linear map."""
  scale: 'Scale'
  weights: Float[np.ndarray, 'c v']
  bias: Float[np.ndarray, 'v']
  penalty: float = math.nan
  converged: bool = True

  def __call__(self, features: Rows) -> Float[np.ndarray, 'n v']:
    return self.scale(features) @ self.weights + self.bias


@dataclasses.dataclass(frozen=True)
class Scale:
  """(x - mean) / deviation; features that never vary stay 0."""
  mean: Float[np.ndarray, 'c']
  deviation: Float[np.ndarray, 'c']

  @classmethod
  def of(cls, features: Rows) -> 'Scale':
    x = np.asarray(features, np.float64)
    deviation = x.std(0)
    return cls(x.mean(0), np.where(deviation > 0, deviation, 1.0))

  def __call__(self, features: Rows) -> Float[np.ndarray, 'n c']:
    return (np.asarray(features, np.float64) - self.mean) / self.deviation


def fit(train: Split, validation: Split, penalties: Sequence[float] = PENALTIES
        ) -> tuple[Linear, float]:
  """Logistic regression with the C that is best on `validation`, and its top1 there.

  Of equal ones the smallest C is taken. Each C starts from the solution of the one before.
  """
  scale, classes = Scale.of(train.features), _classes(train, validation)
  x, known = scale(train.features), np.unique(train.labels)
  if len(known) < 2:
    raise ValueError(f'The training split has the one class {known.tolist()}; give two or more.')
  solver = LogisticRegression(max_iter=ITERATIONS, warm_start=True)
  best, score = None, -1.0
  for penalty in sorted(penalties):
    solver.C = penalty
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always', ConvergenceWarning)
      solver.fit(x, train.labels)
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    weights, bias = solver.coef_, solver.intercept_
    if len(known) == 2:  # one row of scores, for the second class
      weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    full = np.zeros((classes, weights.shape[1])), np.full(classes, -np.inf)
    full[0][known], full[1][known] = weights, bias
    model = Linear(scale, full[0].T.copy(), full[1], penalty, converged)
    found = measure(model(validation.features), validation.labels).top1
    if found > score:
      best, score = model, found
  return best, score


def descend(train: Split, *, epochs: int = EPOCHS, seed: int = 0) -> Linear:
  """The `sgd` protocol; running moments of the batches standardise the test features."""
  x, n = np.asarray(train.features, np.float32), len(train.labels)
  batch, classes = min(LARGEST, n), int(train.labels.max()) + 1
  rng = np.random.default_rng(seed)
  weights = (0.01 * rng.standard_normal((x.shape[1], classes))).astype(np.float32)
  bias = np.zeros(classes, np.float32)
  speed: list[Any] = [np.zeros_like(weights), np.zeros_like(bias)]
  mean, variance = np.zeros(x.shape[1]), np.ones(x.shape[1])
  steps, peak = epochs * (n // batch), 0.1 * batch / 256
  for step in range(steps):
    if step % (n // batch) == 0:
      order = rng.permutation(n)
    rows = order[step % (n // batch) * batch:][:batch]
    part = x[rows]
    m, v = part.mean(0, dtype=np.float64), part.var(0, dtype=np.float64)
    mean, variance = 0.9 * mean + 0.1 * m, 0.9 * variance + 0.1 * v * batch / max(batch - 1, 1)
    part = ((part - m) / np.sqrt(v + 1e-6)).astype(np.float32)
    error = _softmax(part @ weights + bias)
    error[np.arange(batch), train.labels[rows]] -= 1
    error /= batch
    rate = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
    for parameter, velocity, gradient in zip(
        (weights, bias), speed, (part.T @ error, error.sum(0))):
      velocity *= 0.9
      velocity += gradient
      parameter -= np.float32(rate) * velocity
  return Linear(Scale(mean, np.sqrt(variance + 1e-6)), weights.astype(np.float64),
                bias.astype(np.float64))


def vote(train: Split, features: Rows, *, k: int = NEIGHBOURS, temperature: float = TEMPERATURE,
         block: int = 1024) -> Float[np.ndarray, 'n v']:
  """Per class the sum of exp(similarity / temperature) over the k most similar training rows."""
  known, k = _unit(train.features), min(k, len(train.labels))
  out = np.zeros((len(features), int(train.labels.max()) + 1))
  for start in range(0, len(features), block):
    similarity = _unit(features[start:start + block]) @ known.T
    nearest = np.argpartition(-similarity, k - 1, 1)[:, :k]
    weight = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
    rows = np.repeat(np.arange(len(similarity)), k) + start
    np.add.at(out, (rows, train.labels[nearest].ravel()), weight.ravel())
  return out


def few(train: Split, validation: Split, test: Split, shots: int, *, subsets: int = SUBSETS,
        seed: int = 0) -> Few:
  """Logistic regression on `shots` training rows of each class, over subsets drawn without seeing
  anything but labels; each subset chooses its C on the whole validation split."""
  found = []
  for i in range(subsets):
    rng = np.random.default_rng((seed, shots, i))
    rows = np.concatenate([rng.choice(np.flatnonzero(train.labels == c), shots, replace=False)
                           for c in np.unique(train.labels)])
    model, _ = fit(train.take(rows), validation)
    found.append(measure(model(test.features), test.labels).top1)
  return Few(shots, float(np.mean(found)), float(np.std(found)), subsets)


def measure(scores: Float[np.ndarray, 'n v'], labels: Labels) -> Accuracy:
  """Accuracies of the ranking of classes by `scores`; a label beyond their columns is a miss."""
  picked = scores.argmax(1)
  five = np.argsort(-scores, 1, kind='stable')[:, :5]
  hits = picked == labels
  return Accuracy(
      float(hits.mean()),
      float((five == labels[:, None]).any(1).mean()) if scores.shape[1] > 5 else None,
      float(np.mean([hits[labels == c].mean() for c in np.unique(labels)])), len(labels))


def choose(cells: Mapping[Any, tuple[Split, Split]]) -> dict[Any, float]:
  """By cell (layer, noise, pooling) the top1 of `fit` on its training and validation split.

  Best first; ties stay in the order of the cells.
  """
  found = {name: fit(train, validation)[1] for name, (train, validation) in cells.items()}
  return dict(sorted(found.items(), key=lambda item: -item[1]))


def pool(states: Float[np.ndarray, 'b n c'], grid: tuple[int, ...], size: int
         ) -> Float[np.ndarray, 'b f']:
  """Means over `size` nearly equal parts of every axis of the grid, flattened."""
  if not 1 <= size <= min(grid):
    raise ValueError(f'{size=} parts of an axis must be within 1..{min(grid)} for {grid=}.')
  x = np.asarray(states, np.float32).reshape(len(states), *grid, -1)
  for axis, length in enumerate(grid, 1):
    parts = np.array_split(np.arange(length), size)
    x = np.stack([x.take(part, axis).mean(axis) for part in parts], axis)
  return x.reshape(len(x), -1)


def bag(tokens: Int[np.ndarray, 'b n d'], vocab: tuple[int, ...]) -> Float[np.ndarray, 'b v']:
  """The control of codes: how often each occurs in an image, one block of columns per depth."""
  out = np.zeros((len(tokens), sum(vocab)), np.float32)
  starts = np.cumsum((0, *vocab[:-1]))
  rows = np.repeat(np.arange(len(tokens)), tokens.shape[1])
  for d, start in enumerate(starts):
    np.add.at(out, (rows, start + tokens[:, :, d].ravel()), 1 / tokens.shape[1])
  return out


def _classes(*splits: Split) -> int:
  return max(int(split.labels.max()) for split in splits) + 1


def _unit(features: Rows) -> Float[np.ndarray, 'n c']:
  x = np.asarray(features, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _softmax(scores: Float[np.ndarray, 'n v']) -> Float[np.ndarray, 'n v']:
  e = np.exp(scores - scores.max(1, keepdims=True))
  return e / e.sum(1, keepdims=True)
