"""Laws of autoregression over positions of several codes: every way to draw those of a position."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings as hypothesis, strategies
from scipy import stats

from smalti.generators.depth import DepthConfig, DepthSettings, known_bits
from smalti.generators.generator import example_keys, generate
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

PAIRS = TokenSpec(grid=(2,), vocab=(3, 3))
UNEQUAL = TokenSpec(grid=(2,), vocab=(4, 2))
GRID = TokenSpec(grid=(2, 3), vocab=(5, 3, 4))
BYTE = TokenSpec(grid=(2,), vocab=(8,))
P = np.array([[.4, .1], [.2, .3]])  # the codes of one position
ENTROPY, INFORMATION = 1.2798542258, .0863046217

# every way to draw the codes of a position, on tokens that can be enumerated
MODELS = {
    'rq': (PAIRS, {}), 'shared unequal': (UNEQUAL, dict(shared=True, code_width=8)),
    'independent': (UNEQUAL, dict(depth=False)), 'words': (BYTE, dict(words=(1, 2))),
    'bits': (BYTE, dict(view='bits', depth=False)),
    'factors': (TokenSpec(grid=(2,), vocab=(6,), factors=(3, 2)), dict(view='factors', axes=0))}


@functools.cache
def build(name='rq', spec=None, **changes):
  """A model with weights large enough that its distribution is far from uniform."""
  known, options = MODELS[name]
  options = {'depth': True, 'axes': 1, 'dtype': 'float32'} | options | changes
  body = dict(layers=1, width=16, heads=2, remat=False, dtype=options.pop('dtype'))
  inner = TransformerConfig(**body, axes=0) if options.pop('depth') else None
  config = DepthConfig(
      transformer=TransformerConfig(**body, axes=options.pop('axes')), depth=inner, **options)
  model = config.build(spec or known, rngs=nnx.Rngs(0))
  model.head.kernel[...] = 0.4 * jax.random.normal(jax.random.key(7), model.head.kernel.shape)
  for table in (model.token, model.label):
    table.embedding[...] *= 50
  model.transformer.blocks.attention.out.kernel[...] *= 10  # positions hear of each other
  return model


def keys(n, seed=0):
  return example_keys(seed, jnp.arange(n))


def sample(model, n, *, label=None, seed=0, known=None, known_mask=None, **settings):
  condition = None if label is None else {'label': label}
  return generate(model, condition, keys=keys(n, seed), settings=DepthSettings(**settings),
                  known=known, known_mask=known_mask)


log_prob = jax.jit(lambda model, batch: model.log_prob(batch))
scores = jax.jit(lambda model, tokens, label: model._scores(
    model._vectors(model._to(tokens)), label))


@functools.partial(jax.jit, static_argnames='train')
def loss(model, batch, key, train=True):
  return model.loss(batch, step=0, key=key, train=train)


def every(spec):
  """All token arrays of a spec."""
  codes = itertools.product(*map(range, spec.vocab * spec.length))
  return jnp.array(list(codes), jnp.int32).reshape(-1, spec.length, spec.depth)


@functools.cache
def joint(name):
  """The probability of every token array, one axis per code."""
  model = build(name)
  logs = np.asarray(log_prob(model, {'tokens': every(model.spec)}), np.float64)
  return np.exp(logs).reshape(model.spec.vocab * model.spec.length)


def counts(model, tokens):
  shape = model.spec.vocab * model.spec.length
  flat = np.ravel_multi_index(tuple(np.asarray(tokens).reshape(len(tokens), -1).T), shape)
  return np.bincount(flat, minlength=math.prod(shape)).reshape(shape)


def fit(found, law) -> float:
  """Chi-square's p; cells that are expected fewer than 5 times count together."""
  found, law = np.asarray(found).reshape(-1), np.asarray(law).reshape(-1)
  want = law / law.sum() * found.sum()
  rare = want < 5
  pool = lambda x: np.append(x[~rare], x[rare].sum() + 1e-9)  # noqa: E731
  return stats.chisquare(pool(found), pool(want) * pool(found).sum() / pool(want).sum()).pvalue


# ---- the distribution

@pytest.mark.parametrize('name', MODELS)
def test_probabilities_of_all_arrays_sum_to_one(name):
  table = joint(name)
  assert table.sum() == pytest.approx(1, abs=1e-5)
  assert table.max() > 2 * table.mean()  # far from uniform, or the test would say nothing


