"""Pixels as a tokenizer without a run: a generator trains on them, and what it draws are images."""

import dataclasses

import jax
import numpy as np
import pytest

from smalti.configs import cifar10_md4
from smalti.data.digits import DigitsConfig
from smalti.evaluation.subset import subset
from smalti.launch import evaluate, likelihood, real, reconstruct, run as runs
from smalti.launch.experiment import MeshConfig
from smalti.launch.sample import draw
from smalti.launch.scores import Scores
from smalti.launch.state import stream
from smalti.launch.train import train


def test_the_mark_of_pixels_is_of_their_sizes():
  one, same, other = (runs.load(f'pixels:{size}') for size in ('8x8x1', '8x8x1', '4x16x1'))
  assert one.fingerprint == same.fingerprint != other.fingerprint
  assert other.spec.grid == (4, 16) and runs.kind(one.model) == 'tokenizer'
  assert not jax.tree.leaves(one.model)
  for text in ('pixels:8', 'pixels:8x8', 'pixels:8x8x3@4'):
    with pytest.raises(ValueError, match='is not pixels:HxWxC'):
      runs.load(text)


def test_a_generator_of_pixels_trains_and_draws_images(tmp_path, monkeypatch):
  experiment = dataclasses.replace(
      cifar10_md4.get_config('debug'), data=DigitsConfig(), tokenizer='pixels:8x8x1',
      mesh=MeshConfig(data=1), steps=1)
  experiment.model = dataclasses.replace(experiment.model, width=8)
  scores = train(experiment, tmp_path)
  assert abs(scores['eval/bits_per_token'] - 8) < .1  # bits per dimension
  loaded = runs.load(tmp_path)
  pixels = runs.load_tokenizer(loaded)
  settings = dataclasses.replace(experiment.settings, steps=2)
  drawn = draw(loaded, pixels, n=2, seed=0, settings=settings)
  assert drawn.images.dtype == np.uint8 and drawn.images.shape == (2, 8, 8, 1)
  np.testing.assert_array_equal(drawn.images.reshape(2, 64, 1), drawn.tokens)
  splits = [dataclasses.replace(x, images=x.images[:64], labels=x.labels[:64])
            for x in (real.Split.read(DigitsConfig(), name) for name in ('train', 'eval'))]
  found = Scores(loaded, quiet=True)
  evaluate.evaluate_generator(loaded, pixels, found, *splits, drawn, seed=0)
  bits = {score.name: score for score in found.rows}['bits_per_token_held_out']
  assert bits.beside['bits_per_dimension'] == pytest.approx(bits.value)
  asked, nats = [], type(loaded.model).nats
  monkeypatch.setattr(type(loaded.model), 'nats', lambda self, batch, *, key, settings: (
      asked.append(settings), nats(self, batch, key=key, settings=settings))[1])
  monkeypatch.setattr(likelihood, 'SCORED', 16)  # of 64
  few = Scores(loaded, quiet=True)
  evaluate.evaluate_generator(loaded, pixels, few, *splits, drawn, seed=0, settings=settings)
  assert asked == [settings] * 2  # the law of what is drawn: training images, held-out ones
  bits = {score.name: score for score in few.rows}['bits_per_token_held_out']
  tokens = reconstruct.tokenized(pixels, splits[1].images[subset(64, 16)])
  again, _ = likelihood.bits_per_token(loaded, tokens, {}, key=stream(0, 'eval'))
  assert bits.samples == 16 and bits.value == pytest.approx(again, rel=1e-6)
  assert bits.beside['bits_per_dimension'] == pytest.approx(bits.value)
  with pytest.raises(ValueError, match='was trained on tokenizer'):
    runs.load_tokenizer(loaded, 'pixels:16x4x1')
