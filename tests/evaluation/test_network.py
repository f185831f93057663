"""A network as an extractor: its own arithmetic, whatever batch, devices or size images have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from smalti.evaluation import features
from smalti.evaluation.network import BATCH, Network, averaged
from smalti.networks.classifier import ClassifierConfig


@pytest.fixture(scope='module')
def network():
  config = ClassifierConfig(
      image_size=(8, 8), channels=3, width=8, multipliers=(1, 2), classes=4)
  return Network('toynet', config, config.build(rngs=nnx.Rngs(0)), 'ab' * 32)


def images(n, side=8, channels=3):
  return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), np.uint8)


def test_it_is_an_extractor_of_features_and_logits(network):
  assert isinstance(network, features.Extractor)
  assert features.identity(network) == f'toynet:{"ab" * 32}:box_8x8'
  assert features.score_name(network) == 'fd_toynet_abababab'
  x = images(5)
  outputs = network(x)
  assert {k: (v.dtype, v.shape) for k, v in outputs.items()} == {
      'features': (np.float32, (5, network.dim)), 'logits': (np.float32, (5, 4))}
  for found, expected in zip(outputs.values(), network.model(x)):
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_do_not_depend_on_the_batch_they_come_in(network):
  x = images(BATCH + 20)
  whole = network(x)
  for cut in (slice(0, 3), slice(BATCH - 1, BATCH + 20)):
    for name, rows in network(x[cut]).items():
      # the last row of a thread's share may take a scalar path, whose rounding is its own
      np.testing.assert_allclose(rows, whole[name][cut], rtol=1e-6)


def test_computation_follows_the_images_over_devices(network):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P('data'))
  x = images(16)
  spread = jax.device_put(x, sharding)
  compiled = network._program.lower(network._weights, spread).compile()
  assert all(s.spec == jax.P('data') for s in jax.tree.leaves(compiled.output_shardings))
  for name, rows in network(spread).items():
    np.testing.assert_allclose(rows, network(x)[name], atol=1e-5)


def test_larger_images_are_averaged_and_grey_ones_repeated(network):
  x = images(3)
  larger = x.repeat(4, 1).repeat(4, 2)
  np.testing.assert_allclose(network(larger)['features'], network(x)['features'], atol=1e-4)
  grey = images(3, channels=1)
  np.testing.assert_array_equal(network(grey)['features'],
                                network(grey.repeat(3, 3))['features'])


def test_averages_are_those_of_areas():
  x = images(1, side=12, channels=1)
  halves = np.asarray(averaged(jnp.asarray(x, jnp.float32), 4, 6))
  expected = x.reshape(1, 4, 3, 6, 2, 1).mean((2, 4))
  np.testing.assert_allclose(halves, expected, rtol=1e-5)
  boxed = np.asarray(Image.fromarray(x[0, ..., 0]).resize((6, 4), Image.Resampling.BOX), float)
  assert np.abs(halves[0, ..., 0] - boxed).max() <= 1  # Pillow rounds, twice
  # a fraction of a pixel counts as a fraction: 12 pixels to 5 are areas of 2.4
  row = np.arange(12.0)
  odd = np.asarray(averaged(jnp.asarray(row[None, None, :, None], jnp.float32), 1, 5))[0, 0, :, 0]
  np.testing.assert_allclose(odd[0], (0 + 1 + 0.4 * 2) / 2.4, rtol=1e-6)
  assert odd.mean() == pytest.approx(row.mean())


def test_what_it_cannot_see_is_refused(network):
  for wrong in (images(2, side=7), images(2).astype(np.float32), images(2, channels=2)):
    with pytest.raises(ValueError, match='must be uint8, 8x8 or larger and grey or colour'):
      network(wrong)
  with pytest.raises(ValueError, match='at least one'):
    network(images(0))


def test_the_untrained_twin_is_another_extractor_of_the_same_shape(network):
  twin, again, other = network.random(1), network.random(1), network.random(2)
  assert twin.name == 'random_toynet' and twin.dim == network.dim
  assert twin.sha256 == again.sha256 and len({network.sha256, twin.sha256, other.sha256}) == 3
  x = images(4)
  np.testing.assert_array_equal(twin(x)['features'], again(x)['features'])
  assert not np.allclose(twin(x)['features'], network(x)['features'])