@pytest.mark.parametrize('name', [name for name in MODELS if name != 'bits'])
def test_samples_have_the_enumerated_distribution(name):
  """20,000 draws against all arrays, and two controls that must fail."""
  model = build(name)
  drawn = sample(model, 20000)
  found = counts(model, drawn.tokens)
  assert fit(found, joint(name)) > 1e-3
  assert fit(found, np.roll(joint(name), 1, -1)) < 1e-6
  if name == 'rq':  # the codes of a position in the wrong order
    assert fit(found, joint(name).transpose(1, 0, 3, 2)) < 1e-6
  assert drawn.nfe == 2 and drawn.exact.all()
  # the probability that cached steps gave a sample is that of the parallel pass
  np.testing.assert_allclose(
      drawn.log_prob, log_prob(model, {'tokens': drawn.tokens}), atol=1e-4)


def test_codes_of_a_position_are_independent_without_an_inner_transformer():
  """p(a, b | the position before) = p(a | ..) p(b | ..), and with one it is not."""
  gaps = {}
  for name in ('rq', 'independent'):
    table = joint(name)
    table = table / table.sum((2, 3), keepdims=True)
    product = table.sum(3, keepdims=True) * table.sum(2, keepdims=True)
    gaps[name] = np.abs(table - product).max()
  assert gaps['independent'] < 1e-6 < 0.05 < gaps['rq']


@pytest.mark.parametrize('name', ['rq', 'independent'])
def test_no_code_hears_of_later_ones(name):
  """The gradient of code (n, d) by the vector of every code: exactly zero from itself on."""
  model = build(name, spec=TokenSpec(grid=(3,), vocab=(4, 4)))
  tokens = jax.random.randint(jax.random.key(1), (1, 3, 2), 0, 4)
  gradient = jax.jit(jax.jacobian(lambda v: model._scores(v, jnp.zeros(1, int))[0]))(
      model._vectors(tokens))
  found = (np.abs(gradient[:, :, :, 0]).max((2, 5)) > 0).reshape(6, 6)  # of whom, by whom
  before = np.tril(np.ones((6, 6), bool), -1)
  if name == 'independent':
    before &= np.arange(6)[:, None] // 2 != np.arange(6) // 2
  np.testing.assert_array_equal(found, before)


def test_decoding_of_a_grid_equals_the_full_pass():
  for changes in (dict(axes=0, code_width=8), dict(axes=2, depth=False)):
    model = build(spec=GRID, **changes)
    drawn = sample(model, 64)
    assert (drawn.tokens < jnp.array(GRID.vocab)).all()
    np.testing.assert_allclose(
        drawn.log_prob, log_prob(model, {'tokens': drawn.tokens}), atol=1e-4)


def test_bfloat16_decodes_as_it_trains():
  model = build(dtype='bfloat16')
  drawn = sample(model, 64)
  graph, params = nnx.split(model)

  @jax.jit
  def run(params):
    found = nnx.merge(graph, params).log_prob({'tokens': drawn.tokens})
    return jnp.sum(found), found

  (_, found), gradients = jax.value_and_grad(run, has_aux=True)(params)
  np.testing.assert_allclose(drawn.log_prob, found, atol=0.1)
  assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradients))


def test_slots_have_the_coordinates_of_the_position_they_hold():
  np.testing.assert_array_equal(
      build(spec=GRID, axes=2)._positions(), [[0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1]])


# ---- conditions and settings

def guided(scale=None, n=16, **options):
  """Draws of a guided grid; a scale per depth, so that all of them share a program."""
  scale = None if scale is None else jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (3,))
  return sample(build(spec=GRID, axes=2, classes=3), n, guidance=scale,
                **{'label': jnp.arange(n) % 3} | options)


def test_guided_decoding_equals_the_full_pass():
  model, scale = build(spec=GRID, axes=2, classes=3), jnp.array([1.7, 1.0, 0.4])
  drawn = guided(scale)
  conditional, null = (
      jnp.where(GRID.support(), scores(model, drawn.tokens, y), -1e9)
      for y in (jnp.arange(16) % 3, jnp.full(16, 3)))
  logs = jax.nn.log_softmax(null + scale[:, None] * (conditional - null))
  picked = jnp.take_along_axis(logs, drawn.tokens[..., None], -1).sum((1, 2, 3))
  np.testing.assert_allclose(drawn.log_prob, picked, atol=1e-4)
  assert drawn.nfe == 2 * GRID.length
  np.testing.assert_array_equal(guided(1).tokens, guided().tokens)  # as without guidance
  null = guided(label=jnp.full(16, -1)).tokens
  np.testing.assert_array_equal(guided(0).tokens, null)
  assert (drawn.tokens != guided().tokens).any()


