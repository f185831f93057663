"""The laws of every quantizer and tokenizer: a new one is one row in a table."""

import dataclasses
import functools
import inspect
import json
import math
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from smalti.networks.discriminator import PatchDiscriminatorConfig
from smalti.networks.flow import lean
from smalti.networks.layers import Linear
from smalti.networks.vision import plain
from smalti.tokenizers import tokenizer as jitted
from smalti.tokenizers.adversary import AdversaryConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.bernoulli import Bernoulli, BernoulliConfig
from smalti.tokenizers.binary import BSQConfig, LFQConfig
from smalti.tokenizers.clustering import ClusteringConfig
from smalti.tokenizers.entropy import EntropyConfig
from smalti.tokenizers.flexible import FlexTokConfig
from smalti.tokenizers.grouped import GroupedConfig
from smalti.tokenizers.gumbel import GumbelConfig
from smalti.tokenizers.ibq import IBQConfig
from smalti.tokenizers.latent import LatentConfig
from smalti.tokenizers.multiscale import MultiScaleConfig
from smalti.tokenizers.nested import NestedConfig
from smalti.tokenizers.partitioned import PartitionedConfig
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.quantizer import Quantizer, Statistics, absorb, combine
from smalti.tokenizers.recurrent import RecurrentConfig
from smalti.tokenizers.registers import RegisterTokenizerConfig
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.simvq import SimVQConfig
from smalti.tokenizers.sinkhorn import SinkhornConfig
from smalti.tokenizers.sparse import SparseConfig
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.styled import StyledTokenizerConfig
from smalti.tokenizers.vision import VisionTokenizerConfig
from smalti.tokenizers.vq import VQConfig, normalize


@dataclasses.dataclass
class Row:
  """A quantizer and what the laws must know about it.

  `soft(q, z)` is the differentiable map whose jacobian the straight-through vectors have. `draws`:
  codes of training vectors are drawn, or depend on the other vectors. `drops`: training keeps a
  prefix of the codes of each example.
  """
  config: object
  soft: object = staticmethod(lambda q, z: z)
  draws: bool = False
  drops: bool = False


def turned(q, z):
  """lambda R z with the rotation in the plane of z and its code (Rodrigues), seen as constant."""
  a, b = jax.lax.stop_gradient((z, q(z).vectors))
  u, v = normalize(a), normalize(b)
  turn = v[..., :, None] * u[..., None, :] - u[..., :, None] * v[..., None, :]
  turn += turn @ turn / (1 + jnp.sum(u * v, -1))[..., None, None]
  scale = jnp.linalg.norm(b, axis=-1, keepdims=True) / jnp.linalg.norm(a, axis=-1, keepdims=True)
  return scale * (z + (turn @ z[..., None])[..., 0])


@jax.custom_jvp
def hard(x):
  """The sign, whose gradient passes between -1 and 1."""
  return jnp.where(x > 0, 1.0, -1.0)


hard.defjvp(lambda x, d: (hard(*x), jnp.where(jnp.abs(x[0]) <= 1, d[0], 0.0)))


def looped(q, z):
  """The recurrence of BEBR, from its equations."""
  x = normalize(z)
  code = hard(q.first(x))
  for i, (decode, error) in enumerate(zip(q.decoders, q.errors), 1):
    code = code + 0.5**i * hard(error(x - normalize(decode(code))))
  return normalize(q.decoders[-1](code))


def readme():
  """The quantizer that README.md writes."""
  text = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  module = sys.modules['even'] = types.ModuleType('even')
  exec(code, module.__dict__)
  return module.EvenConfig()


