"""Standard streams that are closed, or that nobody reads any more.

A command whose output is its purpose ends quietly when nobody reads it, as
others do (`| head`). One that has something better to do goes on without.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO

# The code with which a shell reports who died of SIGPIPE.
BROKEN_PIPE_CODE = 141

_OUTPUTS = {1: 'standard output', 2: 'standard error'}


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
  goes nowhere.

  Args:
    name: the command's name; '': it ends with a `LostError` instead.
  """
  for fd, stream in ((1, 'stdout'), (2, 'stderr')):
    old = getattr(sys, stream)
    with contextlib.suppress(OSError):
      old.flush()
    setattr(sys, stream, _text(_Output(fd, name), old))


def silence(fd: int) -> None:
  """Sends what is written to a standard stream nowhere, from now on."""
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, fd)
  os.close(null)


class _Output(io.FileIO):
  """A standard stream that is lost with a `LostError`, or in silence."""

  def __init__(self, fd: int, name: str):
    """Stores the descriptor and the command's name, see `outlive`."""
    super().__init__(fd, 'w', closefd=False)
    self._command = name

  def write(self, data: Any) -> int:
    """Writes what fits, waiting if nothing does; see `io.RawIOBase.write`."""
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
