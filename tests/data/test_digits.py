"""The embedded digits: golden counts and hashes of a split that must never move."""

import hashlib

import numpy as np

from smalti.data.digits import DigitsConfig, held_out

GOLDEN = {
    'train': '7748ddfb0635dd17bd64eaf0af5a4da262f1f82502f12f3b558572e8d35779d2',
    'eval': '041daab83b1fb7ac59eb443ccf4cbebfddd23e7b7f2dd76d2272de657afd8fa0',
}


def test_the_split_is_fixed():
  sizes = {}
  for split in GOLDEN:
    source = DigitsConfig().open(split)
    batch = source.read(np.arange(len(source)))
    image, label = batch['image'], batch['label']
    assert image.dtype == np.uint8 and image.shape == (len(source), 8, 8, 1)
    assert label.dtype == np.int32 and source.classes == tuple('0123456789')
    assert image.max() == 255 and len(np.unique(image)) == 17
    sizes[split] = np.bincount(label)
    assert hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest() == GOLDEN[split]
  assert sizes['train'].sum() == 1437 and sizes['eval'].sum() == 360
  share = sizes['eval'] / (sizes['eval'] + sizes['train'])
  assert np.abs(share - 360 / 1797).max() < 1 / 174  # within one example of the smallest class


def test_held_out_counts_exactly():
  label = np.repeat([0, 1, 2], [7, 50, 3])
  for count in (0, 1, 10, 59, 60):
    assert held_out(label, count).sum() == count
