"""Scores collected: what many scores of one model share is said once."""

from typing import Any

from smalti.evaluation.manifest import Score, versions
from smalti.evaluation.summary import Summary
from smalti.launch import run as runs
from smalti.launch.judge import Accumulation, Judge
from smalti.launch.progress import say
from smalti.launch.serialization import to_json


class Scores:
  """Collects scores that share a model, weights, settings and seeds."""

  def __init__(self, loaded: runs.Loaded | None, name: str = '', settings: Any = None,
               seeds: tuple[int, ...] = (), *, quiet: bool = False):
    self.common: dict[str, Any] = dict(
        model=name if loaded is None else f'{_mark(loaded)} {loaded.path.name}@{loaded.step}',
        weights='none' if loaded is None else loaded.weights,
        settings={} if settings is None else to_json(settings), seeds=seeds,
        versions=versions('jax', 'flax', 'scikit-learn'))
    self.rows: list[Score] = []
    self._quiet = quiet

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
    if not self._quiet:
      say(f'{name} {value:.4f} {unit}  {f"({shown})" if shown else ""}')

  def add_judged(self, judge: Judge, summaries: list[Summary],
                 accumulation: Accumulation | None = None) -> None:
    """All measures of a judge, and the share of samples it puts into the class asked for."""
    common: dict[str, Any] = dict(
        extractor=judge.extractor, samples=summaries[0].n, reference=judge.reference[0].source,
        reference_samples=judge.reference[0].n)
    for row in judge.measure(summaries):
      self.add(row.name, row.value, higher=row.higher_is_better, **common, **row.beside)
    if accumulation is not None and accumulation.asked:
      suffix = f'{judge.extractor.name}_{judge.extractor.sha256[:8]}'
      self.add(f'agreement_{suffix}', accumulation.agreeing / accumulation.asked, unit='share',
               higher=True, judge_accuracy=judge.accuracy, **common)
    if accumulation is not None and accumulation.nfe is not None:
      self.add('nfe', accumulation.nfe, unit='passes per sample', higher=False,
               samples=summaries[0].n)


def _mark(loaded: runs.Loaded) -> str:
  """16 hex digits of the model itself: the fingerprint of a generator is that of its tokenizer."""
  if runs.kind(loaded.model) != 'generator':
    return loaded.fingerprint
  return loaded.identity[:16]
