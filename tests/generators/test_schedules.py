"""Golden numbers of the schedules, and what must hold for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smalti.generators import schedules

NAMES = ('linear', 'cosine', 'polynomial', 'geometric')


@pytest.mark.parametrize('name', NAMES)
def test_weight_and_derivative_agree_with_alpha(name):
  schedule = schedules.named(name)
  t = jnp.linspace(0.05, 0.95, 19)
  slope = jax.vmap(jax.grad(schedule.alpha))(t)
  np.testing.assert_allclose(schedule.derivative(t), slope, rtol=2e-5, atol=1e-9)
  np.testing.assert_allclose(schedule.masked(t), 1 - schedule.alpha(t), atol=1e-6)
  np.testing.assert_allclose(schedule.weight(t), -slope / (1 - schedule.alpha(t)), rtol=2e-3)


@pytest.mark.parametrize('name', NAMES)
def test_alpha_falls_from_one_to_zero(name):
  alpha = schedules.named(name).alpha(jnp.linspace(0, 1, 101))
  assert np.all(np.diff(alpha) <= 0)
  np.testing.assert_allclose(alpha[jnp.array([0, -1])], (1, 0), atol=2e-4)


@pytest.mark.parametrize('name', ['cap', 'rescale', 'loop', 'conf'])
@pytest.mark.parametrize('strength', [0.0, 0.1, 0.7, 1.0])
def test_masking_again_keeps_the_share_of_masked_tokens(name, strength):
  steps = 40
  reveal, again = map(np.asarray, schedules.remasking(name, 'cosine', steps, strength))
  alpha = schedules.visible('cosine', steps)
  if name == 'loop':  # up to 0.9 at 0.55, there until 0.05, then to the end
    t = 1 - np.arange(steps + 1) / steps
    alpha = np.interp(t, [0, .05, .55, 1], [1, .9, .9, 0])
    assert (again[:18] == 0).all() and (again[-2:] == 0).all()
    assert (again[18:38] == np.float32(min(strength, 1 / 9))).all()
  assert (reveal >= 0).all() and (reveal <= 1).all() and (again >= 0).all() and (again <= 1).all()
  back = 0 if name == 'conf' else again  # spread over the revealed tokens, one in all at most
  np.testing.assert_allclose(
      alpha[:-1] * (1 - back) + (1 - alpha[:-1]) * reveal, alpha[1:], atol=1e-5)


def test_golden_weights():
  cosine = schedules.named('cosine')
  np.testing.assert_allclose(
      cosine.weight(jnp.array([0.5, 0.25, 1.0])), (1.5708, 3.7922, 0.0), atol=1e-4)
  np.testing.assert_allclose(schedules.named('linear').weight(jnp.array([0.5, 0.1])), (2, 10))
  np.testing.assert_allclose(schedules.named('polynomial', 3.0).weight(jnp.array(0.5)), 6)


def test_weights_keep_their_digits_near_the_clean_end():
  t = np.array([1e-6, 1e-5, 1e-4])
  exact = np.pi / 2 / np.tan(np.pi / 2 * t)
  np.testing.assert_allclose(schedules.named('cosine').weight(jnp.array(t)), exact, rtol=1e-6)
  masked = np.sin(np.pi / 2 * t)
  np.testing.assert_allclose(schedules.named('cosine').masked(jnp.array(t)), masked, rtol=1e-6)


def test_stratified_times_put_one_draw_in_every_stratum():
  draws = jax.vmap(lambda key: schedules.stratified(key, 64))(
      jax.random.split(jax.random.key(0), 256))
  assert draws.shape == (256, 64)
  strata = np.sort(np.floor(np.asarray(draws, np.float64) * 64), 1)
  assert np.mean(strata == np.arange(64)) > .99  # float32 rounds at the borders
  np.testing.assert_allclose(np.mean(draws, 0), .5, atol=4 / np.sqrt(12 * 256))  # every row alone


@pytest.mark.parametrize('steps, golden', [
    (8, (251, 236, 212, 181, 142, 97, 49, 0)),
    (12, (253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 0))])
def test_maskgit_counts(steps, golden):
  np.testing.assert_array_equal(schedules.remaining('cosine', steps, jnp.array(256)), golden)


@pytest.mark.parametrize('name', ('cosine', 'arccos', 'linear'))
@pytest.mark.parametrize('rounding', ('masked', 'revealed'))
@pytest.mark.parametrize('steps', (1, 2, 7, 12, 40))
def test_counts_fall_by_one_or_more_until_none_is_left(name, rounding, steps):
  unknown = jnp.arange(0, 34)
  left = np.asarray(schedules.remaining(name, steps, unknown, rounding=rounding))
  before = np.concatenate([np.asarray(unknown)[None], left[:-1]])
  assert np.all((left < before) | (before == 0)) and np.all(left >= 0)
  assert np.all(left[-1] == 0)


def test_counts_are_those_of_each_row_alone():
  unknown = jnp.array([3, 256, 0, 100])
  rows = [schedules.remaining('cosine', 8, n) for n in unknown]
  np.testing.assert_array_equal(
      schedules.remaining('cosine', 8, unknown), jnp.stack(rows, 1))


def test_counts_in_float32_are_those_of_float64():
  unknown = np.arange(1, 1025)
  for steps in (2, 3, 6, 8, 12, 16, 32, 64):
    wanted = unknown.copy()
    left = np.asarray(schedules.remaining('cosine', steps, jnp.asarray(unknown)))
    for k in range(steps - 1):
      exact = np.floor(np.round(unknown * np.cos(np.pi / 2 * (k + 1) / steps), 9))
      wanted = np.maximum(np.minimum(np.maximum(exact, 1), wanted - 1), 0)
      np.testing.assert_array_equal(left[k], wanted)


def test_halton_order_and_counts():
  order = schedules.halton((16, 16))
  first = [(8, 5), (4, 10), (12, 1), (2, 7), (10, 12), (6, 3), (14, 8), (1, 14)]
  assert [tuple(divmod(int(c), 16)) for c in order[:8]] == first
  assert sorted(order) == list(range(256))
  shown = 256 - schedules.remaining('arccos', 32, jnp.array(256), rounding='revealed')
  np.testing.assert_array_equal(shown[:8], (5, 10, 15, 20, 25, 30, 35, 41))
  np.testing.assert_array_equal(shown[-3:], (198, 215, 256))


def test_ancestral_grids():
  np.testing.assert_allclose(schedules.visible('uniform', 4), (0, .25, .5, .75, 1))
  np.testing.assert_allclose(
      schedules.visible('cosine', 4), (0, .07612047, .29289322, .61731657, 1), atol=1e-8)
  for grid in ('uniform', 'cosine'):
    for steps in (1, 4, 9):
      chance = schedules.unmasking(grid, steps)
      np.testing.assert_allclose(
          np.cumprod(1 - chance), 1 - schedules.visible(grid, steps)[1:], atol=1e-6)
      assert chance[-1] == 1.0


def guidance(name, scale, steps, **options):
  return schedules.guidance(name, scale, schedules.progress(jnp.arange(steps), steps), **options)


def test_guidance_schedules():
  np.testing.assert_allclose(guidance('constant', 3.0, 4), (3, 3, 3, 3))
  np.testing.assert_allclose(guidance('linear', 5.0, 4), (1, 2, 3, 4))
  np.testing.assert_allclose(
      guidance('power_cosine', 3.0, 4), (1, 1.29289322, 2, 2.70710678), rtol=1e-6)
  np.testing.assert_allclose(guidance('power_cosine', 3.0, 4, power=0.0), (3, 3, 3, 3))
  np.testing.assert_allclose(guidance('interval', 3.0, 4, start=0.25, stop=0.75), (1, 3, 3, 1))
  for name in ('constant', 'linear', 'power_cosine', 'interval'):
    np.testing.assert_array_equal(guidance(name, 1.0, 5), np.ones(5))
    one = guidance(name, 2.5, 1)  # i / (T - 1) would be NaN here
    assert np.all(np.isfinite(one))
    traced = jax.jit(lambda s, p, name=name: guidance(name, s, 6, power=p))(2.5, 2.0)
    np.testing.assert_allclose(traced, guidance(name, 2.5, 6, power=2.0), rtol=1e-6)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match='cosine'):
    schedules.named('cosin')
  with pytest.raises(ValueError, match='arccos'):
    schedules.ratio('sine', np.ones(2))
  with pytest.raises(ValueError, match='power_cosine'):
    guidance('ramp', 2.0, 4)
  with pytest.raises(ValueError, match='at least 1'):
    schedules.remaining('cosine', 0, jnp.array(4))
