"""Perceptual distances: trunks of the published shapes, the laws of the head, layers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks import perceptual
from smalti.networks.classifier import ClassifierConfig
from smalti.networks.convnet import space_to_depth
from smalti.networks.perceptual import CHANNELS, ClassifierTaps, Judge, Perceptual, Trunk


@pytest.mark.parametrize(('net', 'count', 'sides'), [
    ('vgg', 14_714_688, (64, 32, 16, 8, 4)),
    ('alex', 2_469_696, (15, 7, 3, 3, 3)),
    ('squeeze', 722_496, (31, 15, 7, 3, 3, 3, 3)),
])
def test_trunks_of_the_published_shapes(net, count, sides):
  """Parameters of torchvision's `features`, and taps at 64 pixels."""
  graph, state = nnx.split(nnx.eval_shape(lambda: Trunk(net, rngs=nnx.Rngs(0))))
  assert sum(int(np.prod(leaf.shape)) for _, leaf in nnx.to_flat_state(state)) == count
  taps = jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, jnp.zeros((2, 64, 64, 3)))
  assert [tap.shape for tap in taps] == [(2, n, n, c) for n, c in zip(sides, CHANNELS[net])]
  heads = nnx.eval_shape(lambda: Perceptual(net, rngs=nnx.Rngs(0))).heads
  assert tuple(head.scale.shape[0] for head in heads) == CHANNELS[net]


def taps(random, batch=3):
  return [jnp.asarray(random.normal(size=(batch, 4, 5, c)), jnp.float32) for c in (6, 9)]


def test_laws_of_the_head():
  random = np.random.default_rng(0)
  x, y = taps(random), taps(random)
  heads = [jnp.asarray(random.uniform(size=c), jnp.float32) for c in (6, 9)]
  d = perceptual.compare(x, y, heads)
  assert d.shape == (3,) and (d > 0).all()
  np.testing.assert_array_equal(perceptual.compare(x, x, heads), np.zeros(3))
  np.testing.assert_array_equal(perceptual.compare(y, x, heads), d)
  # only directions count
  np.testing.assert_allclose(perceptual.compare([3 * t for t in x], y, heads), d, rtol=1e-5)
  # from nothing, what remains is the weighted sum of normalised squares
  zero = [jnp.zeros_like(t) for t in x]
  want = sum((np.square(t) / np.square(t).sum(-1, keepdims=True) @ np.asarray(w)).mean((1, 2))
             for t, w in zip(map(np.asarray, x), heads))
  np.testing.assert_allclose(perceptual.compare(x, zero, heads), want, rtol=1e-5)
  # with even weights that sum to one, opposite directions are at 4 / channels
  np.testing.assert_allclose(
      perceptual.compare(x[:1], [-x[0]], [jnp.full(6, 1 / 6)]), np.full(3, 4 / 6), rtol=1e-5)


def test_gradients_at_silent_pixels_are_finite():
  x = jnp.zeros((1, 2, 2, 3)).at[0, 0, 0, 0].set(1.0)
  gradient = jax.grad(lambda x: jnp.sum(perceptual.unit(x) ** 2))(x)
  assert jnp.isfinite(gradient).all()
  np.testing.assert_allclose(perceptual.unit(x), x)


def test_the_trunk_is_its_definition():
  """AlexNet's first stage by hand, with the shift and scale of its input."""
  graph, state = nnx.split(nnx.eval_shape(lambda: Trunk('alex', rngs=nnx.Rngs(0))))
  random = np.random.default_rng(0)
  state = jax.tree.map(
      lambda leaf: jnp.asarray(random.normal(0, 0.05, leaf.shape), jnp.float32), state)
  x = jnp.asarray(random.uniform(-1, 1, (1, 35, 35, 3)), jnp.float32)
  features = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, x)
  first = nnx.merge(graph, state).stages[0][0]
  z = (np.asarray(x[0], np.float64) - perceptual.SHIFT) / perceptual.SCALE
  z = np.pad(z, ((2, 2), (2, 2), (0, 0)))
  want = np.einsum('hwi,hwio->o', z[4:15, 8:19], first.kernel[...])  # stride 4: row 1, column 2
  np.testing.assert_allclose(
      features[0][0, 1, 2], np.maximum(want + np.asarray(first.bias[...]), 0), atol=1e-4)


def test_pools():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 7, 2)), jnp.float32)
  for pool, size, rows, columns in ((perceptual._HALF, 2, 4, 3), (perceptual._OVERLAPPING, 3, 3, 3),
                                    (perceptual._PARTIAL, 3, 4, 3)):
    got = pool(x)
    assert got.shape == (1, rows, columns, 2)
    for i in range(rows):
      for j in range(columns):
        want = np.asarray(x)[0, 2 * i:2 * i + size, 2 * j:2 * j + size].max((0, 1))
        np.testing.assert_array_equal(got[0, i, j], want)


def test_refusals():
  with pytest.raises(ValueError, match="net='resnet' must be one of vgg, alex, squeeze"):
    Trunk('resnet', rngs=nnx.Rngs(0))
  graph, state = nnx.split(nnx.eval_shape(lambda: Trunk('alex', rngs=nnx.Rngs(0))))
  with pytest.raises(ValueError, match='31 x 40 are too small'):
    jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, jnp.zeros((1, 31, 40, 3)))


def test_a_judge_of_a_classifier_pulls_the_second_image_alone_at_any_size():
  classifier = ClassifierConfig(
      image_size=(8, 8), width=4, multipliers=(1, 2), patch=2).build(rngs=nnx.Rngs(0))
  judge = Judge('perceptual_net', ClassifierTaps(classifier))
  random = np.random.default_rng(0)
  x, y = (jnp.asarray(random.uniform(-1, 1, (2, 12, 8, 1)), jnp.float32) for _ in range(2))

  @jax.jit
  def run(x, y):
    x3, y3 = jnp.repeat(x, 3, 3), jnp.repeat(y, 3, 3)
    z = classifier.input(space_to_depth(x3, 2))
    first = classifier.levels[0].blocks[0](z, key=None, train=False)
    want = perceptual.compare(classifier.taps(x3), classifier.taps(y3), [jnp.ones(4), jnp.ones(8)])
    pulled = jax.grad(lambda x, y: jnp.sum(judge(x, y)), argnums=(0, 1))(x, y)
    return judge(x, y), want, pulled, classifier.taps(x3), first, judge(x, x)

  got, want, (none, pull), taps, first, same = run(x, y)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert (got > 0).all() and not same.any()
  assert not none.any() and pull.any()
  np.testing.assert_allclose(taps[0], first, atol=1e-6)
  assert [tap.shape for tap in taps] == [(2, 6, 4, 4), (2, 3, 2, 8)]
  with pytest.raises(ValueError, match='multiple of 4'):
    classifier.taps(jnp.zeros((1, 10, 8, 3)))
