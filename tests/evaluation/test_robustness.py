"""Perturbed tokens and repeated encoding, on quantizers of grey levels whose answers are known."""

import numpy as np
import pytest

from smalti.evaluation import robustness
from smalti.tokenizers.spec import TokenSpec

SPEC = TokenSpec(grid=(8, 8), vocab=(16,))
LEVELS = np.arange(16, dtype=np.float32)[:, None]  # neighbours of k: k - 1, k + 1


def encode(images, first=0):
  """One of 16 grey levels per pixel."""
  return (images[..., 0].astype(np.int32) // 16).reshape(len(images), 64, 1)


def decode(tokens, first=0):
  return (tokens * 16 + 8).astype(np.uint8).reshape(len(tokens), 8, 8, 1)


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)


def test_nearest_against_all_distances():
  codes = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
  codes[7] = codes[3]  # a twin comes after the code itself
  distances = np.square(codes[:, None].astype(float) - codes).sum(-1)
  near = robustness.nearest(codes, 5)
  np.testing.assert_array_equal(near[:, 0], np.arange(50))
  np.testing.assert_allclose(np.take_along_axis(distances, near, 1), np.sort(distances, 1)[:, :5],
                             atol=1e-12)
  assert {*near[7, :2]} == {3, 7}
  np.testing.assert_array_equal(np.sort(robustness.nearest(codes, 99), 1),
                                np.tile(np.arange(50), (50, 1)))
  np.testing.assert_array_equal(robustness.nearest(LEVELS, 3)[5:7], [[5, 4, 6], [6, 5, 7]])


def test_nearest_in_blocks(monkeypatch):
  codes = np.random.default_rng(1).normal(size=(37, 4))
  whole = robustness.nearest(codes, 6)
  monkeypatch.setattr(robustness, 'BLOCK', 100)
  np.testing.assert_array_equal(robustness.nearest(codes, 6), whole)


def test_perturbation_is_a_uniform_pick_among_the_nearest():
  tokens = np.full((500, 64, 1), 6, np.int32)
  near = [robustness.nearest(LEVELS, 3)]
  out = robustness.perturb(SPEC, tokens, alpha=.3, near=near)
  share = np.bincount(out.ravel(), minlength=16) / out.size
  error = 4 * np.sqrt(.1 * .9 / out.size)  # four standard errors
  np.testing.assert_allclose(share[[5, 6, 7]], [.1, .8, .1], atol=error)
  assert share[[5, 6, 7]].sum() == pytest.approx(1)
  everywhere = robustness.perturb(SPEC, tokens, alpha=.3)
  share = np.bincount(everywhere.ravel(), minlength=16) / everywhere.size
  expected = np.where(np.arange(16) == 6, .7 + .3 / 16, .3 / 16)
  np.testing.assert_allclose(share, expected, atol=error)


def test_perturbation_does_not_depend_on_the_batch(images):
  tokens = encode(images)
  whole = robustness.perturb(SPEC, tokens, alpha=.5, seed=3)
  parts = [robustness.perturb(SPEC, tokens[i:j], alpha=.5, seed=3, start=i)
           for i, j in ((0, 7), (7, 40))]
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert (robustness.perturb(SPEC, tokens, alpha=.5, seed=4) != whole).any()
  assert (robustness.perturb(SPEC, tokens, alpha=0) == tokens).all()
  assert (whole != tokens).any() and tokens.max() == 15  # the argument is left alone


def test_ends_stay_ends_and_alphabets_are_kept():
  spec = TokenSpec(grid=(6,), vocab=(5,), eos=4)
  tokens = np.array([[0, 1, 2, 4, 4, 4], [4] * 6, [3] * 6], np.int32)[..., None]
  tokens = np.tile(tokens, (200, 1, 1))
  for near in (None, [np.tile(np.arange(4, dtype=np.int32), (5, 1))]):
    out = robustness.perturb(spec, tokens, alpha=1., near=near)
    np.testing.assert_array_equal(out == 4, tokens == 4)
    assert {*out[2::3].ravel()} == {0, 1, 2, 3}
  deep = TokenSpec(grid=(30,), vocab=(3, 7))
  out = robustness.perturb(deep, np.zeros((50, 30, 2), np.int32), alpha=1.)
  assert [{*out[..., d].ravel()} for d in (0, 1)] == [{*range(3)}, {*range(7)}]


