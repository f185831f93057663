"""Styled models: one network, three bottlenecks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.launch import state as states
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.latent import LatentConfig
from smalti.tokenizers.styled import StyledConfig, StyledTokenizerConfig
from smalti.tokenizers.tokenizer import Tokenizer
from smalti.tokenizers.vq import VQConfig

NETWORK = dict(image_size=(8, 12), channels=1, patch=2, widths=(4, 8), hidden=8, latents=5)
VECTORS = VQConfig(codes=16, dim=4, update='gradient', init='normal')


def configs():
  return {
      'ae': StyledConfig(**NETWORK),
      'qlae': StyledTokenizerConfig(**NETWORK, quantizer=LatentConfig(latents=5)),
      'vq': StyledTokenizerConfig(**NETWORK, quantizer=VECTORS)}


def shapes(config):
  model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
  return {path: leaf.shape for path, leaf in states.paths(
      states.Structure.of(model).split(model)[0]).items()}


def images(n=4):
  return jax.random.uniform(jax.random.key(3), (n, 8, 12, 1), minval=-1, maxval=1)


def test_only_the_bottleneck_differs():
  ae, qlae, vq = (shapes(config) for config in configs().values())
  assert {k: v for k, v in qlae.items() if k != 'quantizer/codebook'} == ae
  different = {k for k in ae if vq[k] != ae[k]}
  # a vector per latent instead of a number: the layers beside the bottleneck are wider
  assert different == {'encoder/output/kernel', 'encoder/output/bias', 'decoder/style/0/kernel'}
  assert set(vq) == set(qlae)


def test_the_same_seed_gives_the_same_network():
  ae, qlae = (configs()[name].build(rngs=nnx.Rngs(7)) for name in ('ae', 'qlae'))
  np.testing.assert_array_equal(ae.latents(images()), qlae.latents(images()))


def test_an_autoencoder_has_no_tokens():
  ae = configs()['ae'].build(rngs=nnx.Rngs(0))
  assert not isinstance(ae, Tokenizer) and not hasattr(ae, 'spec')
  z = ae.latents(images())
  assert z.shape == (4, 5, 1)
  value, aux = ae.loss({'image': images()}, step=jnp.int32(0), key=jax.random.key(0))
  assert aux['statistics'] is None and aux['weight'] == 4
  assert {'reconstruction', 'mse', 'psnr'} == set(aux['metrics']) and np.isfinite(value)


def test_tokens_are_a_set_of_latents():
  t = configs()['qlae'].build(rngs=nnx.Rngs(0))
  assert t.spec.grid == (5,) and t.spec.vocab == (10,) and t.spec.order == 'set'
  assert t.spec.bits == pytest.approx(5 * math.log2(10))
  assert configs()['vq'].build(rngs=nnx.Rngs(0)).spec.vocab == (16,)


def test_the_reconstruction_is_the_cross_entropy_of_pixels():
  ae = configs()['ae'].build(rngs=nnx.Rngs(0))
  x = images()
  p = (np.asarray(x, np.float64) + 1) / 2
  s = (np.asarray(ae.decode_latents(ae.latents(x)), np.float64) + 1) / 2
  want = -(p * np.log(s) + (1 - p) * np.log(1 - s)).mean()
  got = ae.loss({'image': x}, step=jnp.int32(0), key=jax.random.key(0))[0]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
  assert got >= entropy


def test_terms_are_weighted_by_the_config():
  config = dataclasses.replace(
      configs()['qlae'], weights=LossWeights(reconstruction=2.0, codebook=0.5, commitment=0.25))
  t = config.build(rngs=nnx.Rngs(0))
  value, aux = t.loss({'image': images()}, step=jnp.int32(0), key=jax.random.key(0))
  m = aux['metrics']
  np.testing.assert_allclose(
      value, 2 * m['reconstruction'] + 0.5 * m['codebook'] + 0.25 * m['commitment'], rtol=1e-6)
  paper = StyledTokenizerConfig(**NETWORK, quantizer=LatentConfig(latents=5)).weights
  assert (paper.reconstruction, paper.codebook, paper.commitment) == (1.0, 0.01, 0.01)


def test_the_sharding_rules_and_the_decay_know_every_leaf():
  from smalti.launch import mesh, optimizer
  for config in configs().values():
    for path in shapes(config):
      assert mesh.rule(path) is not None, path
  decayed = optimizer._decayed({'kernel': 0, 'bias': 0, 'codebook': 0})
  assert decayed == {'kernel': True, 'bias': False, 'codebook': False}


@pytest.mark.parametrize('changes, match', [
    (dict(latents=0), 'latents=0'), (dict(latents=6), 'quantizer has 5'),
    (dict(image_size=(8, 10)), 'multiple of 4')])
def test_what_is_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    dataclasses.replace(configs()['qlae'], **changes).build(rngs=nnx.Rngs(0))


def test_other_images_are_refused():
  with pytest.raises(ValueError, match='image_size'):
    configs()['ae'].build(rngs=nnx.Rngs(0)).latents(jnp.zeros((1, 8, 8, 1)))
