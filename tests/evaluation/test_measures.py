"""Two summaries to named numbers: the names, the values behind them, and what they say beside."""

import json

import numpy as np
import pytest

from smalti.evaluation.entropy import inception_score
from smalti.evaluation.frechet import Moments, frechet_distance
from smalti.evaluation.kernel import kernel_distance
from smalti.evaluation.manifest import INCEPTION
from smalti.evaluation.manifold import manifold
from smalti.evaluation.measures import compare, measure_name
from smalti.evaluation.summary import Accumulator

PROXY = f'mlp64:{"ab" * 32}:none'
REAL_NETWORK = f'inception:{INCEPTION[0]}:tf1'


def summary(seed, n=80, extractor=PROXY, shift=0.0, parts=('features', 'logits', 'spatial')):
  rng = np.random.default_rng(seed)
  total = Accumulator(extractor, n, keep=60)
  outputs = {name: rng.normal(shift, 1, (n, dim)).astype(np.float32)
             for name, dim in (('features', 6), ('logits', 4), ('spatial', 3)) if name in parts}
  total.add(outputs, np.arange(n))
  return total.finish()


def test_names():
  measures = ('fid', 'sfid', 'is', 'kid', 'precision', 'recall', 'density', 'coverage')
  assert [measure_name(m, REAL_NETWORK) for m in measures] == list(measures)
  proxies = ('fd', 'sfd', 'is', 'kd', 'precision', 'recall', 'density', 'coverage')
  assert [measure_name(m, PROXY) for m in measures] == [f'{m}_mlp64_abababab' for m in proxies]
  # another network of that name, or another name with that hash, is none
  assert measure_name('fid', f'inception:{"0" * 64}:tf1') == 'fd_inception_00000000'
  assert measure_name('fid', f'other:{INCEPTION[0]}:tf1') == 'fd_other_6726825d'


def test_values():
  a, b = summary(0), summary(1, n=70, shift=.2)
  found = {m.name.removesuffix('_mlp64_abababab'): m for m in compare(a, b, seed=7)}
  shares = manifold(real=b.features, generated=a.features)
  kernel = kernel_distance(a.features, b.features, seed=7)
  expected = {
      'fd': (frechet_distance(a.moments, b.moments), False),
      'sfd': (frechet_distance(a.spatial, b.spatial), False),
      'is': (inception_score(a.shuffled)[0], True), 'kd': (kernel.mean, False),
      'precision': (shares.precision, True), 'recall': (shares.recall, True),
      'density': (shares.density, True), 'coverage': (shares.coverage, True)}
  assert {name: (m.value, m.higher_is_better) for name, m in found.items()} == expected
  assert found['is'].beside == {
      'deviation': inception_score(a.shuffled)[1], 'splits': 10,
      'consecutive_5000': inception_score(a.consecutive)[0],
      'of_reference': inception_score(b.shuffled)[0]}
  assert found['kd'].beside == {'deviation': kernel.deviation, 'subsets': 100, 'subset_size': 60,
                                'rows': 60, 'reference_rows': 60}
  assert (found['precision'].beside['k'], found['density'].beside['k']) == (3, 5)
  assert all(type(m.value) is float for m in found.values())
  json.dumps([m.beside for m in found.values()], allow_nan=False)


def test_only_what_the_summaries_allow():
  plain = summary(0, parts=('features',))
  assert [m.name.split('_')[0] for m in compare(plain, summary(1))] == [
      'fd', 'kd', 'precision', 'recall', 'density', 'coverage']
  few = summary(0, n=5, parts=('features',))
  assert [m.name.split('_')[0] for m in compare(few, summary(1))] == ['fd']
  with pytest.raises(ValueError, match='do not compare'):
    compare(summary(0, extractor=REAL_NETWORK), summary(1))


def test_a_better_generator_is_closer():
  reference = summary(0, n=3000)
  distances = [compare(summary(1, n=3000, shift=s), reference) for s in (0, .3, .9)]
  for measure in range(4):
    name = distances[0][measure].name
    if name.startswith(('fd', 'sfd', 'kd')):
      assert np.all(np.diff([found[measure].value for found in distances]) > 0), name
  pure = Moments.given(0, np.array([3., 4.]), np.eye(2), PROXY)  # FD of a shift is its square
  assert frechet_distance(pure, Moments.given(0, np.zeros(2), np.eye(2), PROXY)) == 25
