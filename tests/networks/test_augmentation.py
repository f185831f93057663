"""Differentiable augmentation: each change by hand, draws per image, gradients that pass."""

import jax
import jax.numpy as jnp
import numpy as np

from smalti.networks.augmentation import augment, colored, holed, translated


def images(key, batch=64, side=8):
  return jax.random.uniform(key, (batch, side, side, 3), minval=0.5, maxval=1)


def test_colours_change_by_three_numbers_of_each_image(key):
  x = images(key, 4)
  u = np.asarray(jax.random.uniform(jax.random.key(1), (3, 4, 1, 1, 1)))
  y = np.asarray(x) + u[0] - 0.5
  y = y.mean(3, keepdims=True) + 2 * u[1] * (y - y.mean(3, keepdims=True))
  mean = y.mean((1, 2, 3), keepdims=True)
  np.testing.assert_allclose(
      colored(x, jax.random.key(1)), mean + (u[2] + 0.5) * (y - mean), atol=1e-5)


def test_shifts_reach_an_eighth_both_ways_and_bring_zeros(key):
  x = images(key, side=16)
  y = np.asarray(translated(x, jax.random.key(1)))
  seen = set()
  for image, moved in zip(np.asarray(x), y):
    found = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if np.array_equal(
        moved[max(-dy, 0):16 - max(dy, 0), max(-dx, 0):16 - max(dx, 0)],
        image[max(dy, 0):16 + min(dy, 0), max(dx, 0):16 + min(dx, 0)])
        and (moved != 0).sum() == 3 * (16 - abs(dy)) * (16 - abs(dx))]
    assert len(found) == 1
    seen |= set(found)
  assert len(seen) > 15 and {abs(d) for pair in seen for d in pair} == {0, 1, 2}


def test_holes_are_half_as_wide_and_anywhere(key):
  y = np.asarray(holed(images(key), jax.random.key(1)))
  zero = (y == 0).all(3)
  sizes = {(int(z.any(1).sum()), int(z.any(0).sum())) for z in zero}
  assert max(sizes) == (4, 4) and min(min(pair) for pair in sizes) == 2  # cut by the border
  for z in zero:
    assert z.sum() == z.any(1).sum() * z.any(0).sum()  # a rectangle
  assert zero.any(0).all()


def test_gradients_pass_and_none_is_nothing(key):
  x = images(key, 2)
  np.testing.assert_array_equal(augment(x, 'none', key), x)
  y, pull = jax.vjp(jax.jit(lambda x: augment(x, 'color+translation', jax.random.key(2))), x)
  assert y.shape == x.shape
  assert jnp.all(jnp.isfinite(pull(y)[0])) and jnp.any(pull(y)[0] != 0)
  both = augment(x, 'color+translation+cutout', jax.random.key(2))
  np.testing.assert_allclose(both[both != 0], y[both != 0], atol=1e-6)
  assert (both == 0).all(3).sum() > (y == 0).all(3).sum()
