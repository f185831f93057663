"""Tokenizers that draw in evaluation: every verb takes them, and an example's draw is its own."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smalti.data.digits import DigitsConfig
from smalti.data.tokens import TokensConfig
from smalti.launch import cli, probe, reconstruct, run as runs, step, tokenize, trees
from smalti.launch.job import Job
from smalti.launch.train import train


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'tokenizer'
  train(trees.load_config('digits_bits:debug', [
      ('mesh.data', '1'), ('steps', '1'), ('model.quantizer.stochastic', 'true')]), folder)
  return folder


def test_the_draw_of_an_example_is_the_same_however_it_is_read(tokenizer, tmp_path):
  loaded = runs.load(tokenizer)
  assert loaded.model.quantizer.stochastic
  source = DigitsConfig().open('train')
  images = source.read(np.arange(40))['image']
  _, whole = reconstruct.reconstruct(loaded, images)
  _, parts = reconstruct.reconstruct(loaded, images, batch_size=7)
  np.testing.assert_array_equal(whole, parts)
  np.testing.assert_array_equal(reconstruct.tokenized(loaded, images, batch_size=9), whole)
  _, other = reconstruct.reconstruct(loaded, images, seed=1)
  assert (whole != other).any()
  alike = reconstruct.encoded(loaded, images[:1].repeat(8, 0))
  assert len({row.tobytes() for row in np.asarray(alike)}) > 1  # the image alone does not decide
  for size in (256, 100):
    tokenize.tokenize(loaded, DigitsConfig(), tmp_path / f'{size}', batch_size=size)
    stored = TokensConfig(path=str(tmp_path / f'{size}')).open('train').read(np.arange(1437))
    np.testing.assert_array_equal(stored['tokens'][:40], whole)
  for index in (np.arange(40), np.arange(40)[::-3]):  # in training, by its number
    batch: Any = {'image': jnp.asarray(images[index]), 'index': jnp.asarray(index)}
    found = jax.jit(step.inputs)(batch, {'tokenizer': loaded.model})['tokens']
    np.testing.assert_array_equal(found, whole[index])
    examples = probe.Examples(images[index], index, index)
    np.testing.assert_array_equal(probe._tokens(loaded, examples, 0), whole[index])
    keys = probe.example_keys(probe.states.stream(0, 'eval'), jnp.asarray(index))
    quantized = probe._of_tokenizer(loaded.model, jnp.asarray(images[index]), keys,
                                    jnp.zeros(()))['quantized']
    np.testing.assert_allclose(quantized, loaded.model.lookup(jnp.asarray(whole[index])), rtol=1e-5)


def test_verbs_take_it(tokenizer, tmp_path):
  assert cli.main(['reconstruct', f'--workdir={tokenizer}', '--n=16']) == 0
  generator = trees.load_config('digits_binary:debug', [
      ('mesh.data', '1'), ('steps', '1'), ('tokenizer', str(tokenizer)), ('eval.batches', '2')])
  job = Job(generator, tmp_path / 'run', None)
  read: list[dict] = []
  put = job._put
  job._put = types.MethodType(lambda self, rows: (read.append(rows), put(rows))[1], job)
  with jax.set_mesh(job.mesh):
    assert np.isfinite(job.evaluate()['eval/loss'])
  source = DigitsConfig().open('eval')
  for rows in read:  # held-out images keep their numbers
    np.testing.assert_array_equal(rows['image'], source.read(rows['index'])['image'])
  job.close()
  train(generator, tmp_path / 'trained')
