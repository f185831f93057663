"""InfoMEC: how modular, compact and explicit latents are about known sources.

Hsu et al. 2023, "Disentanglement via Latent Quantization", arXiv 2305.18378, section 4. From the
normalised mutual information NMI_ij = I(s_i; z_j) / H(s_i) of every source and latent:

  InfoM = (mean_j max_i NMI_ij / sum_i NMI_ij - 1 / n_s) / (1 - 1 / n_s)   a latent tells one source
  InfoC = (mean_i max_j NMI_ij / sum_j NMI_ij - 1 / n_z) / (1 - 1 / n_z)   a source has one latent
  InfoE = mean_i (CE0_i - CE_i) / CE0_i                                    and is linear to read

over the n_z active latents; CE_i is the log-loss of a logistic regression from all latents. What
the reference code leaves undefined is defined here: an active latent that tells nothing has no
preference (1 / n_s), as has a source that nothing tells; one active latent leaves InfoC without a
scale (NaN).
"""

import dataclasses
import math
import warnings
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Sources = Shaped[np.ndarray, '_n _s']  # integers, checked below: floats are refused
Latents = Shaped[np.ndarray, '_m _z']  # integer codes, or real numbers


@dataclasses.dataclass(frozen=True)
class InfoMEC:
  """The three measures, each 1 at best, 0 without any preference, and what they came from.

  Attributes:
    infom, infoc, infoe: modularity, compactness, explicitness; NaN where there is no scale.
    nmi: of every source (row) and latent (column), pruned ones too.
    active: which latents count for infom and infoc.
    explicitness: infoe of every source.
    silent: active latents, and sources, whose NMI are all zero.
    samples: N.
  """
  infom: float
  infoc: float
  infoe: float
  nmi: Float[np.ndarray, 's z']
  active: Bool[np.ndarray, 'z']
  explicitness: Float[np.ndarray, 's']
  silent: tuple[int, int]
  samples: int

  def to_json(self) -> dict[str, Any]:
    """Plain numbers and lists; NaN is None."""
    number = lambda x: None if math.isnan(x) else float(x)  # noqa: E731
    return {
        'infom': number(self.infom), 'infoc': number(self.infoc), 'infoe': number(self.infoe),
        'nmi': np.round(self.nmi, 5).tolist(), 'active': self.active.tolist(),
        'explicitness': [number(round(x, 5)) for x in self.explicitness],
        'silent_latents': self.silent[0], 'silent_sources': self.silent[1],
        'samples': self.samples}


def infomec(sources: Sources, latents: Latents, *, neighbors: int = 10, prune: float = 1 / 20,
            bias_correction: Literal['miller_madow'] | None = None, seed: int = 0) -> InfoMEC:
  """InfoMEC of N samples; integer latents are codes, compared as labels, real ones are continuous.

  Args:
    sources: labels of the factors of variation.
    neighbors: k of the nearest-neighbour estimate of mutual information, for real latents.
    prune: a real latent is active if its range exceeds this share of the largest range; a code, if
      it varies. (The paper's code has 1/20; an older file of it 1/8.)
    bias_correction: of the plug-in mutual information of codes, which is too high by about
      (|s| - 1) (|z| - 1) / 2N nats; published numbers have none.
    seed: of the noise that breaks ties between neighbours.

  Raises:
    ValueError: unequal or no samples, a source that never varies, or values that are not finite.
  """
  sources, latents = _checked(sources, latents)
  discrete = np.issubdtype(latents.dtype, np.integer)
  if bias_correction and not discrete:
    raise ValueError(f'{bias_correction=} is of the plug-in estimate, and these latents are real '
                     'numbers; leave it out.')
  table = (nmi_codes(sources, latents, bias_correction=bias_correction) if discrete
           else nmi_real(sources, latents, neighbors=neighbors, seed=seed))
  spread = latents.max(0).astype(np.float64) - latents.min(0)
  active = spread > (0 if discrete else prune * spread.max())
  if not active.any():
    warnings.warn('No latent varies: InfoMEC is not defined.', stacklevel=2)
    nothing = np.full(sources.shape[1], np.nan)
    return InfoMEC(math.nan, math.nan, math.nan, table, active, nothing, (0, 0), len(sources))
  pruned = table[:, active]
  each = explicitness(sources, latents)
  return InfoMEC(
      infom=preference(pruned.T, 'latents'), infoc=preference(pruned, 'sources'),
      infoe=float(each.mean()), nmi=table, active=active, explicitness=each,
      silent=(int((pruned.sum(0) == 0).sum()), int((pruned.sum(1) == 0).sum())),
      samples=len(sources))


def preference(rows: Float[np.ndarray, 'a b'], name: str = 'rows') -> float:
  """(mean over rows of max / sum - 1 / b) / (1 - 1 / b): 1 if each row has a single entry.

  A row of zeros prefers nothing, 1 / b. With b = 1 there is nothing to prefer: NaN and a warning.
  """
  b = rows.shape[1]
  if b == 1:
    warnings.warn(f'All {name} have one thing to prefer: the measure is not defined.', stacklevel=2)
    return math.nan
  total = rows.sum(1)
  share = np.where(total > 0, rows.max(1) / np.where(total > 0, total, 1), 1 / b)
  return float((share.mean() - 1 / b) / (1 - 1 / b))


