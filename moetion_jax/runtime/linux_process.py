"""Processes that end with their parent, and signals to select on (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable, Iterator

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


STOP = (signal.SIGINT, signal.SIGTERM)


class SignalPipe:
  """A pipe that gets one byte for each signal.

  Attributes:
    fd: readable once a signal came; -1 outside `open`.
  """

  def __init__(self, numbers: tuple[signal.Signals, ...] = STOP):
    """Stores which signals; they do what they did until `open`."""
    self._numbers = numbers
    self.fd = -1

  @contextlib.contextmanager
  def open(self) -> Iterator[None]:
    """While it lasts the signals do nothing but fill the pipe."""
    self.fd, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {n: signal.signal(n, _ignore) for n in self._numbers}
    wakeup_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
      yield
    finally:
      signal.set_wakeup_fd(wakeup_fd)
      for number, handler in before.items():
        signal.signal(number, handler)
      os.close(self.fd)
      os.close(writer)
      self.fd = -1

  def take(self) -> int:
    """How many signals came since the last call; call when readable."""
    return len(os.read(self.fd, 64))


def _ignore(*unused: object) -> None:
  pass  # not SIG_IGN: that one would write nothing to the pipe