QUANTIZERS = {
    'readme': Row(readme()),
    'vq': Row(VQConfig(codes=32, dim=6)),
    'vq_kmeans': Row(VQConfig(codes=32, dim=6, init='kmeans')),
    'vq_gradient': Row(VQConfig(codes=32, dim=6, update='gradient')),
    'vq_cosine': Row(VQConfig(codes=32, dim=6, cosine=True), lambda q, z: normalize(z)),
    'vq_cosine_gradient': Row(
        VQConfig(codes=32, dim=6, cosine=True, update='gradient'), lambda q, z: normalize(z)),
    'vq_options': Row(VQConfig(
        codes=32, dim=6, update='gradient', revival=0.0, estimator='rotation',
        entropy=EntropyConfig(temperature=0.5), clustering=ClusteringConfig()), turned),
    'vq_sinkhorn': Row(VQConfig(  # a fifth of the codes are not the nearest
        codes=32, dim=6, assignment=SinkhornConfig(epsilon=0.05, iterations=2, steps=10)),
        draws=True),
    'fsq': Row(FSQConfig(levels=(8, 5, 3)), lambda q, z: q.bound(z)),
    'fsq_symmetric': Row(
        FSQConfig(levels=(2, 5, 4), symmetric=True), lambda q, z: jnp.tanh(z)),
    'simvq': Row(SimVQConfig(codes=32, dim=6)),
    'ibq': Row(IBQConfig(codes=32, dim=6),
               lambda q, z: jax.nn.softmax(z @ q.codes().T) @ q.codes()),
    'sparse': Row(SparseConfig(codes=32, dim=6, active=3)),
    'gumbel': Row(GumbelConfig(codes=32, dim=6),
                  lambda q, z: jnp.exp(q.soft_assign(z, q.temperature())) @ q.codes(), draws=True),
    'lfq': Row(LFQConfig(bits=6)),
    'bsq': Row(BSQConfig(bits=6, groups=2), lambda q, z: q.scale * normalize(z)),
    'bernoulli': Row(
        BernoulliConfig(bits=7, dim=6), lambda q, z: q.embed(q.soft(z)), draws=True),
    'recurrent': Row(
        RecurrentConfig(dim=6, bits=4, levels=2, hidden=8, dropout=1.0), looped, drops=True),
    'latent': Row(LatentConfig(latents=16, codes=10)),
    'residual_vq': Row(ResidualConfig(quantizer=VQConfig(codes=32, dim=6), levels=2)),
    'residual_fsq': Row(ResidualConfig(quantizer=FSQConfig(levels=(8, 5, 3)), levels=2),
                        lambda q, z: q.levels[0].bound(z)),
    'residual_shared': Row(
        ResidualConfig(quantizer=VQConfig(codes=32, dim=6, revival=0), levels=2, shared=True)),
    'multiscale_vq': Row(MultiScaleConfig(
        quantizer=VQConfig(codes=32, dim=4, update='gradient', revival=0), scales=(1, 4))),
    'mcrvq': Row(PartitionedConfig(
        quantizer=VQConfig(codes=32, dim=6, revival=0), levels=3, split=2, dropout=0)),
    'nested': Row(NestedConfig(quantizer=FSQConfig(levels=(8, 5))),
                  lambda q, z: q.coder.bound(z), drops=True),
    'product_vq': Row(GroupedConfig(quantizer=VQConfig(codes=32, dim=3, revival=0), groups=2)),
    'grvq': Row(GroupedConfig(groups=2, quantizer=ResidualConfig(
        quantizer=VQConfig(codes=32, dim=3, update='gradient', revival=0), levels=2))),
    'projected_vq': Row(
        ProjectedConfig(quantizer=VQConfig(codes=32, dim=3), dim=6),
        lambda q, z: q.expand(q.reduce(z))),
    'projected_fsq': Row(
        ProjectedConfig(quantizer=FSQConfig(levels=(7, 4)), dim=6),
        lambda q, z: q.expand(q.quantizer.bound(q.reduce(z)))),
}


def autoencoder(quantizer, **changes):
  return AutoencoderConfig(**{**dict(
      image_size=(12, 8), channels=3, width=8, multipliers=(1, 2), blocks=1, quantizer=quantizer),
      **changes})


def styled(quantizer):
  return StyledTokenizerConfig(
      image_size=(16, 24), channels=3, patch=4, widths=(8, 16), hidden=16, latents=6,
      quantizer=quantizer)


VIT = dict(image_size=(12, 8), patch=4, encoder=plain(2, 16, 2, init='xavier'),
           decoder=plain(2, 16, 2, init='xavier'))
