"""Exit codes: 0 finished, 2 user error, 3 non-finite, 75 preempted and saved."""

FINISHED, USER_ERROR, NON_FINITE, PREEMPTED = 0, 2, 3, 75


class NonFinite(ArithmeticError):
  """A loss, gradient or statistic was not finite; no update was made."""


class Preempted(Exception):
  """A signal stopped the run, and everything is saved."""
