"""What int8 costs is measured against the model as trained, on every sequence once."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.generators.autoregressive import AutoregressiveConfig
from smalti.generators.text import TextConfig
from smalti.launch import quantization, run as runs
from smalti.networks.transformer import TransformerConfig
from smalti.tokenizers.spec import TokenSpec

CONFIG = AutoregressiveConfig(classes=2, transformer=TransformerConfig(
    layers=1, width=32, heads=2))
SPEC = TokenSpec(grid=(4,), vocab=(3,), eos=2)


@functools.cache
def build():
  model = CONFIG.build(SPEC, rngs=nnx.Rngs(0))
  model.head.kernel[...] = 0.3 * jax.random.normal(jax.random.key(7), model.head.kernel.shape)
  for linear in (model.transformer.blocks.attention.key_value, model.transformer.blocks.down):
    linear.kernel[...] *= 20
  return model


@functools.cache
def data(n=7):
  model, random = build(), np.random.default_rng(0)
  tokens = model.spec.canonical(random.integers(0, 3, (n, 4, 1)).astype(np.int32))
  return tokens, random.integers(0, 2, n).astype(np.int32)


@functools.cache
def measured():
  loaded = runs.Loaded(build(), CONFIG, {}, SPEC, '', None, 0, pathlib.Path('generator'), 'raw')
  other = quantization.in_other_dtype(loaded)
  return quantization.measure(build(), *data(), other=other, batch=3, rounds=1)


def test_the_first_row_is_the_likelihood_of_the_model():
  tokens, labels = data()
  nats = -build().log_prob({'tokens': jnp.asarray(tokens), 'label': jnp.asarray(labels)}).sum()
  valid = build().spec.valid(tokens).sum()
  [first, *rest] = measured()
  assert first['bits_per_token'] == pytest.approx(float(nats) / valid / np.log(2), rel=1e-5)
  assert first['rise'] == 0 and first['agreement'] == 1 and first['met'] is None
  for row in rest:
    assert row['rise'] == pytest.approx(row['bits_per_token'] / first['bits_per_token'] - 1)
    assert 0 < abs(row['rise']) < 0.1 and row['rise_error'] > 0


def test_goals_are_those_of_the_cache_and_of_the_weights():
  assert [row['goal'] for row in measured()] == [None, None, 0.005, 0.01, None]
  for row in measured()[2:4]:
    assert row['met'] is (row['rise'] <= row['goal'])


def test_bytes_are_a_quarter_and_the_scales():
  plain, other, cache, weights, both = measured()
  assert other['case'] == 'bfloat16' and other['weight_bytes'] == plain['weight_bytes']
  entries = 2 * 2 * 4  # keys and values of 2 heads for 4 codes
  assert plain['cache_bytes'] == weights['cache_bytes'] == 4 * 16 * entries
  assert cache['cache_bytes'] == both['cache_bytes'] == (16 + 4) * entries
  assert weights['weight_bytes'] == both['weight_bytes'] < 0.3 * plain['weight_bytes']
  assert all(row['codes_per_cpu_second'] > 0 for row in measured())


def test_batches_leave_the_scores():
  tokens, labels = data()
  one, all_ = (quantization.score(build(), tokens, labels, batch=n, cache='int8') for n in (3, 7))
  for a, b in zip(one, all_, strict=True):
    assert a.shape == (7, 4)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_has_no_cache_is_refused(tmp_path):
  from absl import flags
  values = flags.FlagValues()
  quantization.define(values)
  values(['quantization'])
  with pytest.raises(ValueError, match='--workdir=RUN'):
    quantization.main(values)


def test_text_is_refused_before_anything_is_measured(monkeypatch):
  from absl import flags
  values = flags.FlagValues()
  quantization.define(values)
  values(['quantization', '--workdir=captions'])
  config = dataclasses.replace(CONFIG, text=TextConfig(length=4, width=32))
  model = config.build(SPEC, rngs=nnx.Rngs(0))
  monkeypatch.setattr(runs, 'load', lambda reference: runs.Loaded(
      model, config, {}, SPEC, '', None, 0, pathlib.Path('captions'), 'raw'))
  with pytest.raises(ValueError, match='captions reads text'):
    quantization.main(values)
