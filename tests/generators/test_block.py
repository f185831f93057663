"""Block diffusion against distributions known exactly, autoregression and masked diffusion.

`Exact` replaces the network by the conditionals of a joint table. Its cache holds codes, written
and read at the slots where the network's keys and values would be.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings as hypothesis_settings, strategies as st

from smalti.generators.block import BlockDiffusion, BlockDiffusionConfig, BlockDiffusionSettings
from smalti.generators.generator import example_keys, generate
from smalti.generators.masked import Masked, MaskedConfig
from smalti.generators.tabular import conditionals
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

P = np.array([[.4, .1], [.2, .3]])
PAIR = TokenSpec(grid=(2,), vocab=(2,))
PAIRS = jnp.array(list(itertools.product(range(2), repeat=2)), jnp.int32)[..., None]
INDEPENDENT = np.outer([.5, .5], [.6, .4])
ENTROPY = 1.2798542258
FIRST, ANCESTRAL, MASKGIT = 'first_hitting', 'ancestral', 'maskgit'


def body(**options) -> TransformerConfig:
  return TransformerConfig(**dict(layers=1, width=16, heads=2, remat=False) | options)


def config(**options) -> BlockDiffusionConfig:
  return BlockDiffusionConfig(transformer=body(**options.pop('transformer', {})), **options)


def build(spec, scale=.5, **options) -> BlockDiffusion:
  """A network whose head is not zero, nor its adaLN."""
  model = BlockDiffusion(config(**options), spec, rngs=nnx.Rngs(0))
  parts = [model.head] + ([model.transformer.modulation, model.transformer.blocks.modulation]
                          if model.transformer.modulated else [])
  for i, part in enumerate(parts):
    part.kernel[...] = scale * jax.random.normal(jax.random.key(9 + i), part.kernel[...].shape)
  return model


class Exact(BlockDiffusion):
  """The conditionals of one table per label (or of one table), instead of a network."""

  def __init__(self, spec, *tables, **options):
    super().__init__(config(**options), spec, rngs=nnx.Rngs(0))
    self.tables = tuple(map(tuple, (np.asarray(t).reshape(-1) for t in tables)))

  def conditional(self, tokens, observed, labels):
    shape = self.flat.vocab * self.flat.length
    rows = jnp.stack([conditionals(jnp.array(table).reshape(shape), tokens[..., None],
                                   observed[..., None])[:, :, 0] for table in self.tables])
    if labels is None:
      return rows[0]
    return jnp.take_along_axis(rows, labels[None, :, None, None], 0)[0]

  def logits(self, tokens, masked, labels, **_):
    here = np.arange(self.flat.length) // self.block_size
    rows = [self.conditional(tokens, (here < b) | ((here == b) & ~masked), labels)
            for b in range(self.blocks)]
    return jnp.take_along_axis(jnp.stack(rows), here[None, None, :, None], 0)[0]

  def advance(self, cache, tokens, masked, labels, b, *, previous=None, **_):
    size, (keys, values), length = self.block_size, cache[0], self.flat.length
    if previous is not None:  # the slots of block b - 1
      keys = jax.lax.dynamic_update_slice(
          keys, previous.astype(keys.dtype)[:, None, :, None], (0, 0, b * size, 0))
    cache = [(keys, values)]
    past = jnp.pad(keys[:, 0, size:, 0].astype(jnp.int32), ((0, 0), (0, length)))[:, :length]
    place = b * size
    past = jax.lax.dynamic_update_slice_in_dim(past, tokens, place, 1)
    seen = jnp.broadcast_to(jnp.arange(length) < place, past.shape)
    seen = jax.lax.dynamic_update_slice_in_dim(seen, ~masked, place, 1)
    rows = self.conditional(past, seen, labels)
    return jax.lax.dynamic_slice_in_dim(rows, place, size, 1), cache


class Forgetful(Exact):
  """Never writes a block into its cache: the control that the samplers' tests must notice."""

  def advance(self, cache, tokens, masked, labels, b, *, previous=None, **options):
    previous = None if previous is None else jnp.zeros_like(previous)
    return super().advance(cache, tokens, masked, labels, b, previous=previous, **options)