def test_guidance_may_change_from_position_to_position():
  late = guided(4, guidance_schedule='interval', guidance_start=0.5).tokens
  plain, always = guided().tokens, guided(4).tokens
  np.testing.assert_array_equal(late[:, :3], plain[:, :3])
  assert (late != plain).any() and (late != always).any()


def test_independent_codes_are_guided_each_with_its_scale():
  model, label = build('independent', classes=3), jnp.arange(64) % 3
  both = sample(model, 64, label=label, guidance=jnp.array([3.0, 1.0])).tokens
  plain, strong = (sample(model, 64, label=label, guidance=jnp.full(2, s)).tokens
                   for s in (1.0, 3.0))
  np.testing.assert_array_equal(both[:, 0, 0], strong[:, 0, 0])
  np.testing.assert_array_equal(both[:, 0, 1], plain[:, 0, 1])
  assert (both != plain).any() and (both != strong).any()


def test_each_depth_may_have_a_temperature_of_its_own():
  model = build()
  drawn = sample(model, 256, temperature=jnp.array([0.0, 1.0])).tokens
  best = jnp.argmax(scores(model, drawn, jnp.zeros(256, int)), -1)
  np.testing.assert_array_equal(drawn[..., 0], best[..., 0])
  assert (drawn[..., 1] != best[..., 1]).any()
  greedy = sample(model, 256, top_k=1)
  np.testing.assert_allclose(greedy.log_prob, 0, atol=1e-6)
  np.testing.assert_array_equal(
      greedy.tokens, sample(model, 256, temperature=jnp.zeros(2)).tokens)


def test_sweeps_share_one_program(calls):
  model = build(spec=TokenSpec(grid=(3,), vocab=(4, 2)), classes=3)
  programs = calls(type(model), 'sample')
  for label, seed, guidance, temperature in ((0, 0, 1.0, 1.0), (2, 5, 3.5, 0.5), (1, 1, 0.0, 0.0)):
    sample(model, 4, label=jnp.full(4, label), seed=seed, guidance=guidance,
           temperature=temperature)
  assert len(programs) == 1


def test_batch_size_leaves_the_tokens():
  """At least 99 % equal in float32: sums of other shapes may differ in the last bit."""
  model = build(spec=GRID, axes=0, code_width=8)
  whole = np.asarray(sample(model, 64).tokens)
  for size in (1, 7):
    assert np.mean(np.asarray(sample(model, size).tokens) == whole[:size]) >= 0.99
  order = np.random.default_rng(0).permutation(64)
  shuffled = generate(model, None, keys=keys(64)[order], settings=DepthSettings()).tokens
  assert np.mean(np.asarray(shuffled) == whole[order]) >= 0.99
  assert len(np.unique(whole, axis=0)) > 32


# ---- infilling

@pytest.mark.parametrize('name, held, exact', [
    ('rq', [0], True), ('rq', [0, 1, 2], True), ('rq', [1], False), ('rq', [0, 2], False),
    ('rq', [3], False),
    ('independent', [1], True), ('independent', [0, 1, 3], True), ('independent', [2], False),
    ('shared unequal', [0, 1], True), ('words', [0], True), ('words', [1], False)])
def test_prefixes_are_infilled_exactly_and_nothing_else_is_said_to_be(name, held, exact):
  """Completions of known codes, numbered row-major, against the enumerated conditional."""
  n, model = 20000, build(name)
  values = [1] * (model.spec.length * model.spec.depth)
  mask = np.zeros((n, len(values)), bool)
  mask[:, held] = True
  shape = (n, model.spec.length, model.spec.depth)
  drawn = sample(model, n, known=jnp.ones(shape, int), known_mask=mask.reshape(shape))
  given = tuple(1 if i in held else slice(None) for i in range(len(values)))
  found = counts(model, drawn.tokens)
  assert found[given].sum() == n  # known codes are unchanged
  assert (drawn.exact == exact).all()
  p = fit(found[given], joint(name)[given])
  assert p > 1e-3 if exact else p < 1e-3  # what is known later does not shape what precedes it


