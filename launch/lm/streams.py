"""Standard streams that are closed, or that nobody reads any more.

A command whose output is its purpose ends quietly when nobody reads it, as
others do (`| head`). One that has something better to do goes on without, and
does not wait for whoever reads slowly, or not for a while (Ctrl-S, `| less`).
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import io
import os
import select
import sys
import threading
from typing import Any, TextIO

# The code with which a shell reports who died of SIGPIPE.
BROKEN_PIPE_CODE = 141

_OUTPUTS = {1: 'standard output', 2: 'standard error'}
_PENDING_BYTES = 1 << 20  # of what is printed and not read yet
_HURRY_SECONDS = 5.0
_LEFT_OUT = b'\n[what was printed here while nobody read is left out]\n'


class LostError(OSError):
  """A standard stream can no longer be written; it is the error's filename.

  No `BrokenPipeError`: libraries end a process when they meet one (rich).
  """


def prepare() -> None:
  """Has errors of the standard streams be a `LostError`; opens those missing.

  In the place of each that is closed /dev/null is opened. Otherwise the next
  file that is opened takes its number, and what a library prints goes there.
  """
  for fd, name in enumerate(('stdin', 'stdout', 'stderr')):
    try:
      os.fstat(fd)
    except OSError:
      opened = os.open(os.devnull, os.O_RDWR)  # close-on-exec
      if opened != fd:
        os.dup2(opened, fd)
        os.close(opened)
      os.set_inheritable(fd, True)
    if getattr(sys, name) is None:
      setattr(sys, name, open(fd, 'w' if fd else 'r', closefd=False))
  outlive('')


def outlive(name: str) -> None:
  """Lets the process go on when its output can no longer be written.

  The first time, that is said on the other stream; from then on what is printed
  goes nowhere. Whoever prints never waits: that is left to threads, and to the
  end of the process.

  Args:
    name: the command's name; '': it waits, and ends with a `LostError` instead.
  """
  printer = _Printer() if name else None
  for fd, stream in ((1, 'stdout'), (2, 'stderr')):
    old = getattr(sys, stream)
    with contextlib.suppress(OSError):
      old.flush()
    if printer and fd == 2 and not os.path.sameopenfile(1, 2):
      printer = _Printer()  # else the order of what is printed is kept
    setattr(sys, stream, _text(_Output(fd, name, printer), old))


def silence(fd: int) -> None:
  """Sends what is written to a standard stream nowhere, from now on."""
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, fd)
  os.close(null)


def hurry() -> None:
  """Has the end of the process wait for readers some seconds at most.

  It was asked to end, and whoever asks does not wait for ever.
  """
  _Printer.patience = _HURRY_SECONDS


class _Printer:
  """A thread that writes what others print.

  Attributes:
    patience: the longest that the end of the process waits, in seconds; None:
      until all is read.
  """

  patience: float | None = None

  def __init__(self):
    """Starts the thread."""
    self._changed = threading.Condition()  # guards the fields below
    self._pending: collections.deque[tuple[_Output, bytes]] = (
      collections.deque()
    )
    self._pending_bytes = 0
    self._leaves_out = False
    threading.Thread(target=self._write_all, name='print', daemon=True).start()
    atexit.register(self._drain)

  def put(self, output: _Output, data: bytes) -> None:
    """Has data written, unless too much of it waits for that already."""
    with self._changed:
      if self._pending_bytes + len(data) <= _PENDING_BYTES:
        self._leaves_out = False
      elif self._leaves_out:
        return
      else:
        self._leaves_out, data = True, _LEFT_OUT
      self._pending.append((output, data))
      self._pending_bytes += len(data)
      self._changed.notify_all()

  def _write_all(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._pending)
        output, data = self._pending[0]
      output.write_now(data)
      with self._changed:
        self._pending.popleft()
        self._pending_bytes -= len(data)
        self._changed.notify_all()

  def _drain(self) -> None:
    """Waits until all is written: the process has nothing else to do.

    Not if a signal asks it to end, which leaves the exit code as it is.
    """
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
      sys.stdout.flush()
      sys.stderr.flush()
      with self._changed:
        self._changed.wait_for(lambda: not self._pending, _Printer.patience)


class _Output(io.FileIO):
  """A standard stream that is lost with a `LostError`, or in silence."""

  def __init__(self, fd: int, name: str, printer: _Printer | None):
    """Stores the arguments.

    Args:
      fd: the descriptor.
      name: the command's name, see `outlive`.
      printer: who writes; None: whoever prints.
    """
    super().__init__(fd, 'w', closefd=False)
    self._command = name
    self._printer = printer

  def write(self, data: Any) -> int:
    """Writes, or has it done; see `io.RawIOBase.write`."""
    if self._printer is None:
      return self._write(data)
    self._printer.put(self, bytes(data))
    return memoryview(data).nbytes

  def write_now(self, data: bytes) -> None:
    """Writes all of it, waiting until it is read."""
    while data:
      data = data[self._write(data) :]

  def _write(self, data: Any) -> int:
    """Writes what fits, waiting if nothing does."""
    try:
      while (written := super().write(data)) is None:  # somebody made it so
        select.select([], [self], [])
      return written
    except OSError as error:
      fd = self.fileno()
      silence(fd)  # what is buffered still would meet the same error
      if not self._command:
        raise LostError(error.errno, error.strerror, _OUTPUTS[fd]) from error
      self._tell(error)
      return memoryview(data).nbytes

  def _tell(self, error: OSError) -> None:
    """Says on the other stream that this one is silent."""
    fd = self.fileno()
    (other,) = _OUTPUTS.keys() - {fd}
    text = (
      f'{self._command}: {_OUTPUTS[fd]} can no longer be written '
      f'({error.strerror}); the run goes on, and is not shown there any more. '
      'Its --workdir has metrics.jsonl, events.jsonl and logs/.\n'
    )
    with contextlib.suppress(OSError):
      os.write(other, text.encode())


def _text(raw: io.FileIO, like: TextIO) -> io.TextIOWrapper:
  """Returns a text stream like another one, which takes any text."""
  return io.TextIOWrapper(
    io.BufferedWriter(raw),
    encoding=like.encoding,
    errors='backslashreplace' if like.errors == 'strict' else like.errors,
    line_buffering=getattr(like, 'line_buffering', True),
    write_through=getattr(like, 'write_through', False),
  )