def draw(model, settings=None, n=20000, seed=0, condition=None, **known):
  known = {k: jnp.broadcast_to(v, (n, *v.shape[-2:])) for k, v in known.items()}
  return generate(model, condition, keys=example_keys(seed, jnp.arange(n)),
                  settings=settings or BlockDiffusionSettings(), **known)


def frequencies(model, settings=None, n=20000, **options):
  """How often every token array is drawn."""
  tokens = np.asarray(draw(model, settings, n, **options).tokens).reshape(n, -1)
  flat = np.ravel_multi_index(tuple(tokens.T), model.flat.vocab * model.flat.length)
  return np.bincount(flat, minlength=model.flat.vocab[0] ** model.flat.length)


def arrays(spec):
  rows = itertools.product(range(spec.vocab[0]), repeat=spec.length)
  return jnp.array(list(rows), jnp.int32)[..., None]


# ---- the bound

@pytest.mark.parametrize('size', (1, 2))
def test_bound_is_tight_pointwise_with_exact_conditionals(size):
  model = Exact(PAIR, P, block_size=size)
  truth = np.array([.9162907, 2.3025851, 1.6094379, 1.2039728])
  np.testing.assert_allclose(
      -model.elbo({'tokens': PAIRS}, mode='enumerate'), truth, atol=1e-6)
  draws = jax.jit(jax.vmap(lambda key: -model.elbo({'tokens': PAIRS}, key=key)))(
      jax.random.split(jax.random.key(1), 128))
  error = np.std(draws, 0) / np.sqrt(128)
  assert np.all(error < .05)
  assert np.all(np.abs(np.mean(draws, 0) - truth) < 4 * error + 1e-5)


def test_blocks_of_one_are_an_exact_likelihood():
  """exp(elbo) sums to 1 over all arrays; of larger blocks to less."""
  spec = TokenSpec(grid=(3,), vocab=(4,))
  tokens = arrays(spec)
  for mode in ('enumerate', 'count'):
    total = jnp.exp(build(spec, 2., block_size=1).elbo(
        {'tokens': tokens}, mode=mode, key=jax.random.key(0), samples=1)).sum()
    np.testing.assert_allclose(total, 1, atol=1e-5)
  bound = jnp.exp(build(spec, 2., block_size=3).elbo({'tokens': tokens}, mode='enumerate')).sum()
  assert bound < 1 - 1e-4


def test_one_block_is_masked_diffusion():
  """With the same weights, by prefix-free labels or none."""
  spec, key = TokenSpec(grid=(2, 2), vocab=(3,)), jax.random.key(3)
  tokens = jax.random.randint(key, (5, 4, 1), 0, 3)
  for options in ({'transformer': {'axes': 2}}, {'classes': 2, 'transformer': {'modulated': True}}):
    ours = build(spec, block_size=4, **options)
    theirs = Masked(MaskedConfig(transformer=body(**options['transformer']),
                                 classes=options.get('classes', 0)), spec, rngs=nnx.Rngs(1))
    nnx.update(theirs, nnx.state(ours))
    batch = {'tokens': tokens} | ({'label': jnp.arange(5) % 2} if 'classes' in options else {})
    np.testing.assert_allclose(ours.elbo(batch, mode='enumerate'),
                               theirs.elbo(batch, mode='enumerate'), rtol=1e-5)


def test_bound_is_the_sum_of_the_bounds_of_blocks():
  """In NumPy, from the conditionals: the mean over subsets of each block, given those before."""
  spec = TokenSpec(grid=(4,), vocab=(2,))
  model = build(spec, 2., block_size=2)
  tokens = arrays(spec)
  flat = tokens[..., 0]
  want = np.zeros(16)
  for b in range(2):
    for hidden in ((0,), (1,), (0, 1)):
      masked = np.zeros((16, 4), bool)
      masked[:, [2 * b + i for i in hidden]] = True
      log = jax.nn.log_softmax(model.logits(flat, jnp.asarray(masked), None))
      each = np.take_along_axis(np.asarray(log), np.asarray(tokens), 2)[..., 0]
      want += (each * masked).sum(-1) / len(hidden) / math.comb(2, len(hidden))
  np.testing.assert_allclose(model.elbo({'tokens': tokens}, mode='enumerate'), want, atol=1e-5)


