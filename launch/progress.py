"""Progress: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from tqdm import tqdm


def say(text: str) -> None:
  """One line of plain text, from the first process only."""
  if jax.process_index() == 0:
    tqdm.write(text, file=sys.stderr)


class Progress:
  """Counts towards `total`; on a terminal as a bar, elsewhere as a line per `report`."""

  def __init__(self, total: int, unit: str, start: int = 0):
    terminal = sys.stderr.isatty() and jax.process_index() == 0
    self.bar = tqdm(total=total, initial=start, unit=unit, disable=not terminal, leave=False)
    self.total, self.unit, self.start = total, unit, start
    self.begin = time.perf_counter()

  def advance(self, count: int = 1) -> None:
    self.bar.update(count)

  def report(self, done: int, text: str) -> None:
    """Shows `text` beside the count; time left is guessed from the mean rate so far."""
    if not self.bar.disable:
      self.bar.set_postfix_str(text)
      return
    seconds = time.perf_counter() - self.begin
    left = seconds / max(done - self.start, 1) * (self.total - done)
    say(f'{self.unit} {done}/{self.total}  {text}  {left:.0f} s left')

  def close(self) -> None:
    self.bar.close()


def track(items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
  """Yields `items` under a progress bar; silent off a terminal."""
  progress = Progress(total, unit)
  try:
    for item in items:
      yield item
      progress.advance()
  finally:
    progress.close()