def test_words_of_which_a_part_is_known_are_drawn_among_those_that_have_it():
  """Bits 0, 1 | 2, 3 of a position as two words: each known bit restricts its own word."""
  n, spec = 20000, TokenSpec(grid=(1,), vocab=(2, 2, 2, 2))
  model = build('words', spec=spec, words=(2, 2))
  table = np.exp(np.asarray(log_prob(model, {'tokens': every(spec)}), np.float64))
  table = table.reshape(spec.vocab)
  for held, exact in (([1], True), ([0, 1, 3], True), ([1, 2], False)):
    mask = jnp.zeros((n, 1, 4), bool).at[:, :, jnp.array(held)].set(True)
    drawn = sample(model, n, known=jnp.ones((n, 1, 4), int), known_mask=mask)
    given = tuple(1 if i in held else slice(None) for i in range(4))
    found = counts(model, drawn.tokens)
    assert found[given].sum() == n and (drawn.exact == exact).all()
    assert (fit(found[given], table[given]) > 1e-3) == exact


@hypothesis(max_examples=50, deadline=None)
@given(strategies.data())
def test_a_word_agrees_with_what_is_known_when_all_known_bits_do(data):
  sizes = tuple(data.draw(strategies.lists(strategies.integers(1, 4), min_size=1, max_size=4)))
  split = data.draw(strategies.permutations(sizes))  # other words than codes
  spec = TokenSpec(grid=(2,), vocab=tuple(2**s for s in split))
  rng = np.random.default_rng(data.draw(strategies.integers(0, 999)))
  known, other = (rng.integers(0, spec.vocab, (1, 2, spec.depth)) for _ in range(2))
  mask = rng.random(known.shape) < 0.5
  other = np.where(rng.random(known.shape) < 0.5, known, other)
  words, held, whole = known_bits(spec, sizes, known * mask, mask)
  agrees = (((words ^ spec.to(sizes, other)) & held) == 0).all()
  assert agrees == (known == other)[mask].all()
  bits = spec.to('bits', np.where(mask, np.array(spec.vocab) - 1, 0))[0]
  ends = np.cumsum(sizes)
  full = [[row[e - s:e].all() for s, e in zip(sizes, ends)] for row in bits]
  np.testing.assert_array_equal((held == whole)[0], full)


def test_a_samples_own_prefix_continues_it():
  """Prefilling leaves all draws, and so all tokens, as they were; it takes fewer passes."""
  whole = guided(1.5).tokens
  for prefill, held, passes in ((2, 2, 10), (6, 6, 2), (0, 2, 12)):
    mask = jnp.broadcast_to((jnp.arange(6) < held)[:, None], whole.shape)
    again = guided(1.5, known=whole, known_mask=mask, prefill=prefill)
    np.testing.assert_array_equal(again.tokens, whole)
    assert again.nfe == passes and again.exact.all()


# ---- training

@pytest.mark.parametrize('name', ['words', 'independent'])
def test_loss_is_nats_per_code_of_the_spec_in_every_view(name, key):
  model = build(name)
  tokens = every(model.spec)[::7]
  value, aux = loss(model, {'tokens': tokens}, key, train=False)
  spec, metrics = model.spec, aux['metrics']
  assert aux['weight'] == len(tokens) * spec.length * spec.depth
  expected = -float(log_prob(model, {'tokens': tokens}).sum()) / float(aux['weight'])
  assert float(value) == pytest.approx(expected, rel=1e-5)
  parts = [float(metrics[f'bits_depth_{i}']) for i in range(model.codes.depth)]
  assert sum(parts) / spec.depth == pytest.approx(expected / math.log(2), rel=1e-5)
  assert float(metrics['bits_per_token']) == pytest.approx(expected / math.log(2), rel=1e-5)
  view = model._to(tokens)
  found = scores(model, tokens, jnp.zeros(len(tokens), int))
  logs = jnp.take_along_axis(jax.nn.log_softmax(found), view[..., None], -1)[..., 0]
  np.testing.assert_allclose(parts, -logs.mean((0, 1)) / math.log(2), rtol=1e-4)
  assert float(metrics['accuracy']) == pytest.approx(
      float(jnp.mean(jnp.argmax(found, -1) == view)))


def test_a_new_model_is_uniform_over_each_alphabet(key):
  model = DepthConfig(
      depth=TransformerConfig(layers=1, width=16, heads=2, axes=1),
      transformer=TransformerConfig(layers=1, width=16, heads=2)).build(UNEQUAL, rngs=nnx.Rngs(0))
  value, aux = loss(model, {'tokens': jnp.zeros((2, 2, 2), int)}, key)
  assert float(value) == pytest.approx((math.log(4) + math.log(2)) / 2, abs=1e-6)
  assert [float(aux['metrics'][f'bits_depth_{i}']) for i in (0, 1)] == pytest.approx([2, 1])


