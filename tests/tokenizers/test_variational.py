"""KL-VAE: the divergence in closed form, the stored scale, and what freezing takes away."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.launch import state as states
from smalti.tokenizers.quantizer import absorb, combine
from smalti.tokenizers.variational import VAEConfig, freeze

CONFIG = VAEConfig(image_size=(8, 4), channels=1, features=2, width=8, multipliers=(1, 2))


@functools.cache
def built():
  structure = states.structure(lambda: CONFIG.build(rngs=nnx.Rngs(0)))
  return structure, *jax.jit(lambda: structure.split(CONFIG.build(rngs=nnx.Rngs(0))))()


def vae(scale=1.0):
  structure, params, buffers = built()
  model = structure.merge(*jax.tree.map(jnp.copy, (params, buffers)))
  model.encoder.output.kernel[...] *= scale
  return model


def images():
  return jax.random.uniform(jax.random.key(1), (6, 8, 4, 1), minval=-1, maxval=1)


@functools.partial(jax.jit, static_argnames='train')
def loss(model, x, key=None, train=True):
  return model.loss({'image': x}, step=jnp.int32(0), key=jax.random.key(0) if key is None else key,
                    train=train)


def test_the_divergence_is_that_of_gaussians_summed_over_an_image():
  model, x = vae(scale=2.0), images()
  mean, log_variance = (np.asarray(v, np.float64) for v in model.posterior(x))
  # by quadrature: E_q[log q - log p], each latent on its own grid of +-8 deviations
  u = np.linspace(-8, 8, 2001)
  q = np.exp(-u**2 / 2) / np.sqrt(2 * np.pi)
  z = mean[..., None] + np.exp(log_variance / 2)[..., None] * u
  ratio = -u**2 / 2 - log_variance[..., None] / 2 + z**2 / 2
  want = (q * ratio).sum(-1) * (u[1] - u[0])
  value, aux = loss(model, x)
  metrics = aux['metrics']
  np.testing.assert_allclose(metrics['kl'], want.sum((1, 2, 3)).mean(), rtol=1e-3)
  np.testing.assert_allclose(value, metrics['reconstruction'] + 1e-6 * metrics['kl'], rtol=1e-6)


def test_the_log_variance_is_bounded():
  model = vae()
  model.encoder.output.bias[...] = jnp.array([0.0, 0.0, 1e3, -1e3])
  log_variance = model.posterior(images())[1]
  np.testing.assert_array_equal(log_variance[..., 0], 20)
  np.testing.assert_array_equal(log_variance[..., 1], -30)
  assert np.isfinite(loss(model, images())[0])


def test_training_draws_and_evaluation_does_not():
  model, x = vae(), images()
  first, second = (loss(model, x, jax.random.key(i))[0] for i in range(2))
  assert first != second
  first, second = (loss(model, x, jax.random.key(i), train=False) for i in range(2))
  assert first[0] == second[0] and first[1]['statistics'] is None
  np.testing.assert_array_equal(model.encode_latents(x), model.encode_latents(x))


def test_latents_have_unit_deviation_after_a_step_and_decode_as_they_were():
  model, x = vae(scale=5.0), images()
  assert model.scale() == 1.0
  before, image = model.encode_latents(x), model.decoder(model.posterior(x)[0])
  absorb(model, loss(model, x)[1]['statistics'])
  np.testing.assert_allclose(jnp.std(model.encode_latents(x)), 1, rtol=1e-4)
  np.testing.assert_allclose(model.encode_latents(x), before * model.scale(), rtol=1e-6)
  np.testing.assert_allclose(model.decode_latents(model.encode_latents(x)), image, atol=1e-5)


def test_the_scale_follows_a_change_and_forgets_what_was():
  model, x = vae(scale=5.0), images()
  old = loss(model, x)[1]['statistics']
  new = loss(vae(), x)[1]['statistics']
  absorb(model, old)
  first = float(model.scale())
  absorb(model, jax.tree.map(jnp.zeros_like, old))
  assert model.scale() == first  # nothing seen, nothing forgotten
  for _ in range(500):
    absorb(model, new)
  want = vae()
  absorb(want, new)
  np.testing.assert_allclose(model.scale(), want.scale(), rtol=1e-2)
  assert abs(model.scale() / first - 1) > .1


def test_micro_batches_count_like_the_whole():
  x, (whole, parts) = images(), (vae(), vae())
  absorb(whole, loss(whole, x)[1]['statistics'])
  absorb(parts, combine(*(loss(parts, x[i::2])[1]['statistics'] for i in range(2))))
  np.testing.assert_allclose(whole.scale(), parts.scale(), rtol=1e-5)


def test_gradients_reach_all_parameters():
  structure, params, buffers = built()
  gradients = jax.jit(jax.grad(lambda p: structure.merge(p, buffers).loss(
      {'image': images()}, step=0, key=jax.random.key(0))[0]))(params)
  for path, g in states.paths(gradients).items():
    assert np.any(g != 0), path


def test_a_frozen_vae_is_the_same_function_without_parameters():
  model, x = vae(), images()
  before, names = model.encode_latents(x), states.paths(built()[1]).keys()
  frozen = freeze(model)
  np.testing.assert_array_equal(frozen.encode_latents(x), before)
  params, buffers = states.Structure.of(frozen).split(frozen)
  assert not params and set(states.paths(buffers)) == {*names, 'count', 'total'}


@pytest.mark.parametrize('changes, said', [
    (dict(image_size=(9, 4)), 'multiple of 2'), (dict(attention=(3,)), 'none of the resolutions'),
    (dict(kl=-1.0), 'must be 0 or more')])
def test_what_cannot_be_built_is_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    VAEConfig(**{**dict(image_size=(8, 4), width=8, multipliers=(1, 2)), **changes}).build(
        rngs=nnx.Rngs(0))


def test_other_images_are_refused():
  with pytest.raises(ValueError, match='do not fit image_size'):
    vae().encode_latents(jnp.zeros((1, 4, 8, 1)))