TOKENIZERS = {
    'vq': autoencoder(VQConfig(codes=32, dim=6)),
    'fsq': autoencoder(
        FSQConfig(levels=(5, 5, 5)), reconstruction='l1', image_size=(8, 8), channels=1),
    'llamagen': autoencoder(  # everything at once
        ProjectedConfig(
            quantizer=VQConfig(codes=32, dim=4, cosine=True, update='gradient'), dim=16),
        patch=2, attention=(2,), dtype='bfloat16', dropout=0.1),
    'bsq': autoencoder(BSQConfig(bits=6, groups=3)),
    'var': autoencoder(
        ProjectedConfig(dim=8, quantizer=MultiScaleConfig(
            quantizer=VQConfig(codes=32, dim=4, update='gradient', revival=0), scales=(1, 4))),
        image_size=(8, 8), channels=1),
    'bld': autoencoder(BernoulliConfig(bits=9, dim=8)),
    'adversarial': autoencoder(
        FSQConfig(levels=(5, 5, 5)), image_size=(8, 8), adversary=AdversaryConfig(
            discriminator=PatchDiscriminatorConfig(width=8, layers=1), adaptive=True, lecam=0.01)),
    'qlae': styled(LatentConfig(latents=6, codes=10)),
    'styled_vq': styled(VQConfig(codes=32, dim=4, update='gradient')),
    'vit_vqgan': VisionTokenizerConfig(
        quantizer=VQConfig(codes=32, dim=6, cosine=True), hidden=12, table=(2, 2), smooth=True,
        dtype='bfloat16', **VIT),
    'one_d_piece': RegisterTokenizerConfig(
        quantizer=ProjectedConfig(quantizer=VQConfig(codes=32, dim=4), dim=16), registers=5,
        drop='uniform', mask='causal', **VIT),
    'flextok': FlexTokConfig(
        image_size=(8, 12), channels=1, patch=4, registers=4, encoder=lean(1, 16, head=8),
        decoder=lean(1, 16, head=8), quantizer=FSQConfig(levels=(5, 5))),
}


@functools.cache
def prepared(name):
  """(graphdef, state) of a quantizer after `prepare`, and the vectors it saw."""
  @jax.jit
  def build(keys):
    q = QUANTIZERS[name].config.build(rngs=nnx.Rngs(keys[0]))
    z = jax.random.normal(keys[1], (8, 16, q.dim))
    q.prepare(z, key=keys[2])
    return q, z

  q, z = build(jax.random.split(jax.random.key(0), 3))
  return *nnx.split(q), z


def quantizer(name):
  graph, state, z = prepared(name)
  return nnx.merge(graph, jax.tree.map(jnp.copy, state)), z


def positions(q, others):
  """How many positions its tokens have."""
  return math.prod(q.grid) if q.grid else others


def leaves(module):
  return [np.asarray(x) for x in jax.tree.leaves(nnx.state(module))]


def codebooks(module):
  """Every module that absorbs statistics."""
  return [m for _, m in nnx.iter_modules(module) if hasattr(m, 'absorb')]


def same(first, second):
  return all(np.array_equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))


@pytest.fixture(params=QUANTIZERS)
def name(request):
  return request.param


def test_lookup_returns_the_vectors_bit_for_bit(name):
  q, z = quantizer(name)
  for run in (lambda f: f, jax.jit):
    out = run(lambda q, z: q(z, key=jax.random.key(0), train=True))(q, z)
    looked = run(lambda q, t: q.lookup(t))(q, out.tokens)
    if QUANTIZERS[name].drops:  # each example is one of the prefixes that the spec promises
      place = jnp.arange(len(q.vocab)) + jnp.zeros_like(out.tokens)
      prefixes = [run(lambda q, t, m: q.lookup(t, mask=m))(q, out.tokens, place < k)
                  for k in q.budgets]
      found = [jnp.all(p == out.vectors, (1, 2)) for p in prefixes]
      assert np.all(np.sum(found, 0) == 1) and np.all(np.any(found, 1))
      np.testing.assert_array_equal(prefixes[-1], looked)
      out = run(lambda q, z: q(z))(q, z)
    np.testing.assert_array_equal(looked, out.vectors)