def test_labels_matter_and_are_dropped_per_example(key):
  model = build(classes=3)
  batch = {'tokens': jnp.ones((64, 2, 2), int), 'label': jnp.zeros(64, int)}
  kept = float(loss(model, batch, key, train=False)[0])
  dropped = float(loss(model, {**batch, 'label': jnp.full(64, -1)}, key, train=False)[0])
  assert abs(kept - dropped) > 1e-3
  half = nnx.merge(*nnx.split(model))
  half.label_dropout = 0.5
  shares = [(float(loss(half, batch, k)[0]) - kept) / (dropped - kept)
            for k in jax.random.split(key, 4)]
  assert all(0.2 < share < 0.8 for share in shares) and len(set(shares)) > 1
  whole = 64 * np.array(shares)  # each example has its label or not
  np.testing.assert_allclose(whole, np.round(whole), atol=0.05)


@pytest.mark.parametrize('depth, bound', [(True, ENTROPY), (False, ENTROPY + INFORMATION)])
def test_independent_codes_pay_the_information_between_them(depth, bound, key):
  """P over the two codes of one position: only an inner transformer reaches the entropy."""
  spec = TokenSpec(grid=(1,), vocab=(2, 2))
  body = dict(layers=1, width=16, heads=2, remat=False)
  graph, params = nnx.split(DepthConfig(
      transformer=TransformerConfig(**body),
      depth=TransformerConfig(**body, axes=0) if depth else None).build(spec, rngs=nnx.Rngs(0)))
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 200))
  tokens, weight = every(spec), jnp.asarray(P.reshape(-1))

  def step(state, _):
    def cross(params):
      return -weight @ nnx.merge(graph, params).log_prob({'tokens': tokens})

    value, gradient = jax.value_and_grad(cross)(state[0])
    updates, moments = optimizer.update(gradient, state[1])
    return (optax.apply_updates(state[0], updates), moments), value

  _, values = jax.jit(lambda state: jax.lax.scan(step, state, None, 200))(
      (params, optimizer.init(params)))
  assert values[0] == pytest.approx(2 * math.log(2), abs=1e-5)
  assert -1e-5 < float(values[-1]) - bound < 1e-3


BODY = dict(layers=1, width=16, heads=2)


@pytest.mark.parametrize('spec, options, message', [
    (TokenSpec(grid=(3,), vocab=(4,), eos=3), {}, 'take the autoregressive generator'),
    (PAIRS, dict(view='factors'), 'needs a spec with factors'),
    (PAIRS, dict(view='bits'), 'needs powers of two'),
    (PAIRS, dict(view='flat'), 'is not one of factors, bits'),
    (BYTE, dict(words=(1, 1)), 'must split the 3 bits'),
    (BYTE, dict(words=(1, 2), view='bits'), 'leave one out'),
    (PAIRS, dict(transformer=TransformerConfig(**BODY, axes=2)), 'axes=2 must be 0'),
    (PAIRS, dict(transformer=TransformerConfig(**BODY, modulated=True)), 'modulated=True'),
    (PAIRS, dict(depth=TransformerConfig(**BODY, axes=2)), 'depth.axes=2'),
    (PAIRS, dict(depth=TransformerConfig(**BODY | {'width': 32})), 'depth.width=32'),
    (PAIRS, dict(shared=True), 'set shared=False'),
    (PAIRS, dict(label_dropout=1.5), 'label_dropout=1.5')])
def test_what_cannot_be_built_is_refused(spec, options, message):
  with pytest.raises(ValueError, match=message):
    DepthConfig(**{'transformer': TransformerConfig(**BODY)} | options).build(
        spec, rngs=nnx.Rngs(0))


def test_what_cannot_be_drawn_is_refused():
  model = build()
  for options, message in (
      (dict(guidance=2.0), 'needs a model with classes'), (dict(prefill=1), 'prefill=1'),
      (dict(label=jnp.zeros(2, int)), 'classes=0'),
      (dict(known=jnp.zeros((2, 2, 2), int)), 'go together')):
    with pytest.raises(ValueError, match=message):
      sample(model, 2, **options)
  with pytest.raises(ValueError, match='needs an entry `label`'):
    generate(build(classes=3), {'text': jnp.zeros(2)}, keys=keys(2), settings=DepthSettings())
  with pytest.raises(ValueError, match='keep: all codes'):
    model.log_prob({'tokens': every(PAIRS), 'keep': jnp.ones(81, int)})
