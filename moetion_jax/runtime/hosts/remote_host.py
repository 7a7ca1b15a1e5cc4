"""A further host and its workers, as the leader sees them."""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from moetion_jax import errors, keys
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.recovery import notices
from moetion_jax.runtime import (
  linux_process,
  messages as messages_lib,
  spec as spec_lib,
)
from moetion_jax.runtime.hosts import child_process, host_messages

# How long a host's agent may take to end its workers or itself when told to.
_GRACE_SECONDS = 5.0


class HostError(errors.MoetionError):
  """A host's agent ended, or cannot go on."""


class HostDiedError(HostError):
  """A host's agent was killed; a run that starts again has another one."""

  is_passing = True


class RemoteWorker(child_process.WorkerProcess):
  """A worker that another host's agent started, and speaks for.

  It has no descriptors to poll: `RemoteHost.read` says when there is news.

  Attributes:
    ended: whether the process has ended and all its messages are here.
  """

  def __init__(self, agent: RemoteHost, stage: int):
    """Stores the arguments; nothing runs before `start`."""
    super().__init__(stage, agent.name)
    self.ended = False
    self._agent = agent
    self._pid = 0
    self._messages: list[messages_lib.FromWorker] = []
    self._ended_with: int | None = None

  def start(
    self,
    spec: spec_lib.Spec,
    environment: Mapping[str, str],
    lock_fds: tuple[int, ...],
  ) -> None:
    """Has the other agent start the process, with that agent's locks."""
    del lock_fds
    self._agent.start_worker(
      self, host_messages.Start(spec=spec, environment=environment)
    )

  @property
  def pid(self) -> int:
    """Pid of the process; 0 while it is not known."""
    return self._pid

  def take(self, message: host_messages.FromHost) -> None:
    """Takes in a message of the host's agent about this worker."""
    match message:
      case host_messages.Started():
        self._pid = message.pid
      case host_messages.Said():
        self._messages.append(message.message)
      case host_messages.Printed():
        self._transcript.add(message.line.encode())
      case host_messages.Exited():
        self.ended, self._ended_with = True, message.exit_code

  def send(self, message: messages_lib.ToWorker) -> None:
    """Sends a message through the other agent; see `ChildProcess.send`."""
    self._agent.send(host_messages.Tell(stage=self.stage, message=message))

  def read_status(self) -> tuple[list[Any], bool]:
    """Returns the messages that have come; see `ChildProcess.read_status`."""
    messages, self._messages = self._messages, []
    return messages, False

  def reap(self) -> None:
    """Takes over the exit code that the other agent collected."""
    self.exit_code = self._ended_with

  def kill(self) -> None:
    """Has the other agent kill the process."""
    if self._pid and self.exit_code is None:
      self._agent.send(host_messages.Kill(stage=self.stage))

  def close(self) -> None:
    """Waits for the process to end, unless the other agent hangs."""
    if self._pid and self.exit_code is None:
      self._agent.wait_for(self)
      self.reap()
    super().close()


