"""Processes that die with their parent, and signals: sent, selected on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from moetion_jax.recovery import hang_detection

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_NANOSECONDS = 1e9


def die_with(parent_pid: int, number: signal.Signals = signal.SIGKILL) -> None:
  """Has the kernel signal this process when its parent dies, in any way."""
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
  if os.getppid() != parent_pid:  # the parent died before the call
    os.kill(os.getpid(), number)


def adopt_orphans() -> None:
  """Makes this process the parent of its dead children's children."""
  ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap_orphans(pids: Iterable[int]) -> None:
  """Waits for adopted processes to end; skips pids that are no children."""
  for pid in pids:
    with contextlib.suppress(ChildProcessError):
      os.waitpid(pid, 0)


STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalPipe:
  """A pipe that gets one byte for each signal.

  Attributes:
    fd: the read end, readable once a signal came; -1 outside `open`.
  """

  def __init__(self, numbers: tuple[signal.Signals, ...] = STOP):
    """Stores the signals; their handlers stay as they are until `open`."""
    self._numbers = numbers
    self._hung_up = False
    self.fd = -1

  @contextlib.contextmanager
  def open(self) -> Iterator[None]:
    """Has the signals do nothing but fill the pipe while the context lasts.

    A hangup that is ignored stays so: `nohup` asks for that.
    """
    self.fd, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    is_kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before = {
      n: signal.signal(n, _ignore)
      for n in self._numbers
      if n != signal.SIGHUP or not is_kept
    }
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
    """Returns how many signals came since the last call; call when readable.

    Hangups count once: a terminal that goes sends one, and its shell another.
    """
    numbers = os.read(self.fd, 64)
    hangups = numbers.count(signal.SIGHUP)
    counted = len(numbers) - hangups + (hangups > 0 and not self._hung_up)
    self._hung_up = self._hung_up or hangups > 0
    return counted


def _ignore(*unused: object) -> None:
  pass  # not SIG_IGN: it would write nothing to the pipe


def exit_when_stopped(
  code: int, on_stop: Callable[[], None] = lambda: None
) -> None:
  """Has signals that ask for an end raise SystemExit, where no pipe takes them.

  Who is told to end while it begins, or has only words left, ends as one that
  is told while it works. A hangup that is ignored stays so.

  Args:
    code: the exit code.
    on_stop: called before.
  """

  def leave(*unused: object) -> NoReturn:
    on_stop()
    sys.exit(code)

  for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_DFL:
      signal.signal(number, leave)


def send_signal(pid: int, number: signal.Signals) -> bool:
  """Sends a signal to a process; returns False if there is none any more."""
  try:
    os.kill(pid, number)
  except ProcessLookupError:
    return False
  return True


def is_stopped(pid: int) -> bool:
  """Returns True if the kernel has a process of this host stopped."""
  try:
    return _state(f'/proc/{pid}') == 'T'
  except OSError:
    return False


def usage(pid: int) -> hang_detection.Usage | None:
  """Reads what the threads of a process of this host use; None if it is gone.

  None as well where the kernel does not count how long threads wait.
  """
  worked, queued, states = 0, 0, set[str]()
  try:
    for thread in os.listdir(folder := f'/proc/{pid}/task'):
      with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        states.add(_state(f'{folder}/{thread}'))
        with open(f'{folder}/{thread}/schedstat') as file:
          times = file.read().split()
        worked, queued = worked + int(times[0]), queued + int(times[1])
  except OSError:
    return None
  if not worked:
    return None
  return hang_detection.Usage(
    worked_seconds=worked / _NANOSECONDS,
    queued_seconds=queued / _NANOSECONDS,
    is_held=not states.isdisjoint('RD'),
  )


def _state(folder: str) -> str:
  """Returns the letter for the state of a process or thread in /proc."""
  with open(f'{folder}/stat', 'rb') as file:
    stat = file.read()
  # Its name, in parentheses, may hold anything.
  return stat.rpartition(b')')[2].split()[0].decode()