@pytest.mark.parametrize('rates', ((0., 1.), (.1, .4), (.25, .25)))
def test_training_metric_is_an_unbiased_bound_whatever_the_rates(rates):
  spec = TokenSpec(grid=(4,), vocab=(2,))
  pair = np.array([[.45, .05], [.1, .4]])  # of dependent codes: else all rates weigh them alike
  table = np.einsum('ij,kl->ijkl', pair, pair.T)
  model = Exact(spec, table, block_size=2, rates=rates)
  truth = -np.log(table).mean() / 4
  batch = {'tokens': jnp.tile(arrays(spec), (4, 1, 1))}

  def both(key):
    value, aux = model.loss(batch, step=jnp.array(0), key=key)
    return value, aux['metrics']['nll'], model.loss(
        batch, step=jnp.array(0), key=key, train=False)[0]

  value, bound, held_out = jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(3), 256))
  for draws in (bound, held_out):
    error = np.std(draws) / 16
    assert error < .02
    assert abs(np.mean(draws) - truth) < 4 * error
  biased = abs(np.mean(value) - truth) > 4 * np.std(value) / 16
  assert biased == (rates != (0., 1.))
  assert np.std(held_out) < np.std(bound)


def test_blocks_of_one_all_hidden_have_no_noise():
  model = build(TokenSpec(grid=(4,), vocab=(3,)), block_size=1, rates=(1., 1.))
  batch = {'tokens': jax.random.randint(jax.random.key(0), (4, 4, 1), 0, 3)}
  exact = -model.elbo(batch, mode='enumerate').sum() / 16
  for i, train in ((0, True), (1, True), (2, False)):
    value, aux = model.loss(batch, step=jnp.array(0), key=jax.random.key(i), train=train)
    np.testing.assert_allclose([value, aux['metrics']['nll']], exact, rtol=1e-5)


@hypothesis_settings(max_examples=30, deadline=None)
@given(low=st.floats(.01, 1), width=st.floats(0, 1), size=st.integers(1, 40))
def test_counts_of_hidden_codes_are_a_law_with_the_moments_of_the_rates(low, width, size):
  from smalti.generators.schedules import hidden
  high = low + width * (1 - low)
  chance, inverse = hidden(low, high, size)
  count = np.arange(size + 1)
  mean = (low + high) / 2
  square = mean**2 + (high - low) ** 2 / 12
  np.testing.assert_allclose(chance.sum(), 1, atol=1e-12)
  np.testing.assert_allclose(chance @ count, size * mean, atol=1e-10)
  np.testing.assert_allclose(chance @ count**2, size * mean + size * (size - 1) * square, rtol=1e-9)
  np.testing.assert_allclose(inverse @ count, size, rtol=1e-9)  # E[m / t]


# ---- what is seen

def test_a_block_sees_its_visible_codes_and_the_blocks_before_alone():
  """Gradients of every prediction with respect to every embedded code, of both copies."""
  spec = TokenSpec(grid=(6,), vocab=(5,))
  model = build(spec, block_size=2, classes=2, transformer={'layers': 2})
  tokens = jax.random.randint(jax.random.key(1), (1, 6), 0, 5)
  masked = jnp.array([[True, False, False, True, True, True]])

  # row 0 as it is, row j + 1 with another code j, the last with another label
  rows = jnp.tile(tokens, (8, 1)).at[jnp.arange(6) + 1, jnp.arange(6)].add(1) % 5
  logits = np.asarray(jax.jit(model.logits)(
      rows, jnp.tile(masked, (8, 1)), jnp.array([0] * 7 + [1])))
  moved = (np.abs(logits[1:] - logits[0]).max(-1) > 0).T  # [code predicted, code changed]
  block = np.arange(6) // 2
  want = (block[None] < block[:, None]) | (
      (block[None] == block[:, None]) & ~np.asarray(masked)[0][None])
  np.testing.assert_array_equal(moved[:, :6], want)
  assert moved[:, 6].all()

  # through embeddings: the clean copy of the own or a later block has a gradient of exactly zero
  def prediction(clean, i):
    class Copied(BlockDiffusion):
      def _embed(self, codes, masked, places):
        x = super()._embed(codes, masked, places)
        return x + clean if masked is False else x
    twin = Copied(config(block_size=2, classes=2, transformer={'layers': 2}), spec,
                  rngs=nnx.Rngs(0))
    nnx.update(twin, nnx.state(model))
    return (twin.logits(tokens, masked, jnp.array([0]))[0, i] ** 2).sum()

  gradients = jax.jit(jax.grad(prediction))
  for i in (0, 2, 5):
    gradient = gradients(jnp.zeros((1, 4, 16)), i)
    np.testing.assert_array_equal(np.asarray(gradient)[0].any(-1), block[:4] < block[i])


