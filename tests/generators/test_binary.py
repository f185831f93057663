"""Binary diffusion against enumerated chains, with a network that knows the truth."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from smalti.generators import schedules
from smalti.generators.binary import Binary, BinaryConfig, BinarySettings, posterior, reverse
from smalti.generators.generator import example_keys, generate
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

P = np.array([[.4, .1], [.2, .3]])
PAIR = TokenSpec(grid=(2,), vocab=(2,))
PAIRS = jnp.array(list(itertools.product(range(2), repeat=2)), jnp.int32)[..., None]
ENTROPY = 1.2798542258


def config(**options) -> BinaryConfig:
  body = dict(layers=1, width=16, heads=2, remat=False) | options.pop('transformer', {})
  return BinaryConfig(transformer=TransformerConfig(**body), **options)


class Exact(Binary):
  """p(z_0 | z_t) of a joint table over the bits of one position after another."""

  def __init__(self, table, **options):
    table = np.asarray(table)
    spec = TokenSpec(grid=(table.ndim,), vocab=(2,))
    super().__init__(config(**options), spec, rngs=nnx.Rngs(0))
    self.table = tuple(table.reshape(-1).tolist())

  def logits(self, z, t, labels, **_):
    keep = jnp.asarray(self.kept, jnp.float32)[t][:, None]
    states = jnp.asarray(list(itertools.product(range(2), repeat=z.shape[1])))
    same = (z[:, None, :, 0] == states).sum(-1)
    weight = jnp.asarray(self.table) * ((1 + keep) / 2) ** same * (
        (1 - keep) / 2) ** (z.shape[1] - same)
    one = jnp.einsum('bs,sn->bn', weight, states.astype(jnp.float32))
    return (jnp.log(one) - jnp.log(weight.sum(-1, keepdims=True) - one))[..., None]


def keys(n, seed=0):
  return example_keys(seed, jnp.arange(n))


def bound(table, steps, visited=None, **options):
  """Expected nats of the bound over the table's own draws."""
  table = np.asarray(table)
  model = Exact(table, steps=steps, **options)
  states = jnp.array(list(itertools.product(range(2), repeat=table.ndim)), jnp.int32)[..., None]
  found = jax.jit(lambda m, x: m.elbo({'tokens': x}, mode='enumerate', steps=visited))(
      model, states)
  return -float(table.reshape(-1) @ found)


# ---- the process


@pytest.mark.parametrize('name, golden', [
    ('linear', (.75, .5, .25)), ('cosine', (.8535534, .5, .1464466)),
    ('sigmoid', (.5417526, .2305695, .0705943))])
def test_steps_of_any_stride_lead_back_to_the_marginals(name, golden):
  np.testing.assert_allclose(schedules.kept(name, 4)[1:4], golden, atol=5e-8)
  kept = schedules.kept(name, 16)
  assert kept[0] == 1 and kept[-1] == 0 and (np.diff(kept) < 0).all()
  z_t, z_0 = jnp.indices((2, 2))
  for s, t in [(1, 2), (3, 9), (15, 16), (1, 16)]:
    seen = np.where(z_t == z_0, 1 + kept[t], 1 - kept[t]) / 2
    back = np.sum(seen * posterior(z_t, z_0, jnp.asarray(kept[s]), jnp.asarray(kept[t])), 0)
    np.testing.assert_allclose(back, kept[s] * np.arange(2) + (1 - kept[s]) / 2, atol=1e-6)


def test_the_posterior_is_that_of_bayes():
  keep_s, keep_t = 0.6, 0.4
  for z_t, z_0 in itertools.product(range(2), repeat=2):
    joint = []
    for z_s in range(2):
      there = (1 + keep_s) / 2 if z_s == z_0 else (1 - keep_s) / 2
      seen = (1 + keep_t / keep_s) / 2 if z_t == z_s else (1 - keep_t / keep_s) / 2
      joint.append(there * seen)
    found = posterior(*map(jnp.asarray, (z_t, z_0, keep_s, keep_t)))
    assert float(found) == pytest.approx(joint[1] / sum(joint), rel=1e-6)


@pytest.mark.parametrize('z_t, p, mixture, product', [
    (0, .794118, .362745, .294872), (1, .954545, .934343, .944444)])
def test_the_printed_reverse_is_not_the_mixture(z_t, p, mixture, product):
  at = *map(jnp.asarray, (z_t, p, .6, .4)),
  assert float(reverse(*at, 'mixture')) == pytest.approx(mixture, abs=2e-6)
  assert float(reverse(*at, 'product')) == pytest.approx(product, abs=2e-6)


# ---- likelihood


@pytest.mark.parametrize('steps, product', [
    (2, .325083), (4, .340559), (16, .445878), (64, .519801)])
