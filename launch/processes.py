"""A worker as its agent sees it: a process, its pipes, what it said last."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping

from launch import protocol
from moetion_jax import base

_READ_BYTES = 1 << 16
_KEPT_LINES = 1000  # of output, until there is a log to write them to


class WorkerError(base.MoetionError):
  """A worker ended, or cannot go on."""

  def __init__(self, stage: int, iteration: int, what: str):
    super().__init__(f'stage {stage}, iteration {iteration}: {what}')
    self.stage = stage
    self.iteration = iteration


class WorkerProcess:
  """One worker process. `start` first; `kill`, then `close` last.

  Nothing here waits, except `close`: the agent polls `status_fd`, `output_fd`
  and `pid_fd`, and calls what is named after the one that is readable.

  Attributes:
    stage: that it trains.
    generation: of the worker.
    state: what it does, for people and `workers.json`.
    detail: more about that; '' for nothing.
    iteration: that it works on.
    exit_code: negative for a signal; None while it runs.
  """

  def __init__(self, stage: int, generation: int = 1):
    """Stores who it is; nothing runs before `start`."""
    self.stage = stage
    self.generation = generation
    self.state, self.detail, self.iteration = 'starting', '', 0
    self.exit_code: int | None = None
    self.status_fd = self.output_fd = self.pid_fd = self._control_fd = -1
    self._process: subprocess.Popen[bytes] | None = None
    self._status_lines = protocol.Lines()
    self._output_lines = protocol.Lines()
    self._log = None
    self._unlogged: list[bytes] = []

  def start(
    self,
    spec: Mapping[str, object],
    environment: Mapping[str, str],
    lock_fds: tuple[int, ...],
  ) -> None:
    """Starts the process.

    Args:
      spec: JSON of a `protocol.Spec` but for the pipes.
      environment: of the process.
      lock_fds: that it inherits, and with them the locks.
    """
    self.status_fd, their_status = os.pipe2(os.O_CLOEXEC)
    their_control, self._control_fd = os.pipe2(os.O_CLOEXEC)
    self.output_fd, their_output = os.pipe2(os.O_CLOEXEC)
    try:
      self._process = subprocess.Popen(
        [sys.executable, '-m', 'launch.worker_main'],
        stdin=subprocess.PIPE,
        stdout=their_output,
        stderr=their_output,
        pass_fds=(their_status, their_control, *lock_fds),
        env=environment,
        process_group=0,  # a Ctrl-C on the terminal is the agent's to handle
      )
    finally:
      for fd in (their_status, their_control, their_output):
        os.close(fd)
    self.pid_fd = os.pidfd_open(self._process.pid)
    os.set_blocking(self.status_fd, False)
    os.set_blocking(self.output_fd, False)
    full = {**spec, 'status_fd': their_status, 'control_fd': their_control}
    assert self._process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died: its pid_fd says so
      self._process.stdin.write(json.dumps(full).encode())
      self._process.stdin.close()

  @property
  def pid(self) -> int:
    """Of the process."""
    assert self._process is not None
    return self._process.pid

  def send(self, kind: str, **fields: object) -> None:
    """Sends a message; one that a dead worker does not get is lost."""
    with contextlib.suppress(BrokenPipeError):
      os.write(self._control_fd, protocol.encode(kind, **fields))

  def read_status(self) -> tuple[list[protocol.Message], bool]:
    """The messages that have come, and whether no more can."""
    data, ended = _read(self.status_fd)
    lines = self._status_lines.feed(data)
    return [json.loads(line) for line in lines], ended

  def read_output(self) -> bool:
    """Passes on what the process printed; whether no more can come."""
    data, ended = _read(self.output_fd)
    lines = self._output_lines.feed(data)
    if ended:
      lines += self._output_lines.flush()
    for line in lines:
      if self._log:
        self._log.write(line + b'\n')
      elif len(self._unlogged) < _KEPT_LINES:
        self._unlogged.append(line)
      text = line.decode(errors='replace')
      print(f'[stage {self.stage}] {text}', file=sys.stderr)
    return ended

  def open_log(self, path: pathlib.Path) -> None:
    """From now on output goes to a file as well; what has come, too."""
    self._log = open(path, 'ab', buffering=0)
    for line in self._unlogged:
      self._log.write(line + b'\n')
    self._unlogged.clear()

  def reap(self) -> None:
    """Collects the exit code of a process that ended."""
    assert self._process is not None
    self.exit_code = self._process.wait()

  def kill(self) -> None:
    """Ends the process at once (JAX swallows SIGTERM)."""
    if self._process is not None and self._process.poll() is None:
      self._process.kill()

  def close(self) -> None:
    """Waits for the end of the process, then closes what belongs to it."""
    if self._process is not None:
      self.exit_code = self._process.wait()
    if self.output_fd >= 0:
      self.read_output()
    for fd in (self.status_fd, self.output_fd, self.pid_fd, self._control_fd):
      if fd >= 0:
        os.close(fd)
    self.status_fd = self.output_fd = self.pid_fd = self._control_fd = -1
    if self._log:
      self._log.close()

  def describe_exit(self) -> str:
    """How it ended, for people."""
    if self.exit_code is not None and self.exit_code < 0:
      return f'was killed by {signal.Signals(-self.exit_code).name}'
    return f'exited with code {self.exit_code}'


def _read(fd: int) -> tuple[bytes, bool]:
  """All that a non-blocking pipe holds, and whether its writers are gone."""
  pieces = []
  while True:
    try:
      piece = os.read(fd, _READ_BYTES)
    except BlockingIOError:
      return b''.join(pieces), False
    if not piece:
      return b''.join(pieces), True
    pieces.append(piece)