def test_perturbed_reconstruction(images):
  images = images % 192 + 32  # levels with a neighbour on both sides
  result = robustness.perturbed(encode, decode, SPEC, images, alpha=.5, delta=3, codes=[LEVELS],
                                batch=16)
  assert result == robustness.perturbed(encode, decode, SPEC, images, alpha=.5, delta=3,
                                        codes=[LEVELS], batch=40)
  assert result.changed == pytest.approx(.5 * 2 / 3, abs=.03)
  assert result.clean.psnr > result.perturbed.psnr + 3
  assert result.psnr_drop == result.clean.psnr - result.perturbed.psnr
  # a step of one level adds 16^2 to an error of about 16^2 / 12
  squares = 10 ** (-result.perturbed.psnr_of_mean / 10) * 255 ** 2
  assert squares == pytest.approx(21.5 + result.changed * 256, rel=.06)
  wide = robustness.perturbed(encode, decode, SPEC, images, alpha=.5)
  assert wide.delta is None and wide.perturbed.psnr < result.perturbed.psnr - 3
  none = robustness.perturbed(encode, decode, SPEC, images, alpha=0.)
  assert none.changed == none.psnr_drop == 0 and none.perturbed == none.clean


def test_a_stable_tokenizer_keeps_its_tokens(images):
  result = robustness.recode(encode, decode, SPEC, images, rounds=3, batch=16)
  assert result.unchanged == result.kept == (1, 1, 1)
  assert len(set(result.psnr)) == 1 and result.drift == 0 and result.images == 40


def test_a_drifting_tokenizer_loses_them(images):
  darker = lambda tokens, first: np.maximum(decode(tokens), 16) - 16  # noqa: E731 - one level per round
  low = images % 64  # levels 0..3: none is left after three rounds
  result = robustness.recode(encode, darker, SPEC, low, rounds=4, batch=9)
  level = encode(low)
  expected = [np.mean(np.maximum(level - r, 0) == np.maximum(level - r - 1, 0)) for r in range(4)]
  assert result.unchanged == pytest.approx(expected)
  assert result.kept == pytest.approx([np.mean(level == 0)] * 4)
  assert result.unchanged[-1] == 1 and result.drift > 1
  assert list(result.psnr) == sorted(result.psnr, reverse=True)


def test_an_exact_tokenizer_has_no_psnr(images):
  spec = TokenSpec(grid=(64,), vocab=(256,))
  result = robustness.recode(lambda x, _: x.reshape(-1, 64, 1).astype(np.int32),
                             lambda t, _: t.astype(np.uint8).reshape(-1, 8, 8, 1), spec, images)
  assert result.psnr == (None, None) and result.drift is None and result.kept == (1,)


def test_a_tokenizer_that_draws_has_the_same_noise_in_every_batch_and_round(images):
  def noise(first, n):
    return np.stack([np.random.default_rng(first + i).integers(-9, 10, (8, 8, 1))
                     for i in range(n)])

  def encode_noisy(x, first):
    return encode(np.clip(x.astype(int) + noise(first, len(x)), 0, 255))

  def decode_noisy(tokens, first):
    return np.clip(decode(tokens).astype(int) + noise(first, len(tokens)), 0, 255).astype(np.uint8)

  for measure in (robustness.perturbed, robustness.recode):
    found = [measure(encode_noisy, decode_noisy, SPEC, images, batch=batch) for batch in (7, 40)]
    assert found[0] == found[1]
  repeated = robustness.recode(lambda x, _: encode_noisy(x, 0), decode_noisy, SPEC, images, batch=7)
  assert repeated != found[0]  # what a batch that always begins at 0 would give


def test_refusals(images):
  tokens = encode(images)
  with pytest.raises(ValueError, match='probability'):
    robustness.perturb(SPEC, tokens, alpha=1.5)
  with pytest.raises(ValueError, match='delta=0'):
    robustness.nearest(LEVELS, 0)
  with pytest.raises(ValueError, match='vocab'):
    robustness.perturb(SPEC, tokens, near=[np.zeros((15, 2), np.int32)])
  with pytest.raises(ValueError, match='rounds=0'):
    robustness.recode(encode, decode, SPEC, images, rounds=0)
