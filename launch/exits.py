"""How a verb ends: exit codes, and the two endings that are not a user's mistake.

Codes are those of the command line: 75 is EX_TEMPFAIL of sysexits.h, which schedulers may requeue.
"""

FINISHED = 0
USER_ERROR = 2
NON_FINITE = 3
PREEMPTED = 75


class NonFinite(Exception):
  """A loss or gradient is not finite; the message names step and terms. Exit code 3."""


class Preempted(Exception):
  """Stopped by a signal, after saving; the same command resumes. Exit code 75."""