def test_straight_through_has_the_jacobian_of_the_soft_map(name):
  q, z = quantizer(name)
  z = z[:1] if q.grid else z[:1, :2]
  got = jax.jacrev(lambda z: q(z).vectors)(z)
  want = jax.jacrev(lambda z: QUANTIZERS[name].soft(q, z))(z)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_tokens_are_in_range_at_any_scale(name, scale):
  q, z = quantizer(name)
  out = q(scale * z, key=jax.random.key(0), train=True)
  shape = (z.shape[0], positions(q, z.shape[1]), len(q.vocab))
  assert out.tokens.dtype == jnp.int32 and out.tokens.shape == shape
  assert np.all(out.tokens >= 0) and np.all(out.tokens < np.array(q.vocab))
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(
      (out.vectors, out.losses, out.metrics, out.statistics)))


def test_evaluation_is_deterministic_and_has_no_statistics(name):
  q, z = quantizer(name)
  first, second = q(z), q(z, key=jax.random.key(9))
  assert first.statistics is None
  np.testing.assert_array_equal(first.tokens, second.tokens)
  np.testing.assert_array_equal(first.vectors, second.vectors)


def test_training_is_a_function_of_the_key(name):
  """All of it is; codes and vectors depend on it where the row says that they are drawn."""
  q, z = quantizer(name)
  for book in codebooks(q):
    if hasattr(book, 'age'):
      book.age[...] += 5  # amid an annealing, where some vectors take the nearest
  one, again, other = (q(z, key=jax.random.key(i), train=True) for i in (0, 0, 1))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  differ = np.any(one.tokens != other.tokens) or np.any(one.vectors != other.vectors)
  assert differ == (QUANTIZERS[name].draws or QUANTIZERS[name].drops)


PRODUCTS = 'dot_general', 'conv_general_dilated'


