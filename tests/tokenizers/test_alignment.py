"""REPA: minus the cosine, whose gradient reaches the decoder and leaves the teacher alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.launch import state as states
from smalti.networks.classifier import ClassifierConfig
from smalti.networks.flow import FlowTransformer, lean
from smalti.networks.teacher import ClassifierPatches
from smalti.tokenizers.alignment import FEATURES, Alignment, AlignmentConfig
from smalti.tokenizers.flexible import FlexTokConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.scalar import FSQConfig

BLOCKS = dataclasses.replace(lean(3, 16, head=8), remat=False)
CONFIG = FlexTokConfig(
    image_size=(8, 8), channels=3, patch=4, registers=2, encoder=lean(1, 16, head=8),
    decoder=BLOCKS, quantizer=FSQConfig(levels=(5, 5)),
    alignment=AlignmentConfig(teacher='cifar10', block=2, hidden=32),
    weights=LossWeights(alignment=0.25))


class Rows(nnx.Module):
  """Features that are an image's own numbers."""

  def __init__(self):
    self.kernel = nnx.Param(jax.random.normal(jax.random.key(3), (192, 4 * 128)))

  def __call__(self, x, grid):
    assert grid == (2, 2)
    return (x.reshape(len(x), -1) @ self.kernel[...]).reshape(len(x), 4, 128)


def batch(count=6):
  x = jax.random.uniform(jax.random.key(0), (count, 8, 8, 3), minval=-1, maxval=1)
  return {'image': x, 'teacher': Rows()}


def loss(model, rows):
  return model.loss(rows, step=jnp.array(0), key=jax.random.key(1))


def test_minus_one_is_aligned_and_the_mean_is_over_tokens():
  head = Alignment(AlignmentConfig(teacher='mnist', hidden=8), 16, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (3, 5, 16))
  y = x
  for layer in head.layers[:-1]:
    y = jax.nn.silu(layer(y))
  y = np.asarray(head.layers[-1](y), np.float64)
  np.testing.assert_allclose(head(x, 7.0 * y.astype(np.float32)), -1, atol=1e-5)
  other = np.random.default_rng(0).normal(size=y.shape)
  cosine = (y * other).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(other, axis=-1)
  np.testing.assert_allclose(head(x, other.astype(np.float32)), -cosine.mean(), atol=1e-6)


def test_the_loss_has_the_weighted_term_and_the_teacher_no_gradient():
  model, rows = CONFIG.build(rngs=nnx.Rngs(0)), batch()
  plain = dataclasses.replace(CONFIG, alignment=None).build(rngs=nnx.Rngs(0))
  with_term, aux = loss(model, rows)
  without, _ = loss(plain, {'image': rows['image']})
  np.testing.assert_allclose(
      with_term, without + 0.25 * aux['metrics']['alignment'], rtol=1e-6)

  graph, state = nnx.split(rows['teacher'])

  @jax.jit
  def gradients(params, state):
    return jax.grad(lambda params, state: loss(
        structure.merge(params, buffers),
        {**rows, 'teacher': nnx.merge(graph, state)})[0], argnums=(0, 1))(params, state)

  structure = states.Structure.of(model)
  params, buffers = structure.split(model)
  ours, theirs = gradients(params, state)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(theirs))
  # at initialisation all gates are shut: the term moves the perceptron and what leads to the block
  assert all(np.any(leaf) for leaf in jax.tree.leaves(ours['alignment']))
  assert np.any(jax.tree.leaves(ours['decoder']['input'])[0])


def test_a_tap_leaves_the_velocity_as_it_is():
  flow = FlowTransformer(BLOCKS, grid=(2, 2), features=5, registers=3, rngs=nnx.Rngs(0))
  for i, part in enumerate((flow.head, flow.transformer.modulation,
                            flow.transformer.blocks.modulation)):  # as after training
    part.kernel[...] = 0.3 * jax.random.normal(jax.random.key(i), part.kernel.shape)
  given = (jax.random.normal(jax.random.key(4), (2, 4, 5)),
           jax.random.normal(jax.random.key(5), (2, 3, 16)), jnp.array([0.2, 0.7]))
  whole = flow(*given)
  states = flow.transformer.hidden(
      flow._begin(*given)[0], blocks=(1, 2), modulation=flow.time(given[2]))
  for block, state in zip((1, 2), states):
    velocity, hidden = flow.tapped(*given, block)
    np.testing.assert_allclose(velocity, whole, atol=1e-5)
    np.testing.assert_allclose(hidden, state[:, :4], atol=1e-5)
  with pytest.raises(ValueError, match='part='):
    flow.tapped(*given, 0)


def test_a_released_tokenizer_has_no_perceptron():
  released = CONFIG.released()
  assert released.alignment is None and CONFIG.alignment is not None
  structure = states.Structure.of(CONFIG.build(rngs=nnx.Rngs(0)))
  params, _ = structure.split(CONFIG.build(rngs=nnx.Rngs(0)))
  kept, _ = states.Structure.of(released.build(rngs=nnx.Rngs(0))).split(
      released.build(rngs=nnx.Rngs(0)))
  assert set(params) - set(states.released(params)) == {'alignment'}
  assert jax.tree.structure(states.released(params)) == jax.tree.structure(kept)


@pytest.mark.parametrize('changes,message', [
    (dict(alignment=AlignmentConfig(block=3)), 'block=3 must be a block before the last of'),
    (dict(alignment=AlignmentConfig(block=0)), 'block=0'),
    (dict(alignment=AlignmentConfig(teacher='clip', block=1)), "teacher='clip' must be one of")])
def test_what_cannot_be_aligned_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes).build(rngs=nnx.Rngs(0))


def test_training_without_the_teacher_is_refused():
  with pytest.raises(ValueError, match='needs a frozen network in the batch'):
    loss(CONFIG.build(rngs=nnx.Rngs(0)), {'image': batch()['image']})


def test_features_of_a_classifier_are_those_of_its_last_level_at_the_grid():
  classifier = ClassifierConfig(image_size=(8, 8), width=32, multipliers=(1, 4), blocks=1).build(
      rngs=nnx.Rngs(0))
  patches, x = ClassifierPatches(classifier), batch(2)['image']
  assert patches.width == FEATURES['cifar10'] == 128
  last = classifier.taps(x)[-1]  # at 2 x 2
  np.testing.assert_allclose(patches(x, (2, 2)), last.reshape(2, 4, 128), atol=1e-6)
  finer = np.asarray(patches(x, (4, 4))).reshape(2, 4, 4, 128)
  np.testing.assert_allclose(finer[:, 0, 0], last[:, 0, 0], atol=1e-5)
  np.testing.assert_allclose(
      finer[:, 1, 0], 0.75 * last[:, 0, 0] + 0.25 * last[:, 1, 0], atol=1e-5)
  grey = x[..., :1]
  np.testing.assert_array_equal(patches(grey, (2, 2)), patches(jnp.repeat(grey, 3, 3), (2, 2)))
