"""Our transformer against HuggingFace's Llama, weight for weight, and against itself uncached."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.generators.autoregressive import AutoregressiveSettings
from smalti.generators.generator import example_keys, generate
from smalti.launch import llama, timing

SIZES = llama.Sizes(layers=2, width=32, heads=2, vocab=64, length=16)
PEER = os.environ.get('SMALTI_PEER_PYTHON')


def test_the_cache_changes_no_sample():
  model, keys = SIZES.build(), example_keys(3, jnp.arange(4))
  cached = generate(model, None, keys=keys, settings=AutoregressiveSettings()).tokens[..., 0]
  np.testing.assert_array_equal(jax.jit(llama.uncached)(model, keys), cached)
  assert len(np.unique(cached)) > 16  # the draws are no constant


def test_weights_have_the_names_and_shapes_of_a_llama():
  found = llama.weights(SIZES.build())
  assert len(found) == 3 + 9 * SIZES.layers
  assert found['model.embed_tokens.weight'].shape == (65, 32)
  assert found['model.layers.1.mlp.down_proj.weight'].shape == (32, SIZES.peer()['hidden'])
  assert found['model.layers.0.self_attn.o_proj.weight'].shape == (32, 32)


def test_flops_are_those_of_all_products_of_a_step():
  sizes = llama.Sizes(layers=2, width=32, heads=2, vocab=64, length=16, remat=False)
  model, batch = sizes.build(), {'tokens': jnp.zeros((3, 16, 1), jnp.int32)}
  graph, params = nnx.split(model)
  jaxpr = jax.make_jaxpr(jax.grad(lambda params: nnx.merge(graph, params).loss(
      batch, step=0, key=jax.random.key(0))[0]))(params)
  assert products(jaxpr.jaxpr) == sizes.flops(3)


def products(jaxpr):
  """Floating-point operations of all matrix products, those in a scan as often as it runs."""
  total = 0
  for equation in jaxpr.eqns:
    times = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
    if equation.primitive.name == 'dot_general':
      contracted = equation.params['dimension_numbers'][0][0]
      inner = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
      total += 2 * inner * np.prod(equation.outvars[0].aval.shape)
    for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns')):
      part = getattr(part, 'jaxpr', part)
      if hasattr(part, 'eqns'):
        total += times * products(part)
  return total


@pytest.mark.skipif(not PEER, reason='SMALTI_PEER_PYTHON names no interpreter with transformers')
@pytest.mark.parametrize('compiled', [False, True])
def test_likelihoods_equal_those_of_transformers(tmp_path, compiled):
  model = SIZES.build()
  np.savez(tmp_path / 'weights.npz', **llama.weights(model))
  tokens = np.random.default_rng(0).integers(0, SIZES.vocab, SIZES.length)
  with timing.Peer(PEER) as peer:
    said = peer.prepare('decode', path=str(tmp_path / 'weights.npz'), tokens=tokens.tolist(),
                        batch=1, length=SIZES.length, known=0, compiled=compiled,
                        **SIZES.peer())['check']
  ours = model.log_prob({'tokens': jnp.asarray(tokens)[None, :, None]})[0]
  np.testing.assert_allclose(ours, sum(said), rtol=1e-5)