def products(jaxpr):
  """The products of a program and of the programs inside it."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in PRODUCTS:
      yield equation
    for part in jax.tree.leaves(equation.params):
      part = getattr(part, 'jaxpr', part)
      if hasattr(part, 'eqns'):
        yield from products(part)


def rounded(f, *arguments):
  """The products that an accelerator may round to TF32 or bfloat16."""
  exact = jax.lax.Precision.HIGHEST
  return [str(e) for e in products(jax.make_jaxpr(f)(*arguments).jaxpr)
          if e.params['precision'] != (exact, exact)
          or any(v.aval.dtype != jnp.float32 for v in e.invars)]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_no_product_of_a_quantizer_is_rounded(name, dtype):
  """Searches, maps of codebooks, projections, resizes: TF32 and bfloat16 change no code."""
  graph, state, z = prepared(name)
  z, key = z.astype(dtype), jax.random.key(0)
  merged = lambda state: nnx.merge(graph, state)  # noqa: E731
  assert not rounded(lambda state, z: merged(state)(z, key=key, train=True), state, z)
  assert not rounded(lambda state, z: merged(state).prepare(z, key=key), state, z)


def test_rounded_products_are_noticed_wherever_they_are():
  """The negative control: in a loop, a branch, a derivative rule, a checkpoint, a convolution."""
  x = jnp.ones((3, 3))
  by = lambda y: y @ x.astype(y.dtype)  # noqa: E731
  rule = jax.custom_jvp(by)
  rule.defjvp(lambda primals, tangents: (by(*primals), by(*tangents)))
  for f in (by, jax.jit(by), jax.checkpoint(by), rule, jax.vmap(by),
            lambda y: jax.lax.scan(lambda y, _: (by(y), None), y, length=2),
            lambda y: jax.lax.cond(y[0, 0] > 0, by, lambda y: y, y),
            lambda y: jax.lax.map(by, y),
            lambda y: jax.lax.while_loop(lambda y: y[0, 0] > 0, by, y),
            lambda y: jax.lax.conv(y[None, None], y[None, None], (1, 1), 'SAME')):
    assert len(rounded(f, x)) == 1
    with jax.default_matmul_precision('highest'):
      assert not rounded(f, x) and len(rounded(f, x.astype(jnp.bfloat16))) == 1


def test_no_forward_pass_writes_state(name):
  q, z = quantizer(name)
  for train in (False, True):
    q(z, key=jax.random.key(0), train=train)
    q.lookup(jnp.zeros((1, positions(q, 2), len(q.vocab)), jnp.int32))
  graph, state, _ = prepared(name)
  assert same(q, nnx.merge(graph, state))


def test_every_codebook_and_parameter_moves_in_training(name):
  q, z = quantizer(name)
  books = codebooks(q)
  before = [leaves(b) for b in books]
  target = jax.random.normal(jax.random.key(5), z.shape)

  def loss(q):
    out = q(z, key=jax.random.key(0), train=True)
    return jnp.mean(jnp.square(out.vectors - target)) + sum(out.losses.values()), out.statistics

  gradients, statistics = nnx.grad(loss, has_aux=True)(q)
  params = nnx.state(q, nnx.Param)
  for path, g in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.any(np.asarray(g) != 0), jax.tree_util.keystr(path)
  nnx.update(q, jax.tree.map(lambda p, g: p - g, params, gradients))
  absorb(q, statistics)
  for old, book in zip(before, books):
    assert all(not np.array_equal(a, b) for a, b in zip(old, leaves(book), strict=True))
  assert bool(books) == bool(jax.tree.leaves(statistics))  # the others learn by gradient alone


def test_losses_of_its_own_train_all_of_a_committed_quantizer(name):
  q, z = quantizer(name)
  gradients = nnx.grad(lambda q: sum(
      q(z, key=jax.random.key(0), train=True).losses.values(), jnp.zeros(())))(q)
  committed = all(part.committed for _, part in nnx.iter_modules(q) if isinstance(part, Quantizer))
  assert committed == all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(gradients))


def test_statistics_are_those_of_the_global_batch(name):
  q, z = quantizer(name)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  place = NamedSharding(mesh, PartitionSpec('data'))

  @jax.jit
  def step(q, z):
    out = q(z, key=jax.random.key(0), train=True)
    absorb(q, out.statistics)
    return out, nnx.state(q)

  one, eight = step(q, z), step(q, jax.device_put(z, place))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(one[0].tokens, eight[0].tokens)


def pin(statistics, spare):
  """Statistics with these spare rows."""
  if isinstance(statistics, Statistics):
    return dataclasses.replace(statistics, spare=spare[:, :statistics.spare.shape[1]])
  return {k: pin(v, spare) for k, v in (statistics or {}).items()}


@pytest.mark.parametrize('k', [2, 4])
def test_micro_batches_absorb_like_the_whole_batch(name, k):
  if QUANTIZERS[name].draws:
    pytest.skip('draws of training are of a whole micro-batch')
  spare = jax.random.normal(jax.random.key(7), (32, 8))
  whole, z = quantizer(name)
  parts, _ = quantizer(name)
  z = z.at[:, :, :].multiply(0.3)  # some codes are left without vectors
  statistics = None
  for i in range(k):
    part = parts(z[i::k], key=jax.random.key(i), train=True).statistics
    statistics = combine(statistics, pin(part, spare))
  absorb(parts, statistics)
  absorb(whole, pin(whole(z, key=jax.random.key(0), train=True).statistics, spare))
  for a, b in zip(leaves(whole), leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_empty_statistics_are_neutral(name):
  q, z = quantizer(name)
  statistics = q(z, key=jax.random.key(0), train=True).statistics
  empty = jax.tree.map(jnp.zeros_like, statistics)
  for combined in (combine(empty, statistics), combine(statistics, empty)):
    for a, b in zip(jax.tree.leaves(combined), jax.tree.leaves(statistics), strict=True):
      np.testing.assert_array_equal(a, b)
  absorb(q, empty)
  assert same(q, quantizer(name)[0])


def test_bfloat16_vectors_are_quantized_in_float32(name):
  q, z = quantizer(name)
  z = z.astype(jnp.bfloat16)
  low, high = q(z), q(z.astype(jnp.float32))
  np.testing.assert_array_equal(low.tokens, high.tokens)
  assert low.vectors.dtype == jnp.float32


def test_vectors_that_do_not_count_leave_no_trace(name):
  q, z = quantizer(name)
  if 'valid' not in inspect.signature(type(q).__call__).parameters:
    pytest.skip('every vector counts')
  key, valid = jax.random.key(0), jnp.arange(8)[:, None] < jnp.full(z.shape[1], 5)
  some = q(z.at[5:].multiply(100), key=key, train=True, valid=valid)
  alone, none = q(z[:5], key=key, train=True), q(z, key=key, train=True, valid=valid & False)
  np.testing.assert_array_equal(some.tokens[:5], alone.tokens)
  spare = jax.random.normal(jax.random.key(7), (32, 8))
  for a, b in ((some.losses, alone.losses), (some.metrics, alone.metrics),
               (pin(some.statistics, spare), pin(alone.statistics, spare))):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(
      (some.statistics, none.losses, none.metrics, none.statistics)))
  assert all(np.all(x == 0) for x in jax.tree.leaves(none.losses))
  absorb(q, none.statistics)
  assert same(q, quantizer(name)[0])


def test_usage_and_perplexity_are_in_range(name):
  q, z = quantizer(name)
  metrics = q(z).metrics
  size = q.vocab[0]
  assert 0 < metrics['usage'] <= 1
  assert 1 <= metrics['perplexity'] <= size * metrics['usage'] * (1 + 1e-5)


def test_soft_assignment_peaks_at_the_token(name):
  q, z = quantizer(name)
  inner = getattr(q, 'quantizer', q)
  if not hasattr(inner, 'soft_assign'):
    pytest.skip('no single codebook')
  log_p = q.soft_assign(z, 0.5)
  np.testing.assert_array_equal(jnp.argmax(log_p, -1), q(z).tokens[..., 0])
  np.testing.assert_allclose(jnp.sum(jnp.exp(log_p), -1), 1, rtol=1e-5)


def test_config_is_made_of_json(name):
  fields = dataclasses.asdict(QUANTIZERS[name].config)
  assert json.loads(json.dumps(fields)) == json.loads(json.dumps(fields, allow_nan=False))


@functools.cache
def built(kind):
  config = TOKENIZERS[kind]
  x = jax.random.uniform(
      jax.random.key(1), (8, *config.image_size, config.channels), minval=-1, maxval=1)

  @jax.jit
  def build(keys, x):
    t = config.build(rngs=nnx.Rngs(keys[0]))
    t.prepare({'image': x}, key=keys[1])
    for _, part in nnx.iter_modules(t):
      if isinstance(part, Linear):  # what starts at zero is as after training
        flat = 0.3 * jax.random.normal(keys[1], (part.kernel.size,))
        part.kernel[...] = jnp.where(
            jnp.any(part.kernel[...] != 0), part.kernel[...], flat.reshape(part.kernel.shape))
    return t

  return *nnx.split(build(jax.random.split(jax.random.key(0)), x)), x


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
  graph, state, x = built(request.param)
  return nnx.merge(graph, jax.tree.map(jnp.copy, state)), x


def noise(t):
  """What decoders that draw are called with, for eight examples."""
  if not hasattr(t, 'settings'):
    return {}
  return {'keys': jax.random.split(jax.random.key(4), 8), 'settings': t.settings(steps=2)}


def test_encode_and_decode_agree_with_the_spec(tokenizer):
  t, x = tokenizer
  tokens = jitted.encode(t, x)
  assert tokens.dtype == jnp.int32 and tokens.shape == (8, t.spec.length, t.spec.depth)
  assert np.all(np.take_along_axis(t.spec.support(), np.asarray(tokens[0]).T, 1))
  y = jitted.decode(t, tokens, **noise(t))
  assert y.shape == x.shape and y.dtype == jnp.float32
  assert np.all(np.abs(y) <= 1)
  assert TokenSpec.from_json(t.spec.to_json()) == t.spec
  top = jnp.broadcast_to(jnp.array(t.spec.vocab) - 1, tokens.shape).astype(jnp.int32)
  assert np.all(np.isfinite(jitted.decode(t, top, **noise(t))))


def test_decoding_is_the_training_forward(tokenizer):
  t, x = tokenizer
  out = jax.jit(lambda t, x: t.quantizer(t.latents(x), key=jax.random.key(0), train=True))(t, x)
  if not isinstance(t.quantizer, Bernoulli):  # which draws its bits in training
    np.testing.assert_array_equal(jitted.encode(t, x), out.tokens)
  np.testing.assert_array_equal(jax.jit(lambda t, k: t.lookup(k))(t, out.tokens), out.vectors)
  image = jax.jit(lambda t, v: t.decode_latents(v, **noise(t)))(t, out.vectors)
  found = jitted.decode(t, out.tokens, **noise(t))
  np.testing.assert_allclose(found, jnp.clip(image, -1, 1), atol=1e-6)


def test_bytes_and_floats_are_the_same_image(tokenizer):
  t, x = tokenizer
  levels = jnp.clip(jnp.rint(127.5 * (x + 1)), 0, 255).astype(jnp.uint8)
  np.testing.assert_array_equal(
      jitted.encode(t, levels), jitted.encode(t, levels.astype(jnp.float32) / 127.5 - 1))


def test_loss_has_gradients_everywhere_and_writes_nothing(tokenizer):
  t, x = tokenizer
  before = leaves(t)
  structure, params, rest = nnx.split(t, nnx.Param, ...)

  @jax.jit
  def loss(params):
    return nnx.merge(structure, params, rest).loss(
        {'image': x}, step=jnp.int32(0), key=jax.random.key(0), train=True)

  (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  assert np.isfinite(value) and aux['weight'] == 8
  assert {'perplexity', 'usage', 'reconstruction'} <= set(aux['metrics'])
  assert all(np.ndim(m) == 0 for m in aux['metrics'].values())
  for path, g in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.any(np.asarray(g) != 0), jax.tree_util.keystr(path)
  assert all(np.array_equal(a, b) for a, b in zip(before, leaves(t), strict=True))
  absorb(t, aux['statistics'])
  assert (aux['statistics'] is None) == (not codebooks(t))
  value, aux = jax.jit(lambda t, x: t.loss(
      {'image': x}, step=jnp.int32(0), key=jax.random.key(0), train=False))(t, x)
  assert aux['statistics'] is None and np.isfinite(value)
  assert {'mse', 'psnr', 'perplexity', 'usage', 'reconstruction'} <= set(aux['metrics'])


def test_what_lies_beyond_a_prefix_is_ignored(tokenizer):
  t, x = tokenizer
  tokens = jitted.encode(t, x)
  if t.spec.order in ('raster', 'set'):
    with pytest.raises(ValueError, match='no prefixes'):
      t.decode(tokens, keep=jnp.full(8, 3))
    return
  rng, vocab = np.random.default_rng(0), np.array(t.spec.vocab)
  keep = rng.integers(1, t.spec.steps, 8).astype(np.int32)
  other = (tokens + rng.integers(1, vocab, tokens.shape)) % vocab  # another code everywhere
  mixed = np.where(t.spec.mask(keep), tokens, other).astype(np.int32)
  decode = functools.partial(jitted.decode, t, **noise(t))
  prefix = decode(tokens, keep=keep)
  np.testing.assert_array_equal(prefix, decode(mixed, keep=keep))
  whole, full = decode(tokens), np.full(8, t.spec.steps, np.int32)
  np.testing.assert_allclose(decode(tokens, keep=full), whole, atol=1e-5)
  assert np.abs(prefix - whole).max((1, 2, 3)).min() > 0  # and a prefix is not everything


def test_other_images_are_refused(tokenizer):
  t, x = tokenizer
  with pytest.raises(ValueError, match='do not fit image_size'):
    t.encode(jnp.concatenate([x, x], -1))
  with pytest.raises(ValueError, match='do not fit image_size'):
    t.encode(jnp.concatenate([x, x], 1))


def test_leaf_names_are_those_of_the_path_rules(tokenizer):
  t, _ = tokenizer
  last = {str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(t, nnx.Param))}
  assert last <= {'kernel', 'bias', 'scale', 'codebook', 'embedding'}


def test_portrait_images_of_48_by_32():
  t = autoencoder(FSQConfig(levels=(5, 5)), image_size=(48, 32)).build(rngs=nnx.Rngs(0))
  assert t.spec.grid == (24, 16)
  x = jnp.zeros((1, 48, 32, 3)).at[:, :8].set(1.0)
  tokens = jitted.encode(t, x).reshape(24, 16)
  assert jitted.decode(t, tokens.reshape(1, -1, 1)).shape == x.shape
  # row-major: what differs lies in the first rows of the grid
  flat = jitted.encode(t, jnp.zeros_like(x)).reshape(24, 16)
  changed = np.asarray(tokens != flat)
  assert changed[:5].any() and t.spec.coordinates()[16].tolist() == [1, 0]