def nmi_codes(sources: Sources, latents: Latents, *,
              bias_correction: Literal['miller_madow'] | None = None
              ) -> Float[np.ndarray, 's z']:
  """Plug-in I(s_i; z_j) / H(s_i) of labels.

  'miller_madow' adds (K - 1) / 2N to every entropy, K the values seen (Miller 1955); an information
  that is negative then is zero.
  """
  s, z = _labels(sources), _labels(latents)
  corrected = bias_correction == 'miller_madow'
  of_s, of_z = ([entropy(column, corrected) for column in x.T] for x in (s, z))
  table = np.empty((s.shape[1], z.shape[1]))
  for i, a in enumerate(s.T):
    for j, b in enumerate(z.T):
      both = entropy(a * (b.max() + 1) + b, corrected)
      table[i, j] = (of_s[i] + of_z[j] - both) / of_s[i]
  return np.where(table < 1e-12, 0, table)  # 1e-12: what rounding leaves of zero


def nmi_real(sources: Sources, latents: Latents, *, neighbors: int = 10,
             seed: int = 0) -> Float[np.ndarray, 's z']:
  """I(s_i; z_j) / H(s_i) of labels and real numbers by k nearest neighbours (Ross 2014)."""
  from sklearn.feature_selection import mutual_info_classif  # imports for a second; who asks pays
  z = _standardized(latents)
  return np.stack([
      mutual_info_classif(z, s, discrete_features=False, n_neighbors=neighbors, random_state=seed)
      / entropy(s) for s in _labels(sources).T])


def entropy(labels: Int[np.ndarray, 'n'], corrected: bool = False) -> float:
  """Plug-in entropy in nats, with Miller and Madow's (K - 1) / 2N if asked for."""
  count = np.bincount(labels)
  p = count[count > 0] / len(labels)
  return float(-(p * np.log(p)).sum()) + corrected * (len(p) - 1) / (2 * len(labels))


def explicitness(sources: Sources, latents: Latents) -> Float[np.ndarray, 's']:
  """(CE0_i - CE_i) / CE0_i per source, from all latents at once, codes as one-hot vectors.

  Log-losses on the samples that were fitted, of scikit-learn's multinomial logistic regression
  without penalty, L-BFGS of at most 100 iterations (which rarely converges, and belongs to the
  definition), classes balanced; CE0 is that of no input. For unbalanced sources CE0 is
  log(#classes), above their entropy.
  """
  from sklearn.preprocessing import OneHotEncoder
  if np.issubdtype(latents.dtype, np.integer):
    inputs = OneHotEncoder().fit_transform(_labels(latents))
  else:
    inputs = _standardized(latents)
  nothing = np.zeros((len(sources), 1))
  losses = np.array([[_log_loss(x, s) for x in (inputs, nothing)] for s in _labels(sources).T])
  return (losses[:, 1] - losses[:, 0]) / losses[:, 1]


def _log_loss(inputs: Any, labels: Int[np.ndarray, 'n']) -> float:
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.linear_model import LogisticRegression
  from sklearn.metrics import log_loss
  model = LogisticRegression(
      C=np.inf, solver='lbfgs', tol=1e-4, max_iter=100, fit_intercept=True, class_weight='balanced')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)
    model.fit(inputs, labels)
  return float(log_loss(labels, model.predict_proba(inputs)))


def _labels(x: Int[np.ndarray, 'n c']) -> Int[np.ndarray, 'n c']:
  """0, 1, ... per column, in the order of the values."""
  return np.stack([np.unique(column, return_inverse=True)[1] for column in x.T], 1)


def _standardized(x: Float[np.ndarray, 'n z']) -> Float[np.ndarray, 'n z']:
  x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
  deviation = x.std(0)
  return x / np.where(deviation > 0, deviation, 1)


def _checked(sources: Any, latents: Any) -> tuple[np.ndarray, np.ndarray]:
  sources, latents = np.asarray(sources), np.asarray(latents)
  if sources.ndim != 2 or latents.ndim != 2 or len(sources) != len(latents) or not len(sources):
    raise ValueError(f'sources {sources.shape} and latents {latents.shape} must be [N, n] of the '
                     'same N samples.')
  if not np.issubdtype(sources.dtype, np.integer):
    raise ValueError(f'sources of {sources.dtype} must be integer labels.')
  if not np.isfinite(latents).all():
    raise ValueError('Some latents are not finite; look at the model that made them.')
  if (constant := np.flatnonzero(sources.max(0) == sources.min(0))).size:
    raise ValueError(f'The sources {constant.tolist()} never vary in these samples; '
                     'leave them out, or draw more.')
  return sources, latents
