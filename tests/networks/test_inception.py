"""Inception: the published counts and shapes, and the whole chain on weights with known results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks import inception
from smalti.networks.inception import Inception


@pytest.fixture(scope='module')
def abstract():
  return nnx.split(nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0))))


def size(leaves):
  return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def test_the_published_counts(abstract):
  flat = dict(nnx.to_flat_state(abstract[1]))
  kernels = [leaf for path, leaf in flat.items() if path[-1] == 'kernel' and len(leaf.shape) == 4]
  assert (len(kernels), size(kernels)) == (94, 21_751_136)
  for name in ('scale', 'bias', 'mean', 'var'):
    found = [leaf for path, leaf in flat.items() if path[-1] == name and path[0] != 'softmax']
    assert (len(found), size(found)) == (94, 17_216)
  assert size(leaf for path, leaf in flat.items() if path[0] == 'softmax') == 2_065_392
  parameters = [leaf for leaf in flat.values() if isinstance(leaf, nnx.Param)]
  assert size(parameters) == 23_850_960
  assert size(flat.values()) == 23_850_960 + 2 * 17_216


def test_the_shapes_of_the_published_table(abstract):
  graph, state = abstract
  shapes = {}

  def run(state, x):
    net = nnx.merge(graph, state)

    def note(name, x):
      shapes[name] = x.shape[1:]
      return x

    for name in ('conv', 'conv_1', 'conv_2', 'pool', 'conv_3', 'conv_4', 'pool_1', 'mixed',
                 *(f'mixed_{i}' for i in range(1, 11))):
      layer = getattr(net, name, lambda x: inception.max_pool(x, 2, 'VALID'))
      x = note(name, layer(x))

  jax.eval_shape(run, state, jnp.zeros((1, 299, 299, 3)))
  assert shapes == {
      'conv': (149, 149, 32), 'conv_1': (147, 147, 32), 'conv_2': (147, 147, 64),
      'pool': (73, 73, 64), 'conv_3': (73, 73, 80), 'conv_4': (71, 71, 192),
      'pool_1': (35, 35, 192),
      'mixed': (35, 35, 256), 'mixed_1': (35, 35, 288), 'mixed_2': (35, 35, 288),
      'mixed_3': (17, 17, 768), 'mixed_4': (17, 17, 768), 'mixed_5': (17, 17, 768),
      'mixed_6': (17, 17, 768), 'mixed_7': (17, 17, 768), 'mixed_8': (8, 8, 1280),
      'mixed_9': (8, 8, 2048), 'mixed_10': (8, 8, 2048)}
  taps = jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, jnp.zeros((2, 299, 299, 3)))
  assert [tap.shape for tap in taps] == [(2, 2048), (2, 2023), (2, 1008)]


def test_the_average_leaves_padding_out():
  x = jnp.arange(1.0, 13).reshape(1, 3, 4, 1)
  got = inception.average_pool(x)[0, ..., 0]
  np.testing.assert_allclose(got[0, 0], (1 + 2 + 5 + 6) / 4)  # and not / 9
  np.testing.assert_allclose(got[1, 3], (3 + 4 + 7 + 8 + 11 + 12) / 6)
  np.testing.assert_allclose(got[1, 1], np.arange(1, 13).reshape(3, 4)[:, :3].mean())
  np.testing.assert_allclose(inception.average_pool(jnp.full((1, 8, 8, 2), 3.0)), 3.0, rtol=1e-6)


# With kernels that take the mean of all channels at the centre pixel, an activation is a few maps,
# each with a number of channels, and the whole network is written down in a page.

GAIN, MEAN, VAR, BIAS = 1.02, 0.4, 2.0, 0.41


def unit(parts, channels, stride=1, crop=0):
  """relu(normalised mean over channels) of the pixels in the centre of the kernel."""
  x = sum(n * x for n, x in parts) / sum(n for n, _ in parts)
  x = x[crop:x.shape[0] - crop:stride, crop:x.shape[1] - crop:stride]
  return (channels, np.maximum((x - MEAN) * GAIN / np.sqrt(VAR + 1e-3) * np.sqrt(VAR) + BIAS, 0))


def windows(x, stride):
  return [[x[max(i - 1, 0):i + 2, max(j - 1, 0):j + 2] for j in stride(x.shape[1])]
          for i in stride(x.shape[0])]


def pooled(parts, reduce, stride):
  return [(n, np.array([[reduce(w) for w in row] for row in windows(x, stride)])) for n, x in parts]


def every(size):
  return range(size)


def second(size):
  return range(1, size - 1, 2)


def reference(image):
  down = dict(stride=2, crop=1)

  def chain(parts, *channels):
    for n in channels:
      parts = [unit(parts, n)]
    return parts

  x = [unit([(3, image)], 32, **down)]
  x = [unit([unit(x, 32, crop=1)], 64)]
  x = pooled(x, np.max, second)
  x = [unit([unit(x, 80)], 192, crop=1)]
  x = pooled(x, np.max, second)
  for n in (32, 64, 64):
    x = [*chain(x, 64), *chain(x, 48, 64), *chain(x, 64, 96, 96),
         *chain(pooled(x, np.mean, every), n)]
  x = [unit(x, 384, **down), unit(chain(x, 64, 96), 96, **down), *pooled(x, np.max, second)]
  for i, n in enumerate((128, 160, 160, 192)):
    x = [*chain(x, 192), *chain(x, n, n, 192), *chain(x, n, n, n, n, 192),
         *chain(pooled(x, np.mean, every), 192)]
    if i == 2:
      spatial = np.repeat(x[0][1][..., None], 7, -1).reshape(-1)
  x = [unit(chain(x, 192), 320, **down), unit(chain(x, 192, 192, 192), 192, **down),
       *pooled(x, np.max, second)]
  for reduce in (np.mean, np.max):
    x = [*chain(x, 320), *chain(x, 384, 768), *chain(x, 448, 384, 768),
         *chain(pooled(x, reduce, every), 192)]
  return np.concatenate([np.full(n, x.mean()) for n, x in x]), spatial


def test_the_chain_on_weights_with_known_results(abstract):
  graph, state = abstract
  random = np.random.default_rng(0)
  image = random.uniform(0.2, 1, (139, 171))
  head = random.normal(size=(2048, 1008)).astype(np.float32)
  leaves = {'scale': GAIN * np.sqrt(VAR), 'mean': MEAN, 'var': VAR, 'bias': BIAS}

  def fill(path, leaf):
    if path[0] == 'softmax':
      value = head if path[-1] == 'kernel' else np.full(leaf.shape, 99, np.float32)
    elif path[-1] == 'kernel':
      value = np.zeros(leaf.shape, np.float32)
      value[leaf.shape[0] // 2, leaf.shape[1] // 2] = 1 / leaf.shape[2]
    else:
      value = np.full(leaf.shape, leaves[path[-1]], np.float32)
    return leaf.replace(jnp.asarray(value))

  state = nnx.from_flat_state([(path, fill(path, leaf)) for path, leaf in nnx.to_flat_state(state)])
  x = np.repeat(image[None, ..., None], 3, -1).astype(np.float32)
  got = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, x)
  features, spatial = reference(image)
  assert np.ptp(features) > 1e-3  # maxima and means differ
  # dozens of float32 layers one after the other
  np.testing.assert_allclose(got.features[0], features, rtol=1e-4)
  np.testing.assert_allclose(got.spatial[0], spatial, rtol=1e-4)
  np.testing.assert_allclose(got.logits[0], features @ head, atol=1e-3)  # without the bias of 99
