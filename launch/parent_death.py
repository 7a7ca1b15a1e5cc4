"""Processes that end with their parent, whatever ends it (Linux).

No JAX here: agents use this module and never create a JAX backend.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with(parent_pid: int, number: signal.Signals = signal.SIGKILL) -> None:
  """Lets the kernel signal this process when its parent dies, however."""
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
  if os.getppid() != parent_pid:  # it died before that
    os.kill(os.getpid(), number)


def adopt_orphans() -> None:
  """From now on children of a child that dies are children of this process."""
  ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap_orphans(pids: Iterable[int]) -> None:
  """Waits for the end of adopted processes; of others nothing is known."""
  for pid in pids:
    with contextlib.suppress(ChildProcessError):
      os.waitpid(pid, 0)
