"""A worker as its agent sees it: a process, its pipes, its last messages."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from moetion_jax import codec, disk
from moetion_jax.runtime import messages, spec as spec_lib
from moetion_jax.runtime.records import files as record_files

if TYPE_CHECKING:
  from moetion_jax.runtime.hosts import host_messages

_READ_BYTES = 1 << 16
_KEPT_LINES = 1000  # output lines kept until there is a log to write them to

_Spec = TypeVar('_Spec', spec_lib.Spec, 'host_messages.HostSpec')
_Sent = TypeVar('_Sent', messages.ToWorker, 'host_messages.ToHost')


class Transcript:
  """The output of a process: shown with its name, and kept in a log.

  Call `close` last.

  Attributes:
    name: name of the process, shown before each line.
  """

  def __init__(self, name: str):
    """Stores the name."""
    self.name = name
    self._log = None
    self._unlogged: list[bytes] = []

  def add(self, line: bytes) -> None:
    """Takes a line of output, without its line end."""
    # First: a disk may be too full for the log.
    print(f'[{self.name}] {line.decode(errors="replace")}', file=sys.stderr)
    if self._log:
      self._write(line)
    elif len(self._unlogged) < _KEPT_LINES:
      self._unlogged.append(line)

  def open_log(self, path: pathlib.Path) -> None:
    """Writes lines to a file as well from now on, and those kept so far.

    Its folder is made anew, should somebody have removed it.
    """
    path.parent.mkdir(exist_ok=True)
    record_files.unshare(path)
    self._log = open(path, 'a+b', buffering=0)
    if self._log.seek(0, os.SEEK_END):
      self._log.seek(-1, os.SEEK_END)
      if self._log.read() != b'\n':  # torn by a death, or a full disk
        self._write(b'')
    for line in self._unlogged:
      self._write(line)
    self._unlogged.clear()

  def _write(self, line: bytes) -> None:
    assert self._log is not None
    with disk.naming(self._log.name):
      self._log.write(line + b'\n')

  def close(self) -> None:
    """Closes the log. May be called twice."""
    if self._log:
      self._log.close()
      self._log = None


class ChildProcess(Generic[_Spec, _Sent]):
  """A child process and its pipes. `start` first; `kill`, `close` last.

  Nothing here waits, except `close`, and a thread for a child that does not
  read (one that is stopped, say): the owner polls `status_fd`, `output_fd`
  and `pid_fd`, and when one is readable calls `read_status`, `read_output` or
  `reap`.

  Attributes:
    exit_code: the process's exit code, negative for a signal; None while it
      runs.
    is_closed: whether nothing more can be heard of the process.
  """

  def __init__(self, module: str, kinds: Any, on_line: Callable[[bytes], None]):
    """Stores the arguments; nothing runs before `start`.

    Args:
      module: the module to run.
      kinds: the union of all messages that it may send.
      on_line: called with each line that it prints.
    """
    self.exit_code: int | None = None
    self.is_closed = False
    self.status_fd = self.output_fd = self.pid_fd = self._control_fd = -1
    self._module = module
    self._kinds = kinds
    self._on_line = on_line
    self._process: subprocess.Popen[bytes] | None = None
    self._sent: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # b'': no more
    self._sender = threading.Thread(target=self._send_all, daemon=True)
    self._status_lines = messages.Lines()
    self._output_lines = messages.Lines()

  def start(
    self,
    spec: _Spec,
    environment: Mapping[str, str],
    lock_fds: tuple[int, ...],
  ) -> None:
    """Starts the process.

    Args:
      spec: what it is told, without the pipes.
      environment: variables to set on top of those of this process.
      lock_fds: descriptors that it inherits, and with them the locks.

    Raises:
      OSError: it cannot be started; the filename says what.
    """
    with disk.naming(f'{sys.executable} -m {self._module}'):
      self._start(spec, environment, lock_fds)
    self._sender.start()

  def _start(
    self,
    spec: _Spec,
    environment: Mapping[str, str],
    lock_fds: tuple[int, ...],
  ) -> None:
    with contextlib.ExitStack() as theirs:  # closed here, whatever comes
      self.status_fd, their_status = os.pipe2(os.O_CLOEXEC)
      theirs.callback(os.close, their_status)
      their_control, self._control_fd = os.pipe2(os.O_CLOEXEC)
      theirs.callback(os.close, their_control)
      self.output_fd, their_output = os.pipe2(os.O_CLOEXEC)
      theirs.callback(os.close, their_output)
      self._process = subprocess.Popen(
        [sys.executable, '-m', self._module],
        stdin=subprocess.PIPE,
        stdout=their_output,
        stderr=their_output,
        pass_fds=(their_status, their_control, *lock_fds),
        env={**os.environ, **_import_path(), **environment},
        process_group=0,  # a Ctrl-C on the terminal is for the agent to handle
      )
    self.pid_fd = os.pidfd_open(self._process.pid)
    os.set_blocking(self.status_fd, False)
    os.set_blocking(self.output_fd, False)
    full = dataclasses.replace(
      spec, status_fd=their_status, control_fd=their_control
    )
    assert self._process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died: its pid_fd says so
      self._process.stdin.write(json.dumps(codec.encode(full)).encode())
      self._process.stdin.close()

  @property
  def pid(self) -> int:
    """Pid of the process; 0 before it was started."""
    return self._process.pid if self._process is not None else 0

  def send(self, message: _Sent) -> None:
    """Sends a message; a message to a dead process is lost."""
    self._sent.put(messages.pack(message))

  def _send_all(self) -> None:
    with contextlib.suppress(BrokenPipeError):
      while data := self._sent.get():
        messages.write(self._control_fd, data)

  def read_status(self) -> tuple[list[Any], bool]:
    """Returns the messages that have come, and whether no more can come."""
    data, ended = _read(self.status_fd)
    lines = self._status_lines.feed(data)
    return [messages.unpack(self._kinds, line) for line in lines], ended

  def read_output(self) -> bool:
    """Passes on what the process printed; returns True if no more can come."""
    data, ended = _read(self.output_fd)
    lines = self._output_lines.feed(data)
    if ended:
      lines += self._output_lines.flush()
    for line in lines:
      self._on_line(line)
    return ended

  def reap(self) -> None:
    """Collects the exit code of the process; call when it has ended."""
    assert self._process is not None
    self.exit_code = self._process.wait()

  def kill(self) -> None:
    """Ends the process at once (JAX swallows SIGTERM)."""
    if self._process is not None and self._process.poll() is None:
      self._process.kill()

  def resume(self) -> None:
    """Has the process go on if a signal has stopped it."""
    if self._process is not None and self._process.poll() is None:
      self._process.send_signal(signal.SIGCONT)

  def close(self) -> None:
    """Waits for the process to end, then closes its pipes. Idempotent.

    Raises:
      OSError: its last output cannot be passed on; all is closed then.
    """
    self.is_closed = True
    if self._process is not None:
      self.exit_code = self._process.wait()
    if self._sender.is_alive():  # it writes to nobody now
      self._sent.put(b'')
      self._sender.join()
    try:
      if self.output_fd >= 0:
        self.read_output()
    finally:
      for fd in (self.status_fd, self.output_fd, self.pid_fd, self._control_fd):
        if fd >= 0:
          os.close(fd)
      self.status_fd = self.output_fd = self.pid_fd = self._control_fd = -1

  def describe_exit(self) -> str:
    """Says how the process ended, for people."""
    if self.exit_code is not None and self.exit_code < 0:
      return f'was killed by {signal.Signals(-self.exit_code).name}'
    return f'exited with code {self.exit_code}'


class WorkerProcess(ChildProcess[spec_lib.Spec, messages.ToWorker]):
  """One worker process.

  Attributes:
    stage: the stage that it trains; `STANDBY` for none yet.
    replica: its replica of the stage.
    host: name of the host that it runs on.
    is_warm: whether it is a standby that is prepared.
    made_at: time at which this was made, `time.monotonic`.
  """

  def __init__(
    self,
    stage: int,
    host: str = '',
    on_line: Callable[[bytes], None] | None = None,
    replica: int = 0,
    is_alone: bool = True,
  ):
    """Stores the arguments; nothing runs before `start`.

    Args:
      stage: the stage that it trains.
      host: name of the host that it runs on.
      on_line: called with each line that it prints; None: its `Transcript`.
      replica: its replica of the stage.
      is_alone: whether the stage has one worker.
    """
    self.stage = stage
    self.replica = replica
    self.host = host
    self.is_warm = False
    self.made_at = time.monotonic()
    self._is_alone = is_alone
    self._transcript = Transcript(self.name)
    super().__init__(
      'moetion_jax.runtime.worker.main',
      messages.FromWorker,
      on_line or self._transcript.add,
    )

  def become(self, stage: int, replica: int) -> None:
    """Turns a standby into the worker of a stage."""
    self.stage, self.replica, self.is_warm = stage, replica, False
    self._transcript.name = self.name

  @property
  def is_standby(self) -> bool:
    """True if it has no stage yet."""
    return self.stage == spec_lib.STANDBY

  @property
  def name(self) -> str:
    """Name for people: 'stage 1', or with several 'stage 1 replica 0'."""
    if self.is_standby:
      return 'standby'
    of_replica = '' if self._is_alone else f' replica {self.replica}'
    return f'stage {self.stage}{of_replica}'

  def open_log(self, path: pathlib.Path) -> None:
    """Opens the log of its output; see `Transcript.open_log`."""
    self._transcript.open_log(path)

  def close(self) -> None:
    """Ends the process and its transcript; see `ChildProcess.close`."""
    try:
      super().close()
    finally:
      self._transcript.close()


def marked(variable: str, value: str) -> list[int]:
  """Returns the pids of processes started with this value of a variable."""
  wanted = f'{variable}={value}'.encode()
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/environ'):
    try:
      if wanted in path.read_bytes().split(b'\0'):
        found.append(int(path.parent.name))
    except OSError:
      continue
  return found


def _import_path() -> dict[str, str]:
  """Returns a PYTHONPATH with which a child imports this same package."""
  root = str(pathlib.Path(__file__).resolve().parents[3])
  paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
  return {'PYTHONPATH': os.pathsep.join(paths)}


def _read(fd: int) -> tuple[bytes, bool]:
  """Reads all that a pipe holds; True if its writers are gone."""
  pieces = []
  while True:
    try:
      piece = os.read(fd, _READ_BYTES)
    except BlockingIOError:
      return b''.join(pieces), False
    if not piece:
      return b''.join(pieces), True
    pieces.append(piece)
