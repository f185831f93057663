"""Scans: orders in which the positions of a grid are read."""

from typing import Literal

import numpy as np
from jaxtyping import Int

Scan = Literal['raster', 'snake', 'hilbert', 'column']
SCANS = ('raster', 'snake', 'hilbert', 'column')


def path(grid: tuple[int, ...], scan: Scan) -> Int[np.ndarray, 'n']:
  """The positions of a grid in the order of a scan; grids of three axes plane by plane.

  'snake' reverses every other row, 'column' goes down before right, 'hilbert' is Hilbert's curve
  over the enclosing square of a power of two, without the cells outside the grid.

  Raises:
    ValueError: an unknown scan, or one of rows and columns for a grid without.
  """
  if scan not in SCANS:
    raise ValueError(f'{scan=} is not one of {", ".join(SCANS)}.')
  places = np.arange(np.prod(grid))
  if scan == 'raster':
    return places
  if len(grid) < 2:
    raise ValueError(f'A {scan!r} scan needs rows and columns, and {grid=} has none; give raster.')
  planes = places.reshape(-1, *grid[-2:])
  if scan == 'column':
    return planes.transpose(0, 2, 1).reshape(-1)
  if scan == 'snake':
    planes[:, 1::2] = planes[:, 1::2, ::-1].copy()
    return planes.reshape(-1)
  row, column = _hilbert(max(grid[-2:]))
  inside = (row < grid[-2]) & (column < grid[-1])
  return planes[:, row[inside], column[inside]].reshape(-1)


def _hilbert(side: int) -> tuple[np.ndarray, np.ndarray]:
  """Row and column of every step of Hilbert's curve, over the next power of two from `side`."""
  size = 1 << (side - 1).bit_length()
  rest = np.arange(size * size)
  x, y, scale = np.zeros_like(rest), np.zeros_like(rest), 1
  while scale < size:
    right = rest >> 1 & 1
    down = (rest ^ right) & 1
    turned, mirrored = down == 0, (down == 0) & (right == 1)
    x, y = np.where(mirrored, scale - 1 - x, x), np.where(mirrored, scale - 1 - y, y)
    x, y = np.where(turned, y, x) + scale * right, np.where(turned, x, y) + scale * down
    rest, scale = rest >> 2, scale * 2
  return y, x
