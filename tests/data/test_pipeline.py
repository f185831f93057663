"""Laws of the stream of batches: permutations, processes, restarts, augmentation, the tail."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from smalti.data import augment, pipeline
from smalti.data.arrays import ArraysSource
from smalti.data.augment import AugmentConfig
from smalti.data.noise import noise

fast = settings(max_examples=25, deadline=None)


def numbers(length: int) -> ArraysSource:
  image = np.random.default_rng(0).integers(0, 256, (length, 6, 5, 3), np.uint8)
  return ArraysSource({'image': image, 'label': np.arange(length, dtype=np.int32)})


def take(source, count, **options):
  return list(itertools.islice(pipeline.batches(source, **options), count))


@fast
@given(length=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 3))
def test_every_epoch_is_a_permutation(length, seed, epoch):
  assert sorted(pipeline.permutation(length, seed, epoch)) == list(range(length))


def test_epochs_and_seeds_have_their_own_orders():
  orders = {tuple(pipeline.permutation(500, seed, epoch))
            for seed in range(4) for epoch in range(4)}
  assert len(orders) == 16


def test_every_example_comes_to_every_place():
  # 4,000 epochs of 5: each of the 25 counts is binomial with p = 1/5.
  orders = np.array([pipeline.permutation(5, 0, epoch) for epoch in range(4000)])
  counts = np.stack([np.bincount(orders[:, place], minlength=5) for place in range(5)])
  assert np.abs(counts / 4000 - 0.2).max() < 4.5 * (0.2 * 0.8 / 4000)**0.5
  assert len(np.unique(orders, axis=0)) == 120


def test_the_order_never_changes():
  assert pipeline.permutation(8, 1, 2).tolist() == [1, 6, 0, 4, 2, 7, 5, 3]


@fast
@given(length=st.integers(1, 40), size=st.sampled_from([4, 8, 12]), seed=st.integers(0, 99))
def test_three_epochs_have_no_duplicate_and_no_omission(length, size, seed):
  count = -(-3 * length // size)
  index = np.concatenate([b['index'] for b in take(
      numbers(length), count, batch_size=size, seed=seed)])[:3 * length]
  assert (np.bincount(index, minlength=length) == 3).all()


@fast
@given(length=st.integers(1, 40), processes=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 99),
       start=st.integers(0, 12), train=st.booleans())
def test_processes_read_contiguous_rows_of_one_stream(length, processes, seed, start, train):
  options = dict(batch_size=16, seed=seed, train=train, start=start,
                 augment=AugmentConfig(flip=True, crop=2))
  whole = take(numbers(length), 3, **options)
  parts = [take(numbers(length), 3, process=p, processes=processes, **options)
           for p in range(processes)]
  assert all(len(part) == len(whole) for part in parts)
  for i, batch in enumerate(whole):
    for name, value in batch.items():
      np.testing.assert_array_equal(value, np.concatenate([part[i][name] for part in parts]))


@fast
@given(start=st.integers(0, 9), seed=st.integers(0, 99), threads=st.sampled_from([0, 2]))
def test_a_restart_anywhere_is_the_uninterrupted_stream(start, seed, threads):
  options = dict(batch_size=8, seed=seed, augment=AugmentConfig(flip=True, crop=1))
  whole = take(numbers(19), start + 3, **options)[start:]
  again = take(numbers(19), 3, start=start, threads=threads, **options)
  for one, two in zip(whole, again, strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], two[name])


def test_batches_carry_what_the_source_holds():
  source = numbers(10)
  batch = take(source, 1, batch_size=4, seed=0)[0]
  np.testing.assert_array_equal(batch['label'], batch['index'])
  np.testing.assert_array_equal(batch['image'], source.arrays['image'][batch['index']])
  assert set(batch) == {'image', 'label', 'index'} and batch['index'].dtype == np.int32


@fast
@given(length=st.integers(1, 40), size=st.integers(1, 16))
def test_evaluation_is_one_pass_in_order_with_a_marked_tail(length, size):
  found = take(numbers(length), None, batch_size=size, seed=0, train=False)
  index, valid = (np.concatenate([b[k] for b in found]) for k in ('index', 'valid'))
  assert index[valid].tolist() == list(range(length))
  assert valid.tolist() == [True] * length + [False] * (-length % size)
  assert all(len(b['index']) == size for b in found)


def test_half_of_the_images_are_flipped_and_every_shift_occurs():
  ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, None, :, None], (4000, 8, 8, 1))
  flipped = augment.apply(AugmentConfig(flip=True), ramp, seed=1, positions=np.arange(4000))
  share = (flipped[:, 0, 0, 0] == 7).mean()
  assert abs(share - 0.5) < 4 * 0.5 / 4000**0.5
  moved = augment.apply(AugmentConfig(crop=2), ramp, seed=1, positions=np.arange(4000))
  counts = np.bincount(moved[:, 0, 4, 0], minlength=8)
  assert (np.flatnonzero(counts) == [2, 3, 4, 5, 6]).all()
  assert np.abs(counts[2:7] / 4000 - 0.2).max() < 4 * (0.2 * 0.8 / 4000)**0.5


def test_an_image_is_treated_anew_every_time_it_comes():
  source = ArraysSource({'image': np.arange(8, dtype=np.uint8).reshape(1, 2, 4, 1)})
  found = take(source, 20, batch_size=8, seed=0, augment=AugmentConfig(flip=True))
  patterns = {tuple(batch['image'][:, 0, 0, 0]) for batch in found}
  assert len(patterns) > 15


def test_noise_has_a_fixed_value_and_separates_its_arguments():
  # SplitMix64 from seed 0: the first output of the published generator.
  assert int(noise(0)) == 0xE220A8397B1DCDAF
  words = np.concatenate([noise(s, p, np.arange(1000)) for s in range(3) for p in range(3)])
  assert len(np.unique(words)) == 9000


def test_refusals_name_value_and_rule():
  for options, message in (
      (dict(batch_size=6, processes=4), 'batch_size=6 must be a positive multiple of processes=4'),
      (dict(batch_size=4, process=2, processes=2), 'process=2 must be within'),
  ):
    with pytest.raises(ValueError, match=message):
      pipeline.batches(numbers(4), seed=0, **options)
  with pytest.raises(ValueError, match='empty'):
    pipeline.batches(ArraysSource({'label': np.zeros(0)}), batch_size=1, seed=0)
  with pytest.raises(ValueError, match='one length'):
    ArraysSource({'image': np.zeros(3), 'label': np.zeros(2)})
  with pytest.raises(ValueError, match=r'augment.crop=6 must be within 0..4'):
    augment.apply(AugmentConfig(crop=6), numbers(1).arrays['image'], seed=0, positions=np.arange(1))
