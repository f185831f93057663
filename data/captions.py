"""Captions from a grammar over a 2 x 2 canvas of handwritten digits: text that is true of an image.

Four digits of another source stand in the quadrants of one image. A caption says some of what holds
of them: which digit is where, how many there are of one, what they add up to, whether that is even,
which half has more ink. All of it is computed from the digits and the pixels, so that a caption is
true by construction, and what it claims comes beside it as numbers, to be read back from images.

Combinations of four digits (multisets: 715) are split: no arrangement of a held-out combination is
in the training split. Example i of a split is a function of i alone.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from smalti.data.digits import DigitsConfig
from smalti.data.noise import noise
from smalti.data.source import DataConfig, Source, Split
from smalti.data.utf8 import to_bytes

HELD_OUT = 8  # every so many combinations
CANVAS, IMAGE, SAID = 1, 2, 3  # purposes of noise
SPLIT = 4

CORNERS = 'top left', 'top right', 'bottom left', 'bottom right'
NUMBERS = 'no', 'one', 'two', 'three', 'four'
HALVES = 'left', 'right'
# Columns of `claims`: the digit of each corner, a digit and how many there are of it, the sum, its
# remainder by 2, and the half with more ink (0 left); -1 where a caption does not say.
COLUMNS = (*CORNERS, 'digit', 'count', 'sum', 'parity', 'brighter')
LONGEST = 56  # bytes; the longest caption of `choose` has 55


@dataclasses.dataclass(kw_only=True, slots=True)
class CaptionsConfig(DataConfig):
  """`image` uint8[2h, 2w, 1], `text` uint8[T], `text_mask`, `factors` int32[5], `claims` int32[9].

  Attributes:
    digits: the source of single digits, with labels 0..9; held-out ones are on held-out canvases.
    length: bytes T of a caption.
    train, eval: how many examples there are; the canvases of a split are drawn from far more.
  """
  digits: DataConfig = dataclasses.field(default_factory=DigitsConfig)
  length: int = LONGEST
  train: int = 50_000
  eval: int = 1_000

  def open(self, split: Split) -> 'CaptionsSource':
    if self.length < LONGEST:
      raise ValueError(f'length={self.length} would cut captions, which then need not be true; '
                       f'{LONGEST} is enough.')
    return CaptionsSource(self.digits.open(split), split, self.length,
                          self.train if split == 'train' else self.eval)


class CaptionsSource:
  """Canvases and their captions. `factors`: the four digits, row-major, and the half with more ink
  (-1 where both have the same)."""

  classes: tuple[str, ...] = ()

  def __init__(self, digits: Source, split: Split, length: int, count: int):
    rows = digits.read(np.arange(len(digits)))
    self.images, self.label = rows['image'], rows['label']
    self.split, self.length, self.count = split, length, count
    self.arrangements = arrangements(split)
    self.members = [np.flatnonzero(self.label == digit) for digit in range(10)]
    if empty := [digit for digit, rows in enumerate(self.members) if not len(rows)]:
      raise ValueError(f'The source of digits has none of {empty}; name one with labels 0..9.')

  def __len__(self) -> int:
    return self.count

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    index, part = np.asarray(indices), int(self.split == 'eval')
    digits = self.arrangements[noise(CANVAS, part, index) % len(self.arrangements)]
    bits = noise(IMAGE, part, index[:, None], np.arange(4))
    cells = np.array([[self.members[d][b % len(self.members[d])] for d, b in zip(*row)]
                      for row in zip(digits, bits)]).reshape(-1, 4)
    image = compose(self.images[cells])
    half = brighter(image)
    claims = choose(digits, half, noise(SAID, part, index))
    text, mask = to_bytes([caption(row) for row in claims], self.length)
    return {'image': image, 'text': text, 'text_mask': mask, 'claims': claims,
            'factors': np.concatenate([digits, half[:, None]], 1).astype(np.int32)}


def arrangements(split: Split) -> Int[np.ndarray, 'a 4']:
  """All arrangements of the combinations of a split: int64[., 4], digits row-major."""
  every = np.array(list(itertools.product(range(10), repeat=4)))
  place = np.array([1000, 100, 10, 1])
  held = noise(SPLIT, np.sort(every, 1) @ place) % HELD_OUT == 0
  return every[held == (split == 'eval')]


def compose(cells: UInt8[np.ndarray, 'b 4 h w c']) -> UInt8[np.ndarray, 'b H W c']:
  """Four images, row-major, as one."""
  rows = [np.concatenate([cells[:, i], cells[:, i + 1]], 2) for i in (0, 2)]
  return np.concatenate(rows, 1)


def brighter(image: UInt8[np.ndarray, 'b H W c']) -> Int[np.ndarray, 'b']:
  """0 where the left half has more ink, 1 where the right has, -1 where they have the same."""
  middle = image.shape[2] // 2
  left, right = (x.astype(np.int64).sum((1, 2, 3))
                 for x in (image[:, :, :middle], image[:, :, middle:]))
  return np.where(left == right, -1, (right > left).astype(np.int32))


def choose(digits: Int[np.ndarray, 'b 4'], half: Int[np.ndarray, 'b'],
           bits: np.ndarray) -> Int[np.ndarray, 'b 9']:
  """`claims` int32[B, 9] of canvases: which of what holds is said, by random bits."""
  def coin(shift, sides):
    return (bits >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64) % sides

  total = digits.sum(1)
  place = coin(0, 8)  # half of the captions say all four digits, most others one or two
  order = np.argsort(noise(SAID, bits[:, None], np.arange(4)), 1)
  rank = np.argsort(order, 1)
  said = rank < np.select([place < 4, place < 6, place < 7], [4, 1, 2], 0)[:, None]
  # mostly a digit that is there
  asked = np.where(coin(8, 8) > 0, digits[np.arange(len(digits)), coin(16, 4)], coin(24, 10))
  other = coin(40, 8)
  # 5 and more say no more; without corners 7 asks for a count instead
  other = np.where((other == 7) & ~said.any(1), 2, other)
  count = (digits == asked[:, None]).sum(1)
  ink = (coin(48, 4) == 0) & (half >= 0)
  columns = [*np.where(said, digits, -1).T, np.where(other < 3, asked, -1),
             np.where(other < 3, count, -1), np.where(other == 3, total, -1),
             np.where(other == 4, total % 2, -1), np.where(ink, half, -1)]
  claims = np.stack(columns, 1).astype(np.int32)
  silent = (claims < 0).all(1)
  claims[silent, 7] = (total % 2)[silent]
  return claims


def caption(claims: Sequence[int] | np.ndarray) -> str:
  """The sentence that says what `claims` do."""
  corners, (digit, count, total, parity, half) = list(claims[:4]), claims[4:]
  clauses = []
  if min(corners) >= 0:
    clauses.append('{} {} above {} {}'.format(*corners))
  else:
    clauses += [f'{d} {where}' for d, where in zip(corners, CORNERS) if d >= 0]
  if digit >= 0:
    clauses.append(f'{NUMBERS[count]} {digit}{"" if count == 1 else "s"}')
  if total >= 0:
    clauses.append(f'sum {total}')
  if parity >= 0:
    clauses.append(f'{("even", "odd")[parity]} sum')
  if half >= 0:
    clauses.append(f'brighter {HALVES[half]}')
  return ', '.join(clauses)


def parse(text: str) -> Int[np.ndarray, '9']:
  """The claims of a caption, the inverse of `caption`.

  Raises:
    ValueError: a clause that is not of the grammar.
  """
  claims = np.full(len(COLUMNS), -1, np.int32)
  for clause in text.split(', '):
    if found := re.fullmatch(r'(\d) (\d) above (\d) (\d)', clause):
      claims[:4] = [int(d) for d in found.groups()]
    elif found := re.fullmatch(rf'(\d) ({"|".join(CORNERS)})', clause):
      claims[CORNERS.index(found[2])] = int(found[1])
    elif found := re.fullmatch(rf'({"|".join(NUMBERS)}) (\d)(s?)', clause):
      claims[4:6] = int(found[2]), NUMBERS.index(found[1])
    elif found := re.fullmatch(r'sum (\d+)', clause):
      claims[6] = int(found[1])
    elif found := re.fullmatch(r'(even|odd) sum', clause):
      claims[7] = int(found[1] == 'odd')
    elif found := re.fullmatch(rf'brighter ({"|".join(HALVES)})', clause):
      claims[8] = HALVES.index(found[1])
    else:
      raise ValueError(f'{clause!r} is no clause of a caption such as {EXAMPLE!r}.')
  return claims


EXAMPLE = '3 7 above 0 3, two 3s, brighter left'
