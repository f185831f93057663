"""Caption agreement: the truth, chance by enumeration, and images that break one claim each."""

import numpy as np
import pytest

from smalti.data.captions import choose
from smalti.evaluation.captions import KINDS, caption_agreement, judged, read


def judge(images):
  """Reads the first pixel: 25 d is the digit d."""
  return images[:, 0, 0, 0].astype(int) // 25


def canvases(digits, half):
  """uint8[b, 8, 8, 1] whose quadrants begin with their digit, and with more ink in one half."""
  image = np.zeros((len(digits), 8, 8, 1), np.uint8)
  for i in range(4):
    image[:, 4 * (i // 2), 4 * (i % 2), 0] = 25 * digits[:, i]
  image[:, 2:, 2, 0] = np.where(half == 0, 255, 0)[:, None]
  image[:, 2:, 6, 0] = np.where(half == 1, 255, 0)[:, None]
  return image


@pytest.fixture(scope='module')
def data():
  rng = np.random.default_rng(0)
  digits, half = rng.integers(0, 10, (400, 4)), rng.integers(0, 2, 400)
  claims = choose(digits, half, rng.integers(0, 2**63, 400).astype(np.uint64))
  return digits, half, claims


def test_what_is_shown_is_read(data):
  digits, half, _ = data
  np.testing.assert_array_equal(
      read(canvases(digits, half), judge), np.concatenate([digits, half[:, None]], 1))
  assert read(np.zeros((1, 4, 4, 1), np.uint8), judge)[0, 4] == -1


def test_true_captions_agree_and_others_by_chance(data):
  digits, half, claims = data
  images = canvases(digits, half)
  found = caption_agreement((images, claims), (images[:200], claims[:200]), judge)
  assert found.agreement == found.whole == found.real == found.real_whole == 1
  assert set(found.per_kind) == set(KINDS) and set(found.per_kind.values()) == {1.0}
  assert found.shuffled < 0.35 and found.shuffled_whole < 0.15
  assert found.chance == pytest.approx(found.shuffled, abs=0.03)
  # over all pairs, by the letter
  held, made, whole = 0, 0, 0
  for i in range(400):
    for j in range(400):
      if i != j:
        row = judged(claims[i:i + 1], np.array([[*digits[j], half[j]]]))[0]
        held, made = held + (row == 1).sum(), made + (row >= 0).sum()
        whole += (row != 0).all()
    if i == 20:
      break
  assert found.shuffled == pytest.approx(held / made, abs=0.05)
  assert found.shuffled_whole == pytest.approx(whole / (21 * 399), abs=0.05)


@pytest.mark.parametrize('column, kinds', [
    (0, {'corner', 'count', 'sum', 'parity'}), (4, {'brighter'})])
def test_what_is_not_shown_is_noticed(data, column, kinds):
  digits, half, claims = data
  changed, other = digits.copy(), half
  if column < 4:
    changed[:, column] = (changed[:, column] + 1) % 10  # parity turns, but from 9 to 0: as well
  else:
    other = 1 - half
  found = caption_agreement(
      (canvases(changed, other), claims), (canvases(digits, half), claims), judge)
  assert {kind for kind, share in found.per_kind.items() if share < 1} == kinds
  if column < 4:
    assert found.per_kind['sum'] == found.per_kind['parity'] == 0
  else:
    assert found.per_kind['brighter'] == 0
  assert found.real == 1


def test_refusals(data):
  digits, half, claims = data
  images = canvases(digits, half)
  with pytest.raises(ValueError, match='two or more'):
    caption_agreement((images[:1], claims[:1]), (images, claims), judge)
  with pytest.raises(ValueError, match='no quadrants'):
    read(images[:, :7], judge)
