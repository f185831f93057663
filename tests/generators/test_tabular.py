"""The exact table: conditionals by hand, exact samples, exact infilling for every mask."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from smalti.generators.generator import example_keys, generate
from smalti.generators.tabular import (
    TabularConfig,
    TabularGenerator,
    TabularSettings,
    conditionals,
)
from smalti.tokenizers.spec import TokenSpec

P = jnp.array([[0.4, 0.1], [0.2, 0.3]])  # p1 = (.5, .5), p2 = (.6, .4), entropy 1.2798542258 nats
SPEC = TokenSpec(grid=(2,), vocab=(2,))
ENTROPY = 1.2798542258


def keys(n, seed=0):
  return example_keys(seed, jnp.arange(n))


def test_conditionals_by_hand():
  tokens = jnp.array([[0, 0], [0, 1], [1, 1]])[..., None]
  observed = jnp.array([[False, False], [True, False], [False, True]])[..., None]
  p = np.exp(conditionals(P, tokens, observed))[:, :, 0]
  np.testing.assert_allclose(p[0], [[0.5, 0.5], [0.6, 0.4]], atol=1e-6)
  np.testing.assert_allclose(p[1], [[1, 0], [0.8, 0.2]], atol=1e-6)
  np.testing.assert_allclose(p[2], [[0.25, 0.75], [0, 1]], atol=1e-6)


def test_conditionals_of_unequal_alphabets(key):
  table = jax.random.dirichlet(key, jnp.ones(24)).reshape(2, 3, 2, 2)
  tokens, observed = jnp.array([[[1, 2], [0, 1]]]), jnp.array([[[True, False], [False, True]]])
  p = np.exp(conditionals(table, tokens, observed))[0]
  given = table[1, :, :, 1] / table[1, :, :, 1].sum()
  np.testing.assert_allclose(p[0, 1], given.sum(1), atol=1e-6)
  np.testing.assert_allclose(p[1, 0], [*given.sum(0), 0], atol=1e-6)
  np.testing.assert_allclose(p[0, 0], [0, 1, 0], atol=1e-6)


def test_log_prob_and_loss_are_the_table():
  model = TabularGenerator(SPEC, P)
  tokens = jnp.array(list(itertools.product(range(2), repeat=2)))[..., None]
  np.testing.assert_allclose(
      -model.log_prob({'tokens': tokens}), [0.9162907, 2.3025851, 1.6094379, 1.2039728], rtol=1e-5)
  counts = (P.ravel() * 10).astype(int)  # the data set that has exactly these frequencies
  data = jnp.repeat(tokens, counts, 0, total_repeat_length=10)
  loss, aux = model.loss({'tokens': data}, step=0, key=None)
  assert loss * 2 == pytest.approx(ENTROPY, abs=1e-5) and aux['weight'] == 20


def test_samples_follow_the_table():
  tokens = generate(TabularGenerator(SPEC, P), None, keys=keys(20000),
                    settings=TabularSettings()).tokens
  drawn = np.bincount(np.asarray(tokens[:, 0, 0] * 2 + tokens[:, 1, 0]), minlength=4)
  assert stats.chisquare(drawn, 20000 * np.array([0.4, 0.1, 0.2, 0.3])).pvalue > 1e-3
  independent = np.outer([0.5, 0.5], [0.6, 0.4]).ravel()
  assert stats.chisquare(drawn, 20000 * independent).pvalue < 1e-3  # negative control


def test_log_prob_of_a_sample_is_the_models():
  model = TabularGenerator(SPEC, P)
  sample = generate(model, None, keys=keys(16), settings=TabularSettings())
  np.testing.assert_allclose(
      sample.log_prob, model.log_prob({'tokens': sample.tokens}), atol=1e-5)
  assert sample.nfe == 2 and sample.exact.all()


@pytest.mark.parametrize('mask', list(itertools.product([False, True], repeat=3))[:-1], ids=str)
def test_infilling_is_exact_for_every_mask(mask):
  n, spec = 4000, TokenSpec(grid=(3,), vocab=(2,))
  table = jax.random.dirichlet(jax.random.key(5), jnp.ones(8)).reshape(2, 2, 2)
  known = jnp.broadcast_to(jnp.array([1, 0, 1])[:, None], (n, 3, 1))
  known_mask = jnp.broadcast_to(jnp.array(mask)[:, None], (n, 3, 1))
  sample = generate(TabularGenerator(spec, table), None, keys=keys(n), settings=TabularSettings(),
                    known=known, known_mask=known_mask)
  tokens = np.asarray(sample.tokens[..., 0])
  np.testing.assert_array_equal(tokens[:, list(mask)], np.asarray(known[:, list(mask), 0]))
  given = np.asarray(table, np.float64)[
      tuple(1 - i % 2 if m else slice(None) for i, m in enumerate(mask))].ravel()
  free = tokens[:, [not m for m in mask]]
  drawn = np.bincount(free @ (2 ** np.arange(free.shape[1])[::-1]), minlength=given.size)
  assert stats.chisquare(drawn, n * given / given.sum()).pvalue > 1e-3 and sample.exact.all()


def test_the_same_seed_draws_the_same_tokens_at_every_batch_size():
  model = TabularGenerator(
      TokenSpec(grid=(2, 2), vocab=(3, 2)), jax.random.dirichlet(
          jax.random.key(1), jnp.ones(1296)).reshape((3, 2) * 4))

  def draw(keys):
    return np.asarray(generate(model, None, keys=keys, settings=TabularSettings()).tokens)

  whole = draw(keys(64))
  for size in (1, 7):
    np.testing.assert_array_equal(draw(keys(64)[:size]), whole[:size])
  order = np.random.default_rng(0).permutation(64)
  np.testing.assert_array_equal(draw(keys(64)[order]), whole[order])


def test_eight_devices_draw_the_same_tokens():
  model = TabularGenerator(SPEC, P)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  one = generate(model, None, keys=keys(64), settings=TabularSettings()).tokens
  with jax.set_mesh(mesh):
    split = jax.device_put(keys(64), NamedSharding(mesh, PartitionSpec('data')))
    eight = generate(model, None, keys=split, settings=TabularSettings()).tokens
  assert len(eight.sharding.device_set) == 8
  np.testing.assert_array_equal(one, eight)


def test_only_strings_that_end_have_mass():
  spec = TokenSpec(grid=(3,), vocab=(3,), eos=2)
  model = TabularConfig().build(spec, rngs=nnx.Rngs(0))
  table = np.asarray(model.table())
  assert table[2, 0, 0] == 0 and table[2, 2, 2] > 0 and table.sum() == pytest.approx(1)
  assert np.count_nonzero(table) == 1 + 2 + 4 + 8
  tokens = generate(model, None, keys=keys(64), settings=TabularSettings()).tokens
  np.testing.assert_array_equal(tokens, spec.canonical(tokens))


def test_a_table_that_would_not_fit_is_refused():
  with pytest.raises(ValueError, match='use another generator'):
    TabularConfig().build(TokenSpec(grid=(16,), vocab=(4,)), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='one axis per code'):
    TabularGenerator(SPEC, jnp.ones((2, 2, 2)))


def test_a_table_learns_frequencies():
  model = TabularConfig().build(SPEC, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model)
  tokens = jnp.array([[0, 0], [0, 0], [1, 1]])[..., None]
  loss = jax.jit(jax.value_and_grad(
      lambda params: nnx.merge(graph, params).loss({'tokens': tokens}, step=0, key=None)[0]))
  for _ in range(300):
    _, gradient = loss(params)
    params = jax.tree.map(lambda p, g: p - 2 * g, params, gradient)
  np.testing.assert_allclose(
      nnx.merge(graph, params).table(), [[2 / 3, 0], [0, 1 / 3]], atol=0.02)
