"""TokenSpec: what crosses from a tokenizer to a generator, and its views.

Everything discrete is `tokens: int32[B, N, D]`, N positions row-major over `grid` and D codes per
position, coarse first. This module imports numpy only and works through array methods, so the same
functions run on numpy arrays and on jax tracers.
"""

import dataclasses
import functools
import json
import math
from typing import Any, Literal

import numpy as np

ORDERS = ('raster', 'nested', 'depth', 'scale', 'set')
VIEWS = ('flat', 'factors', 'bits')
Order = Literal['raster', 'nested', 'depth', 'scale', 'set']
View = Literal['flat', 'factors', 'bits'] | tuple[int, ...]  # a tuple: words of so many bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSpec:
  """The shape and alphabet of a token array; frozen, hashable, JSON-able.

  Args:
    grid: positions, row-major; `N = prod(grid)`.
    vocab: one alphabet size per code of a position, coarse first; `D = len(vocab)`.
    factors: mixed radix of every code, little-endian, `prod(factors)` equal to its alphabet; or ().
    eos: the last id, where a string of tokens ends (D == 1 only); all that follows repeats it.
    order: the axis a prefix runs along: 'nested' positions, 'depth' codes, 'scale' whole scales.
    budgets: prefix lengths along `order` that the decoder was trained for; () is full length only.
  """

  grid: tuple[int, ...]
  vocab: tuple[int, ...]
  factors: tuple[int, ...] = ()
  eos: int | None = None
  order: Order = 'raster'
  budgets: tuple[int, ...] = ()

  def __post_init__(self):
    for name in ('grid', 'vocab', 'factors', 'budgets'):
      object.__setattr__(self, name, tuple(int(v) for v in getattr(self, name)))
    if not self.grid or min(self.grid) < 1:
      raise ValueError(f'grid={self.grid} must name one or more positive sizes.')
    if not self.vocab or min(self.vocab) < 2 or max(self.vocab) > 2**31 - 1:
      raise ValueError(f'vocab={self.vocab} must hold alphabets of 2 to 2**31 - 1 codes.')
    if self.order not in ORDERS:
      raise ValueError(f'order={self.order!r} is not one of {", ".join(ORDERS)}.')
    if self.factors and any(math.prod(self.factors) != v for v in self.vocab):
      raise ValueError(
          f'factors={self.factors} multiply to {math.prod(self.factors)}, '
          f'which must equal every alphabet of vocab={self.vocab}.')
    if self.eos is not None and (self.depth != 1 or self.eos != self.vocab[0] - 1):
      raise ValueError(
          f'eos={self.eos} must be the last id of a single alphabet, got vocab={self.vocab}.')
    if self.budgets:
      top = self.steps
      if self.order in ('raster', 'set'):
        raise ValueError(f'budgets={self.budgets} need an order with prefixes, not {self.order!r}.')
      if list(self.budgets) != sorted(set(self.budgets)) or not (
          1 <= self.budgets[0] and self.budgets[-1] <= top):
        raise ValueError(f'budgets={self.budgets} must increase within 1..{top}.')

  @property
  def length(self) -> int:
    """N, the number of positions."""
    return math.prod(self.grid)

  @property
  def depth(self) -> int:
    """D, the codes per position."""
    return len(self.vocab)

  @property
  def steps(self) -> int:
    """The full length along `order`: what `keep` may reach."""
    return self.depth if self.order == 'depth' else self.length

  @property
  def bits(self) -> float:
    """log2 of the number of token arrays; an upper bound where EOS shortens them."""
    return self.length * sum(math.log2(v) for v in self.vocab)

  def coordinates(self) -> np.ndarray:
    """int32[N, len(grid)]: the grid coordinates of every position, row-major."""
    return np.stack(np.unravel_index(np.arange(self.length), self.grid), -1).astype(np.int32)

  def valid(self, tokens: Any) -> Any:
    """bool[B, N, D]: True up to and including the first EOS."""
    if self.eos is None:
      return tokens == tokens
    ended = (tokens == self.eos).astype(np.int32)
    return ended.cumsum(1) - ended == 0

  def mask(self, keep: Any) -> Any:
    """bool[B, N, D]: the codes that `keep: int32[B]` entries along `order` leave in place."""
    axis = {'nested': 1, 'scale': 1, 'depth': 2}.get(self.order)
    if axis is None:
      raise ValueError(f'order={self.order!r} has no prefixes; decode it without keep.')
    place = np.indices((1, self.length, self.depth))[axis]
    return place < keep[:, None, None]

  def canonical(self, tokens: Any, length: int | None = None) -> Any:
    """Repeats EOS after the first; also pads ragged host sequences to int32[B, N, D].

    Raises:
      ValueError: ragged input without an EOS, or a sequence longer than the grid.
    """
    if not hasattr(tokens, 'ndim'):
      if any(len(row) != self.length for row in tokens) and self.eos is None:
        raise ValueError(f'Ragged tokens need an eos; this spec has {self.length} fixed positions.')
      longest = max((len(row) for row in tokens), default=0)
      if longest > self.length:
        raise ValueError(f'A sequence of {longest} tokens is longer than the grid {self.grid}.')
      padded = np.full((len(tokens), self.length, self.depth), self.eos or 0, np.int32)
      for i, row in enumerate(tokens):
        padded[i, :len(row)] = np.asarray(row, np.int32).reshape(len(row), self.depth)
      tokens = padded
    if self.eos is None:
      return tokens
    valid = self.valid(tokens)
    return tokens * valid + self.eos * ~valid

  def support(self) -> np.ndarray:
    """bool[D, max(vocab)]: which columns of a head are codes."""
    return np.arange(max(self.vocab)) < np.array(self.vocab)[:, None]

  @functools.cache  # noqa: B019 - specs are few, frozen and small
  def view(self, name: View) -> 'TokenSpec':
    """The spec of the same tokens seen another way; prefixes belong to the original spec.

    'flat' lists all codes as positions, row-major (equal alphabets); 'factors' splits every code
    into its mixed-radix digits; 'bits' splits it into bits, least significant first; a tuple packs
    the bits of a position, in that order, into words of so many bits: (6, 12) of an alphabet of
    2^18, or (8, 8) of sixteen single bits.

    Raises:
      ValueError: the view does not exist, with the reason.
    """
    if not isinstance(name, tuple) and name not in VIEWS:
      raise ValueError(f'view={name!r} is not one of {", ".join(VIEWS)} or a tuple of bits.')
    if name == 'flat':
      if len(set(self.vocab)) > 1:
        raise ValueError(f'A flat view needs equal alphabets, got vocab={self.vocab}.')
      grid = self.grid if self.depth == 1 else (*self.grid, self.depth)
      return TokenSpec(grid=grid, vocab=self.vocab[:1], factors=self.factors, eos=self.eos)
    if self.eos is not None:
      raise ValueError(f'A {name} view cannot hold an EOS (eos={self.eos}).')
    if isinstance(name, tuple):
      bits = self.view('bits').depth
      if sum(name) != bits or min(name) < 1 or max(name) > 30:
        raise ValueError(f'view={name} must split the {bits} bits of a position into words of 1 to '
                         '30 bits.')
      return TokenSpec(grid=self.grid, vocab=tuple(2**size for size in name))
    if name == 'factors' and not self.factors:
      raise ValueError('A factors view needs a spec with factors, such as FSQ levels.')
    return TokenSpec(grid=self.grid, vocab=sum(self._radices(name), ()))

  def to(self, name: View, tokens: Any) -> Any:
    """Tokens of this spec to tokens of `view(name)`."""
    self.view(name)
    if name == 'flat':
      return tokens.reshape(tokens.shape[0], self.length * self.depth, 1)
    if isinstance(name, tuple):
      return self.view(name).back('bits', self.to('bits', tokens))
    radix, place, owner = self._digits(name)
    return tokens[:, :, owner] // place % radix

  def back(self, name: View, tokens: Any) -> Any:
    """Tokens of `view(name)` to tokens of this spec; the inverse of `to`."""
    self.view(name)
    if name == 'flat':
      return tokens.reshape(tokens.shape[0], self.length, self.depth)
    if isinstance(name, tuple):
      return self.back('bits', self.view(name).to('bits', tokens))
    radices = self._radices(name)
    _, place, _ = self._digits(name)
    ends = np.cumsum([len(r) for r in radices])
    digits = tokens * place
    codes = [digits[:, :, e - len(r):e].sum(2) for e, r in zip(ends, radices)]
    out = codes[0][:, :, None] * np.eye(self.depth, dtype=np.int32)[0]
    for i, code in enumerate(codes[1:], 1):
      out = out + code[:, :, None] * np.eye(self.depth, dtype=np.int32)[i]
    return out.astype(np.int32)

  def _radices(self, name: View) -> tuple[tuple[int, ...], ...]:
    if name == 'factors':
      return (self.factors,) * self.depth
    for size in self.vocab:
      if size & (size - 1):
        raise ValueError(f'A bits view needs powers of two, got vocab={self.vocab}.')
    return tuple((2,) * (size.bit_length() - 1) for size in self.vocab)

  def _digits(self, name: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    radices = self._radices(name)
    place = [math.prod(r[:i]) for r in radices for i in range(len(r))]
    owner = [d for d, r in enumerate(radices) for _ in r]
    return (np.array(sum(radices, ()), np.int32), np.array(place, np.int32), np.array(owner))

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), sort_keys=True)

  @classmethod
  def from_json(cls, text: str | dict) -> 'TokenSpec':
    """Reads `to_json`. Raises ValueError for unknown fields or values of another type."""
    fields: dict[str, Any] = json.loads(text) if isinstance(text, str) else dict(text)
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
      raise ValueError(f'Unknown fields of a TokenSpec: {", ".join(unknown)}.')
    lists = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
    return cls(**{**fields, **lists})