@pytest.mark.parametrize('size, options', (
    (1, {}), (3, {'classes': 3}), (2, {'classes': 3, 'modulated': True, 'axes': 2}),
    (6, {'kv_heads': 1, 'axes': 0})), ids=('plain', 'prefix', 'adaLN', 'groups'))
def test_cached_logits_equal_the_one_pass(size, options):
  spec, classes = TokenSpec(grid=(2, 3), vocab=(5,)), options.pop('classes', 0)
  model = build(spec, block_size=size, classes=classes, transformer={'layers': 2} | options)
  tokens = jax.random.randint(jax.random.key(1), (3, 6), 0, 5)
  labels = jnp.arange(3) if classes else None
  cache, full, advance = model.transformer.cache(3, 6 + size), *map(
      jax.jit, (model.logits, model.advance))
  for b in range(6 // size):
    cut = lambda x, b=b: x[:, b * size:(b + 1) * size]  # noqa: E731
    for i, shown in enumerate((0, size // 2)):  # the noisy entries of a pass leave no trace
      masked = jnp.broadcast_to(jnp.arange(6) % size >= shown, (3, 6))
      written = {} if i else {'previous': cut(tokens, max(b - 1, 0))}
      found, cache = advance(cache, cut(tokens), cut(masked), labels, jnp.asarray(b), **written)
      np.testing.assert_allclose(found, cut(full(tokens, masked, labels)), atol=1e-4)
  if size < 6:  # the control: a cache that lacks a block
    none = jax.tree.map(lambda x: x.at[:, :, size:2 * size].set(0), cache)
    found, _ = advance(none, cut(tokens), cut(masked), labels, jnp.asarray(b))
    assert np.abs(found - cut(full(tokens, masked, labels))).max() > 1e-3


# ---- sampling

@functools.cache
def wide(kind=Exact, size=2):
  """Four codes of three letters: correlated, with zeros."""
  table = np.random.default_rng(0).dirichlet(np.full(81, .3)).reshape((3,) * 4)
  table = np.where(table < 1e-3, 0, table)
  return kind(TokenSpec(grid=(2, 2), vocab=(3,)), table / table.sum(), block_size=size)


@pytest.mark.parametrize('size', (1, 2, 4))
def test_first_hitting_samples_the_joint_exactly(fits, size):
  model = wide(size=size)
  assert fits(frequencies(model), model.tables[0])
  if size < 4:  # the control: a block that is not written into the cache must be noticed
    assert not fits(frequencies(wide(Forgetful, size)), model.tables[0])


@pytest.mark.parametrize('grid, steps, weight', [
    ('uniform', 4, .25), ('cosine', 4, .30448187), ('uniform', 1, 1.)])
def test_ancestral_sampler_mixes_in_what_is_revealed_together(fits, grid, steps, weight):
  """Inside a block; two blocks of one code each are drawn from the joint by any sampler."""
  settings = BlockDiffusionSettings(sampler=ANCESTRAL, grid=grid, steps=steps)
  counts = frequencies(Exact(PAIR, P, block_size=2), settings)
  assert fits(counts, weight * INDEPENDENT + (1 - weight) * P)
  assert not fits(counts, P)
  assert fits(frequencies(Exact(PAIR, P, block_size=1), settings), P)


def test_maskgit_choice_temperature_moves_between_greedy_and_exact(fits):
  model = Exact(PAIR, P, block_size=2)
  greedy, random = (frequencies(model, BlockDiffusionSettings(
      sampler=MASKGIT, steps=2, choice_temperature=t)) for t in (0., 1e9))
  assert fits(greedy, [[.56, .04], [.28, .12]]) and not fits(greedy, P)
  assert fits(random, P)


def test_confidence_in_a_block_moves_between_greedy_and_exact(fits):
  """As in one block of all codes, see test_unmasking; two at a time are independent."""
  model = Exact(PAIR, P, block_size=2)
  greedy, random, together = (frequencies(model, BlockDiffusionSettings(
      sampler='confidence', choice_temperature=t, reveal=m))
                              for t, m in ((0., 1), (1e9, 1), (0., 2)))
  assert fits(greedy, [[.56, .04], [.28, .12]]) and not fits(greedy, P)
  assert fits(random, P)
  assert fits(together, INDEPENDENT)


def test_same_tokens_in_any_batch():
  model, keys = wide(), example_keys(5, jnp.arange(32))
  run = lambda keys: np.asarray(generate(  # noqa: E731
      model, None, keys=keys, settings=BlockDiffusionSettings()).tokens)
  tokens = run(keys)
  assert len(np.unique(tokens, axis=0)) > 8
  np.testing.assert_array_equal(run(keys[7:14]), tokens[7:14])
  order = np.random.default_rng(0).permutation(32)
  np.testing.assert_array_equal(run(keys[order]), tokens[order])


def test_passes_are_as_many_as_codes_and_fewer_where_they_are_known():
  model = build(TokenSpec(grid=(6,), vocab=(3,)), block_size=3)
  assert draw(model, n=4).nfe == 6
  assert draw(model, BlockDiffusionSettings(sampler=MASKGIT, steps=2), n=4).nfe == 4
  known = jnp.zeros((6, 1), jnp.int32)
  assert draw(model, n=4, known=known, known_mask=jnp.arange(6)[:, None] < 3).nfe == 1 + 3
  assert draw(model, n=4, known=known, known_mask=jnp.arange(6)[:, None] < 5).nfe == 1 + 1


def test_temperature_zero_and_truncation(fits):
  model = Exact(PAIR, P, block_size=1)
  for options in ({'temperature': 0.}, {'top_k': 1}):
    counts = frequencies(model, BlockDiffusionSettings(**options), n=64)
    np.testing.assert_array_equal(counts, (64, 0, 0, 0))
  sharp = frequencies(model, BlockDiffusionSettings(temperature=.5))
  law = np.array([[.64, .04], [.16, .36]]) / np.array([[.68], [.52]]) / 2
  assert fits(sharp, law) and not fits(sharp, P)


# ---- infilling

@pytest.mark.parametrize('places, size, exact', [
    ((0, 1), 2, True), ((1,), 2, True), ((0,), 1, True), ((0, 2), 4, True), ((2,), 2, False),
    ((1, 3), 2, False)])
def test_infilling_is_exact_where_it_says_so(fits, places, size, exact):
  """Known codes come back; those of the first unknown block count, later ones are not looked at."""
  model = wide(size=size)
  values = np.array([0, 2, 0, 1])
  known_mask = np.isin(np.arange(4), places)
  table = np.array(model.tables[0]).reshape((3,) * 4)
  cut = tuple(values[i] if known_mask[i] else slice(None) for i in range(4))
  law = np.zeros((3,) * 4)
  law[cut] = table[cut] / table[cut].sum()
  known = dict(known=jnp.asarray(values)[:, None], known_mask=jnp.asarray(known_mask)[:, None])
  sample = draw(model, n=64, **known)
  tokens = np.asarray(sample.tokens)[..., 0]
  np.testing.assert_array_equal(tokens[:, known_mask], np.tile(values[known_mask], (64, 1)))
  np.testing.assert_array_equal(sample.exact, exact)
  if exact:
    assert fits(frequencies(model, **known), law)
  else:  # zeros of the table may make an array impossible: a strictly positive one
    flat = Exact(model.spec, .5 * table + .5 / 81, block_size=size)
    law = .5 * table + .5 / 81
    wrong = np.zeros_like(law)
    wrong[cut] = law[cut] / law[cut].sum()
    assert not fits(frequencies(flat, **known), wrong)


def test_exact_of_samplers_that_reveal_together():
  model, known = Exact(PAIR, P, block_size=2), jnp.zeros((3, 2, 1), jnp.int32)
  known_mask = jnp.array([[0, 0], [0, 1], [1, 1]], bool)[..., None]
  sample = generate(model, None, keys=example_keys(0, jnp.arange(3)), known=known,
                    known_mask=known_mask, settings=BlockDiffusionSettings(sampler=ANCESTRAL))
  np.testing.assert_array_equal(sample.exact, (False, True, True))


# ---- strings with an end

def strings(kind=Exact):
  """Three letters and an end, N = 4: a law over strings of 0 to 4 letters."""
  spec = TokenSpec(grid=(4,), vocab=(4,), eos=3)
  table = np.zeros((4,) * 4)
  weights = np.random.default_rng(1).gamma(.5, size=4**4)
  for i, row in enumerate(itertools.product(range(4), repeat=4)):
    row = np.array(row)[None, :, None]
    if np.array_equal(spec.canonical(row), row):
      table[tuple(row.reshape(-1))] = weights[i] + .05
  return kind(spec, table / table.sum(), block_size=2)


def test_strings_are_drawn_from_their_law_and_their_bound_is_tight(fits):
  model = strings()
  assert fits(frequencies(model), model.tables[0])
  table = np.array(model.tables[0]).reshape((4,) * 4)
  rows = np.argwhere(table > 0)
  bound = model.elbo({'tokens': jnp.asarray(rows)[..., None]}, mode='enumerate')
  np.testing.assert_allclose(bound, np.log(table[tuple(rows.T)]), atol=1e-5)


def test_the_loss_is_the_mean_over_tokens_and_not_over_strings(check_token_mean):
  check_token_mean(strings())


def test_end_facts_hold_without_being_learned():
  spec = TokenSpec(grid=(4,), vocab=(4,), eos=3)
  model = BlockDiffusion(config(block_size=2), spec, rngs=nnx.Rngs(0))  # uniform
  tokens = jnp.array([[0, 3, 3, 3], [0, 1, 2, 0]])
  masked = jnp.array([[True, False, True, True], [True, False, True, True]])
  probs = np.asarray(jax.nn.softmax(model.scores(tokens, masked, None)))
  np.testing.assert_allclose(probs[0, 0], np.full(4, .25), rtol=1e-6)  # may be a repeat
  np.testing.assert_allclose(probs[0, 2:], np.tile(np.eye(4)[3], (2, 1)))
  np.testing.assert_allclose(probs[1, 0], [1/3, 1/3, 1/3, 0], rtol=1e-6)
  np.testing.assert_allclose(probs[1, 2:], np.full((2, 4), .25), rtol=1e-6)  # later: not seen
  bound = model.elbo({'tokens': tokens[:1, :, None]}, mode='enumerate')
  # position 1 is an EOS: log 4 twice if drawn after the first code, whatever comes first
  assert -2 * math.log(4) - 1e-6 <= bound[0] <= -math.log(4)


@pytest.mark.parametrize('sampler', (FIRST, ANCESTRAL, MASKGIT))
def test_nothing_but_eos_follows_an_eos_and_passes_stop(sampler):
  spec = TokenSpec(grid=(6,), vocab=(3,), eos=2)
  model = build(spec, 2., block_size=2)
  settings = BlockDiffusionSettings(sampler=sampler, steps=2)
  tokens = np.asarray(draw(model, settings, n=300).tokens)
  np.testing.assert_array_equal(spec.canonical(tokens), tokens)
  assert len(np.unique((tokens == 2).sum(1))) > 2  # several lengths occur
  model.head.bias[...] = jnp.array([0., 0., 1e3])
  sample = draw(model, settings, n=4)
  assert np.all(np.asarray(sample.tokens) == 2) and sample.nfe <= 2


@pytest.mark.parametrize('place, code', ((4, 2), (4, 1), (1, 2)))
def test_no_eos_before_a_known_code(place, code):
  spec = TokenSpec(grid=(6,), vocab=(3,), eos=2)
  model = BlockDiffusion(config(block_size=2), spec, rngs=nnx.Rngs(0))
  model.head.bias[...] = jnp.array([0., 0., 4.])  # would rather stop
  known = jnp.full((6, 1), code, jnp.int32)
  sample = draw(model, n=64, known=known, known_mask=jnp.arange(6)[:, None] == place)
  tokens = np.asarray(sample.tokens)[..., 0]
  assert np.all(tokens[:, :place] < 2) and np.all(tokens[:, place] == code)
  assert code != 2 or np.all(tokens[:, place:] == 2)
  assert not np.any(sample.exact)


# ---- labels and guidance

Q = np.array([[.05, .45], [.25, .25]])
NULL = (P + Q) / 2


def test_labels_select_the_law_and_none_is_the_null_label(fits):
  model = Exact(PAIR, P, Q, NULL, classes=2, block_size=1)
  for label, law in ((0, P), (1, Q), (-1, NULL), (None, NULL)):
    condition = None if label is None else {'label': jnp.full(20000, label)}
    assert fits(frequencies(model, condition=condition), law)


def test_guidance_tilts_every_conditional_and_costs_two_passes(fits):
  model = Exact(PAIR, P, Q, NULL, classes=2, block_size=1)
  for scale in (0., 1., 3.):
    def tilted(c, u, scale=scale):
      p = u * (c / u) ** scale
      return p / p.sum(-1, keepdims=True)

    first = tilted(Q.sum(1), NULL.sum(1))
    rest = tilted(Q / Q.sum(1, keepdims=True), NULL / NULL.sum(1, keepdims=True))
    settings, label = BlockDiffusionSettings(guidance=scale), {'label': jnp.ones(20000, int)}
    counts = frequencies(model, settings, condition=label)
    assert fits(counts, first[:, None] * rest)
    assert fits(counts, Q) == (scale == 1.) and fits(counts, NULL) == (scale == 0.)
  assert draw(model, settings, n=4, condition={'label': jnp.ones(4, int)}).nfe == 4


def test_one_program_for_labels_seeds_and_float_settings(calls):
  model = BlockDiffusion(config(classes=3, block_size=2), PAIR, rngs=nnx.Rngs(0))
  programs = calls(BlockDiffusion, 'sample')
  for i in range(3):
    settings = BlockDiffusionSettings(
        guidance=1. + i, temperature=.5 + i, choice_temperature=float(i), top_p=.9 - .1 * i,
        guidance_schedule='power_cosine', guidance_power=float(i))
    generate(model, {'label': jnp.full(5, i % 3)}, keys=example_keys(i, jnp.arange(5)),
             settings=settings)
  assert len(programs) == 1


# ---- several codes per position, refusals, training

def test_several_codes_per_position_are_a_flat_row(fits):
  spec = TokenSpec(grid=(1,), vocab=(2, 2))
  model = Exact(spec, P, block_size=1)
  tokens = np.asarray(draw(model).tokens)
  assert tokens.shape == (20000, 1, 2)
  assert fits(np.bincount(tokens[:, 0, 0] * 2 + tokens[:, 0, 1], minlength=4), P)
  bound = model.elbo({'tokens': PAIRS.reshape(4, 1, 2)}, mode='enumerate')
  np.testing.assert_allclose(bound, np.log(P).reshape(-1), atol=1e-6)


def test_labels_are_dropped_per_example_and_only_in_training(check_dropped):
  seen = []

  class Watched(BlockDiffusion):
    def logits(self, tokens, masked, labels, **options):
      seen.append(np.asarray(labels))
      return super().logits(tokens, masked, labels, **options)

  model = Watched(config(classes=4, label_dropout=.5, block_size=1), PAIR, rngs=nnx.Rngs(0))
  batch = {'tokens': jnp.tile(PAIRS, (64, 1, 1)), 'label': jnp.arange(256) % 4}
  check_dropped(model, batch, seen)


def test_gradients_are_finite_beside_impossible_codes():
  spec = TokenSpec(grid=(4,), vocab=(3,), eos=2)
  model = build(spec, block_size=2, transformer={'dropout': .1})
  tokens = jnp.array([[0, 1, 2, 2], [2, 2, 2, 2], [1, 0, 0, 1]] * 4, jnp.int32)[..., None]
  graph, params = nnx.split(model)
  gradients = jax.jit(lambda params, key: jax.grad(lambda p: nnx.merge(graph, p).loss(
      {'tokens': tokens}, step=jnp.array(0), key=key)[0])(params))
  for i in range(3):
    leaves = jax.tree.leaves(gradients(params, jax.random.key(i)))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves) and any(map(np.any, leaves))


def test_refusals_say_why():
  make = functools.partial(BlockDiffusion, rngs=nnx.Rngs(0))
  six = TokenSpec(grid=(6,), vocab=(2,))
  for options, message in (
      ({'block_size': 4}, 'the nearest is 3'), ({'block_size': 0}, 'block_size=0'),
      ({'block_size': 2, 'rates': (.6, .2)}, 'within 0..1'),
      ({'block_size': 2, 'rates': (1., 1.)}, 'never show a code'),
      ({'block_size': 2, 'transformer': {'modulated': True}}, 'classes > 0'),
      ({'block_size': 2, 'transformer': {'axes': 3}}, 'axes=3'),
      ({'block_size': 2, 'label_dropout': 2.}, 'label_dropout=2')):
    with pytest.raises(ValueError, match=message):
      make(config(**options), six)
  with pytest.raises(ValueError, match='equal alphabets'):
    make(config(), TokenSpec(grid=(4,), vocab=(8, 4)))
  model, keys = Exact(PAIR, P, block_size=2), example_keys(0, jnp.arange(2))
  with pytest.raises(ValueError, match='guidance needs'):
    model.sample(None, keys=keys, settings=BlockDiffusionSettings(guidance=2.))
  with pytest.raises(ValueError, match='go together'):
    model.sample(None, keys=keys, settings=BlockDiffusionSettings(), known=PAIRS[:2])
  for sampler in ('halton', 'remdm'):
    with pytest.raises(ValueError, match='not one of first_hitting'):
      model.sample(None, keys=keys, settings=BlockDiffusionSettings(sampler=sampler))
  with pytest.raises(ValueError, match='12 positions'):
    make(config(block_size=13), TokenSpec(grid=(13,), vocab=(2,))).elbo(
        {'tokens': jnp.zeros((1, 13, 1), jnp.int32)}, mode='enumerate')
  with pytest.raises(ValueError, match='key'):
    model.elbo({'tokens': PAIRS})
  with pytest.raises(ValueError, match='keep'):
    model.elbo({'tokens': PAIRS, 'keep': jnp.ones(4)}, mode='enumerate')


@pytest.mark.parametrize('size, rates', (
    (1, (1., 1.)), (2, (0., 1.)), pytest.param(2, (.3, .8), marks=pytest.mark.slow)))
def test_training_reaches_the_entropy(size, rates):
  """-ELBO under the data law within .01 nats of H(P), from 10,000 samples."""
  model = BlockDiffusion(config(block_size=size, rates=rates, transformer={'width': 32}),
                         PAIR, rngs=nnx.Rngs(0))
  data = PAIRS[np.random.default_rng(0).choice(4, 10000, p=P.reshape(-1))]
  graph, params = nnx.split(model)
  optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, 250), weight_decay=0.)

  @jax.jit
  def train(params, moments, key):
    def step(state, key):
      params, moments = state
      pick, key = jax.random.split(key)
      batch = {'tokens': data[jax.random.randint(pick, (256,), 0, len(data))]}
      gradient = jax.grad(lambda p: nnx.merge(graph, p).loss(
          batch, step=jnp.array(0), key=key)[0])(params)
      updates, moments = optimizer.update(gradient, moments, params)
      return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, (params, moments), jax.random.split(key, 250))[0]

  params, _ = train(params, optimizer.init(params), jax.random.key(0))
  model = nnx.merge(graph, params)
  bound = -np.asarray(model.elbo({'tokens': PAIRS}, mode='enumerate'))
  found = P.reshape(-1) @ bound
  print(f'block_size={size} rates={rates}: {found:.5f} nats, the entropy is {ENTROPY:.5f}')
  assert abs(found - ENTROPY) < .01
  if size == 2:
    counts = frequencies(model, n=4000)
    np.testing.assert_allclose(counts / counts.sum(), P.reshape(-1), atol=.04)
