"""Laws of ranks: golden draws, nested laws, and the gradient at every optimum."""

import numpy as np
import pytest

from smalti.evaluation import zipf


def draws(p, total=10**6, seed=0):
  return np.random.default_rng(seed).multinomial(total, p / p.sum())


RANK = np.arange(1, 1025)


def test_zipf_golden():
  """10^6 draws of Zipf(1) over 1,024 codes."""
  result = zipf.ranks(draws(1 / RANK))
  assert result.zipf.parameters['a'] == pytest.approx(.9995, abs=.005)
  assert result.slope == pytest.approx(1, abs=.02)
  assert result.zipf.bits == pytest.approx(7.5106, abs=.01)
  assert result.zipf.ks < .002 and result.types == 1024 and result.tokens == 10**6
  assert result.uniform.bits == pytest.approx(10)


def test_every_law_finds_its_own_parameters():
  mandelbrot = zipf.ranks(draws((RANK + 20.) ** -1.5)).mandelbrot
  assert mandelbrot.parameters['a'] == pytest.approx(1.5, abs=.02)
  assert mandelbrot.parameters['q'] == pytest.approx(20, abs=1)
  log = np.log(RANK)
  lognormal = zipf.ranks(draws(np.exp(-(log - 2) ** 2 / 2 / 1.5 ** 2) / RANK)).lognormal
  assert lognormal.parameters['m'] == pytest.approx(2, abs=.02)
  assert lognormal.parameters['s'] == pytest.approx(1.5, abs=.02)
  assert mandelbrot.ks < .002 and lognormal.ks < .002


@pytest.mark.parametrize('p', [1 / RANK, (RANK + 20.) ** -1.5, np.ones(1024), RANK ** -2.5,
                               1. + (RANK < 500)])
def test_likelihoods_are_of_the_stated_laws_and_nest(p):
  counts = draws(p, 20_000)
  result = zipf.ranks(counts)
  f = np.sort(counts[counts > 0])[::-1]
  r, empirical = np.arange(1, len(f) + 1), f / f.sum()
  laws = {'zipf': lambda a: -a * np.log(r), 'mandelbrot': lambda a, q: -a * np.log(r + q),
          'uniform': lambda: np.zeros(len(r)),
          'lognormal': lambda m, s: -(np.log(r) - m) ** 2 / 2 / s ** 2 - np.log(r)}
  for name, logits in laws.items():
    law = getattr(result, name)
    if name == 'lognormal' and 'a' in law.parameters:
      assert law == result.zipf
      continue
    weights = np.exp(logits(**law.parameters))
    model = weights / weights.sum()
    assert law.log_likelihood == pytest.approx((f * np.log(model)).sum(), rel=1e-9)
    assert law.bits == pytest.approx(-(empirical * np.log2(model)).sum(), rel=1e-9)
    assert law.ks == pytest.approx(np.abs(np.cumsum(model - empirical)).max(), abs=1e-9)
    for key in law.parameters:  # no neighbour is better
      for factor in (.999, 1.001):
        moved = {**law.parameters, key: law.parameters[key] * factor}
        if zipf.EXPONENTS[0] <= moved.get('a', 1) <= zipf.EXPONENTS[1]:
          other = np.exp(logits(**moved))
          if moved.get('q', 0) <= 10 * len(r):  # the edge of the search
            assert (f * np.log(other / other.sum())).sum() <= law.log_likelihood + 1e-6
  entropy = -(empirical * np.log2(empirical)).sum()
  assert entropy <= min(getattr(result, name).bits for name in laws) + 1e-9
  assert result.mandelbrot.bits <= result.zipf.bits and result.lognormal.bits <= result.zipf.bits


def test_few_types():
  one = zipf.ranks(np.array([0, 5, 0]))
  assert (one.types, one.tokens, one.zipf.bits, one.slope) == (1, 5, 0, 0)
  two = zipf.ranks(np.array([1, 3]))
  assert two.zipf.parameters['a'] == pytest.approx(np.log2(3)) and two.once == .5
  assert two.curve == ((1, 3), (2, 1))
  assert zipf.zipf(np.array([1, 3])) == two.zipf
  with pytest.raises(ValueError, match='at least one'):
    zipf.ranks(np.zeros(4, int))
