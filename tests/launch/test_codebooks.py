"""The code vectors that a generator gets from its tokenizer, once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.configs import digits_resgen, digits_rvq
from smalti.launch import codebooks, run as runs
from smalti.launch.experiment import CheckpointConfig
from smalti.launch.job import Job
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.grouped import GroupedConfig
from smalti.tokenizers.partitioned import PartitionedConfig
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.vq import VQConfig

VQ = VQConfig(codes=16, dim=4, init='normal')


class Holder:
  """What a tokenizer is here: its quantizer."""

  def __init__(self, config):
    self.quantizer = config.build(rngs=nnx.Rngs(0))


@pytest.mark.parametrize('config', (
    ResidualConfig(quantizer=VQ, levels=3), ResidualConfig(quantizer=VQ, levels=3, shared=True),
    ResidualConfig(quantizer=FSQConfig(levels=(5, 3)), levels=2)),
    ids=('own', 'shared', 'scaled'))
def test_vectors_add_up_to_what_the_quantizer_looks_up(config):
  holder = Holder(config)
  q = holder.quantizer
  vectors = codebooks.vectors(holder)
  assert vectors.shape == (len(q.vocab), max(q.vocab), q.dim)
  tokens = jax.random.randint(jax.random.key(0), (8, 5, len(q.vocab)), 0, jnp.array(q.vocab))
  found = vectors[jnp.arange(len(q.vocab)), tokens].sum(2)
  np.testing.assert_allclose(found, q.lookup(tokens), atol=1e-6)
  assert np.std(found) > .1


@pytest.mark.parametrize('config, reason', (
    (ProjectedConfig(quantizer=ResidualConfig(quantizer=VQ, levels=2), dim=8), 'projects the sum'),
    (GroupedConfig(quantizer=ResidualConfig(quantizer=VQ, levels=2)), 'part of the channels each'),
    (PartitionedConfig(quantizer=VQ, levels=4, split=2), 'not what is left over'),
    (ResidualConfig(quantizer=GroupedConfig(quantizer=VQ), levels=2), 'one code per level'),
    (VQ, 'one vector per code')), ids=lambda value: type(value).__name__)
def test_what_is_no_sum_of_one_vector_per_code_is_refused(config, reason):
  with pytest.raises(ValueError, match=reason):
    codebooks.vectors(Holder(config))


def born(experiment, folder, init_from=None):
  """The state of a run before its first step, and its first checkpoint."""
  experiment = dataclasses.replace(
      experiment, mesh=dataclasses.replace(experiment.mesh, data=1))
  job = Job(experiment, folder, init_from)
  job.save({})
  job.checkpoints.wait()
  job.close()
  return job.state


def test_a_new_run_is_given_them_once(tmp_path, monkeypatch):
  for seed in (0, 1):
    born(dataclasses.replace(digits_rvq.get_config('debug'), seed=seed,
                             checkpoint=CheckpointConfig()), tmp_path / f'tokenizer{seed}')
  books = [np.asarray(codebooks.vectors(runs.load(tmp_path / f'tokenizer{seed}').model))
           for seed in (0, 1)]
  assert np.abs(books[0] - books[1]).max() > .01
  first = dataclasses.replace(digits_resgen.get_config('debug'), checkpoint=CheckpointConfig(),
                              tokenizer=str(tmp_path / 'tokenizer0'))
  other = dataclasses.replace(first, tokenizer=str(tmp_path / 'tokenizer1'))
  np.testing.assert_array_equal(born(first, tmp_path / 'run')['buffers']['vectors'], books[0])
  np.testing.assert_array_equal(runs.load(tmp_path / 'run').model.vectors[...], books[0])
  with monkeypatch.context() as patch:  # a run that goes on has those of its checkpoint
    patch.delattr(codebooks, 'vectors')
    state = born(first, tmp_path / 'run')
  np.testing.assert_array_equal(state['buffers']['vectors'], books[0])
  # weights from elsewhere, vectors of the tokenizer that is named
  state = born(other, tmp_path / 'other', str(tmp_path / 'run'))
  np.testing.assert_array_equal(state['buffers']['vectors'], books[1])
  wrong = dataclasses.replace(first, model=dataclasses.replace(first.model, channels=4))
  with pytest.raises(ValueError, match='set channels=8'):
    born(wrong, tmp_path / 'wrong')


def test_a_tokenizer_without_residual_codes_is_refused_before_vectors_are_asked_for():
  spec = AutoencoderConfig(image_size=(8, 8), channels=1, width=8, quantizer=VQ).build(
      rngs=nnx.Rngs(0)).spec
  with pytest.raises(ValueError, match='not residual codes'):
    digits_resgen.get_config('debug').model.build(spec, rngs=nnx.Rngs(0))
