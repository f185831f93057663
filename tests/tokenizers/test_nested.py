"""Nested codes: the law of the drawn prefix lengths, and codes that are cut to prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.bernoulli import BernoulliConfig
from smalti.tokenizers.binary import LFQConfig
from smalti.tokenizers.grouped import GroupedConfig
from smalti.tokenizers.multiscale import MultiScaleConfig
from smalti.tokenizers.nested import SCHEDULES, NestedConfig, budgets, draw_budget, draw_keep
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.quantizer import absorb
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.tokenizer import decode, encode
from smalti.tokenizers.vq import VQConfig

DRAWS = 100_000


def law(length, schedule):
  """P(k) by counting, for every k of `budgets`."""
  ks = budgets(length, schedule)
  if schedule == 'uniform_power':
    rounded = [min(k for k in ks if k >= n) for n in range(1, length + 1)]
    return np.array([rounded.count(k) / length for k in ks])
  return np.full(len(ks), 1 / len(ks))


@pytest.mark.parametrize('length', [256, 12])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_budgets_follow_their_law(schedule, length):
  draws = np.asarray(draw_budget(jax.random.key(3), DRAWS, length, schedule))
  assert draws.dtype == np.int32
  ks, p = np.array(budgets(length, schedule)), law(length, schedule)
  counts = np.array([np.sum(draws == k) for k in ks])
  assert counts.sum() == DRAWS  # nothing else was drawn
  assert stats.chisquare(counts, DRAWS * p).pvalue > 1e-3


@pytest.mark.parametrize('schedule,full,mean', [
    ('uniform', 1 / 256, 128.5), ('power', 1 / 9, 56.78), ('uniform_power', 1 / 2, 170.67)])
def test_published_probability_of_all_and_mean(schedule, full, mean):
  p, ks = law(256, schedule), np.array(budgets(256, schedule))
  assert p[-1] == pytest.approx(full) and p @ ks == pytest.approx(mean, abs=5e-3)
  draws = np.asarray(draw_budget(jax.random.key(4), DRAWS, 256, schedule))
  assert np.mean(draws) == pytest.approx(mean, abs=4 * np.sqrt(p @ ks**2 / DRAWS))
  assert np.mean(draws == 256) == pytest.approx(full, abs=4 * np.sqrt(full / DRAWS))


def test_budgets_start_at_the_least():
  assert budgets(8, 'uniform', 3) == (3, 4, 5, 6, 7, 8)
  assert budgets(8, 'power', 3) == (4, 8) and budgets(12, 'power') == (1, 2, 4, 8, 12)
  draws = draw_budget(jax.random.key(5), 1000, 8, 'uniform', 3)
  assert set(np.asarray(draws).tolist()) == {3, 4, 5, 6, 7, 8}


def test_what_cannot_be_drawn_is_refused():
  with pytest.raises(ValueError, match='one of uniform, power, uniform_power'):
    budgets(8, 'pow2')
  with pytest.raises(ValueError, match=r'in 1\.\.8'):
    budgets(8, 'uniform', 9)


def test_a_fraction_of_the_examples_is_cut():
  keep = np.asarray(draw_keep(jax.random.key(6), 8000, 4, dropout=0.5))
  want = 8000 * (np.full(4, 0.5 / 4) + np.array([0, 0, 0, 0.5]))
  assert stats.chisquare(np.bincount(keep, minlength=5)[1:], want).pvalue > 1e-3
  assert np.all(np.asarray(draw_keep(jax.random.key(6), 8, 4, dropout=0.0)) == 4)
  with pytest.raises(ValueError, match='pass a key'):
    draw_keep(None, 8, 4)


BOOK = VQConfig(codes=8, dim=2, revival=0, init='normal')
INSIDE = {
    'fsq': FSQConfig(levels=(8, 5, 3)),
    'bits': LFQConfig(bits=6, groups=3),
    'product': GroupedConfig(quantizer=BOOK, groups=3),
    'sum': ResidualConfig(quantizer=BOOK, levels=3),
}


def build(inside, **fields):
  return NestedConfig(quantizer=inside, **fields).build(rngs=nnx.Rngs(0))


@pytest.mark.parametrize('kind', INSIDE)
def test_dropped_codes_become_the_learned_vector(kind):
  q = build(INSIDE[kind])
  z = jax.random.normal(jax.random.key(7), (32, 5, q.dim))

  @jax.jit
  def run(z):
    out, whole = q(z, key=jax.random.key(8), train=True), q(z)
    place = jnp.arange(3) + jnp.zeros_like(out.tokens)
    other = (out.tokens + 1 + place) % jnp.array(q.vocab)
    cut = jax.vmap(lambda k: q.lookup(out.tokens, place < k))(jnp.arange(1, 4))
    junk = jax.vmap(lambda k: q.lookup(jnp.where(place < k, out.tokens, other), place < k))(
        jnp.arange(1, 4))
    return out, whole, cut, junk

  out, whole, cut, junk = run(z)
  np.testing.assert_array_equal(out.tokens, whole.tokens)
  np.testing.assert_array_equal(cut[2], whole.vectors)
  found = []
  for k, prefix, mixed in zip((1, 2, 3), cut, junk):
    np.testing.assert_array_equal(prefix, mixed)  # whatever the codes beyond
    found.append(np.all(prefix == out.vectors, (1, 2)))
    if kind == 'sum':
      level = [np.asarray(q.coder.levels[i].codes())[out.tokens[..., i]] for i in range(3)]
      want = sum(level[:k]) + sum(np.asarray(q.bias[...])[k:], np.zeros(2))
      np.testing.assert_allclose(prefix, want, atol=1e-6)
    else:
      width = k * q.dim // 3
      np.testing.assert_array_equal(prefix[..., :width], whole.vectors[..., :width])
      learned = np.broadcast_to(q.bias[...], prefix.shape)[..., width:]
      np.testing.assert_array_equal(prefix[..., width:], learned)
  assert np.all(np.sum(found, 0) == 1) and np.all(np.any(found, 1))
  assert q.order == 'depth' and q.budgets == (1, 2, 3)


def test_factors_of_one_code_become_codes():
  q = build(FSQConfig(levels=(8, 5, 3)))
  z = jax.random.normal(jax.random.key(9), (4, 50, 3))
  out = jax.jit(lambda z: q(z))(z)
  tokens, inner = out.tokens, jax.jit(lambda z: q.coder(z).tokens)(z)
  np.testing.assert_array_equal(tokens @ np.array([1, 8, 40]), inner[..., 0])
  assert q.vocab == (8, 5, 3) and q.factors == ()
  assert out.metrics['usage_2'] == 1
  assert build(LFQConfig(bits=6, groups=3)).factors == (2, 2)


def test_dropped_channels_pass_no_gradient():
  structure, bias = nnx.split(build(FSQConfig(levels=(8, 5, 3))))
  z = jax.random.normal(jax.random.key(10), (64, 1, 3))

  @jax.jit
  def gradients(bias, z):
    return jax.grad(lambda bias, z: jnp.sum(nnx.merge(structure, bias)(
        z, key=jax.random.key(11), train=True).vectors), (0, 1))(bias, z)

  bias, vectors = gradients(bias, z)
  dropped = np.all(np.asarray(vectors) == 0, (1,)).sum(0)
  np.testing.assert_array_equal(bias['bias'][...], dropped)
  assert dropped[0] == 0 and 5 < dropped[1] < dropped[2] < 60


@pytest.mark.parametrize('inside,message', [
    (BOOK, 'has no codes to drop'),
    (ProjectedConfig(quantizer=FSQConfig(levels=(5, 5)), dim=4), 'put a projection outside'),
    (BernoulliConfig(bits=4, dim=8), 'no channels of their own'),
    (BernoulliConfig(bits=4, dim=8, stochastic=True), 'set stochastic=False'),
    (GroupedConfig(quantizer=LFQConfig(bits=4, groups=2)), 'no channels of their own'),
    (ResidualConfig(quantizer=BOOK, dropout=1.0), 'of its own')])
def test_what_has_no_prefix_to_learn_is_refused(inside, message):
  with pytest.raises(ValueError, match=message):
    build(inside)


TRAINED = {
    'residual': ResidualConfig(quantizer=VQConfig(codes=16, dim=8), levels=4, dropout=1.0),
    'grvq': GroupedConfig(quantizer=ResidualConfig(
        quantizer=VQConfig(codes=16, dim=4), levels=2, dropout=1.0)),
    'channels': NestedConfig(quantizer=FSQConfig(levels=(5,) * 8)),
    'scales': MultiScaleConfig(
        quantizer=VQConfig(codes=64, dim=8), scales=(1, 2, 4), dropout=1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', TRAINED)
def test_images_get_better_with_every_code_of_a_trained_prefix(kind):
  """Digits through a small autoencoder: 300 steps, then every budget on 300 held-out images."""
  from sklearn.datasets import load_digits  # imports for a second
  images = load_digits().images.astype(np.float32)[..., None] / 8 - 1
  config = AutoencoderConfig(image_size=(8, 8), channels=1, width=16, multipliers=(1, 2),
                             quantizer=TRAINED[kind])
  t = config.build(rngs=nnx.Rngs(0))
  t.prepare({'image': images[:256]}, key=jax.random.key(0))
  structure, params, rest = nnx.split(t, nnx.Param, ...)
  rule = optax.adam(2e-3)

  @jax.jit
  def step(params, rest, moments, i):
    x = jnp.asarray(images)[jax.random.randint(jax.random.key(i), (64,), 0, 1497)]
    loss = lambda params: nnx.merge(structure, params, rest).loss(  # noqa: E731
        {'image': x}, step=i, key=jax.random.key(i))
    gradients, aux = jax.grad(loss, has_aux=True)(params)
    updates, moments = rule.update(gradients, moments, params)
    model = nnx.merge(structure, optax.apply_updates(params, updates), rest)
    absorb(model, aux['statistics'])
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return params, rest, moments

  moments = rule.init(params)
  for i in range(300):
    params, rest, moments = step(params, rest, moments, jnp.uint32(i))
  t = nnx.merge(structure, params, rest)
  x = images[1497:]
  tokens = encode(t, x)
  error = [float(jnp.mean(jnp.square(decode(t, tokens, keep=jnp.full(300, k)) - x)))
           for k in t.spec.budgets]
  assert all(b < a for a, b in zip(error, error[1:])), error
  assert error[-1] < 0.8 * error[0]
