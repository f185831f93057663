"""TiTok and One-D-Piece: registers keep to themselves, lengths are drawn per example."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.networks.vision import plain
from smalti.tokenizers import tokenizer as jitted
from smalti.tokenizers.registers import RegisterTokenizerConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.vq import VQConfig

SMALL = dict(image_size=(8, 12), channels=1, patch=4, registers=4,
             encoder=plain(1, 16, 2, init='xavier'), decoder=plain(1, 16, 2, init='xavier'),
             quantizer=FSQConfig(levels=(5, 5)))


@functools.cache
def weights():
  config = RegisterTokenizerConfig(**SMALL)
  return nnx.state(jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0)))


def build(**changes):
  """A tokenizer with the same weights whatever changes; of fewer registers, with the first ones."""
  config = RegisterTokenizerConfig(**{**SMALL, **changes})
  graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
  return nnx.merge(graph, jax.tree.map(lambda a, b: jnp.copy(a[:b.shape[0]]), weights(), state))


@pytest.fixture
def x():
  return jax.random.uniform(jax.random.key(1), (2, 8, 12, 1), minval=-1, maxval=1)


latents = jax.jit(lambda t, x: t.latents(x))
decode = jax.jit(lambda t, z: t.decode_latents(z))


def test_a_register_is_a_token_and_their_channels_are_not_mixed(x):
  """Permuted registers permute what is encoded and decoded; published TiTok scrambles channels."""
  t, swapped, order = build(), build(), jnp.array([2, 0, 3, 1])
  table = swapped.encoder.registers.embedding
  table[...] = table[...][order]
  z = latents(t, x)
  np.testing.assert_allclose(latents(swapped, x), z[:, order], atol=1e-5)
  places = swapped.decoder.registers.embedding
  places[...] = places[...][order]
  np.testing.assert_allclose(decode(swapped, z[:, order]), decode(t, z), atol=1e-5)
  assert np.abs(decode(t, z[:, order]) - decode(t, z)).max() > 1e-4  # places do matter
  mixed = jnp.swapaxes(z, 1, 2).reshape(z.shape)  # the legacy reshape
  assert np.abs(mixed - z).max() > 1e-2


@pytest.mark.parametrize('drop, budgets', [
    ('uniform', (1, 2, 3, 4)), ('power', (1, 2, 4)), (None, ())])
def test_the_spec_names_the_trained_lengths(drop, budgets):
  t = build(drop=drop)
  assert t.spec.grid == (4,) and t.spec.budgets == budgets and t.spec.vocab == (25,)
  assert t.spec.order == ('nested' if drop else 'raster')
  drawn = t.budget(jax.random.key(0), 64)
  assert (drawn is None) == (drop is None)
  assert drop is None or set(np.unique(drawn).tolist()) == set(budgets)


def test_training_cuts_every_example_at_its_own_length(x):
  """The loss at a step is that of decoding prefixes of the drawn lengths, by hand."""
  t = build(drop='uniform')
  key = jax.random.key(3)
  _, aux = jax.jit(lambda t, x: t.loss({'image': x}, step=0, key=key))(t, x)
  keep = t.budget(jax.random.split(key, 4)[3], 2)
  tokens = jitted.encode(t, x)
  y = jax.jit(lambda t, k: t.decode_latents(t.lookup(k), keep=keep))(t, tokens)
  np.testing.assert_allclose(aux['metrics']['reconstruction'], np.mean((x - y) ** 2), rtol=1e-5)
  _, aux = jax.jit(lambda t, x: t.loss({'image': x}, step=0, key=key, train=False))(t, x)
  whole = decode(t, t.lookup(tokens))  # evaluation is of all registers
  np.testing.assert_allclose(aux['metrics']['reconstruction'], np.mean((x - whole) ** 2), rtol=1e-5)


def test_a_causal_prefix_is_encoded_without_the_rest(x):
  t, short = build(mask='causal'), build(mask='causal', registers=2)
  np.testing.assert_allclose(latents(short, x), latents(t, x)[:, :2], atol=1e-5)


@pytest.mark.parametrize('sizes, drop, official', [
    (((8, 512, 8), (8, 512, 8), 128, 4096, 12), None, 51_753_312),
    (((12, 768, 12), (24, 1024, 16), 64, 8192, 64), None, 390_016_148),
    (((24, 1024, 16), (24, 1024, 16), 256, 4096, 12), 'uniform', 607_592_288)],
    ids=['titok_s128', 'titok_bl64', 'onedpiece_l256'])
def test_published_parameter_counts(sizes, drop, official):
  """Counts of the official constructors, which hold registers and class tokens twice."""
  encoder, decoder, registers, codes, dim = sizes
  config = RegisterTokenizerConfig(
      image_size=(256, 256), patch=16, encoder=plain(*encoder), decoder=plain(*decoder), drop=drop,
      registers=registers, smooth=True, quantizer=VQConfig(codes=codes, dim=dim, update='gradient'))
  model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
  count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert count == official - (registers + 1) * encoder[1] - decoder[1]


@pytest.mark.parametrize('changes, message', [
    (dict(registers=0), 'registers=0 must be 1 or more'),
    (dict(image_size=(8, 10)), 'must be a multiple of patch=4 on both sides'),
    (dict(drop='uniform', least=5), 'least=5 must be in 1..4'),
    (dict(table=(0, 2)), 'must be the rows and columns'),
    (dict(hidden=-1), 'hidden=-1 must be 0'),
])
def test_what_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    RegisterTokenizerConfig(**{**SMALL, **changes}).build(rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_more_registers_are_a_better_image():
  """A toy trained with uniform lengths: the mean error falls with every register, k by k."""
  import optax
  from sklearn.datasets import load_digits
  images = np.asarray(load_digits().images, np.float32)[..., None] / 8 - 1
  config = RegisterTokenizerConfig(
      image_size=(8, 8), channels=1, patch=2, registers=6, drop='uniform',
      encoder=plain(2, 48, 4, init='xavier'), decoder=plain(2, 48, 4, init='xavier'),
      quantizer=FSQConfig(levels=(5, 5, 5)))
  graph, params = nnx.split(jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(
      jax.random.key(0)))
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(
      optax.warmup_cosine_decay_schedule(0, 2e-3, 50, 1500)))

  @jax.jit
  def step(params, state, x, key):
    def loss(params):
      return nnx.merge(graph, params).loss({'image': x}, step=0, key=key)[0]
    update, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, update), state

  state, rng = optimizer.init(params), np.random.default_rng(0)
  for i in range(1500):
    rows = images[:1500][rng.integers(0, 1500, 64)]
    params, state = step(params, state, rows, jax.random.key(i))
  t, x = nnx.merge(graph, params), images[1500:]
  tokens = jitted.encode(t, x)
  error = [float(np.mean((jitted.decode(t, tokens, keep=np.full(len(x), k, np.int32)) - x) ** 2))
           for k in range(1, 7)]
  assert error == sorted(error, reverse=True), error
  assert error[-1] < 0.5 * error[0], error
