"""Random bits as a hash of names, for numpy code that must not depend on who calls it when."""

import numpy as np


def noise(*words: int | np.ndarray) -> np.ndarray:
  """uint64 of independent random bits for every combination of `words`, which broadcast.

  SplitMix64 (Steele, Lea and Flood 2014) chained over the words: the same numbers on every
  platform and NumPy version, in any order and batch. Distinct last words never collide.
  """
  state = np.asarray(0, np.uint64)
  for word in words:
    state = _mix(state ^ np.asarray(word).astype(np.uint64))
  return state


def _mix(z: np.ndarray) -> np.ndarray:
  with np.errstate(over='ignore'):  # arithmetic modulo 2**64 is meant
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
