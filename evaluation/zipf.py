"""Laws of ranked frequencies: Zipf, Zipf-Mandelbrot, log-normal and uniform, by likelihood.

Ranks 1..R are those of the R types that occur, by falling frequency f_r, F tokens in all, and every
law is a distribution over these ranks, fitted by maximum likelihood: sum_r f_r log p(r). Because
the ranks come from the same frequencies, rare types look steeper than they are until all occur.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

EXPONENTS = (.01, 3.)  # range of the search
POINTS = 64  # of a curve for plots
NEWTON = 100  # steps at most; some ten are taken


@dataclasses.dataclass(frozen=True)
class Law:
  """One fitted law.

  Attributes:
    parameters: by name.
    log_likelihood: in nats, of all tokens.
    bits: -log_likelihood / F / log 2, which the plug-in entropy bounds from below.
    ks: largest difference between the fitted and the observed distribution over ranks.
  """
  parameters: dict[str, float]
  log_likelihood: float
  bits: float
  ks: float


@dataclasses.dataclass(frozen=True)
class Ranks:
  """Ranked frequencies of types (codes, or n-grams of codes).

  Attributes:
    types: R, how many occur.
    tokens: F, how many were counted.
    once: share of types that occur once.
    slope: minus the least-squares slope of log f over log r, for plots only: rare types weigh most.
    zipf: p(r) ~ r^-a.
    mandelbrot: p(r) ~ (r + q)^-a, q >= 0.
    lognormal: p(r) ~ exp(-(log r - m)^2 / 2 s^2) / r, or its limit Zipf where that fits better.
    uniform: p(r) = 1 / R.
    curve: (rank, frequency) of up to 64 ranks, evenly spaced on a log scale.
  """
  types: int
  tokens: int
  once: float
  slope: float
  zipf: Law
  mandelbrot: Law
  lognormal: Law
  uniform: Law
  curve: tuple[tuple[int, int], ...]


def ranks(counts: Int[np.ndarray, '_v']) -> Ranks:
  """All laws of this module for the counts of types. Raises ValueError where nothing occurs."""
  f = _sorted(counts)
  log = np.log(np.arange(1, len(f) + 1))
  slope = 0. if len(f) < 2 else -float(np.polyfit(log, np.log(f), 1)[0])
  shown = np.unique(np.geomspace(1, len(f), POINTS).round().astype(int))
  return Ranks(
      types=len(f), tokens=int(f.sum()), once=float((f == 1).mean()), slope=slope,
      zipf=_zipf(f), mandelbrot=_mandelbrot(f), lognormal=_lognormal(f),
      uniform=_law(f, np.zeros(len(f)), {}),
      curve=tuple((int(r), int(f[r - 1])) for r in shown))


def zipf(counts: Int[np.ndarray, '_v']) -> Law:
  """Zipf's law alone, for many types. Raises ValueError where nothing occurs."""
  return _zipf(_sorted(counts))


def _sorted(counts: Int[np.ndarray, '_v']) -> Float[np.ndarray, 'r']:
  f = np.sort(counts[counts > 0])[::-1].astype(np.float64)
  if not len(f):
    raise ValueError('No tokens were counted; give at least one.')
  return f


def _zipf(f: Float[np.ndarray, 'r']) -> Law:
  log = np.log(np.arange(1, len(f) + 1))
  a = _exponent(f, log)
  return _law(f, -a * log, {'a': a})


def _mandelbrot(f: Float[np.ndarray, 'r']) -> Law:
  """The best q of a grid, then golden sections around it; the exponent is exact for every q."""
  r = np.arange(1, len(f) + 1)

  def law(q: float) -> Law:
    log = np.log(r + q)
    a = _exponent(f, log)
    return _law(f, -a * log, {'a': a, 'q': float(q)})

  grid = [0., *np.geomspace(.01, 10 * len(f), 25)]
  laws = [law(q) for q in grid]
  best = max(range(len(grid)), key=lambda i: laws[i].log_likelihood)
  low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
  ratio = (5 ** .5 - 1) / 2
  inner = [law(high - ratio * (high - low)), law(low + ratio * (high - low))]
  while high - low > 1e-6 * (1 + high):
    if inner[0].log_likelihood > inner[1].log_likelihood:
      high = inner[1].parameters['q']
      inner = [law(high - ratio * (high - low)), inner[0]]
    else:
      low = inner[0].parameters['q']
      inner = [inner[1], law(low + ratio * (high - low))]
  return max([laws[best], *inner], key=lambda fit: fit.log_likelihood)


def _lognormal(f: Float[np.ndarray, 'r']) -> Law:
  """By Newton's method in the natural parameters of log r and (log r)^2, where it is concave."""
  log = np.log(np.arange(1, len(f) + 1))
  features = np.stack([log, log ** 2]) / max(log[-1], 1)  # of like size
  observed, theta = features @ f / f.sum(), np.zeros(2)
  law = _law(f, theta @ features, {})
  for _ in range(NEWTON):
    p = _normalized(theta @ features)
    mean = features @ p
    slope, curvature = observed - mean, (features * p) @ features.T - np.outer(mean, mean)
    step = np.linalg.lstsq(curvature, slope, rcond=1e-14)[0]
    if slope @ step < 1e-12:
      break
    while True:  # the whole step, or as much of it as helps
      tried = _law(f, (theta + step) @ features, {})
      if tried.log_likelihood > law.log_likelihood or np.abs(step).max() < 1e-12:
        break
      step = step / 2
    theta, law = theta + step, tried
  one, two = theta / max(log[-1], 1)
  if two >= -1e-9:  # it would rise again at far ranks: the best with a mode or none is Zipf's
    return _zipf(f)
  variance = -1 / (2 * two)
  return dataclasses.replace(law, parameters={'m': float((one + 1) * variance),
                                              's': float(variance ** .5)})


def _exponent(f: Float[np.ndarray, 'r'], log: Float[np.ndarray, 'r']) -> float:
  """Where the mean of `log` under exp(-a log) is the observed one: Newton's method, bracketed."""
  target = (f * log).sum() / f.sum()  # not a dot product: threads of BLAS cost more than they give
  (low, high), a = EXPONENTS, 1.
  for _ in range(NEWTON):
    p = _normalized(-a * log)
    mean = (p * log).sum()
    low, high = (a, high) if mean > target else (low, a)
    variance = (p * (log - mean) ** 2).sum()
    new = a + (mean - target) / variance if variance > 0 else low
    if not low < new < high:
      new = (low + high) / 2
    if abs(new - a) < 1e-12:
      break
    a = new
  return float(a)


def _law(f: Float[np.ndarray, 'r'], logits: Float[np.ndarray, 'r'], parameters: dict[str, float]
         ) -> Law:
  logits = logits - logits.max()
  p, total = _normalized(logits), float(f.sum())
  likelihood = float((f * logits).sum()) - total * float(np.log(np.exp(logits).sum()))
  return Law(parameters=parameters, log_likelihood=likelihood,
             bits=abs(likelihood) / total / float(np.log(2)),
             ks=float(np.abs(np.cumsum(p) - np.cumsum(f) / total).max()))


def _normalized(logits: Float[np.ndarray, 'r']) -> Float[np.ndarray, 'r']:
  p = np.exp(logits - logits.max())
  return p / p.sum()
