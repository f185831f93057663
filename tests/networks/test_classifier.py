"""The classifier: its loss by hand, images that do not see each other, refusals, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smalti.networks.classifier import ClassifierConfig

SMALL = dict(image_size=(8, 8), channels=1, width=8, multipliers=(1, 2), classes=3)


@pytest.fixture(scope='module')
def model():
  return ClassifierConfig(**SMALL).build(rngs=nnx.Rngs(0))


def images(n, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1), np.uint8)


def test_an_image_is_judged_alone_and_by_its_levels(model):
  x = images(5)
  features, logits = model(x)
  assert features.shape == (5, 16) and logits.shape == (5, 3)
  for alone, together in zip(model(x[2:3]), (features, logits)):
    np.testing.assert_allclose(alone[0], together[2], atol=1e-5)
  for floats, levels in zip(model(x / np.float32(127.5) - 1), (features, logits)):
    np.testing.assert_allclose(floats, levels, atol=1e-5)
  np.testing.assert_allclose(
      logits, features @ model.output.kernel[...] + model.output.bias[...], atol=1e-5)


def test_loss_is_cross_entropy_with_a_smoothed_target(model):
  batch = {'image': jnp.asarray(images(6)), 'label': jnp.array([0, 1, 2, 0, 1, 2])}
  value, aux = model.loss(batch, step=0, key=jax.random.key(0), train=False)
  logits = np.asarray(model(batch['image'])[1], np.float64)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  target = np.eye(3)[np.asarray(batch['label'])] * 0.9 + 0.1 / 3
  assert float(value) == pytest.approx(-(target * log_p).sum(1).mean(), rel=1e-5)
  assert float(aux['metrics']['nll']) == pytest.approx(
      -log_p[np.arange(6), batch['label']].mean(), rel=1e-5)
  assert float(aux['metrics']['accuracy']) == pytest.approx(
      (log_p.argmax(1) == np.asarray(batch['label'])).mean())
  assert float(aux['weight']) == 6 and aux['statistics'] is None


def test_it_learns_which_corner_is_lit(model):
  graph, params = nnx.split(model, nnx.Param)
  label = np.arange(48) % 3
  x = images(48) // 2
  for i, (row, column) in enumerate([(0, 0), (0, 4), (4, 0)]):
    x[label == i, row:row + 4, column:column + 4] += 120
  batch = {'image': jnp.asarray(x), 'label': jnp.asarray(label)}
  optimizer = optax.adam(3e-3)

  @jax.jit
  def update(params, moments):
    loss = lambda p: nnx.merge(graph, p).loss(  # noqa: E731
        batch, step=0, key=jax.random.key(0), train=True)[0]
    updates, moments = optimizer.update(jax.grad(loss)(params), moments)
    return optax.apply_updates(params, updates), moments

  moments = optimizer.init(params)
  for _ in range(60):
    params, moments = update(params, moments)
  _, logits = nnx.merge(graph, params)(batch['image'])
  assert float(jnp.mean(jnp.argmax(logits, -1) == batch['label'])) == 1.0


def test_dropout_needs_a_key_in_training_and_is_off_elsewhere():
  model = ClassifierConfig(**SMALL, dropout=0.5).build(rngs=nnx.Rngs(0))
  first, second = (model(images(2), key=jax.random.key(i), train=True)[0] for i in range(2))
  assert not np.allclose(first, second)
  with pytest.raises(ValueError, match='pass key'):
    model(images(2), train=True)
  np.testing.assert_array_equal(model(images(2))[0], model(images(2))[0])


@pytest.mark.parametrize('change, word', [
    (dict(image_size=(10, 8)), 'multiple of 4'), (dict(classes=1), 'classes'),
    (dict(smoothing=1.0), 'smoothing')])
def test_what_cannot_be_built(change, word):
  with pytest.raises(ValueError, match=word):
    ClassifierConfig(**{**SMALL, **change}).build(rngs=nnx.Rngs(0))


def test_other_images_are_refused(model):
  with pytest.raises(ValueError, match='do not fit image_size'):
    model(np.zeros((2, 8, 9, 1), np.uint8))
