"""Every config: each size builds abstractly with its published count; `debug` trains two steps."""

import dataclasses
import functools
import importlib
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from smalti.generators.generator import GeneratorConfig
from smalti.launch import mesh as meshes, run as runs, serialization, state as states
from smalti.launch.train import train

NAMES = sorted(p.stem for p in (pathlib.Path(__file__).parents[2] / 'configs').glob('*.py'))
SIZES = [(name, size) for name in NAMES
         for size in importlib.import_module(f'smalti.configs.{name}').SIZES]


def config(name, size):
  return importlib.import_module(f'smalti.configs.{name}').get_config(size)


@functools.cache
def abstract(name, size):
  """Parameters and buffers of a size by path, as shapes."""
  experiment = config(name, size)
  model = nnx.eval_shape(
      lambda: runs.build(experiment.model, experiment.published.spec, nnx.Rngs(0)))
  return states.Structure.of(model).split(model)


@pytest.mark.parametrize('name, size', SIZES)
def test_every_size_builds_with_its_published_count(name, size):
  experiment = config(name, size)
  published = experiment.published
  assert published.source, 'say where the count is from, or why there is none'
  if isinstance(experiment.model, GeneratorConfig):
    assert published.spec is not None, 'a generator states the tokens of its published tokenizer'
  # counts are published without discriminators
  params, buffers = map(states.released, abstract(name, size))
  # a codebook learned by averages counts as it does where gradients learn it
  books = sum(leaf.size for path, leaf in states.paths(buffers).items()
              if path.endswith(('codebook', 'embedding')))
  total = states.count(params) + books
  print(f'{name}:{size} {total:,} parameters')
  if published.parameters is not None:
    assert abs(total - published.parameters) <= published.tolerance, f'{total:,}'
  else:
    assert not published.tolerance
  serialization.check(experiment)
  text = serialization.to_json(experiment)
  assert serialization.to_json(serialization.from_json(text, type(experiment))) == text


def test_rows_of_the_quantizer_study_have_one_rate_and_one_net():
  from smalti.configs import quantizers
  parts = []
  for row, experiment in quantizers.get_sweep().items():
    model = nnx.eval_shape(lambda e=experiment: e.model.build(rngs=nnx.Rngs(0)))
    assert abs(model.spec.bits / 640 - 1) < (0.04 if row == 'grvq' else 0.02), row
    params, _ = states.Structure.of(model).split(model)
    parts.append(states.count(params['encoder']) + states.count(params['decoder']))
  assert max(parts) < 1.06 * min(parts)  # convolutions to the codes' channels alone differ


def test_rows_of_the_generator_study_stand_on_their_tokenizers():
  from smalti.configs import generators
  rows = generators.get_sweep()
  specs = {}
  for name in generators.SPECS:
    model = nnx.eval_shape(lambda e=rows[f'tokens {name}']: e.model.build(rngs=nnx.Rngs(0)))
    specs[f'row:tokens {name}'] = model.spec
    assert model.spec == generators.SPECS[name]
    assert model.spec.bits == (
        96 if name == 'nested' else 640 if name in generators.PICTURES else 294)
  for row, experiment in rows.items():
    if isinstance(experiment.model, GeneratorConfig):
      assert experiment.published.spec == specs[experiment.tokenizer], row
      assert 0.5e6 < states.count(abstract('generators', row.partition('/')[0])[0]) < 2e6, row


def test_every_sharding_rule_matches_a_parameter_of_some_config():
  unused = set(range(len(meshes.RULES)))
  for name, size in SIZES:
    for tree in abstract(name, size):
      for path in states.paths(tree):
        axes = meshes.rule(path)
        assert axes is not None, f'no rule matches {path}'
        unused -= {i for i, (_, a) in enumerate(meshes.RULES)
                   if a is axes and meshes.RULES[i][1] == axes and _first(path) == i}
  assert not unused, [meshes.RULES[i][0] for i in unused]


def _first(path):
  import re
  return next(i for i, (p, _) in enumerate(meshes.RULES) if re.search(rf'(^|/){p}$', path))


@pytest.fixture(scope='session')
def tokenizer_runs(tmp_path_factory):
  """A trained `debug` tokenizer for the generators' configs to stand on, of codes or of bits."""
  @functools.cache
  def run(name):
    workdir = tmp_path_factory.mktemp('tokenizer')
    train(on_one_device(config(name, 'debug')), workdir)
    return workdir

  return run


def on_one_device(experiment):
  # eight simulated devices compile slower; sharding has its own tests
  return dataclasses.replace(
      experiment, mesh=dataclasses.replace(experiment.mesh, data=1))


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
  """A folder of small random photographs, for the configs that read images from elsewhere."""
  from PIL import Image
  folder = tmp_path_factory.mktemp('pictures')
  rng = np.random.default_rng(0)
  for i in range(24):
    (folder / f'class{i % 3}').mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(
        folder / f'class{i % 3}' / f'{i}.png')
  return folder


def write_text(experiment, path):
  """What the config's data reads, of random codes: a text file, or a token folder."""
  from smalti.data.text import TextConfig
  from smalti.data.tokens import TokenWriter
  spec, rng = experiment.published.spec, np.random.default_rng(0)
  if isinstance(experiment.data, TextConfig):
    path.write_text(''.join(rng.choice(list(experiment.data.alphabet), 4000)))
    return
  for split in ('train', 'eval'):
    writer = TokenWriter(path / split, spec.to_json(), 'f' * 16)
    writer.add({'tokens': rng.integers(0, spec.vocab[0], (24, spec.length, 1), np.int32)})
    writer.close()


@pytest.mark.parametrize('name', NAMES)
def test_debug_trains_two_steps(name, tokenizer_runs, pictures, tmp_path):
  from smalti.data.captions import CaptionsConfig
  from smalti.data.digits import DigitsConfig
  from smalti.data.factors import Shapes3DLikeConfig
  from smalti.data.folder import FolderConfig
  from smalti.data.text import TextConfig
  from smalti.data.tokens import TokensConfig
  experiment = on_one_device(config(name, 'debug'))
  text = isinstance(experiment.data, (TextConfig, TokensConfig))  # tokens without a tokenizer
  if text:
    experiment.data.path = str(tmp_path / 'text')
    write_text(experiment, tmp_path / 'text')
  elif not isinstance(experiment.data, (CaptionsConfig, DigitsConfig, Shapes3DLikeConfig)):
    # the data sets of published configs are not here: the same shapes from a folder
    experiment.data = FolderConfig(path=str(pictures), size=experiment.data.size)
  if isinstance(experiment.data, CaptionsConfig):  # its text is needed, and so its tokenizer
    experiment.tokenizer = experiment.tokenizer and str(tokenizer_runs('captions_vq'))
  elif (experiment.tokenizer or '').startswith('pixels:'):
    assert runs.load(experiment.tokenizer).spec == experiment.published.spec
  elif isinstance(experiment.model, GeneratorConfig) and not text:
    spec = experiment.published.spec
    experiment.tokenizer = str(tokenizer_runs(
        'digits_rvq' if spec.order == 'depth' else
        'digits_bits' if spec.vocab[0] == 2 else 'digits_vq'))
    if not isinstance(experiment.data, DigitsConfig):
      experiment.data = DigitsConfig()
  scores = train(experiment, tmp_path / 'run')
  assert np.isfinite(scores['eval/loss'])
  assert jax.tree.leaves(runs.load(tmp_path / 'run').model)
