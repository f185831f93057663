"""The adversary: losses against their formulas, one backward for two players, LeCAM's averages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks.classifier import ClassifierConfig
from smalti.networks.discriminator import PatchDiscriminatorConfig
from smalti.networks.perceptual import ClassifierTaps, Judge
from smalti.tokenizers import adversary
from smalti.tokenizers.adversary import AdversaryConfig, Lecam, tied
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.quantizer import Statistics, absorb, combine
from smalti.tokenizers.scalar import FSQConfig

SMALL = dict(image_size=(8, 8), channels=1, width=8, multipliers=(1,), patch=2, blocks=1,
             quantizer=FSQConfig(levels=(5, 5)))
PLAYER = dict(discriminator=PatchDiscriminatorConfig(width=8, layers=1))
FIXED = dict(weight=0.3, lecam=0.01, start=2, warm=2)  # felt from step 4 on
ADAPTIVE = dict(weight=0.3, lecam=0.01, adaptive=True)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)


@functools.cache
def player(**fields):
  """A tokenizer split into graph, params, rest; and its jitted step: (loss, aux), gradients."""
  config = AutoencoderConfig(**SMALL, adversary=AdversaryConfig(**PLAYER, **fields))
  split = nnx.split(jax.jit(lambda: config.build(rngs=nnx.Rngs(0)))(), nnx.Param, ...)

  @jax.jit
  def step(params, rest, x, step):
    def loss(params):
      return nnx.merge(split[0], params, rest).loss(
          {'image': x}, step=step, key=jax.random.key(0), train=True)
    return jax.value_and_grad(loss, has_aux=True)(params)

  return *split, step


def sigmoid_loss(logits, target):
  p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  return -np.log(p if target else 1 - p)


def test_losses_are_those_of_the_published_codes():
  real = jax.random.normal(jax.random.key(0), (3, 4))
  fake = 2 * jax.random.normal(jax.random.key(1), (3, 4))
  r, f = np.asarray(real, np.float64), np.asarray(fake, np.float64)
  hinge = 0.5 * (np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean())
  images = sigmoid_loss(r.mean(1), 1).mean() + sigmoid_loss(f.mean(1), 0).mean()
  want = {
      'hinge': (-f.mean(), hinge),
      'vanilla': (-f.mean(), 0.5 * (sigmoid_loss(r, 1).mean() + sigmoid_loss(f, 0).mean())),
      'nonsaturating': (sigmoid_loss(f.mean(1), 1).mean(), images),
      'mixed': (sigmoid_loss(f.mean(1), 1).mean(), hinge)}
  for kind, (generator, discriminator) in want.items():
    np.testing.assert_allclose(adversary.generator_loss(kind, fake), generator, rtol=1e-6)
    np.testing.assert_allclose(
        adversary.discriminator_loss(kind, real, fake), discriminator, rtol=1e-6)


def test_tied_has_the_value_and_the_gradient_it_is_given():
  def f(x):
    return tied(jnp.sum(x['a']) ** 3, (x['a'], x['b']), (jnp.array([1.0, 2.0]), jnp.array(5.0)))

  x = {'a': jnp.array([1.0, 1.0]), 'b': jnp.array(7.0)}
  value, gradient = jax.value_and_grad(lambda x: 2 * f(x))(x)
  assert value == 16
  np.testing.assert_array_equal(gradient['a'], [2, 4])
  assert gradient['b'] == 10


@functools.cache
def separately():
  """The value of each loss, and autodiff of it through the whole model."""
  graph, params, rest, _ = player(**ADAPTIVE)
  stop = jax.lax.stop_gradient

  def terms(params):
    t, x = nnx.merge(graph, params, rest), IMAGES
    y = t.decode_latents(t.quantizer(t.latents(x)).vectors)
    real, fake = t.discriminator.network(x), t.discriminator.network(stop(y))
    own = stop(jnp.stack([jnp.mean(real), jnp.mean(fake)]))  # there are no averages yet
    lecam = jnp.mean(jnp.square(jax.nn.relu(real - own[1]))) + jnp.mean(
        jnp.square(jax.nn.relu(own[0] - fake)))
    margins = jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
    return {'reconstruction': jnp.mean(jnp.square(x - y)),
            'generator': -jnp.mean(t.discriminator.network(y)),
            'discriminator': margins / 2 + 0.01 * lecam}

  values, each = jax.jit(lambda params: (terms(params), jax.jacrev(terms)(params)))(params)
  return values, {name: dict(nnx.to_flat_state(found)) for name, found in each.items()}


@pytest.mark.parametrize('fields', [ADAPTIVE, FIXED], ids=['adaptive', 'fixed'])
def test_one_backward_is_the_gradient_of_both_players(fields):
  """Against autodiff of each loss through the whole model, and the weight by two backwards."""
  _, params, rest, step = player(**fields)
  (loss, aux), got = step(params, rest, IMAGES, 4)
  values, each = separately()
  ours, theirs = (np.linalg.norm(each[name]['decoder', 'output', 'kernel'][...])
                  for name in ('reconstruction', 'generator'))
  weight = 0.3 * (ours / (theirs + 1e-4) if fields is ADAPTIVE else 1)
  np.testing.assert_allclose(aux['metrics']['adversary/weight'], weight, rtol=1e-4)
  np.testing.assert_allclose(
      loss, values['reconstruction'] + weight * values['generator'], rtol=1e-5)
  for path, gradient in nnx.to_flat_state(got):
    if path[0] == 'discriminator':
      want = each['discriminator'][path][...]
    else:
      want = each['reconstruction'][path][...] + weight * each['generator'][path][...]
    scale = max(float(jnp.abs(want).max()), 1e-3)  # biases before an instance norm have none
    np.testing.assert_allclose(gradient[...] / scale, want / scale, atol=1e-4, err_msg=str(path))


def test_the_ratio_is_cut_at_the_limit():
  config = AdversaryConfig(**PLAYER, weight=0.5, limit=1e-3)
  t = AutoencoderConfig(**SMALL, adversary=config).build(rngs=nnx.Rngs(0)).discriminator
  np.testing.assert_allclose(t.weight(0, 0.01), 5e-4, rtol=1e-6)
  np.testing.assert_allclose(t.weight(0, 1e-4), 5e-5, rtol=1e-6)


def test_before_its_start_there_is_no_adversary_and_while_warm_the_generator_is_spared():
  _, params, rest, play = player(**FIXED)
  for step, plays, felt in ((1, False, False), (2, True, False), (3, True, False), (4, True, True)):
    (_, aux), found = play(params, rest, IMAGES, step)
    m = aux['metrics']
    assert bool(m['adversary/weight']) == felt and bool(m['adversary/discriminator']) == plays
    for g in jax.tree.leaves(found['discriminator']):
      assert bool(jnp.any(g != 0)) == plays
    assert bool(aux['statistics']['discriminator']['lecam'].count[0] > 0) == plays


def test_conditional_and_selected_play_agree(monkeypatch):
  def function(x):
    return {'twice': 2 * x, 'count': jnp.int32(7)}

  want = [jax.tree.map(jnp.zeros_like, function(jnp.ones(3))), function(jnp.ones(3))]
  for backend in ('cpu', 'gpu'):
    monkeypatch.setattr(adversary.jax, 'default_backend', lambda backend=backend: backend)
    run = jax.jit(lambda step: adversary.since(5, step, function, jnp.ones(3)))
    for step, expected in zip((4, 5), want):
      jax.tree.map(np.testing.assert_array_equal, run(step), expected)
    monkeypatch.undo()


def test_the_penalty_is_the_squared_slope_at_real_images():
  """Of a linear judge, whose slope is its kernel wherever it is taken."""
  def judge(params, x):
    return x.reshape(x.shape[0], -1) @ params

  params = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
  x = jnp.ones((3, 2, 2, 1))
  value, gradient = jax.value_and_grad(lambda params: adversary.slope(judge, params, x))(params)
  total = np.asarray(params).sum(1)
  np.testing.assert_allclose(value, np.square(total).sum(), rtol=1e-5)
  np.testing.assert_allclose(gradient, np.stack([2 * total] * 2, 1), rtol=1e-5)


def test_the_penalty_reaches_the_discriminator_alone():
  def run(penalty):
    config = AdversaryConfig(**PLAYER, penalty=penalty)
    t = AutoencoderConfig(**SMALL, adversary=config).build(rngs=nnx.Rngs(0)).discriminator
    return jax.jit(lambda t: t.play(IMAGES, 0.5 * IMAGES, 0, jax.random.key(0)))(t)

  plain, steep = run(0.0), run(3.0)
  graph, *parts = nnx.split(AutoencoderConfig(
      **SMALL, adversary=AdversaryConfig(**PLAYER)).build(rngs=nnx.Rngs(0)).discriminator.network)
  extra = jax.jit(jax.grad(lambda params: adversary.slope(
      lambda params, x: nnx.merge(graph, params)(x), params, IMAGES)))(parts[0])
  np.testing.assert_array_equal(plain.push, steep.push)
  for a, b, c in zip(*map(jax.tree.leaves, (plain.gradient, steep.gradient, extra)), strict=True):
    np.testing.assert_allclose(b, a + 3 * c, rtol=1e-4, atol=1e-6)
  assert steep.metrics['adversary/slope'] > 0


def test_both_players_see_augmented_images_and_the_gradient_passes():
  config = AdversaryConfig(**PLAYER, augment='color+translation')
  t = AutoencoderConfig(**SMALL, adversary=config).build(rngs=nnx.Rngs(0)).discriminator
  run = jax.jit(lambda t, key: t.play(IMAGES, 0.5 * IMAGES, 0, key))
  first, second = run(t, jax.random.key(0)), run(t, jax.random.key(1))
  for name in ('adversary/real', 'adversary/fake'):
    assert first.metrics[name] != second.metrics[name]
  assert first.push.shape == IMAGES.shape and bool(jnp.any(first.push != second.push))
  np.testing.assert_array_equal(  # judged as it is where nothing is learned
      t.metrics(IMAGES, IMAGES)['adversary/real'], jnp.mean(t.network(IMAGES)))


def test_evaluation_plays_nothing_and_reports_held_out_logits():
  t = nnx.merge(*player(**FIXED)[:3])

  @jax.jit
  def run(t, x):
    return t.loss({'image': x}, step=0, key=jax.random.key(0), train=False), jnp.mean(
        t.discriminator.network(x))

  (value, aux), real = run(t, IMAGES)
  np.testing.assert_allclose(value, aux['metrics']['reconstruction'], rtol=1e-6)
  assert aux['statistics'] is None
  np.testing.assert_allclose(aux['metrics']['adversary/real'], real, rtol=1e-5)


def statistics(real, fake):
  count = jnp.array([len(real), len(fake)], jnp.float32)
  return Statistics(count, jnp.array([[sum(real)], [sum(fake)]], jnp.float32), jnp.zeros((2, 1)))


def test_averages_start_with_the_first_logits_and_are_global():
  lecam = Lecam(decay=0.9)
  real, fake = jnp.array([[2.0, 4.0]]), jnp.array([[-1.0, 1.0]])
  # its own means stand in: relu(real - 0)^2 and relu(3 - fake)^2
  np.testing.assert_allclose(lecam(real, fake), (4 + 16) / 2 + (16 + 4) / 2)
  lecam.absorb(combine(statistics([2.0], [-1.0]), statistics([4.0], [1.0])))  # two micro-batches
  np.testing.assert_allclose(lecam.average[...], [3, 0])
  lecam.absorb(statistics([13.0, 13.0], [10.0, 10.0]))
  np.testing.assert_allclose(lecam.average[...], [4, 1], rtol=1e-6)
  np.testing.assert_allclose(lecam(real, fake), (1 + 9) / 2 + (25 + 9) / 2, rtol=1e-6)
  lecam.absorb(statistics([], []))  # a step without an adversary
  np.testing.assert_allclose(lecam.average[...], [4, 1], rtol=1e-6)
  assert lecam.count[...] == 2


def test_micro_batches_give_the_same_play():
  """Fixed weight and averages that exist: two halves make the gradients of the whole."""
  graph, params, rest, step = player(**FIXED)
  t = nnx.merge(graph, params, rest)
  absorb(t, {'discriminator': {'lecam': statistics([1.0], [-1.0])}})
  _, _, rest = nnx.split(t, nnx.Param, ...)
  whole = step(params, rest, IMAGES, 4)
  halves = [step(params, rest, IMAGES[i::2], 4) for i in (0, 1)]
  for a, b, c in zip(*(jax.tree.leaves(x[1]) for x in (whole, *halves)), strict=True):
    np.testing.assert_allclose(a, (b + c) / 2, rtol=1e-4, atol=1e-6)
  both = combine(*(x[0][1]['statistics'] for x in halves))['discriminator']['lecam']
  np.testing.assert_allclose(
      both.total, whole[0][1]['statistics']['discriminator']['lecam'].total, rtol=1e-5)


def test_other_weights_start_as_they_would_without_an_adversary():
  plain = jax.jit(lambda: AutoencoderConfig(**SMALL).build(rngs=nnx.Rngs(0)))()
  _, params, _, _ = player(**FIXED)
  theirs = dict(nnx.to_flat_state(params))
  for path, leaf in nnx.to_flat_state(nnx.state(plain)):
    np.testing.assert_array_equal(leaf[...], theirs[path][...])


@pytest.mark.parametrize('fields,message', [
    (dict(weight=-1.0), 'weight=-1.0 must be 0'),
    (dict(decay=1.0), r'decay=1.0 must be in \[0, 1')])
def test_impossible_settings_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    AdversaryConfig(**fields)


def test_a_perceptual_distance_is_a_term_under_the_name_of_its_network():
  classifier = ClassifierConfig(image_size=(8, 8), channels=1, width=4, multipliers=(1,), patch=2)
  judge = Judge('perceptual_net', ClassifierTaps(classifier.build(rngs=nnx.Rngs(3))), channels=1)
  weights = LossWeights(perceptual=0.5)
  t = AutoencoderConfig(**SMALL, perceptual='proxy', weights=weights).build(rngs=nnx.Rngs(0))

  @jax.jit
  def run(t, judge, x):
    y = t.decode_latents(t.quantizer(t.latents(x)).vectors)
    return t.loss({'image': x, 'perceptual': judge}, step=0, key=jax.random.key(0),
                  train=False), jnp.mean(judge(x, y))

  (value, aux), distance = run(t, judge, IMAGES)
  assert 'perceptual' not in aux['metrics']
  np.testing.assert_allclose(aux['metrics']['perceptual_net'], distance, rtol=1e-5)
  np.testing.assert_allclose(
      value, aux['metrics']['reconstruction'] + 0.5 * distance, rtol=1e-5)


def test_a_batch_without_the_network_of_its_perceptual_distance_is_refused():
  t = AutoencoderConfig(**SMALL, perceptual='proxy').build(rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="perceptual='proxy' needs its frozen network"):
    t.loss({'image': IMAGES}, step=jnp.int32(0), key=jax.random.key(0))
