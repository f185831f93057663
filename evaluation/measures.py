"""Two summaries to numbers: every measure that their contents allow, under its right name.

The plain names (fid, sfid, is, kid, precision, ...) are for features of the FID Inception network,
known by its hash. With any other extractor a name ends in `_<extractor>_<first 8 digits>`, and the
distances are `fd`, `sfd` and `kd`: no proxy is ever called FID.
"""

import dataclasses
from typing import Any

from smalti.evaluation.entropy import inception_score
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.kernel import kernel_distance
from smalti.evaluation.manifest import INCEPTION
from smalti.evaluation.manifold import manifold
from smalti.evaluation.summary import Summary

PROXIES = {'fid': 'fd', 'sfid': 'sfd', 'kid': 'kd'}


@dataclasses.dataclass(frozen=True)
class Measured:
  """One number.

  Attributes:
    name: as in `measure_name`.
    higher_is_better: None where neither is.
    beside: what else was computed, and the settings: JSON.
  """
  name: str
  value: float
  higher_is_better: bool | None
  beside: dict[str, Any]


def measure_name(measure: str, extractor: str) -> str:
  """The name of 'fid', 'sfid', 'is', 'kid', 'precision', ... with features of this identity."""
  name, sha256, _ = extractor.rsplit(':', 2)
  if name == 'inception' and sha256 in INCEPTION:
    return measure
  return f'{PROXIES.get(measure, measure)}_{name}_{sha256[:8]}'


def compare(generated: Summary, reference: Summary, *, k: int = 3, density_k: int = 5,
            seed: int = 2020) -> list[Measured]:
  """All measures of `generated` against `reference`.

  Frechet distances always; Inception score where there are logits; kernel distance, precision,
  recall, density and coverage where both have kept rows, and more rows than `k` and `density_k`.

  Args:
    k: neighbours that a ball reaches, for precision and recall (arXiv 1904.06991).
    density_k: the same for density and coverage (arXiv 2002.09797).
    seed: of the subsets of the kernel distance.

  Raises:
    ValueError: the features are not of one extractor.
  """
  found: list[Measured] = []

  def add(measure: str, value: float, higher: bool, **beside: Any) -> None:
    if not reference.verified and measure != 'is':
      beside['unverified_reference'] = True
    found.append(
        Measured(measure_name(measure, generated.extractor), float(value), higher, beside))

  add('fid', frechet_distance(generated.moments, reference.moments), False)
  if generated.spatial is not None and reference.spatial is not None:
    add('sfid', frechet_distance(generated.spatial, reference.spatial), False)
  if generated.shuffled is not None and generated.consecutive is not None:
    mean, deviation = inception_score(generated.shuffled)
    beside = {'deviation': deviation, 'splits': len(generated.shuffled.count),
              'consecutive_5000': inception_score(generated.consecutive)[0]}
    if reference.shuffled is not None:
      beside['of_reference'] = inception_score(reference.shuffled)[0]
    add('is', mean, True, **beside)
  a, b = generated.features, reference.features
  if min(len(a), len(b)) > max(k, density_k):
    rows = {'rows': len(a), 'reference_rows': len(b)}
    kernel = kernel_distance(a, b, seed=seed)
    add('kid', kernel.mean, False, deviation=kernel.deviation, subsets=kernel.subsets,
        subset_size=kernel.size, **rows)
    shares = manifold(real=b, generated=a, k=k, density_k=density_k,
                      around_real=reference.neighbours(max(k, density_k)))
    add('precision', shares.precision, True, k=k, **rows)
    add('recall', shares.recall, True, k=k, **rows)
    add('density', shares.density, True, k=density_k, **rows)
    add('coverage', shares.coverage, True, k=density_k, **rows)
  return found
