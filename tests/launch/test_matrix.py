"""Every generator on the tokens of every tokenizer, against the table of docs/generators.md."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.data.digits import DigitsConfig
from smalti.generators import schedules
from smalti.generators.autoregressive import AutoregressiveConfig
from smalti.generators.binary import BinaryConfig
from smalti.generators.block import BlockDiffusionConfig
from smalti.generators.delay import DelayConfig
from smalti.generators.depth import DepthConfig
from smalti.generators.generator import example_keys, generate
from smalti.generators.maskbit import MaskBitConfig
from smalti.generators.masked import MaskedConfig
from smalti.generators.resgen import ResGenConfig
from smalti.generators.stacked import StackedConfig
from smalti.launch import codebooks, optimizer as optimizers, state as states
from smalti.launch.experiment import OptimizerConfig
from smalti.launch.step import train_step
from smalti.networks.pixels import to_float
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.bernoulli import BernoulliConfig
from smalti.tokenizers.binary import LFQConfig
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.vq import VQConfig

CODES = {'vq': VQConfig(codes=16, dim=8), 'fsq': FSQConfig(levels=(5, 3)),
         'residual': ResidualConfig(quantizer=VQConfig(codes=8, dim=8), levels=2),
         'bits': BernoulliConfig(bits=4, dim=8), 'lfq': LFQConfig(bits=4), 'nested': None}
BODY = dict(layers=2, width=32, heads=4)
GENERATORS = {
    'autoregressive': AutoregressiveConfig(classes=10, transformer=TransformerConfig(**BODY)),
    'any order': AutoregressiveConfig(
        classes=10, anneal=(50, 50), transformer=TransformerConfig(**BODY, axes=0)),
    'depth': DepthConfig(classes=10, transformer=TransformerConfig(**BODY),
                         depth=TransformerConfig(**BODY, axes=0)),
    'delay': DelayConfig(classes=10, transformer=TransformerConfig(**BODY)),
    'masked': MaskedConfig(classes=10, transformer=TransformerConfig(**BODY)),
    'MaskGIT': MaskedConfig(
        classes=10, objective='maskgit', transformer=TransformerConfig(**BODY)),
    'stacked': StackedConfig(classes=10, transformer=TransformerConfig(**BODY)),
    'MaskBit': MaskBitConfig(classes=10, transformer=TransformerConfig(**BODY)),
    'block': BlockDiffusionConfig(classes=10, transformer=TransformerConfig(**BODY)),
    'ResGen': ResGenConfig(classes=10, channels=8, components=64, rank=8,
                           transformer=TransformerConfig(**BODY)),
    'binary': BinaryConfig(classes=10, transformer=TransformerConfig(**BODY)),
}
STEPS, BATCH = 50, 64


def table():
  """The cells of the page by tokens and generator."""
  text = (pathlib.Path(__file__).parents[2] / 'docs' / 'generators.md').read_text()
  lines = [[cell.strip() for cell in line.strip('|').split('|')]
           for line in text.splitlines() if line.startswith('|')]
  names = [re.sub(r'\[([^]]*)\].*', r'\1', line[0]) for line in lines[2:]]
  return {tokens: dict(zip(names, (line[i] for line in lines[2:])))
          for i, tokens in enumerate(lines[0][1:], 1)}


@functools.cache
def tokenizer(name):
  """A tokenizer at its data-dependent start, and the tokens of all digits."""
  images = to_float(jnp.asarray(DigitsConfig().open('train').read(np.arange(1437))['image']))
  if CODES[name] is None:
    from smalti.configs import onedpiece
    config = onedpiece.get_config('debug').model
  else:
    config = AutoencoderConfig(image_size=(8, 8), channels=1, width=16, multipliers=(1,), blocks=0,
                               patch=2, quantizer=CODES[name])
  model = config.build(rngs=nnx.Rngs(0))
  model.prepare({'image': images[:256]}, key=jax.random.key(0))
  return model, np.asarray(jax.jit(lambda m, x: m.encode(x))(model, images))


def test_the_page_has_a_cell_for_every_pair():
  assert {row: list(cells) for row, cells in table().items()} == {
      row: list(GENERATORS) for row in CODES}


@pytest.mark.parametrize('tokens', CODES)
@pytest.mark.parametrize('generator', GENERATORS)
def test_what_makes_no_sense_is_refused_with_the_reason_of_the_page(tokens, generator):
  spec, said = tokenizer(tokens)[0].spec, table()[tokens][generator]
  build = lambda: GENERATORS[generator].build(spec, rngs=nnx.Rngs(0))  # noqa: E731
  if said == 'yes':
    assert nnx.eval_shape(build).spec == spec
    return
  with pytest.raises(ValueError, match={'cannot be permuted': 'can be permuted, others not'}.get(
      said, said)):
    build()


@pytest.mark.parametrize('generator', GENERATORS)
def test_guidance_needs_a_null_condition_that_was_trained(generator):
  spec = next(tokenizer(name)[0].spec for name, cells in table().items()
              if cells[generator] == 'yes')

  def draw(dropout, scale):
    config = dataclasses.replace(GENERATORS[generator], label_dropout=dropout)
    model = nnx.eval_shape(lambda: config.build(spec, rngs=nnx.Rngs(0)))
    settings = dataclasses.replace(model.settings(), guidance=scale)
    return nnx.eval_shape(lambda model: model.sample(
        {'label': jnp.arange(2)}, keys=example_keys(0, jnp.arange(2)), settings=settings), model)

  assert draw(0.1, 2.0).tokens.shape == draw(0.0, None).tokens.shape
  with pytest.raises(ValueError, match='label_dropout=0 never'):
    draw(0.0, 2.0)


@pytest.mark.parametrize('generator', [
    'masked', 'MaskGIT', 'stacked', 'MaskBit', 'block', 'ResGen', 'binary'])
def test_times_of_a_batch_with_strata_are_by_these_alone(generator, calls):
  source = tokenizer(next(name for name, cells in table().items() if cells[generator] == 'yes'))[0]
  config, rng = GENERATORS[generator], np.random.default_rng(0)
  if generator == 'block':  # in 4 blocks of 4 strata leave the counts as they are
    config = dataclasses.replace(config, block_size=8)
  model = config.build(source.spec, rngs=nnx.Rngs(0))
  nnx.update(model, jax.tree.map(  # heads of zeros have one loss for all
      lambda x: x + .3 * rng.normal(size=x.shape), nnx.state(model, nnx.Param)))
  shape = (8, source.spec.length, source.spec.depth)
  batch = {'tokens': jnp.asarray(rng.integers(0, source.spec.vocab, shape), jnp.int32),
           'label': jnp.arange(8)}
  if generator == 'ResGen':
    model.prepare({**batch, 'vectors': codebooks.vectors(source)}, key=jax.random.key(0))
  strata, drawn = jnp.arange(.5, 8) / 8, calls(schedules, 'stratified')
  for train in (False, True):
    loss = jax.jit(lambda strata, train=train: model.loss(
        {**batch, 'strata': strata}, step=0, key=jax.random.key(0), train=train)[0])
    assert loss(strata) == loss(strata + 0) and abs(loss(strata / 2) - loss(strata)) > 1e-3
  assert not drawn


@pytest.mark.slow
@pytest.mark.parametrize('tokens', CODES)
@pytest.mark.parametrize('generator', GENERATORS)
def test_fifty_steps_learn_and_what_is_drawn_decodes(tokens, generator):
  if table()[tokens][generator] != 'yes':
    pytest.skip('refused')
  model, data = tokenizer(tokens)
  labels = DigitsConfig().open('train').read(np.arange(1437))['label']
  build = lambda rngs: GENERATORS[generator].build(model.spec, rngs=rngs)  # noqa: E731
  rule = optimizers.make(OptimizerConfig(rate=3e-3, warmup=10), None, STEPS)
  structure = states.structure(lambda: build(nnx.Rngs(0)))
  state = states.init(build, rule, jax.random.key(0), ema=False)
  if 'vectors' in state['buffers']:
    state['buffers']['vectors'] = codebooks.vectors(model)
  step = jax.jit(functools.partial(train_step, structure=structure, optimizer=rule))
  held_out = {'tokens': jnp.asarray(data[-400:]), 'label': jnp.asarray(labels[-400:])}
  judge = jax.jit(lambda params, key: structure.merge(params, state['buffers']).loss(
      held_out, step=0, key=key, train=False)[0])
  score = lambda: np.array([judge(state['params'], jax.random.key(i))  # noqa: E731
                            for i in range(8)])
  before = score()
  for chosen in np.random.default_rng(0).integers(0, 1037, (STEPS, BATCH)):
    state, metrics = step(state, {'tokens': jnp.asarray(data[chosen]),
                                  'label': jnp.asarray(labels[chosen])}, jax.random.key(1))
    assert bool(metrics['finite'].all())
  after = score()
  print(f'{generator} on {tokens}: {before.mean():.3f} to {after.mean():.3f} nats')
  assert before.mean() - after.mean() > 3 * max(np.std(before), np.std(after), 1e-6)
  trained = structure.merge(state['params'], state['buffers'])
  found = generate(trained, {'label': jnp.arange(10)}, keys=example_keys(0, jnp.arange(10)),
                   settings=trained.settings())
  assert found.tokens.shape == (10, *data.shape[1:])
  assert (found.tokens >= 0).all() and (found.tokens < jnp.array(model.spec.vocab)).all()
  assert jnp.isfinite(model.decode(found.tokens)).all()
