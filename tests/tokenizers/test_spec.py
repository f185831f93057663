"""TokenSpec: views are bijections, prefixes and EOS obey their laws, JSON returns, errors tell."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from smalti.tokenizers.spec import TokenSpec

grids = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
radices = st.lists(st.integers(2, 6), min_size=1, max_size=4).map(tuple)
laws = settings(max_examples=60, deadline=None)


@st.composite
def factored(draw):
  factors = draw(radices)
  return TokenSpec(grid=draw(grids), vocab=(math.prod(factors),) * draw(st.integers(1, 3)),
                   factors=factors)


@st.composite
def powers_of_two(draw):
  bits = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
  return TokenSpec(grid=draw(grids), vocab=tuple(2**b for b in bits))


@st.composite
def with_eos(draw):
  size = draw(st.integers(2, 6))
  return TokenSpec(grid=draw(grids), vocab=(size,), eos=size - 1)


def tokens_of(spec, seed, batch=3):
  rng = np.random.default_rng(seed)
  codes = [rng.integers(0, v, (batch, spec.length), np.int32) for v in spec.vocab]
  return np.stack(codes, -1)


def check_view(spec, name, seed):
  view, tokens = spec.view(name), tokens_of(spec, seed)
  seen = spec.to(name, tokens)
  assert seen.shape == (3, view.length, view.depth) and seen.dtype == np.int32
  assert np.all((seen >= 0) & (seen < np.array(view.vocab)))
  assert math.isclose(view.bits, spec.bits)
  assert view.order == 'raster' and view.budgets == ()
  np.testing.assert_array_equal(spec.back(name, seen), tokens)
  other = tokens_of(view, seed + 1)
  np.testing.assert_array_equal(spec.to(name, spec.back(name, other)), other)


@laws
@given(factored(), st.integers(0, 99))
def test_factors_are_a_bijection(spec, seed):
  check_view(spec, 'factors', seed)
  check_view(spec, 'flat', seed)
  tokens = tokens_of(spec, seed)
  digits = spec.to('factors', tokens).reshape(3, spec.length, spec.depth, len(spec.factors))
  place = np.cumprod((1, *spec.factors[:-1]))  # little-endian
  np.testing.assert_array_equal((digits * place).sum(-1), tokens)


@laws
@given(powers_of_two(), st.integers(0, 99))
def test_bits_are_a_bijection_least_significant_first(spec, seed):
  check_view(spec, 'bits', seed)
  tokens = tokens_of(spec, seed)
  first = np.cumsum([0] + [v.bit_length() - 1 for v in spec.vocab[:-1]])
  np.testing.assert_array_equal(spec.to('bits', tokens)[:, :, first], tokens % 2)


@laws
@given(powers_of_two(), st.data())
def test_words_are_a_bijection_of_the_bits_in_their_order(spec, data):
  left, words = spec.view('bits').depth, []
  while left:
    words.append(data.draw(st.integers(1, left)))
    left -= words[-1]
  check_view(spec, tuple(words), 0)
  tokens = tokens_of(spec, 0)
  digits = spec.to('bits', tokens)
  for size, word in zip(words, np.moveaxis(spec.to(tuple(words), tokens), -1, 0)):
    np.testing.assert_array_equal((digits[..., :size] << np.arange(size)).sum(-1), word)
    digits = digits[..., size:]


@laws
@given(with_eos(), st.integers(0, 99))
def test_canonical_repeats_eos_and_valid_counts_it_once(spec, seed):
  tokens = tokens_of(spec, seed)
  canonical, valid = spec.canonical(tokens), spec.valid(tokens)
  np.testing.assert_array_equal(spec.canonical(canonical), canonical)
  np.testing.assert_array_equal(spec.valid(canonical), valid)
  np.testing.assert_array_equal(canonical[valid], tokens[valid])
  assert np.all(canonical[~valid] == spec.eos)
  for row, live in zip(tokens[..., 0], valid[..., 0]):
    ends = np.nonzero(row == spec.eos)[0]
    assert live.sum() == (ends[0] + 1 if len(ends) else spec.length)
  ragged = [row[:live.sum()].tolist() for row, live in zip(tokens[..., 0], valid[..., 0])]
  np.testing.assert_array_equal(spec.canonical(ragged), canonical)


@laws
@given(st.sampled_from(['nested', 'scale', 'depth']), grids, st.integers(1, 3), st.integers(0, 99))
def test_mask_keeps_a_prefix_along_the_order(order, grid, depth, seed):
  spec = TokenSpec(grid=grid, vocab=(8,) * depth, order=order)
  keep = np.random.default_rng(seed).integers(0, spec.steps + 1, 5)
  mask = spec.mask(keep)
  assert mask.shape == (5, spec.length, depth) and mask.dtype == bool
  per_step = spec.length * depth // spec.steps
  np.testing.assert_array_equal(mask.sum((1, 2)), keep * per_step)
  along = mask.any(1) if order == 'depth' else mask.any(2)
  np.testing.assert_array_equal(along, np.arange(spec.steps) < keep[:, None])


def test_jax_arrays_are_treated_like_numpy_ones():
  spec = TokenSpec(grid=(2, 3), vocab=(8, 8), factors=(2, 4), order='depth')
  tokens = tokens_of(spec, 0)
  for name in ('flat', 'factors', 'bits'):
    seen = jax.jit(spec.to, static_argnums=0)(name, tokens)
    np.testing.assert_array_equal(seen, spec.to(name, tokens))
    back = jax.jit(spec.back, static_argnums=0)(name, seen)
    assert back.dtype == jnp.int32
    np.testing.assert_array_equal(back, tokens)
  keep = np.array([0, 1, 2])
  np.testing.assert_array_equal(jax.jit(spec.mask)(keep), spec.mask(keep))
  words = TokenSpec(grid=(6,), vocab=(4,), eos=3)
  tokens = tokens_of(words, 0)
  np.testing.assert_array_equal(jax.jit(words.canonical)(tokens), words.canonical(tokens))
  np.testing.assert_array_equal(jax.jit(words.valid)(tokens), words.valid(tokens))


@laws
@given(st.one_of(factored(), powers_of_two(), with_eos()))
def test_json_returns_the_same_spec(spec):
  again = TokenSpec.from_json(spec.to_json())
  assert again == spec and hash(again) == hash(spec)


@laws
@given(powers_of_two())
def test_support_and_bits_count_the_alphabets(spec):
  assert spec.support().sum(1).tolist() == list(spec.vocab)
  assert math.isclose(2 ** (spec.bits / spec.length), math.prod(spec.vocab))
  assert spec.coordinates().shape == (spec.length, len(spec.grid))
  np.testing.assert_array_equal(
      np.ravel_multi_index(spec.coordinates().T, spec.grid), np.arange(spec.length))


@pytest.mark.parametrize('spec,bits', [  # tokenizers.md 1.4
    (TokenSpec(grid=(16, 16), vocab=(16384,)), 3584),
    (TokenSpec(grid=(16, 16), vocab=(512, 512), factors=(2,) * 9), 4608),
    (TokenSpec(grid=(32, 32), vocab=(512,) * 4, factors=(2,) * 9), 36864),
    (TokenSpec(grid=(16, 16), vocab=(2,) * 64, order='set'), 16384),
    (TokenSpec(grid=(8, 8), vocab=(16384,) * 4, order='depth', budgets=(1, 2, 3, 4)), 3584),
    (TokenSpec(grid=(256,), vocab=(64000,), factors=(8, 8, 8, 5, 5, 5), order='nested',
               budgets=tuple(range(1, 257))), 256 * math.log2(64000)),
    (TokenSpec(grid=(680,), vocab=(4096,), order='scale',
               budgets=(1, 5, 14, 30, 55, 91, 155, 255, 424, 680)), 8160),
])
def test_published_tokenizers_can_be_said(spec, bits):
  assert math.isclose(spec.bits, bits)
  assert TokenSpec.from_json(spec.to_json()) == spec


def refusal(fields, message):
  return pytest.param(fields, message, id=message)


@pytest.mark.parametrize('fields,message', [
    refusal(dict(grid=(), vocab=(2,)), 'positive sizes'),
    refusal(dict(grid=(4, 0), vocab=(2,)), 'grid=.4, 0.'),
    refusal(dict(grid=(4,), vocab=()), 'vocab=..'),
    refusal(dict(grid=(4,), vocab=(1,)), 'vocab=.1,.'),
    refusal(dict(grid=(4,), vocab=(2**31,)), '2147483648'),
    refusal(dict(grid=(4,), vocab=(8,), order='column'), 'column'),
    refusal(dict(grid=(4,), vocab=(8,), factors=(2, 2)), 'multiply to 4'),
    refusal(dict(grid=(4,), vocab=(8, 8), eos=7), 'eos=7'),
    refusal(dict(grid=(4,), vocab=(8,), eos=3), 'last id'),
    refusal(dict(grid=(4,), vocab=(8,), budgets=(1,)), 'order with prefixes'),
    refusal(dict(grid=(4,), vocab=(8,), order='nested', budgets=(2, 1)), 'must increase'),
    refusal(dict(grid=(4,), vocab=(8,), order='nested', budgets=(5,)), '1..4'),
    refusal(dict(grid=(4,), vocab=(8, 8), order='depth', budgets=(3,)), '1..2'),
])
def test_impossible_specs_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    TokenSpec(**fields)


def test_missing_views_are_refused_with_the_reason():
  with pytest.raises(ValueError, match='equal alphabets'):
    TokenSpec(grid=(2,), vocab=(4, 8)).view('flat')
  with pytest.raises(ValueError, match='needs a spec with factors'):
    TokenSpec(grid=(2,), vocab=(8,)).view('factors')
  with pytest.raises(ValueError, match='powers of two'):
    TokenSpec(grid=(2,), vocab=(10,)).view('bits')
  with pytest.raises(ValueError, match='cannot hold an EOS'):
    TokenSpec(grid=(2,), vocab=(8,), eos=7).view('bits')
  with pytest.raises(ValueError, match='not one of flat, factors, bits'):
    TokenSpec(grid=(2,), vocab=(8,)).view('words')
  with pytest.raises(ValueError, match='must split the 3 bits'):
    TokenSpec(grid=(2,), vocab=(8,)).view((1, 1))
  with pytest.raises(ValueError, match='no prefixes'):
    TokenSpec(grid=(2,), vocab=(8,)).mask(np.array([1]))
  with pytest.raises(ValueError, match='Unknown fields of a TokenSpec: colour'):
    TokenSpec.from_json({'grid': [2], 'vocab': [2], 'colour': 1})
  with pytest.raises(ValueError, match='longer than the grid'):
    TokenSpec(grid=(2,), vocab=(8,), eos=7).canonical([[1, 2, 3]])
  with pytest.raises(ValueError, match='need an eos'):
    TokenSpec(grid=(2,), vocab=(8,)).canonical([[1]])


def test_the_module_imports_numpy_alone():
  code = (
      'import sys, numpy; before = set(sys.modules); import smalti.tokenizers.spec; '
      'new = {m.split(".")[0] for m in set(sys.modules) - before} - sys.stdlib_module_names; '
      'print(sorted(new))')
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "['smalti']"