def test_the_bound_of_one_bit_is_its_entropy_with_the_mixture_alone(steps, product):
  assert bound([.1, .9], steps) == pytest.approx(.325083, abs=2e-5)
  assert bound([.1, .9], steps, reverse='product') == pytest.approx(product, abs=2e-5)


@pytest.mark.parametrize('steps, mixture, product', [
    (1, 1.366159, None), (2, 1.334926, None), (4, 1.309094, 1.389046), (8, 1.294702, None),
    (16, 1.287307, 1.617139), (64, 1.281720, 1.748389), (256, 1.280321, 1.799293)])
def test_the_bound_of_two_bits_falls_to_their_entropy(steps, mixture, product):
  assert bound(P, steps) == pytest.approx(mixture, abs=2e-5)
  if product:
    assert bound(P, steps, reverse='product') == pytest.approx(product, abs=2e-5)


def test_a_chain_of_fewer_steps_has_the_bound_of_its_own_length_and_stays_one():
  assert bound(P, 64, 64) < bound(P, 64, 16) < bound(P, 64, 4) < bound(P, 64, 1)
  # from T straight to 0 the network sees noise alone
  assert bound(P, 64, 1) == pytest.approx(bound(P, 1), abs=2e-5)
  with pytest.raises(ValueError, match='steps=65 must be within 1..64'):
    bound(P, 64, 65)


def test_a_sampler_is_scored_by_the_chain_that_it_walks(key):
  batch, model = {'tokens': PAIRS}, Exact(P, steps=8)
  for kind, steps in itertools.product(('mixture', 'product'), (None, 3)):
    chain = dict(steps=steps, reverse=kind)
    exact = Exact(P, steps=8, reverse=kind).elbo(batch, mode='enumerate', steps=steps)
    np.testing.assert_allclose(model.elbo(batch, mode='enumerate', **chain), exact, rtol=1e-6)
    found = model.nats(batch, key=key, settings=BinarySettings(**chain))
    np.testing.assert_array_equal(found, model.elbo(batch, key=key, **chain))
  np.testing.assert_array_equal(model.nats(batch, key=key), model.elbo(batch, key=key))


@pytest.mark.parametrize('options', [{}, {'reverse': 'product'}, {'schedule': 'cosine'}])
def test_drawn_bounds_and_the_loss_have_the_mean_of_the_exact_one(options, key):
  model = Exact(P, steps=8, **options)
  exact = model.elbo({'tokens': PAIRS}, mode='enumerate')
  drawn = jax.jit(jax.vmap(lambda k: model.elbo({'tokens': PAIRS}, key=k)))(
      jax.random.split(key, 4000))
  error = np.std(drawn, 0) / 4000 ** 0.5
  assert (abs(np.mean(drawn, 0) - exact) < 4 * error).all()
  losses, aux = jax.jit(jax.vmap(lambda k: model.loss(
      {'tokens': PAIRS}, step=0, key=k, train=False)))(jax.random.split(key, 4000))
  error = np.std(losses) / 4000 ** 0.5
  assert abs(np.mean(losses) * 2 + np.mean(exact)) < 4 * 2 * error
  np.testing.assert_array_equal(losses, aux['metrics']['nll'])


def test_uniform_guesses_cost_one_bit_each_and_flips_are_what_changed():
  """At the start the head is zero: p = 1/2 whatever is seen."""
  spec = TokenSpec(grid=(3,), vocab=(8,), factors=(2, 2, 2))
  model = config(steps=8).build(spec, rngs=nnx.Rngs(0))
  tokens = jnp.array([[[0], [5], [7]]])
  value, aux = model.loss({'tokens': tokens}, step=0, key=jax.random.key(0))
  assert float(aux['metrics']['cross_entropy']) == pytest.approx(math.log(2), rel=1e-6)
  assert float(value) == pytest.approx(
      math.log(2) + 0.1 * float(aux['metrics']['nll']) / 3, rel=1e-5)  # three bits of a code
  model.head.bias[...] = jnp.array([2.0, 0.0, -2.0])
  z = jnp.array([[[0, 1, 0], [1, 1, 1], [0, 0, 1]]])
  np.testing.assert_array_equal(
      model.logits(z, jnp.array([1]), None), [[[2, 0, -2], [-2, 0, 2], [2, 0, 2]]])


@pytest.mark.parametrize('kind', ['mixture', 'product'])
def test_gradients_are_finite_at_any_certainty(kind):
  model = Exact(P, steps=4, reverse=kind)
  kept = jnp.asarray(model.kept)
  z, bits = (jnp.array(x, jnp.int32).reshape(1, 4, 1) for x in ([0, 0, 1, 1], [0, 1, 0, 1]))

  def total(x, t):
    return jnp.sum(model._divergence(z, bits, x * jnp.ones((1, 4, 1)), kept[t - 1][None],
                                     kept[t][None]))

  for t, x in itertools.product((1, 2, 4), (-200.0, -20.0, 0.0, 20.0, 200.0)):
    value, slope = jax.value_and_grad(total)(x, t)
    assert np.isfinite(value) and np.isfinite(slope) and value > -1e-5