class RemoteHost:
  """The agent of another host. `start` first, `close` last.

  Attributes:
    name: the host's name in the location map.
    address: address of its store server; '' until it serves.
    store: path of its store folder.
    keeps_store: whether the store stays when the host is closed.
  """

  def __init__(self, name: str, hostmem_dir: str, run_id: str, workdir: str):
    """Stores the host's name and its store's place; nothing runs yet.

    Args:
      name: the host's name in the location map.
      hostmem_dir: the directory of its store.
      run_id: the name of its store.
      workdir: the run's workdir, absolute.
    """
    self.name = name
    self.address = ''
    self.store = store_folder.StoreFolder(hostmem_dir, run_id).path
    self.keeps_store = False
    self._hostmem_dir = hostmem_dir
    self._run_id = run_id
    self._workdir = workdir
    self._transcript = child_process.Transcript(name)
    self._process = child_process.ChildProcess[
      host_messages.HostSpec, host_messages.ToHost
    ](
      'moetion_jax.runtime.hosts.host_agent',
      host_messages.FromHost,
      self._transcript.add,
    )
    self._workers: dict[int, RemoteWorker] = {}
    self._pids: set[int] = set()
    self._gone = True

  def start(self, secret: str, lock_fds: tuple[int, ...]) -> None:
    """Starts the agent.

    Args:
      secret: the job's secret, in hex.
      lock_fds: descriptors of locks that it and its workers inherit.
    """
    spec = host_messages.HostSpec(
      name=self.name,
      run_id=self._run_id,
      hostmem_dir=self._hostmem_dir,
      workdir=self._workdir,
      secret=secret,
      agent_pid=os.getpid(),
      lock_fds=lock_fds,
      status_fd=-1,
      control_fd=-1,
    )
    self._process.start(spec, {}, lock_fds)
    self._gone = False

  def sources(self) -> tuple[tuple[int, Callable[[], Any]], ...]:
    """Returns descriptors to poll, and what to call when one is readable.

    `read`, which belongs to the first one, returns workers with news.
    """
    return (
      (self._process.status_fd, self.read),
      (self._process.output_fd, self._process.read_output),
    )

  @property
  def pid(self) -> int:
    """Pid of the agent."""
    return self._process.pid

  def worker(self, stage: int) -> RemoteWorker:
    """Makes a worker of this host; the caller starts it."""
    return RemoteWorker(self, stage)

  def fence(self, worker: keys.WorkerId) -> None:
    """Has the agent refuse older generations of a worker of any host."""
    self.send(host_messages.Fence(worker=worker))

  def start_worker(
    self, worker: RemoteWorker, message: host_messages.Start
  ) -> None:
    """Has the agent start a worker."""
    self._workers[worker.stage] = worker
    self.send(message)

  def send(self, message: host_messages.ToHost) -> None:
    """Sends a message; a message to a dead agent is lost."""
    if not self._gone:
      self._process.send(message)

  def read(self) -> list[RemoteWorker]:
    """Takes in what the agent said; returns the workers with news.

    Raises:
      errors.ConfigError: the host cannot be used.
      HostDiedError: the agent ended.
    """
    news = self._take()
    if self._gone:
      stages = ', '.join(map(str, sorted(self._workers)))
      raise HostDiedError(
        f'{self.name}: its agent (pid {self.pid}) '
        f'{self._process.describe_exit()}, and with it the workers of '
        f'stage(s) {stages}'
      )
    return news

  def wait_for(self, worker: RemoteWorker) -> None:
    """Waits for a worker that was told to end; kills an agent that hangs."""
    if not self._wait(lambda: worker.ended):
      self._process.kill()
      self._wait(lambda: False)

  def close(self) -> None:
    """Ends the agent, by force if it hangs, with all its processes."""
    if self._process.status_fd < 0:
      return
    self.send(host_messages.Close(keep=self.keeps_store))
    with contextlib.suppress(OSError):  # a log has no room for last output
      self._wait(lambda: False)
    self._process.kill()
    self._process.close()
    self._transcript.close()
    if self._process.exit_code:
      # Its workers died with it, and are children of this process now.
      linux_process.reap_orphans(self._pids)
    if self._process.exit_code and self.keeps_store:
      run_store.tidy(self.store)
    elif self._process.exit_code:
      try:
        run_store.remove_store(self._hostmem_dir, self._run_id)
      except errors.StoreError as error:
        print(f'Not removed: {error}', file=sys.stderr)

  def _wait(self, is_enough: Callable[[], bool]) -> bool:
    """True once `is_enough()` or the agent has ended; False on timeout.

    An agent that is stopped goes on, since it has to act.
    """
    if self._gone:
      return True
    self._process.resume()
    deadline = time.monotonic() + _GRACE_SECONDS
    with selectors.DefaultSelector() as selector:
      for fd in (self._process.status_fd, self._process.output_fd):
        selector.register(fd, selectors.EVENT_READ)
      while not self._gone and not is_enough():
        timeout_seconds = deadline - time.monotonic()
        if timeout_seconds <= 0:
          return False
        if selector.select(timeout_seconds):
          self._process.read_output()
          self._take(is_end=True)
    return True

  def _take(self, is_end: bool = False) -> list[RemoteWorker]:
    """Does what `read` does, but only notes that the agent ended."""
    messages, ended = self._process.read_status()
    news: dict[RemoteWorker, None] = {}
    for message in messages:
      match message:
        case host_messages.Serving():
          self.address = message.address
        case notices.Refused():
          if not is_end:
            raise message.error()
        case host_messages.HostFailed():
          if not is_end:
            raise HostError(f'{self.name}: {message.error}')
        case _:
          if worker := self._workers.get(message.stage):
            worker.take(message)
            if isinstance(message, host_messages.Started):
              self._pids.add(message.pid)
            elif isinstance(message, host_messages.Exited):
              self._pids.discard(worker.pid)
            news[worker] = None
    if ended:
      self._gone = True
      self._process.reap()
    return list(news)
