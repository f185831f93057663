"""Prefixes of a decoder that draws, measured; and a part of a model that comes from another run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.launch import budgets, cli, export, run as runs, state as states, trees
from smalti.launch.job import Job
from smalti.launch.reconstruct import decoded, lengths, reconstruct, settings_of
from smalti.launch.serialization import to_json
from smalti.launch.train import train
from smalti.tokenizers.spec import TokenSpec


def config(name):
  return trees.load_config(f'{name}:debug', [('mesh.data', '1')])


@pytest.fixture(scope='module')
def flextok(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'flextok'
  train(config('flextok'), folder)
  return folder


def test_a_drawn_reconstruction_is_of_its_seed_and_place_alone(flextok):
  loaded = runs.load(flextok)
  images = loaded.experiment.data.open('eval').read(np.arange(6))['image']
  settings = settings_of(loaded, {'steps': '2'})
  assert settings.steps == 2
  whole, tokens = reconstruct(loaded, images, settings=settings)
  cut, _ = reconstruct(loaded, images, batch_size=3, settings=settings)
  assert np.abs(whole.astype(int) - cut).max() <= 1  # a float on the border of two levels
  assert np.abs(decoded(loaded, tokens[3:], first=3, settings=settings).astype(int)
                - whole[3:]).max() <= 1
  other, _ = reconstruct(loaded, images, seed=1, settings=settings)
  assert np.abs(other.astype(int) - whole).mean() > 5


def test_budgets_are_measured_and_drawn(flextok, tmp_path):
  out = tmp_path / 'numbers.json'
  code = cli._verb('budgets', [
      f'--workdir={flextok}', '--n=6', '--seeds=2', '--steps=1,2', '--settings.steps=2',
      f'--out={out}'])
  assert code == 0
  found = json.loads(out.read_text())['results']
  assert [row['keep'] for row in found['rows']] == [1, 2, 3, 4]
  assert all(row['psnr_sd'] > 0 and row['between_seeds'] > 0 for row in found['rows'])
  assert [row['steps'] for row in found['steps']] == [1, 2]
  assert found['settings']['steps'] == 2 and found['seeds'] == 2
  # nothing is learned in two steps: the drawn noise decides, whatever the tokens say
  assert not found['holds']['tokens of another image cost 3 dB']
  assert (flextok / 'budgets' / 'strips.png').stat().st_size > 1000
  assert (flextok / 'budgets' / 'seeds.png').stat().st_size > 1000


def test_verdicts_can_fail_and_hold():
  row = dict(psnr_sd=.1, psnr_se=.2)
  low, high = dict(row, psnr=10., between_seeds=.3), dict(row, psnr=10.7, between_seeds=.2)
  holds = budgets._verdicts([low, high], {'cost': 4.0}, True)
  assert all(holds.values()) and len(holds) == 4
  assert not any(budgets._verdicts([high, low], {'cost': 2.0}, True).values())
  assert len(budgets._verdicts([low, high], {'cost': 4.0}, False)) == 3


def test_of_many_budgets_the_powers_of_two_are_shown():
  spec = TokenSpec(grid=(256,), vocab=(8,), order='nested', budgets=tuple(range(1, 257)))
  assert lengths(spec) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
  few = dataclasses.replace(spec, budgets=(3, 5, 256))
  assert lengths(few) == (3, 5, 256)
  assert lengths(dataclasses.replace(spec, budgets=(), order='raster')) == (None,)


def test_settings_of_a_decoder_that_draws_nothing_are_refused(flextok):
  loaded = runs.load(flextok)
  still = dataclasses.replace(loaded, model=object())
  assert settings_of(still, {}) is None
  with pytest.raises(ValueError, match='leave out --settings.steps'):
    settings_of(still, {'steps': '2'})


def latent():
  experiment = config('flextok')
  return dataclasses.replace(experiment, model=dataclasses.replace(
      experiment.model, vae=config('klvae').model, patch=2))


@pytest.fixture(scope='module')
def vae(tmp_path_factory):
  """A file of a KL-VAE that has seen a step, without the cost of one."""
  model = jax.jit(lambda: config('klvae').model.build(rngs=nnx.Rngs(7)))()
  model.count[...], model.total[...] = jnp.ones(1), jnp.array([[0.0, 4.0]])
  split = states.Structure.of(model).split(model)
  stored = to_json(config('klvae').model)
  path = tmp_path_factory.mktemp('files') / 'vae.safetensors'
  export.save(runs.Loaded(model, config('klvae').model, stored, None,
                          runs.fingerprint(stored, None, *split), None, 2, path, 'ema'), path)
  return path


def leaves(model):
  params, buffers = states.Structure.of(model).split(model)
  return {**states.paths(params), **states.paths(buffers)}


def test_a_part_comes_from_another_run(vae, tmp_path, capsys):
  job = Job(latent(), tmp_path / 'flextok', f'vae={vae}')
  assert 'init_from: copied vae/encoder' in capsys.readouterr().err
  theirs, mine = leaves(runs.load(vae).model), states.paths(job.state['buffers'])
  assert {path.removeprefix('vae/') for path in mine} == theirs.keys()
  for path, leaf in mine.items():
    np.testing.assert_array_equal(leaf, theirs[path.removeprefix('vae/')])
  assert not any('vae' in path for group in ('params', 'ema', 'optimizer')
                 for path in states.paths(job.state[group]))
  model = job.structure.merge(job.state['params'], job.state['buffers'])
  assert float(model.vae.scale()) == .5
  batch = {'image': jax.ShapeDtypeStruct((4, 8, 8, 1), np.uint8)}
  for train_ in (True, False):  # traced alone: the slow test below trains
    jax.eval_shape(lambda m, b, t=train_: m.loss(
        b, step=0, key=jax.random.key(0), train=t), model, batch)
  job.close()


def test_a_part_that_comes_from_nowhere_is_refused(vae, tmp_path):
  with pytest.raises(ValueError, match='vae of FlexTok is not trained with it; .*=vae=RUN'):
    Job(latent(), tmp_path / 'flextok', None)
  with pytest.raises(ValueError, match='no part vea'):
    Job(latent(), tmp_path / 'flextok', f'vea={vae}')


@pytest.mark.slow
def test_flextok_learns_on_the_latents_of_a_trained_vae(tmp_path):
  train(config('klvae'), tmp_path / 'vae')
  train(latent(), tmp_path / 'flextok', init_from=f'vae={tmp_path / "vae"}')
  before, loaded = leaves(runs.load(tmp_path / 'vae').model), runs.load(tmp_path / 'flextok')
  for path, leaf in leaves(loaded.model.vae).items():  # after two steps, unchanged
    np.testing.assert_array_equal(leaf, before[path])
  images = loaded.experiment.data.open('eval').read(np.arange(2))['image']
  found, _ = reconstruct(loaded, images, settings=settings_of(loaded, {'steps': '1'}))
  assert found.shape == images.shape
