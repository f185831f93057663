"""InfoMEC: the golden cases of N = 10,000 uniform draws from the Shapes3D lattice, and its laws."""

import json
import math
import warnings

import numpy as np
import pytest

from smalti.evaluation import latents
from smalti.evaluation.latents import explicitness, infomec, nmi_codes, nmi_real, preference

N = 10_000
SIZES = (10, 10, 15, 8, 4, 10)


def sources(seed=0, n=N):
  rng = np.random.default_rng(seed)
  return np.stack([rng.integers(0, size, n) for size in SIZES], 1)


def modularity(s, z, **options):
  """(InfoM, InfoC) of codes, without the regressions."""
  table = nmi_codes(s, z, **options)
  return preference(table.T), preference(table)


def split(s):
  """The factor of ten values as its half and its remainder."""
  return np.concatenate([s[:, 1:], s[:, :1] // 5, s[:, :1] % 5], 1)


def pair(s):
  """Two factors in one latent, and their sum in another."""
  a, b = s[:, 0], s[:, 1]
  return np.concatenate([np.stack([10 * a + b, (a + b) % 10], 1), s[:, 2:]], 1)


@pytest.mark.parametrize('latent, infom, infoc', [
    (lambda s: s, 0.991, 0.991),
    (lambda s: np.concatenate([s, s], 1), 0.991, 0.450),
    (split, 0.992, 0.934),
    (pair, 0.734, 0.977)], ids=['same', 'twice', 'split', 'pair'])
def test_golden_modularity_and_compactness(latent, infom, infoc):
  s = sources()
  assert modularity(s, latent(s)) == pytest.approx((infom, infoc), abs=0.01)


def test_golden_random_codes():
  # one draw of the twelve latents moves InfoM by 0.01: the golden value is one draw's, so a mean
  found = []
  for seed in range(5):
    z = np.random.default_rng(100 + seed).integers(0, 10, (N, 12))
    found.append(modularity(sources(seed), z))
  assert np.mean(found, 0) == pytest.approx([0.081, 0.034], abs=0.01)


def test_golden_explicitness():
  s = sources()
  assert explicitness(s, s).mean() > 0.999
  z = np.random.default_rng(1).integers(0, 10, (N, 12))
  assert explicitness(s, z).mean() == pytest.approx(0.021, abs=0.01)


def test_golden_constant_code_is_pruned():
  s = sources()
  found = infomec(s, np.concatenate([s, np.full((N, 1), 3)], 1))
  assert (found.infom, found.infoc) == pytest.approx((0.991, 0.991), abs=0.01)
  assert found.infoe > 0.999
  assert found.active.tolist() == [True] * 6 + [False]
  assert found.nmi.shape == (6, 7) and np.all(found.nmi[:, 6] == 0) and found.samples == N


def test_the_bias_of_the_plug_in_estimate_and_its_correction():
  s = sources()
  table = nmi_codes(s, s)
  entropy = np.log(SIZES)
  apart = [(i, j) for i in range(6) for j in range(6) if i != j]
  # (|s| - 1) (|z| - 1) / 2N nats for independent labels
  got = np.mean([table[i, j] * entropy[i] for i, j in apart])
  want = np.mean([(SIZES[i] - 1) * (SIZES[j] - 1) / (2 * N) for i, j in apart])
  assert got == pytest.approx(want, rel=0.1)
  corrected = nmi_codes(s, s, bias_correction='miller_madow')
  assert np.mean([corrected[i, j] * entropy[i] for i, j in apart]) < 0.3 * want
  np.testing.assert_allclose(np.diag(table), 1)
  assert all(x > 0.998 for x in modularity(s, s, bias_correction='miller_madow'))


def test_mutual_information_is_that_of_scikit_learn():
  from sklearn.metrics import mutual_info_score
  rng = np.random.default_rng(0)
  s = rng.integers(0, 5, (400, 2))
  z = np.stack([s[:, 0] + rng.integers(0, 2, 400), rng.integers(-9, 9, 400)], 1)
  want = [[mutual_info_score(a, b) / mutual_info_score(a, a) for b in z.T] for a in s.T]
  np.testing.assert_allclose(nmi_codes(s, z), want, rtol=1e-10)


def test_codes_are_labels():
  s = sources(n=2000)
  renamed = np.array([7, -3, 900, 12, 0, 55, 1, 8, 10**9, 4, 2, 3, 77, 99, 6])[s]
  np.testing.assert_allclose(nmi_codes(s, renamed), nmi_codes(s, s), rtol=1e-12)
  np.testing.assert_allclose(nmi_codes(renamed, s), nmi_codes(s, s), rtol=1e-12)


def test_real_latents_carry_what_theory_says():
  # z = s + noise of a uniform width 2 over two equally likely labels 0 and 1: half the density
  # overlaps, so I = log 2 / 2
  rng = np.random.default_rng(0)
  s = np.stack([rng.integers(0, 2, 4000), rng.integers(0, 3, 4000)], 1)
  z = np.stack([s[:, 0] + rng.uniform(-1, 1, 4000), rng.normal(size=4000)], 1)
  table = nmi_real(s, z)
  assert table[0, 0] == pytest.approx(0.5, abs=0.03)
  assert np.all(np.array([table[0, 1], *table[1]]) < 0.02)
  assert np.all(table >= 0)


def test_real_latents_are_standardized_and_pruned_by_their_range():
  rng = np.random.default_rng(0)
  s = np.stack([rng.integers(0, 4, 1000), rng.integers(0, 4, 1000)], 1)
  z = s + 0.05 * rng.normal(size=s.shape)
  weak = np.concatenate([z, 0.1 * rng.normal(size=(1000, 1)) / 6], 1)
  found = infomec(s, weak)
  assert found.active.tolist() == [True, True, False]
  assert infomec(s, weak, prune=1 / 500).active.all()
  assert found.infom > 0.95 and found.infoc > 0.95 and found.infoe > 0.9
  again = infomec(s, 100 * z - 7)
  assert again.infoe == pytest.approx(infomec(s, z).infoe, abs=1e-3)
  np.testing.assert_allclose(again.nmi, infomec(s, z).nmi, atol=1e-3)


def test_a_repeated_call_gives_the_same_numbers():
  rng = np.random.default_rng(0)
  s, z = rng.integers(0, 3, (500, 2)), rng.normal(size=(500, 3))
  first, second = infomec(s, z), infomec(s, z)
  np.testing.assert_array_equal(first.nmi, second.nmi)
  assert first.to_json() == second.to_json()


def test_explicitness_of_unbalanced_labels_is_against_all_classes():
  # 90 of 100 binary labels are 0, and the latents know nothing: balanced weights make both losses
  # log 2, whatever the entropy of the labels (0.325)
  s = np.repeat([0, 1], [900, 100])[:, None]
  nothing = np.zeros((1000, 1))
  assert latents._log_loss(nothing, s[:, 0]) == pytest.approx(math.log(2), abs=1e-4)
  assert latents.entropy(s[:, 0]) == pytest.approx(0.325, abs=1e-3)


# --- where the measures are not defined ------------------------------------------------------


def test_one_active_latent_has_no_compactness():
  s = sources(n=500)
  z = np.stack([s[:, 0], np.zeros(500, int)], 1)
  with pytest.warns(UserWarning, match='one thing to prefer'):
    found = infomec(s, z)
  assert math.isnan(found.infoc) and found.infom > 0.5 and 0 < found.infoe < 1
  assert json.loads(json.dumps(found.to_json(), allow_nan=False))['infoc'] is None


def test_no_active_latent_has_nothing():
  s = sources(n=500)
  with pytest.warns(UserWarning, match='No latent varies'):
    found = infomec(s, np.zeros((500, 3), int))
  assert all(map(math.isnan, (found.infom, found.infoc, found.infoe)))
  assert found.active.tolist() == [False] * 3
  json.dumps(found.to_json(), allow_nan=False)


def test_what_tells_nothing_prefers_nothing():
  rows = np.array([[0.0, 0, 0, 0], [1, 0, 0, 0]])
  assert preference(rows) == pytest.approx(((1 / 4 + 1) / 2 - 1 / 4) / (1 - 1 / 4))
  # independent by construction: every pair occurs equally often
  s = np.array([[a, b] for a in (0, 1) for b in (0, 1) for _ in range(2)])
  z = np.stack([s[:, 0], np.tile([0, 1], 4)], 1)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    found = infomec(s, z)
  assert found.silent == (1, 1)
  assert found.infom == pytest.approx(0.5) and found.infoc == pytest.approx(0.5)


@pytest.mark.parametrize('s, z, options, match', [
    (np.zeros((5, 1), int), np.zeros((4, 1), int), {}, 'same N samples'),
    (np.zeros((0, 1), int), np.zeros((0, 1), int), {}, 'same N samples'),
    (np.arange(4.0)[:, None], np.arange(4)[:, None], {}, 'integer labels'),
    (np.ones((4, 1), int), np.arange(4)[:, None], {}, 'never vary'),
    (np.arange(4)[:, None], np.array([[0], [1], [np.nan], [2]]), {}, 'not finite'),
    (np.arange(4)[:, None], np.arange(4.0)[:, None], {'bias_correction': 'miller_madow'},
     'real numbers')])
def test_what_is_refused(s, z, options, match):
  with pytest.raises(ValueError, match=match):
    infomec(s, z, **options)
