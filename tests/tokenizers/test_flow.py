"""Rectified flow against its closed forms: one image, a Gaussian; guidance, times and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from smalti.generators.generator import example_keys
from smalti.tokenizers.flow import (
    FlowSettings,
    by_level,
    draw_noise,
    draw_times,
    euler,
    guide,
    mix,
)

MEAN, DEVIATION = 1.5, 0.5


def of_gaussian(x, t):
  """E[eps - x | x_t] of x ~ N(MEAN, DEVIATION^2)."""
  t, s = t[:, None], DEVIATION**2
  slope = (t - (1 - t) * s) / (t**2 + (1 - t) ** 2 * s)
  return -MEAN + slope * (x - (1 - t) * MEAN)


@functools.partial(jax.jit, static_argnums=(0, 3))
def follow(field, noise, settings, null=None):
  return euler(field, noise, settings, null)


@pytest.mark.parametrize('steps', [1, 7])
@pytest.mark.parametrize('shift', [1.0, 3.0])
def test_the_field_of_one_image_leads_to_it_in_any_steps(steps, shift):
  image = jax.random.normal(jax.random.key(0), (4, 3))

  def field(x, t):
    return (x - image) / t[:, None, None]  # eps - image, since x = t eps + (1 - t) image

  noise = jax.random.normal(jax.random.key(1), (5, 4, 3))
  np.testing.assert_allclose(field(mix(jnp.broadcast_to(image, noise.shape), noise,
                                       jnp.full(5, .3)), jnp.full(5, .3)), noise - image, atol=1e-5)
  found = follow(field, noise, FlowSettings(steps=steps, shift=shift))
  np.testing.assert_allclose(found, jnp.broadcast_to(image, found.shape), atol=1e-5)


def test_the_least_squares_velocity_is_the_closed_form_of_a_gaussian():
  keys = jax.random.split(jax.random.key(2), 2)
  x = MEAN + DEVIATION * jax.random.normal(keys[0], (400_000, 1))
  noise = jax.random.normal(keys[1], x.shape)
  for t in (.1, .5, .9):
    time = jnp.full(len(x), t)
    mixed = np.asarray(mix(x, noise, time))
    slope, offset = np.polyfit(mixed[:, 0], np.asarray(noise - x)[:, 0], 1)
    places = jnp.array([[0.0], [2.0]])
    np.testing.assert_allclose(
        of_gaussian(places, time[:2])[:, 0], offset + slope * places[:, 0], atol=.02)


def test_euler_carries_noise_to_the_gaussian_with_an_error_of_first_order():
  noise = jnp.array(stats.norm.ppf((np.arange(200) + .5) / 200), jnp.float32)[:, None]
  want = MEAN + DEVIATION * noise  # the flow is monotone: it maps quantiles to quantiles
  errors = [float(jnp.abs(follow(of_gaussian, noise, FlowSettings(steps=n)) - want).mean())
            for n in (25, 50, 100)]
  assert errors[2] < .02 and errors[0] / errors[1] == pytest.approx(2, rel=.15)
  assert errors[1] / errors[2] == pytest.approx(2, rel=.15)


@pytest.mark.parametrize('law, location', [
    ('logit_normal', 0.0), ('logit_normal', 1.5), ('uniform', 0.0)])
def test_times_follow_their_law(law, location):
  cdf = {'uniform': stats.uniform.cdf, 'logit_normal': lambda t: stats.norm.cdf(
      np.log(t / (1 - t)) - location)}[law]
  t = np.asarray(draw_times(jax.random.key(0), 20_000, law, location=location))
  assert stats.kstest(t, cdf).pvalue > 1e-3
  even = np.asarray(draw_times(jax.random.key(1), 64, law, location=location, stratified=True))
  np.testing.assert_array_equal(np.floor(cdf(even) * 64 + 1e-4), np.arange(64))
  with pytest.raises(ValueError, match='must be logit_normal or uniform'):
    draw_times(jax.random.key(0), 2, 'cosine')


def test_noise_is_each_examples_own():
  keys = example_keys(3, jnp.arange(6))
  noise = draw_noise(keys, (5, 4))
  np.testing.assert_array_equal(noise[2:4], draw_noise(keys[2:4], (5, 4)))
  assert len(np.unique(noise)) == noise.size
  assert stats.kstest(np.asarray(draw_noise(keys, (2000,))).ravel(), 'norm').pvalue > 1e-3


def vectors():
  keys = jax.random.split(jax.random.key(5), 3)
  return [jax.random.normal(key, (3, 4, 5)) for key in keys]


def flat_dot(a, b):
  return np.sum(np.asarray(a) * np.asarray(b), (1, 2))


def test_projected_guidance_is_what_its_equations_say():
  conditional, null, before = vectors()
  settings = FlowSettings(guidance=3.0, momentum=-.5, threshold=2.5)
  got, running = guide(conditional, null, before, settings)
  added = np.asarray(got - conditional)
  np.testing.assert_allclose(flat_dot(added, conditional), 0, atol=1e-4)  # orthogonal
  # twenty lines of numpy, in float64
  c, n, b = (np.asarray(v, np.float64) for v in (conditional, null, before))
  want = c - n - .5 * b
  np.testing.assert_allclose(running, want, atol=1e-6)  # kept as it was before the cut
  length = np.linalg.norm(want.reshape(3, -1), axis=-1)
  assert length.min() > 2.5
  want = want * (2.5 / length)[:, None, None]
  unit = c / np.linalg.norm(c.reshape(3, -1), axis=-1)[:, None, None]
  want -= (want * unit).sum((1, 2), keepdims=True) * unit
  np.testing.assert_allclose(added, 2 * want, atol=1e-5)
  # short differences are not stretched to the threshold
  loose = FlowSettings(guidance=2.0, momentum=0.0, threshold=1e3)
  added = guide(conditional, null, before, loose)[0] - conditional
  full = c - n
  want = full - (full * unit).sum((1, 2), keepdims=True) * unit
  np.testing.assert_allclose(added, want, atol=1e-5)


@pytest.mark.parametrize('projected', [True, False])
def test_guidance_of_one_is_none_bit_for_bit(projected):
  conditional, null, before = vectors()
  settings = FlowSettings(guidance=1.0, projected=projected)
  np.testing.assert_array_equal(guide(conditional, null, before, settings)[0], conditional)


def test_plain_guidance_extrapolates():
  conditional, null, before = vectors()
  got, _ = guide(conditional, null, before, FlowSettings(guidance=2.0, projected=False))
  np.testing.assert_allclose(got, null + 2.0 * (conditional - null), atol=1e-6)


def test_guidance_is_followed_and_its_strength_is_no_new_program():
  noise = jax.random.normal(jax.random.key(1), (2, 6))
  programs = []

  def away(x, t):
    programs.append(t)
    return x + 1.0

  def drift(x, t):
    return x

  plain = follow(drift, noise, FlowSettings(steps=4))
  guided, counts = [], []
  for w in (1.0, 2.0, 4.0):
    guided.append(follow(drift, noise, FlowSettings(steps=4, guidance=w), away))
    counts.append(len(programs))
  assert counts[0] == counts[1] == counts[2] > 0
  np.testing.assert_allclose(guided[0], plain, atol=1e-6)
  assert np.abs(guided[1] - plain).max() < np.abs(guided[2] - plain).max()
  with pytest.raises(ValueError, match='train with null > 0'):
    euler(drift, noise, FlowSettings(guidance=2.0))
  with pytest.raises(ValueError, match='1 or more'):
    FlowSettings(steps=0)


def test_errors_by_noise_level_are_of_the_quarters_of_the_batch():
  t = jnp.array([.9, .1, .5, .3, .7, .2, .8, .4])
  means = by_level(t, t)
  np.testing.assert_allclose(list(means.values()), [.15, .35, .6, .85], rtol=1e-6)
  assert list(means) == ['velocity_1of4', 'velocity_2of4', 'velocity_3of4', 'velocity_4of4']
  assert not by_level(t[:3], t[:3])
