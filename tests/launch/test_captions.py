"""From the command line to a sample: what text is read, in what order, and how it is judged."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.data.captions import CaptionsConfig
from smalti.data.digits import DigitsConfig
from smalti.data.utf8 import from_bytes
from smalti.generators.autoregressive import AutoregressiveConfig, AutoregressiveSettings
from smalti.generators.generator import example_keys
from smalti.generators.text import ByteEncoderConfig, TextConfig
from smalti.launch import evaluate, real, sample, state as states
from smalti.launch.scores import Scores
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

DATA = CaptionsConfig(train=40, eval=40)
TEXT = TextConfig(length=56, encoder=ByteEncoderConfig(
    transformer=TransformerConfig(layers=1, width=16, heads=2)))
SPEC = TokenSpec(grid=(2, 2), vocab=(4,))


def loaded(text=TEXT, data=DATA, model=None):
  return types.SimpleNamespace(
      config=types.SimpleNamespace(text=text, classes=0), model=model, path=pathlib.Path('run'),
      experiment=data and types.SimpleNamespace(data=data))


class Pixels(nnx.Module):
  """Decodes a code to a pixel of its brightness."""

  def decode(self, tokens, *, keep=None, keys=None):
    return tokens.reshape(-1, 2, 2, 1) / 2 - 1.0


def test_held_out_captions_are_taken_in_turn():
  rows = DATA.open('eval').read(np.arange(40))
  found = sample.captions(loaded(), 100)
  assert set(found) == {'text', 'text_mask', 'claims'}
  for name, values in found.items():
    np.testing.assert_array_equal(values, rows[name][np.arange(100) % 40])
  few = sample.captions(loaded(), 7)
  np.testing.assert_array_equal(few['text'], rows['text'][:7])
  assert sample.captions(loaded(text=None), 7) is None


def test_texts_of_the_command_line_are_taken_in_turn(tmp_path):
  file = tmp_path / 'captions.txt'
  file.write_text('3 7 above 0 3\n\nbrighter left\n')
  for given in (sample._given(['3 7 above 0 3', 'brighter left'], None),
                sample._given(None, str(file))):
    found = sample.captions(loaded(), 5, given)
    assert from_bytes(found['text'], found['text_mask']) == [
        '3 7 above 0 3', 'brighter left'] * 2 + ['3 7 above 0 3']
  assert sample._given(None, None) is None


@pytest.mark.parametrize('attempt, message', [
    (lambda: sample.captions(loaded(text=None), 2, ['x']), 'reads no text'),
    (lambda: sample.captions(loaded(text=TextConfig(length=4, width=8)), 2, ['x']), 'features'),
    (lambda: sample.captions(loaded(data=None), 2), 'exported file'),
    (lambda: sample.captions(loaded(data=DigitsConfig()), 2), 'holds no text'),
    (lambda: sample._given(['x'], 'file'), 'give one of them'),
    (lambda: sample._given(None, 'nowhere.txt'), 'no file of captions')])
def test_what_cannot_be_read_is_refused(attempt, message):
  with pytest.raises(ValueError, match=message):
    attempt()


def test_an_example_is_drawn_from_its_own_caption():
  """Batches of 4 of 6 examples are what the model draws of all six in one call."""
  model = AutoregressiveConfig(text=TEXT, transformer=TransformerConfig(
      layers=1, width=16, heads=2, memory=16)).build(SPEC, rngs=nnx.Rngs(0))
  model.head.kernel[...] = jax.random.normal(jax.random.key(1), model.head.kernel.shape)
  attention = model.transformer.blocks.cross.attention
  for linear in (attention.query, attention.key_value, attention.out):
    linear.kernel[...] *= 40
  settings, generator = AutoregressiveSettings(), loaded(model=model)
  sampler = sample.Sampler(4, jax.devices()[:1])
  texts = sample.captions(generator, 6)
  parts = list(sampler.batches(generator, loaded(model=Pixels()), n=6, seed=2, settings=settings))
  tokens = np.concatenate([np.asarray(p.tokens)[p.index >= 0] for p in parts])
  assert sampler.programs == 1
  keys = example_keys(states.stream(2, 'sample'), jnp.arange(6))
  draw = jax.jit(lambda condition: model.sample(condition, keys=keys, settings=settings).tokens)
  condition = {name: jnp.asarray(texts[name]) for name in sample.TEXT}
  np.testing.assert_array_equal(tokens, draw(condition))
  turned = jax.tree.map(lambda x: jnp.roll(x, 1, 0), condition)  # the negative control
  assert (np.asarray(draw(turned)) != tokens).any()


def test_real_canvases_agree_with_their_captions():
  rows = CaptionsConfig(eval=200).open('eval').read(np.arange(200))
  texts = {name: rows[name] for name in ('text', 'text_mask', 'claims')}
  held_out = real.Split(rows['image'], None, texts)
  scores = Scores(None, 'real', quiet=True)
  evaluate.evaluate_captions(scores, DATA, rows['image'], texts, held_out)
  share, whole = scores.rows
  assert (share.name, whole.name) == ('caption_agreement', 'whole_captions')
  assert share.value == share.beside['real'] > 0.9 and whole.value > 0.8
  assert share.beside['shuffled'] == share.beside['chance'] < 0.35
  assert whole.beside['chance'] < 0.15 and share.beside['brighter'] == 1
  evaluate.evaluate_captions(scores, DigitsConfig(), rows['image'], texts, held_out)
  assert len(scores.rows) == 2  # of other data nothing is said
