"""Rows that stand for all: shares of classes, whatever order the rows are in."""

import numpy as np
from hypothesis import example, given, settings, strategies as st

from smalti.evaluation.subset import subset


@settings(deadline=None)
@given(n=st.integers(1, 1000), stride=st.integers(1, 10), more=st.integers(-9, 9),
       classes=st.integers(2, 12))
@example(n=2000, stride=5, more=0, classes=10)  # CIFAR-10: every fifth is of two classes
def test_a_subset_has_the_shares_of_the_whole(n, stride, more, classes):
  length = max(1, n * stride + more)
  rows = subset(length, n)
  assert len(rows) == len(set(rows)) == min(n, length)
  np.testing.assert_array_equal(rows, subset(length, n))
  np.testing.assert_array_equal(subset(length, length), np.arange(length))
  for labels in (np.arange(length) * classes // length, np.arange(length) % classes):
    share = np.bincount(labels, minlength=classes) / length
    found = np.bincount(labels[rows], minlength=classes)
    # five deviations of a draw without return, and three for the tails of few rows
    deviation = np.sqrt(len(rows) * share * (1 - share) * (1 - len(rows) / length))
    assert (abs(found - len(rows) * share) <= 5 * deviation + 3).all()