# ---- sampling


def counts(model, n=20_000, **options):
  found = generate(model, None, keys=keys(n), settings=BinarySettings(**options)).tokens
  flat = np.asarray(found)[..., 0] @ (2 ** np.arange(found.shape[1])[::-1])
  return np.bincount(flat, minlength=2 ** found.shape[1])


@pytest.mark.parametrize('steps, visited', [(4, 4), (64, 16), (64, 1)])
def test_one_bit_is_drawn_from_its_own_distribution_in_any_number_of_steps(steps, visited):
  p = np.array([.1, .9])
  found = counts(Exact(p, steps=steps), steps=visited)
  assert stats.chisquare(found, p * found.sum()).pvalue > 1e-3


def test_the_product_draws_another_distribution():
  found = counts(Exact([.1, .9], steps=16), reverse='product')
  assert stats.chisquare(found, np.array([.1, .9]) * found.sum()).pvalue < 1e-6
  want = np.array([1 - .8116193624, .8116193624])  # the chain of 16 products, worked out
  assert stats.chisquare(found, want * found.sum()).pvalue > 1e-3


def chain(table, steps):
  """The distribution of the sampler's two bits, enumerated: each step turns every bit by itself."""
  kept = schedules.kept('linear', steps)
  states = np.array(list(itertools.product(range(2), repeat=2)))
  now = np.full(4, 0.25)
  for t in range(steps, 0, -1):
    after = np.zeros(4)
    for z, chance in zip(states, now):
      same = (z == states).sum(1)
      weight = table.reshape(-1) * ((1 + kept[t]) / 2) ** same * ((1 - kept[t]) / 2) ** (2 - same)
      p = weight @ states / weight.sum()
      one = np.asarray(reverse(jnp.asarray(z), jnp.asarray(p), jnp.asarray(kept[t - 1]),
                               jnp.asarray(kept[t]), 'mixture'), np.float64)
      after += chance * np.prod(np.where(states == 1, one, 1 - one), 1)
    now = after
  return now / now.sum()


@pytest.mark.parametrize('steps', [1, 4])
def test_two_bits_have_the_distribution_of_the_chain(steps):
  want = chain(P, steps)
  found = counts(Exact(P, steps=steps))
  assert stats.chisquare(found, want * found.sum()).pvalue > 1e-3
  assert stats.chisquare(found, P.reshape(-1) * found.sum()).pvalue < 1e-6  # control: few steps


def test_many_steps_bring_the_chain_to_the_table():
  gaps = [np.abs(chain(P, steps) - P.reshape(-1)).sum() for steps in (1, 4, 16, 64)]
  assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.01


def test_temperature_divides_the_logits():
  """Odds of 9 become 3 at temperature 2 and 81 at one half."""
  laws = {2.0: [.25, .75], .5: [1 / 82, 81 / 82]}
  for (temperature, law), wrong in zip(laws.items(), [*laws.values()][::-1]):
    found = counts(Exact([.1, .9], steps=8), steps=1, temperature=temperature)
    assert stats.chisquare(found, np.array(law) * found.sum()).pvalue > 1e-3
    assert stats.chisquare(found, np.array(wrong) * found.sum()).pvalue < 1e-6  # the control


def test_temperature_zero_and_threshold_are_the_likelier_value():
  for options in (dict(temperature=0.0), dict(last='threshold')):
    assert counts(Exact([.1, .9], steps=8), n=100, steps=1, **options)[1] == 100


def network(spec=None, **options):
  spec = spec or TokenSpec(grid=(2, 2), vocab=(2,) * 3, factors=(2,))
  model = config(classes=3, steps=8, **options).build(spec, rngs=nnx.Rngs(0))
  model.head.kernel[...] = 0.5 * jax.random.normal(jax.random.key(1), model.head.kernel.shape)
  return model


def test_samples_depend_on_their_own_key_alone():
  model, label = network(), {'label': jnp.arange(8) % 3}
  whole = generate(model, label, keys=keys(8), settings=BinarySettings()).tokens
  part = generate(model, {'label': label['label'][5:]}, keys=keys(8)[5:],
                  settings=BinarySettings()).tokens
  np.testing.assert_array_equal(whole[5:], part)
  assert whole.shape == (8, 4, 3) and len(np.unique(np.asarray(whole), axis=0)) > 4


