"""Is it new? Samples beside the training data, and held-out data beside the same.

A generator that copies its training set has the best Frechet distance of all. Both checks set the
samples beside held-out data, since neighbours are near in any dense data set. Of a large
training set a part is looked at, and scores say which share.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Shaped

Tokens = Int[np.ndarray, '_b _n _d']
Rows = Shaped[np.ndarray, '_b ...']


@dataclasses.dataclass(frozen=True)
class Copies:
  """Exact matches of token arrays.

  Attributes:
    samples: how many were asked.
    copies: samples whose tokens are those of a training example.
    distinct: different token arrays among the samples.
    held_out: how many held-out examples were asked.
    held_out_copies: held-out examples whose tokens are those of a training example: coarse tokens
      give some without any copying.
  """
  samples: int
  copies: int
  distinct: int
  held_out: int
  held_out_copies: int

  @property
  def share(self) -> float:
    return self.copies / self.samples

  @property
  def held_out_share(self) -> float:
    return self.held_out_copies / self.held_out


@dataclasses.dataclass(frozen=True)
class Nearest:
  """Euclidean distance to the nearest training example, averaged.

  Attributes:
    samples, held_out: mean over samples and over held-out data.
    ratio: samples / held_out; well below 1 is memorisation, well above 1 is poor quality.
    zero: samples that lie exactly on a training example.
    held_out_zero: held-out examples that do.
  """
  samples: float
  held_out: float
  ratio: float
  zero: int
  held_out_zero: int


def copies(samples: Tokens, train: Tokens, held_out: Tokens, keep: int | None = None) -> Copies:
  """Exact copies of training token arrays, or their first `keep` positions, among the others."""
  samples, train, held_out = (tokens[:, :keep] for tokens in (samples, train, held_out))
  _check(samples, train, held_out)
  known = set(_bytes(train))
  drawn, asked = _bytes(samples), _bytes(held_out)
  return Copies(len(drawn), sum(row in known for row in drawn), len(set(drawn)),
                len(asked), sum(row in known for row in asked))


def nearest(samples: Rows, train: Rows, held_out: Rows) -> Nearest:
  """Mean nearest-training distance of samples beside that of held-out data."""
  _check(samples, train, held_out)
  drawn, asked = nearest_distances(samples, train), nearest_distances(held_out, train)
  base = float(asked.mean())
  return Nearest(float(drawn.mean()), base, float(drawn.mean()) / base if base else float('inf'),
                 int((drawn == 0).sum()), int((asked == 0).sum()))


def nearest_distances(rows: Rows, reference: Rows, chunk: int = 512) -> Float[np.ndarray, 'b']:
  """Euclidean distance of every row to its nearest row of `reference`, as given, in float64.

  In chunks of both, through |u|^2 - 2 u v + |v|^2, which is exact for uint8 pixels.
  """
  out = np.full(len(rows), np.inf)
  for j in range(0, len(reference), chunk):
    v = _flat(reference[j:j + chunk])
    squares = np.square(v).sum(1)
    for i in range(0, len(rows), chunk):
      u = _flat(rows[i:i + chunk])
      distances = np.square(u).sum(1)[:, None] - 2 * u @ v.T + squares
      out[i:i + chunk] = np.minimum(out[i:i + chunk], distances.min(1))
  return np.sqrt(np.maximum(out, 0))


def _flat(rows: Rows) -> Float[np.ndarray, 'b p']:
  return rows.reshape(len(rows), -1).astype(np.float64)


def _bytes(tokens: Tokens) -> list[bytes]:
  return [row.tobytes() for row in np.ascontiguousarray(tokens, np.int32)]


def _check(samples: Rows, train: Rows, held_out: Rows) -> None:
  shapes = {x.shape[1:] for x in (samples, train, held_out)}
  if len(shapes) > 1:
    raise ValueError(f'Samples, training and held-out rows have shapes {sorted(shapes)}; '
                     'they must be alike.')
  if not (len(samples) and len(train) and len(held_out)):
    raise ValueError(f'{len(samples)} samples, {len(train)} training and {len(held_out)} held-out '
                     'rows; give at least one of each.')
