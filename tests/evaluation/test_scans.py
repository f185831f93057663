"""Scans visit every position once, as drawn by hand."""

import numpy as np
import pytest

from smalti.evaluation import scans


def test_by_hand():
  assert scans.path((2, 3), 'raster').tolist() == [0, 1, 2, 3, 4, 5]
  assert scans.path((2, 3), 'snake').tolist() == [0, 1, 2, 5, 4, 3]
  assert scans.path((2, 3), 'column').tolist() == [0, 3, 1, 4, 2, 5]
  assert scans.path((2, 2), 'hilbert').tolist() == [0, 2, 3, 1]
  assert scans.path((2, 2, 2), 'column').tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize('scan', scans.SCANS)
@pytest.mark.parametrize('grid', [(1, 1), (8, 8), (7, 5), (3, 4, 6), (1, 9)])
def test_every_position_once(scan, grid):
  assert sorted(scans.path(grid, scan)) == list(range(np.prod(grid)))


@pytest.mark.parametrize('side', [2, 4, 16, 32])
def test_hilbert_and_snake_move_to_a_neighbour(side):
  for scan in ('hilbert', 'snake'):
    place = np.stack(np.divmod(scans.path((side, side), scan), side))
    assert (np.abs(np.diff(place)).sum(0) == 1).all()
  # Hilbert's curve fills every quadrant before the next, a raster none
  quarter = scans.path((side, side), 'hilbert').reshape(4, -1)
  rows, columns = np.divmod(quarter, side)
  assert (np.ptp(rows, 1) < side // 2).all() and (np.ptp(columns, 1) < side // 2).all()


def test_refusals():
  with pytest.raises(ValueError, match='raster, snake'):
    scans.path((4, 4), 'spiral')
  with pytest.raises(ValueError, match='rows and columns'):
    scans.path((16,), 'snake')
