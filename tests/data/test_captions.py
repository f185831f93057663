"""Captions: true of their images, a function of index and split, held-out combinations unseen."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, strategies as st

from smalti.data import captions
from smalti.data.captions import COLUMNS, LONGEST, CaptionsConfig, arrangements, caption, parse
from smalti.data.digits import DigitsConfig
from smalti.data.utf8 import from_bytes

COUNT = 3000
GOLDEN = {
    'train': '00f3762bbbd413860f81c1597ca3e880027ac4c2a821349bdb29f3af80a6752b',
    'eval': '104c3e4b73db94dd8e0f8f5dd1873be6158dc1c1d26143345c29aa2f5528aa7e',
}


@pytest.fixture(scope='module')
def rows():
  return {split: CaptionsConfig(train=COUNT, eval=COUNT).open(split).read(np.arange(COUNT))
          for split in ('train', 'eval')}


def test_captions_are_true_of_their_images(rows):
  """By digits found again in their source, pixel by pixel, and by ink."""
  for split, batch in rows.items():
    source = DigitsConfig().open(split)
    known = source.read(np.arange(len(source)))
    label = {image.tobytes(): label for image, label in zip(known['image'], known['label'])}
    texts = from_bytes(batch['text'], batch['text_mask'])
    for image, text, factors in zip(batch['image'], texts, batch['factors']):
      digits = [label[np.ascontiguousarray(image[y:y + 8, x:x + 8]).tobytes()]
                for y in (0, 8) for x in (0, 8)]
      left, right = image[:, :8].sum(dtype=int), image[:, 8:].sum(dtype=int)
      assert list(factors) == [*digits, -1 if left == right else int(right > left)]
      words = text.replace(',', '').split()
      if 'above' in words:
        assert words[:5] == [str(d) for d in digits[:2]] + ['above'] + [str(d) for d in digits[2:]]
      for clause in text.split(', '):
        words = clause.split()
        if words[0] in captions.NUMBERS:
          assert digits.count(int(words[1].strip('s'))) == captions.NUMBERS.index(words[0])
        elif words[-1] == 'sum':
          assert words[0] == ('odd' if sum(digits) % 2 else 'even')
        elif words[0] == 'sum':
          assert int(words[1]) == sum(digits)
        elif words[0] == 'brighter':
          assert (left > right) == (words[1] == 'left') and left != right
        elif 'above' not in words:
          place = ('bottom' in words) * 2 + ('right' in words)
          assert int(words[0]) == digits[place]


def test_every_kind_is_said_often_and_nothing_is_silent(rows):
  said = rows['train']['claims'] >= 0
  assert said.any(1).all() and (said.mean(0) > 0.1).all()
  corners = np.bincount(said[:, :4].sum(1), minlength=5) / COUNT
  assert corners[3] == 0 and (corners[[0, 1, 2]] > 0.08).all() and 0.45 < corners[4] < 0.55
  assert rows['train']['text_mask'].sum(1).max() <= 55
  for column, values in ((4, range(10)), (5, range(4))):  # all digits, and none to three of them
    assert set(values) <= set(rows['train']['claims'][:, column])


def test_held_out_combinations_are_disjoint_and_complete(rows):
  parts = {split: {tuple(sorted(a)) for a in arrangements(split)} for split in ('train', 'eval')}
  assert not parts['train'] & parts['eval']
  assert len(parts['train']) + len(parts['eval']) == 715  # multisets of four of ten digits
  assert 60 < len(parts['eval']) < 120
  assert sum(len(arrangements(split)) for split in parts) == 10**4
  for split, batch in rows.items():
    seen = {tuple(sorted(f[:4])) for f in batch['factors']}
    assert seen <= parts[split] and len(seen) > 0.8 * len(parts[split])


@pytest.mark.parametrize('split', ['train', 'eval'])
def test_an_example_is_a_function_of_its_index(rows, split):
  source, order = CaptionsConfig(train=COUNT, eval=COUNT).open(split), [7, 2999, 7, 0]
  for name, values in source.read(np.array(order)).items():
    np.testing.assert_array_equal(values, rows[split][name][order])
  batch = rows[split]
  assert hashlib.sha256(
      batch['image'].tobytes() + batch['text'].tobytes()).hexdigest() == GOLDEN[split]
  assert len({image.tobytes() for image in batch['image']}) > 0.99 * COUNT


claimed = st.tuples(
    *[st.integers(-1, 9)] * 4, st.integers(-1, 9), st.integers(0, 4), st.integers(-1, 36),
    st.integers(-1, 1), st.integers(-1, 1))


@given(claimed)
def test_captions_say_their_claims_and_no_more(claims):
  claims = np.array(claims)
  claims[5] = -1 if claims[4] < 0 else claims[5]
  if (claims >= 0).any():
    np.testing.assert_array_equal(parse(caption(claims)), claims)
    assert len(COLUMNS) == len(claims)


def test_parsing_agrees_with_what_the_data_say(rows):
  for batch in rows.values():
    texts = from_bytes(batch['text'], batch['text_mask'])
    np.testing.assert_array_equal([parse(text) for text in texts], batch['claims'])


def test_refusals():
  with pytest.raises(ValueError, match='would cut'):
    CaptionsConfig(length=LONGEST - 1).open('train')
  with pytest.raises(ValueError, match='no clause'):
    parse('3 7 above 0 3, seven 3s')
