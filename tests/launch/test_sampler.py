"""What the sampler hands to a generator and to the decoder behind it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smalti.generators.generator import Sample, fold
from smalti.launch.sample import Sampler
from smalti.tokenizers import flow


def uniform(keys):
  return jax.vmap(lambda key: jax.random.uniform(key, (1, 1)))(keys)


class First(nnx.Module):
  """Tokens from the first key that an autoregressive generator folds."""

  def sample(self, condition, *, keys, settings):
    tokens = (256 * uniform(fold(keys, 0))).astype(jnp.int32)
    return Sample(tokens=tokens, nfe=1, exact=jnp.ones(len(keys), bool))


class Noise(nnx.Module):
  """Images from the key that a decoder by flow folds."""

  def decode(self, tokens, *, keep, keys):
    return 2 * uniform(fold(keys, flow.NOISE))[..., None] - 1


def test_what_a_decoder_draws_has_nothing_to_do_with_the_codes():
  sampler = Sampler(512, jax.devices()[:1])
  loaded = [types.SimpleNamespace(model=model, config=None) for model in (First(), Noise())]
  batch, = sampler.batches(*loaded, n=512, seed=0, settings=None)
  codes, noise = (np.asarray(x, float).reshape(-1) for x in (batch.tokens, batch.images))
  assert codes.std() > 60 and noise.std() > 60
  assert abs(np.corrcoef(codes, noise)[0, 1]) < .2  # 4.5 deviations; with one key it is 1