@pytest.mark.parametrize('clamp', ['clean', 'renoise'])
@pytest.mark.parametrize('spec', [TokenSpec(grid=(2, 2), vocab=(2,) * 3, factors=(2,)),
                                  TokenSpec(grid=(2, 2), vocab=(8,), factors=(2, 2, 2))])
def test_known_tokens_come_back(clamp, spec, key):
  model, shape = network(spec), (16, 4, spec.depth)
  known = jax.random.randint(key, shape, 0, spec.vocab[0])
  mask = jax.random.bernoulli(key, 0.5, shape)
  found = generate(model, None, keys=keys(16), settings=BinarySettings(clamp=clamp), known=known,
                   known_mask=mask)
  np.testing.assert_array_equal(found.tokens[mask], known[mask])
  assert (found.tokens[~mask] != known[~mask]).any()
  np.testing.assert_array_equal(found.exact, ~mask.any((1, 2)) | mask.all((1, 2)))


def test_known_bits_carry_the_noise_of_the_step_or_none():
  model = Exact(P, steps=4)
  known, mask = jnp.ones((2000, 2, 1), jnp.int32), jnp.zeros((2000, 2, 1), bool).at[:, 0].set(True)
  for clamp, want in (('clean', [1, 1, 1, 1]), ('renoise', [.625, .75, .875, 1])):
    steps = generate(model, None, keys=keys(2000), known=known, known_mask=mask,
                     settings=BinarySettings(clamp=clamp, trace=True)).steps
    np.testing.assert_allclose(np.mean(steps[:, :, 0, 0], 1), want, atol=0.04)


def test_guidance_of_one_is_conditional_and_the_null_label_is_unconditional():
  model, label = network(transformer=dict(modulated=True)), {'label': jnp.arange(8) % 3}
  model.label.embedding[...] = jax.random.normal(jax.random.key(2), model.label.embedding.shape)
  model.transformer.blocks.modulation.kernel[...] = 0.1 * jax.random.normal(
      jax.random.key(3), model.transformer.blocks.modulation.kernel.shape)
  draw = lambda c, g: generate(  # noqa: E731
      model, c, keys=keys(8), settings=BinarySettings(guidance=g))
  np.testing.assert_array_equal(draw(label, 1.0).tokens, draw(label, None).tokens)
  np.testing.assert_array_equal(draw(label, 0.0).tokens, draw(None, None).tokens)
  assert (draw(label, None).tokens != draw(None, None).tokens).any()
  assert draw(label, 1.0).nfe == 16 and draw(label, None).nfe == 8


def test_labels_are_dropped_per_example_and_only_in_training(check_dropped):
  seen = []

  class Watched(Binary):
    def logits(self, z, t, labels, **_):
      seen.append(np.asarray(labels))
      return jnp.zeros(z.shape)

  model = Watched(config(classes=4, label_dropout=.5), PAIR, rngs=nnx.Rngs(0))
  batch = {'tokens': jnp.tile(PAIRS, (64, 1, 1)), 'label': jnp.arange(256) % 4}
  check_dropped(model, batch, seen)


def test_what_makes_no_sense_is_refused():
  with pytest.raises(ValueError, match='not made of bits; take Bernoulli, LFQ or BSQ'):
    config().build(TokenSpec(grid=(2,), vocab=(16,)), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='not made of bits'):
    config().build(TokenSpec(grid=(2,), vocab=(15,), factors=(5, 3)), rngs=nnx.Rngs(0))
  model = Exact(P)
  with pytest.raises(ValueError, match='is not one of mixture, product'):
    model.sample(None, keys=keys(1), settings=BinarySettings(reverse='sum'))
  with pytest.raises(ValueError, match='guidance needs a model with classes'):
    model.sample(None, keys=keys(1), settings=BinarySettings(guidance=2.0))


@pytest.mark.slow
def test_a_small_network_learns_the_pair_to_its_bound(key):
  model = config(steps=64, transformer=dict(width=32, layers=2)).build(PAIR, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model)
  rule = optax.adam(optax.cosine_decay_schedule(3e-3, 1500))
  data = jnp.repeat(PAIRS, jnp.asarray(1000 * P.reshape(-1), jnp.int32), 0,
                    total_repeat_length=1000)

  @jax.jit
  def step(params, state, key):
    loss = lambda p: nnx.merge(graph, p).loss({'tokens': data}, step=0, key=key)[0]  # noqa: E731
    updates, state = rule.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  state = rule.init(params)
  for i in range(1500):
    params, state = step(params, state, jax.random.fold_in(key, i))
  found = nnx.merge(graph, params).elbo({'tokens': PAIRS}, mode='enumerate')
  nats = -float(P.reshape(-1) @ found)
  print(f'bound {nats:.4f} nats, of the perfect network 1.28172')
  assert 1.28172 - 1e-3 < nats < 1.28172 + 0.02
