"""Memorisation: planted copies are found, and distances are those of brute force."""

import numpy as np
import pytest

from smalti.evaluation import memorization


def test_planted_copies_are_counted():
  rng = np.random.default_rng(0)
  train, held_out = rng.integers(0, 50, (100, 9, 2)), rng.integers(0, 50, (40, 9, 2))
  samples = rng.integers(0, 50, (30, 9, 2))
  samples[:7] = train[[3, 3, 5, 8, 9, 90, 99]]
  held_out[0] = train[17]
  result = memorization.copies(samples.astype(np.int32), train.astype(np.int64), held_out)
  assert (result.copies, result.samples, result.distinct) == (7, 30, 29)
  assert (result.held_out_copies, result.held_out) == (1, 40)
  assert result.share == pytest.approx(7 / 30) and result.held_out_share == 1 / 40


def test_copies_of_prefixes_are_found_behind_their_padding():
  train = np.random.default_rng(0).integers(1, 50, (100, 9, 1))
  samples = np.where(np.arange(9)[:, None] < 4, train[:20], 0)
  assert memorization.copies(samples, train, train[50:], keep=4).share == 1
  assert memorization.copies(samples, train, train[50:]).share == 0


@pytest.mark.parametrize('chunk', [1, 7, 512])
def test_distances_are_those_of_brute_force(chunk):
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 256, (23, 8, 8, 1), np.uint8)
  reference = rng.integers(0, 256, (31, 8, 8, 1), np.uint8)
  reference[12] = rows[4]
  found = memorization.nearest_distances(rows, reference, chunk)
  brute = [np.sqrt(((reference.astype(float) - row) ** 2).sum((1, 2, 3))).min() for row in rows]
  np.testing.assert_allclose(found, brute, rtol=1e-12)
  assert found[4] == 0


def test_copying_lowers_the_ratio_and_noise_raises_it():
  rng = np.random.default_rng(0)
  draw = lambda n: rng.normal(128, 20, (n, 16)).clip(0, 255).astype(np.uint8)  # noqa: E731
  train, held_out = draw(300), draw(100)
  fresh = memorization.nearest(draw(100), train, held_out)
  assert fresh.ratio == pytest.approx(1, abs=0.05) and fresh.zero == 0
  copied = memorization.nearest(train[:100], train, held_out)
  assert (copied.ratio, copied.zero) == (0, 100)
  noise = rng.integers(0, 256, (100, 16), np.uint8)
  assert memorization.nearest(noise, train, held_out).ratio > 2


def test_refusals():
  with pytest.raises(ValueError, match='alike'):
    memorization.nearest(np.ones((2, 3)), np.ones((2, 4)), np.ones((2, 3)))
  with pytest.raises(ValueError, match='at least one of each'):
    memorization.copies(np.ones((0, 3, 1), int), np.ones((2, 3, 1), int), np.ones((2, 3, 1), int))
