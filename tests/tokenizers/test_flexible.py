"""FlexTok: what a prefix may depend on, whose noise is whose, and the flow of one image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smalti.generators.generator import example_keys
from smalti.launch import state as states
from smalti.networks.flow import lean
from smalti.tokenizers import tokenizer as jitted
from smalti.tokenizers.bernoulli import BernoulliConfig
from smalti.tokenizers.flexible import FlexTokConfig
from smalti.tokenizers.flow import FlowSettings, draw_noise, mix
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.variational import VAEConfig

CONFIG = FlexTokConfig(
    image_size=(8, 4), channels=1, patch=2, registers=4, encoder=lean(1, 16, head=8),
    decoder=lean(1, 32, head=8), quantizer=FSQConfig(levels=(5, 5)), null=0.2)
LATENT = dataclasses.replace(CONFIG, vae=VAEConfig(
    image_size=(8, 4), channels=1, features=3, width=8, multipliers=(1, 2)), patch=1)
SETTINGS = FlowSettings(steps=2)


@functools.cache
def built(latent=False):
  config = LATENT if latent else CONFIG
  structure = states.structure(lambda: config.build(rngs=nnx.Rngs(0)))

  @jax.jit
  def build():
    model = config.build(rngs=nnx.Rngs(0))
    for i, part in enumerate((model.decoder.transformer.blocks.modulation, model.decoder.head,
                              model.decoder.transformer.modulation)):  # as after training
      flat = 0.3 * jax.random.normal(jax.random.key(i), (part.kernel.size,))
      part.kernel[...] = flat.reshape(part.kernel.shape)
    return structure.split(model)

  return structure, *build()


def tokenizer(latent=False):
  structure, params, buffers = built(latent)
  return structure.merge(*jax.tree.map(jnp.copy, (params, buffers)))


def images(count=3):
  return jax.random.uniform(jax.random.key(1), (count, 8, 4, 1), minval=-1, maxval=1)


def keys(count=3):
  return example_keys(5, jnp.arange(count))


def draw(model, tokens, keep=None, settings=SETTINGS, by=None):
  keep = None if keep is None else jnp.array(keep)
  return jitted.decode(model, tokens, keep=keep, keys=keys() if by is None else by,
                       settings=settings)


def test_codes_that_are_drawn_are_drawn_by_the_keys_of_their_images():
  config = dataclasses.replace(CONFIG, quantizer=BernoulliConfig(bits=5, dim=4, stochastic=True))
  model = jax.jit(lambda: config.build(rngs=nnx.Rngs(0)))()
  tokens = jitted.encode(model, images(), keys=keys())
  np.testing.assert_array_equal(jitted.encode(model, images()[1:], keys=keys()[1:]), tokens[1:])
  assert np.any(np.asarray(jitted.encode(model, images(), keys=keys()[::-1])) != tokens)


@pytest.mark.parametrize('latent', [False, True])
def test_tokens_beyond_keep_are_ignored_bit_for_bit(latent):
  model = tokenizer(latent)
  tokens = jitted.encode(model, images())
  other = (tokens + 1 + jnp.arange(4)[:, None]) % 25
  keep = [1, 2, 4]
  cut = jnp.where(model.spec.mask(jnp.array(keep)), tokens, other)
  kept = draw(model, tokens, keep)
  assert kept.shape == images().shape and np.isfinite(kept).all()
  np.testing.assert_array_equal(kept, draw(model, cut, keep))
  changed = np.abs(kept - draw(model, tokens, [4, 4, 4])).max((1, 2, 3))
  assert changed[0] > 1e-3 and changed[1] > 1e-3 and changed[2] == 0
  # and every one of those kept matters
  for i in range(4):
    moved = draw(model, tokens.at[:, i].set(other[:, i]), [4, 4, 4])
    assert np.all(np.abs(moved - draw(model, tokens, [4, 4, 4])).max((1, 2, 3)) > 1e-4)


def test_a_register_depends_on_those_before_it_alone():
  model = tokenizer()
  tables = np.asarray(model.encoder.registers.embedding[...])
  before = jax.jit(lambda m: m.latents(images()))(model)
  model.encoder.registers.embedding[...] = jnp.asarray(tables).at[2].multiply(-5.0)
  after = jax.jit(lambda m: m.latents(images()))(model)
  moved = np.abs(after - before).max((0, 2))
  assert np.all(moved[:2] == 0) and np.all(moved[2:] > 1e-5)


def test_vectors_before_the_quantizer_stay_within_reach():
  model = tokenizer()
  latents = jax.jit(lambda m: m.latents(images()))
  for scale in (1.0, 1e3):  # weights that grow, or a direction that all registers take
    model.reduce.kernel[...] *= scale
    z = latents(model)
    assert np.sqrt(np.mean(np.square(z), -1)).max() < 2.0 * 1.5 and np.abs(z).max() > .05
  free = dataclasses.replace(CONFIG, reach=None).build(rngs=nnx.Rngs(0))
  free.reduce.kernel[...] *= 1e3
  assert np.abs(latents(free)).max() > 100


def test_noise_belongs_to_its_example():
  model = tokenizer()
  tokens = jitted.encode(model, images())
  together = draw(model, tokens)
  np.testing.assert_allclose(draw(model, tokens[1:2], by=keys()[1:2]), together[1:2], atol=1e-5)
  np.testing.assert_array_equal(draw(model, tokens), together)
  assert np.abs(draw(model, tokens, by=example_keys(6, jnp.arange(3))) - together).max() > 1e-2


def test_decoding_without_keys_is_refused():
  model = tokenizer()
  tokens = jnp.zeros((1, 4, 1), jnp.int32)
  with pytest.raises(ValueError, match='give keys='):
    model.decode(tokens)
  first, second = (model.decode_latents(model.lookup(tokens), settings=SETTINGS) for _ in range(2))
  np.testing.assert_array_equal(first, second)  # zero noise, for tests


def test_guidance_leads_away_from_the_null_condition():
  model = tokenizer()
  tokens = jitted.encode(model, images())
  plain, one, three = (draw(model, tokens, settings=FlowSettings(steps=2, guidance=w, threshold=9.))
                       for w in (None, 1.0, 3.0))
  np.testing.assert_allclose(one, plain, atol=1e-5)
  assert np.abs(three - plain).max() > 1e-3
  # tokens say nothing to an example without any
  null = jnp.ones(3, bool)
  vectors = model.lookup(tokens)
  np.testing.assert_array_equal(model.condition(vectors, None, null),
                                model.condition(-vectors, jnp.array([1, 2, 3]), null))
  untrained = dataclasses.replace(CONFIG, null=0.0).build(rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='train with null > 0'):
    untrained.decode(tokens, keys=keys(), settings=FlowSettings(guidance=2.0))


@pytest.mark.parametrize('schedule, budgets', [
    ('uniform', (1, 2, 3, 4)), ('power', (1, 2, 4)), ('uniform_power', (1, 2, 4))])
def test_the_spec_says_which_prefixes_were_trained(schedule, budgets):
  model = nnx.eval_shape(
      lambda: dataclasses.replace(CONFIG, schedule=schedule).build(rngs=nnx.Rngs(0)))
  assert model.spec.order == 'nested' and model.spec.budgets == budgets


def test_without_a_schedule_there_are_no_prefixes():
  config = dataclasses.replace(CONFIG, schedule=None, mask='full')
  model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
  assert model.spec.order == 'raster' and model.spec.budgets == ()
  with pytest.raises(ValueError, match='no prefixes'):
    model.decode(jnp.zeros((1, 4, 1), jnp.int32), keep=jnp.array([2]), keys=keys(1))


def test_a_vae_gets_no_gradient_and_is_no_parameter():
  structure, params, buffers = built(latent=True)
  assert all(path.startswith('vae/') for path in states.paths(buffers)) and 'vae' not in params
  model = tokenizer(latent=True)
  assert model.frozen == ('vae',) and tokenizer().frozen == ()
  x = images()
  np.testing.assert_allclose(model.patches(x).reshape(3, 4, 2, 3), model.vae.encode_latents(x))
  np.testing.assert_array_equal(model.image(model.patches(x)),
                                model.vae.decode_latents(model.vae.encode_latents(x)))


@pytest.mark.parametrize('changes, said', [
    (dict(patch=3), 'must divide'), (dict(decoder=lean(1, 34)), 'multiple of 4'),
    (dict(null=1.0), 'below 1'), (dict(reach=0.0), 'must be positive'),
    (dict(times='cosine'), 'logit_normal or uniform'),
    (dict(times='uniform', location=1.5), 'is of times=logit_normal'),
    (dict(schedule='half'), 'one of uniform'),
    (dict(vae=VAEConfig(image_size=(8, 8), channels=1)), 'must be those of the vae')])
def test_what_cannot_be_built_is_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(CONFIG, **changes).build(rngs=nnx.Rngs(0))


def test_evaluation_measures_what_tokens_say_at_all_noise():
  model, x = tokenizer(), images(8)
  metrics = jax.jit(lambda m, x: m.loss(
      {'image': x}, step=jnp.int32(0), key=jax.random.key(0), train=False))(model, x)[1]['metrics']
  levels = [float(metrics[f'velocity_{i}of4']) for i in (1, 2, 3, 4)]
  assert np.mean(levels) == pytest.approx(float(metrics['reconstruction']), rel=1e-5)
  assert metrics['psnr'] < 100 and metrics['mse'] > 0


@pytest.mark.parametrize('stratified, train', [(True, True), (False, True), (False, False)])
def test_levels_that_are_spread_are_by_the_strata_of_a_batch(stratified, train):
  model, x, strata = tokenizer(), images(8), jnp.arange(.5, 8) / 8
  model.stratified = stratified
  loss = jax.jit(lambda strata: model.loss(
      {'image': x, 'strata': strata}, step=jnp.int32(0), key=jax.random.key(0), train=train)[0])
  assert loss(strata) == loss(strata + 0)
  assert (abs(loss(strata / 2) - loss(strata)) > 1e-3) == (stratified or not train)


def fit(model_config, x, *, steps, rate):
  """Parameters after Adam on one batch, the loss's own draws every step."""
  structure = states.structure(lambda: model_config.build(rngs=nnx.Rngs(0)))
  params, buffers = jax.jit(lambda: structure.split(model_config.build(rngs=nnx.Rngs(0))))()
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

  def step(carry, key):
    params, moments = carry
    gradients = jax.grad(lambda p: structure.merge(p, buffers).loss(
        {'image': x}, step=jnp.int32(0), key=key)[0])(params)
    updates, moments = optimizer.update(gradients, moments)
    return (optax.apply_updates(params, updates), moments), None

  run = jax.jit(lambda params: jax.lax.scan(
      step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), steps))[0][0])
  return structure.merge(run(params), buffers)


@pytest.mark.slow
def test_the_velocity_of_one_image_is_the_closed_form():
  x = images(1)
  config = dataclasses.replace(CONFIG, decoder=lean(2, 64), times='uniform')
  model = fit(config, jnp.broadcast_to(x, (64, *x.shape[1:])), steps=1500, rate=3e-3)
  patches = jnp.broadcast_to(model.patches(x), (256, *model.patches(x).shape[1:]))
  registers = jnp.broadcast_to(
      model.condition(model.lookup(model.encode(x))), (256, 4, 64))
  noise = draw_noise(example_keys(9, jnp.arange(256)), patches.shape[1:])
  t = jnp.linspace(.05, 1, 256)
  mixed = mix(patches, noise, t)
  want = (mixed - patches) / t[:, None, None]
  got = jax.jit(lambda m: m.decoder(mixed, registers, t))(model)
  error = float(jnp.sqrt(jnp.mean(jnp.square(got - want)) / jnp.mean(jnp.square(want))))
  assert error < .05, error
  # so Euler's method ends at the image, from any noise
  drawn = jitted.decode(model, jnp.repeat(model.encode(x), 3, 0), keys=keys())
  assert np.abs(drawn - x).mean() < .05
