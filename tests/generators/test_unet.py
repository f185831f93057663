"""A U-Net as the network of a masked model: the laws of `Masked` hold for levels of pixels."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smalti.generators.generator import example_keys, generate
from smalti.generators.masked import MaskedSettings
from smalti.generators.unet import MaskedUNetConfig
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

PAIR = TokenSpec(grid=(1, 2), vocab=(3, 2))  # alphabets may differ
PIXELS = TokenSpec(grid=(4, 4), vocab=(256,) * 3)
BODIES = {'attention': None,
          'transformer': TransformerConfig(layers=1, width=16, heads=2, axes=0, remat=False)}
COUNTS = 8000
STEPS = 400


def config(**options):
  return MaskedUNetConfig(**dict(width=8, blocks=1, remat=False, dropout=0.0) | options)


def loud(model):
  """With a network that says something: no parameter is zero."""
  rng = np.random.default_rng(1)
  nnx.update(model, jax.tree.map(
      lambda leaf: leaf + np.float32(.3) * rng.normal(size=leaf.shape).astype(np.float32),
      nnx.state(model, nnx.Param)))
  return model


@functools.cache
def build(spec, body='attention'):
  return loud(config(transformer=BODIES[body]).build(spec, rngs=nnx.Rngs(0)))


logits = jax.jit(lambda model, codes, masked, labels=None: model.scores(codes, masked, labels))


@functools.cache
def truth():
  """All arrays of PAIR [x, 4], and log p of each in each of the 24 orders [24, x]."""
  model = build(PAIR)
  codes = np.array(list(itertools.product(*map(range, PAIR.vocab * 2))), np.int32)
  known = {}
  for mask in itertools.product((False, True), repeat=4):
    log = jax.nn.log_softmax(logits(model, codes, np.broadcast_to(mask, codes.shape)))
    known[mask] = np.take_along_axis(np.asarray(log), codes[..., None], -1)[..., 0]
  rows = []
  for order in itertools.permutations(range(4)):
    hidden, total = [True] * 4, 0
    for i in order:
      total = total + known[tuple(hidden)][:, i]
      hidden[i] = False
    rows.append(total)
  return codes, np.array(rows)


def test_every_order_is_a_distribution_and_the_bound_their_mean():
  codes, orders = truth()
  np.testing.assert_allclose(np.exp(orders).sum(1), 1, atol=1e-5)
  assert np.abs(orders[0] - orders[-1]).max() > .1  # the orders differ
  bound = build(PAIR).elbo({'tokens': codes.reshape(-1, 2, 2)}, mode='enumerate')
  np.testing.assert_allclose(bound, orders.mean(0), atol=1e-5)


def test_first_hitting_draws_the_mixture_of_all_orders(fits):
  codes, orders = truth()
  sample = generate(build(PAIR), None, keys=example_keys(0, jnp.arange(COUNTS)),
                    settings=MaskedSettings(sampler='first_hitting'))
  sizes = PAIR.vocab * 2
  drawn = np.asarray(sample.tokens).reshape(COUNTS, 4)
  counts = np.bincount(np.ravel_multi_index(tuple(drawn.T), sizes), minlength=len(codes))
  law = np.exp(orders).mean(0)
  assert fits(counts, law)
  one = [law.reshape(sizes).sum(tuple(set(range(4)) - {i})) for i in range(4)]
  assert not fits(counts, functools.reduce(np.multiply.outer, one).reshape(-1))  # the control


def test_the_bound_of_a_uniform_model_is_eight_bits_per_level():
  body = BODIES['transformer']
  model = config(transformer=body).build(PIXELS, rngs=nnx.Rngs(0))  # the head is zero
  batch = {'tokens': jax.random.randint(jax.random.key(0), (2, 16, 3), 0, 256)}
  bound = model.elbo(batch, key=jax.random.key(1), samples=2)
  np.testing.assert_allclose(bound, -48 * np.log(256), rtol=1e-5)
  _, aux = model.loss(batch, step=jnp.array(0), key=jax.random.key(1), train=False)
  np.testing.assert_allclose(aux['metrics']['bits_per_token'], 8, rtol=1e-5)
  assert aux['weight'] == 2 * 48


@pytest.mark.parametrize('body', BODIES)
def test_the_network_reads_the_visible_levels_and_no_others(body):
  model = build(PIXELS, body)
  codes = jax.random.randint(jax.random.key(0), (2, 48), 0, 256)
  masked = jax.random.bernoulli(jax.random.key(1), .5, codes.shape)
  expected = logits(model, codes, masked)
  np.testing.assert_array_equal(
      expected, logits(model, jnp.where(masked, 255 - codes, codes), masked))
  # one visible level, in one channel of one pixel, is read at every pixel
  place = int(jnp.argmax(~masked[0]))
  other = logits(model, codes.at[0, place].set((codes[0, place] + 128) % 256), masked)
  moved = np.abs(other - expected).reshape(2, 16, -1).max(-1)
  assert moved[0].min() > 1e-6 and not moved[1].any()


def test_channels_of_a_pixel_are_told_apart():
  model = build(PIXELS)
  codes = jnp.zeros((1, 48), jnp.int32)
  seen = [logits(model, codes, jnp.arange(48)[None] != place) for place in range(3)]
  assert min(np.abs(seen[0] - seen[1]).max(), np.abs(seen[1] - seen[2]).max()) > .01


def test_columns_of_a_channel_are_its_own():
  """The bias of the last convolution is one row of columns per channel."""
  model = config().build(PIXELS, rngs=nnx.Rngs(0))
  model.unet.output.bias[...] = jnp.arange(768.0)
  got = logits(model, jnp.zeros((1, 48), jnp.int32), jnp.ones((1, 48), bool))
  np.testing.assert_array_equal(got.reshape(16, 768), np.tile(np.arange(768.0), (16, 1)))


@pytest.mark.parametrize('sampler', ['ancestral', 'halton'])
def test_known_levels_come_back(sampler):
  spec = TokenSpec(grid=(2, 2), vocab=(4,) * 3)
  known = jax.random.randint(jax.random.key(0), (8, 4, 3), 0, 4)
  mask = jax.random.bernoulli(jax.random.key(1), .5, known.shape)
  sample = generate(build(spec), None, keys=example_keys(0, jnp.arange(8)), known=known,
                    known_mask=mask, settings=MaskedSettings(sampler=sampler, steps=3))
  np.testing.assert_array_equal(np.where(mask, sample.tokens, 0), np.where(mask, known, 0))
  assert np.all((0 <= sample.tokens) & (sample.tokens < 4))


def test_labels_modulate_and_guidance_of_one_is_conditional():
  body = TransformerConfig(layers=1, width=16, heads=2, axes=0, modulated=True, remat=False)
  model = loud(config(transformer=body, classes=2).build(
      TokenSpec(grid=(2, 2), vocab=(4,)), rngs=nnx.Rngs(0)))
  codes, masked = jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 4), bool)
  rows = logits(model, codes, masked, jnp.arange(3))  # the last is the null label
  assert min(np.abs(rows[0] - rows[1]).max(), np.abs(rows[1] - rows[2]).max()) > .01
  np.testing.assert_allclose(
      model._guided(codes[:1], masked[:1], jnp.array([1]), 1.0), rows[1:2], atol=1e-4)
  np.testing.assert_allclose(model._guided(codes[:1], masked[:1], jnp.array([1]), 3.0),
                             rows[2:] + 3 * (rows[1:2] - rows[2:]), atol=1e-4)


@pytest.mark.parametrize('body', BODIES)
def test_gradients_reach_every_kernel_and_are_finite(body):
  model = loud(config(transformer=BODIES[body], remat=True, dropout=.1).build(
      PIXELS, rngs=nnx.Rngs(0)))
  graph, params = nnx.split(model)
  tokens = jax.random.randint(jax.random.key(0), (4, 16, 3), 0, 256)
  gradients = jax.jit(jax.grad(lambda p: nnx.merge(graph, p).loss(
      {'tokens': tokens}, step=jnp.array(0), key=jax.random.key(1))[0]))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    name = jax.tree_util.keystr(path)
    assert np.isfinite(leaf).all(), name
    assert np.abs(leaf).max() > (1e-6 if 'kernel' in name or 'embedding' in name else -1), name


@pytest.mark.slow
def test_training_approaches_the_entropy_of_grey_pixels():
  """Three equal channels of four levels cost log 4 once, in every order; apart, three times."""
  spec = TokenSpec(grid=(2, 2), vocab=(4,) * 3)
  model = config(width=64).build(spec, rngs=nnx.Rngs(0))  # 64: two channels per group of a norm
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
  graph, params = nnx.split(model)

  @jax.jit
  def step(params, moments, i):
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
    grey = jax.random.randint(first, (64, 4, 1), 0, 4)
    gradients = jax.grad(lambda p: nnx.merge(graph, p).loss(
        {'tokens': jnp.tile(grey, 3)}, step=i, key=second)[0])(params)
    updates, moments = optimizer.update(gradients, moments)
    return optax.apply_updates(params, updates), moments

  moments = optimizer.init(params)
  for i in range(STEPS):
    params, moments = step(params, moments, i)
  grey = jax.random.randint(jax.random.key(9), (256, 4, 1), 0, 4)
  nats = -nnx.merge(graph, params).elbo({'tokens': jnp.tile(grey, 3)}, key=jax.random.key(8))
  assert -.05 < float(nats.mean()) / 4 - np.log(4) < .2


def test_refusals_say_why():
  make = functools.partial(MaskedUNetConfig.build, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='grid .16,. has 1 axes'):
    make(config(), TokenSpec(grid=(16,), vocab=(4,)))
  with pytest.raises(ValueError, match='modulated=True needs classes'):
    make(config(transformer=TransformerConfig(layers=1, width=16, heads=2, modulated=True)), PAIR)
  assert not hasattr(build(PAIR), 'hidden')
