"""Several codes in a slot, by tables or by bits (MaskBit): one distribution per order of the codes.

The laws are those of the network itself: with its predictions for each of the 2^4 masks of four
codes, every order is a distribution, the bound their mean and first-hitting their mixture.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.generators.generator import example_keys, generate
from smalti.generators.maskbit import MaskBit, MaskBitConfig
from smalti.generators.masked import MaskedSettings
from smalti.generators.stacked import Stacked, StackedConfig
from smalti.generators.tabular import conditionals
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

SPECS = {'tables': TokenSpec(grid=(2,), vocab=(3, 2)),
         'codes of bits': TokenSpec(grid=(2,), vocab=(8,), factors=(2, 2, 2)),
         'bits': TokenSpec(grid=(2,), vocab=(2, 2, 2))}
COUNTS = 8000


def config(name, **options):
  body = TransformerConfig(layers=1, width=16, heads=2, remat=False, **options.pop('body', {}))
  if name == 'tables':
    return StackedConfig(transformer=body, **options)
  return MaskBitConfig(transformer=body, **options)


@functools.cache
def build(name):
  """A network that says something: its head is not zero, and what it reads is large."""
  model = config(name).build(SPECS[name], rngs=nnx.Rngs(0))
  nnx.update(model.token, jax.tree.map(lambda leaf: 20 * leaf, nnx.state(model.token)))
  nnx.update(model.transformer.blocks, jax.tree.map(  # kernels, not gains
      lambda leaf: 10 * leaf if leaf.ndim > 2 else leaf, nnx.state(model.transformer.blocks)))
  model.head.kernel[...] = .6 * jax.random.normal(jax.random.key(1), model.head.kernel.shape)
  return model


logits = jax.jit(lambda model, codes, masked: model.scores(codes, masked, None))


@functools.cache
def truth(name):
  """All codes [x, 4], and log p of each in each of the 24 orders [24, x]."""
  model = build(name)
  codes = np.array(list(itertools.product(*map(range, model.slots.vocab * 2))), np.int32)
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


@pytest.mark.parametrize('name', SPECS)
def test_every_order_is_a_distribution_and_the_bound_their_mean(name):
  model = build(name)
  codes, orders = truth(name)
  assert model.flat.length == 4 and model.place.embedding.shape[0] == 2  # two slots
  np.testing.assert_allclose(np.exp(orders).sum(1), 1, atol=1e-5)
  assert np.abs(orders[0] - orders[-1]).max() > .1  # the orders differ
  bound = model.elbo({'tokens': model._tokens(jnp.asarray(codes))}, mode='enumerate')
  np.testing.assert_allclose(bound, orders.mean(0), atol=1e-5)


@pytest.mark.parametrize('name', SPECS)
def test_first_hitting_draws_the_mixture_of_all_orders(fits, name):
  model = build(name)
  codes, orders = truth(name)
  sample = generate(model, None, keys=example_keys(0, jnp.arange(COUNTS)),
                    settings=MaskedSettings(sampler='first_hitting'))
  drawn = np.asarray(model._codes(sample.tokens))
  sizes = model.slots.vocab * 2
  counts = np.bincount(np.ravel_multi_index(tuple(drawn.T), sizes), minlength=len(codes))
  law = np.exp(orders).mean(0)
  assert fits(counts, law)
  one = [law.reshape(sizes).sum(tuple(set(range(4)) - {i})) for i in range(4)]
  assert not fits(counts, functools.reduce(np.multiply.outer, one).reshape(-1))  # the control
  assert sample.nfe == 4 and sample.exact.all()


@pytest.mark.parametrize('name', ['tables', 'bits'])
def test_the_bound_is_tight_with_exact_conditionals(name):
  spec, base = SPECS[name], {'tables': Stacked, 'bits': MaskBit}[name]

  class Exact(base):
    def logits(self, tokens, masked, labels, **_):
      shape = (len(tokens), self.slots.length, self.slots.depth)
      joint = jnp.asarray(table).reshape(self.slots.vocab * 2)
      rows = conditionals(joint, tokens.reshape(shape), ~masked.reshape(shape))
      return rows.reshape(len(tokens), self.flat.length, -1)

  model = Exact(config(name), spec, rngs=nnx.Rngs(0))
  codes = np.array(list(itertools.product(*map(range, model.slots.vocab * 2))), np.int32)
  table = np.random.default_rng(0).dirichlet(np.ones(len(codes)))
  batch = {'tokens': model._tokens(jnp.asarray(codes))}
  np.testing.assert_allclose(model.elbo(batch, mode='enumerate'), np.log(table), atol=1e-5)


@pytest.mark.parametrize('name', SPECS)
def test_codes_inside_are_the_tokens(name):
  model, spec = build(name), SPECS[name]
  tokens = jax.random.randint(jax.random.key(0), (64, 2, spec.depth), 0, jnp.array(spec.vocab))
  np.testing.assert_array_equal(model._tokens(model._codes(tokens)), tokens)
  mask = jax.random.bernoulli(jax.random.key(1), .7, tokens.shape)
  np.testing.assert_array_equal(  # a code inside is whole where all it is made of is
      model._outside(~model._inside(mask)) | mask, jnp.ones_like(mask))


def test_bits_reach_the_network_only_where_they_are_visible():
  model = build('codes of bits')  # words of two bits and one
  codes = jnp.array([[0, 1, 3, 0], [2, 0, 1, 1]])
  masked = jnp.array([[False, True, True, True], [False, True, False, True]])
  other = jnp.where(masked, jnp.array([4, 2, 4, 2]) - 1 - codes, codes)
  np.testing.assert_array_equal(logits(model, codes, masked), logits(model, other, masked))
  graph, params = nnx.split(model)

  def total(params, codes):
    return (nnx.merge(graph, params).logits(codes, masked, None) ** 2).sum()

  rows = jax.grad(total)(params, codes)['token']['kernel'][...]
  assert np.all(rows[2] == 0) and np.all(np.abs(rows[:2]).max(1) > 1e-3)  # the second word is 0
  x = np.asarray(model._embed(codes, masked))
  kernel, bias = np.asarray(model.token.kernel), np.asarray(model.token.bias)
  np.testing.assert_allclose(x[0, 0], bias - kernel[0] - kernel[1], rtol=1e-5)  # bits 0, 0
  np.testing.assert_allclose(x[1, 0], bias - kernel[0] + kernel[1], rtol=1e-5)  # 2: bits 0, 1
  np.testing.assert_allclose(x[0, 1], bias, rtol=1e-6)


def test_tables_are_summed_and_each_has_its_mask():
  model = build('tables')
  table = np.asarray(model.token.embedding)
  assert table.shape == (3 + 1 + 2 + 1, 16)
  x = model._embed(jnp.array([[2, 1, 0, 0]]), jnp.array([[False, False, True, False]]))
  np.testing.assert_allclose(x[0], [table[2] + table[5], table[3] + table[4]], rtol=1e-6)
  assert model.head.kernel.shape == (16, 5)  # no column is MASK


def test_known_bits_of_a_word_restrict_it(fits):
  """Bits 0 and 2 of both positions are known, bit 1 of the second too: one word is drawn."""
  model = build('bits')
  codes, orders = truth('bits')
  known = jnp.broadcast_to(jnp.array([[1, 0, 1], [0, 1, 0]]), (COUNTS, 2, 3))
  mask = jnp.broadcast_to(jnp.array([[True, False, True], [True, True, True]]), known.shape)
  keys = example_keys(0, jnp.arange(COUNTS))
  sample = generate(model, None, keys=keys, settings=MaskedSettings(steps=2), known=known,
                    known_mask=mask)
  np.testing.assert_array_equal(np.where(mask, sample.tokens, 0), np.where(mask, known, 0))
  # the first word (values 0..3, the low bit is bit 0) must be odd, given the other three
  given = np.array([[0, 1, 2, 0]])
  odd = np.asarray(jax.nn.softmax(logits(
      model, given, np.array([[True, False, False, False]]))))[0, 0, [1, 3]]
  counts = np.bincount(np.asarray(sample.tokens)[:, 0, 1], minlength=2)
  assert sample.exact.all() and fits(counts, odd) and not fits(counts, odd[::-1])
  both = mask.at[:, 1].set(jnp.array([True, False, True]))
  assert not generate(model, None, keys=keys[:4], known=known[:4], known_mask=both[:4],
                      settings=MaskedSettings(sampler='first_hitting')).exact.any()


@pytest.mark.parametrize('sampler', ['maskgit', 'ancestral', 'halton'])
def test_bits_of_a_hidden_word_are_hidden_on_the_way(sampler):
  spec = TokenSpec(grid=(2, 2), vocab=(2,) * 4)
  model = config('bits').build(spec, rngs=nnx.Rngs(0))
  known = jax.random.randint(jax.random.key(0), (8, 4, 4), 0, 2)
  mask = jnp.broadcast_to(
      jnp.arange(4)[None, :, None] < jnp.arange(8)[:, None, None] % 4, known.shape)
  sample = generate(
      model, None, keys=example_keys(0, jnp.arange(8)), known=known, known_mask=mask,
      settings=MaskedSettings(sampler=sampler, steps=3, trace=True))
  states = np.asarray(sample.steps)
  assert states.shape == (3, 8, 4, 4)
  np.testing.assert_array_equal(states[-1], sample.tokens)
  np.testing.assert_array_equal(np.where(mask, states, 0)[0], np.where(mask, known, 0))
  words = (states == -1).reshape(3, 8, 4, 2, 2)
  np.testing.assert_array_equal(words[..., 0], words[..., 1])
  if sampler == 'halton':  # cell by cell: two words of a cell follow each other
    cells = (states[:, 0] == -1).all(-1).sum(-1)
    assert list(cells) == sorted(cells, reverse=True)


def test_the_loss_is_per_token_whatever_is_inside():
  spec = TokenSpec(grid=(6,), vocab=(16,), factors=(2,) * 4, order='nested')
  model = config('codes of bits', classes=2).build(spec, rngs=nnx.Rngs(0))  # uniform
  batch = {'tokens': jnp.arange(24).reshape(4, 6, 1) % 16, 'label': jnp.array([0, 1, 0, 1]),
           'keep': jnp.array([1, 2, 3, 6])}
  value, aux = model.loss(batch, step=jnp.array(0), key=jax.random.key(0), train=False)
  np.testing.assert_allclose(value, np.log(16), rtol=1e-6)
  assert aux['weight'] == 12
  bound = model.elbo(batch, key=jax.random.key(1))
  np.testing.assert_allclose(bound, -np.log(16) * np.array([1, 2, 3, 6]), rtol=1e-5)


def test_refusals_say_why():
  build = functools.partial(MaskBitConfig.build, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='not made of bits'):
    build(config('bits'), TokenSpec(grid=(2,), vocab=(16,)))
  with pytest.raises(ValueError, match='groups=4 must be within 1..3'):
    build(config('bits', groups=4), SPECS['bits'])
  with pytest.raises(ValueError, match='axes=2'):
    build(config('bits', body={'axes': 2}), SPECS['bits'])
