"""The agent of a further host, a process that only the leader starts.

It owns its host's store, serves it to the other hosts, starts its stages'
workers as its children, and passes on what they and the leader tell each other
(`host_messages`). It decides nothing. It dies with the leader, and its workers
with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import selectors
import sys
from collections.abc import Mapping

from moetion_jax import codec, errors
from moetion_jax.hostmem import run_store, segment, store_folder
from moetion_jax.logs import zmq_server
from moetion_jax.recovery import notices, orders
from moetion_jax.runtime import (
  linux_process,
  messages as messages_lib,
  spec as spec_lib,
)
from moetion_jax.runtime.hosts import child_process, host_messages


class HostAgent:
  """The agent of one host: its store, its workers, its link to the leader."""

  def __init__(
    self,
    spec: host_messages.HostSpec,
    store: store_folder.StoreFolder,
    server: zmq_server.StoreServer,
  ):
    """Stores the arguments; `run` does the work.

    Args:
      spec: what the leader says of the host.
      store: the host's store, started.
      server: a server of that store, not started.
    """
    self._spec = spec
    self._store = store
    self._server = server
    self._send = functools.partial(_send, spec)
    self._workers: dict[int, child_process.WorkerProcess] = {}
    self._selector = selectors.DefaultSelector()
    self._commands = messages_lib.Lines()
    self._ended = False
    # Unless the leader says otherwise: the same command goes on with the store.
    self._keeps_store = True
    self._trains = False

  def _close_store(self) -> None:
    if not self._trains:
      self._store.disown()
    run_store.close_store(self._store, keep=self._keeps_store)

  def run(self) -> None:
    """Serves until the leader says `Close`, or is gone; then closes all.

    Raises:
      errors.StoreError: the store cannot be served.
    """
    with contextlib.ExitStack() as stack:
      stack.callback(self._selector.close)
      stack.callback(self._close_store)
      self._server.start()
      stack.callback(self._server.close)
      stack.callback(self._end_workers)
      self._send(host_messages.Serving(address=self._server.address))
      self._selector.register(
        self._spec.control_fd, selectors.EVENT_READ, self._on_command
      )
      while not self._ended:
        for key, _ in self._selector.select():
          key.data()

  def _on_command(self) -> None:
    data = os.read(self._spec.control_fd, 1 << 16)
    if not data:
      self._ended = True
    for line in self._commands.feed(data):
      match message := messages_lib.unpack(host_messages.ToHost, line):
        case host_messages.Close():
          self._ended, self._keeps_store = True, message.keep
        case host_messages.Start():
          self._start(message.spec, message.environment)
        case host_messages.Tell():
          if worker := self._workers.get(message.stage):
            self._trains |= isinstance(message.message, orders.Go)
            worker.send(message.message)
        case host_messages.Fence():
          segment.fence(self._store.path, message.worker)
          self._server.fence(message.worker)
        case host_messages.Kill():
          if worker := self._workers.get(message.stage):
            worker.kill()

  def _start(self, spec: spec_lib.Spec, environment: Mapping[str, str]) -> None:
    stage = spec.stage
    if old := self._workers.pop(stage, None):
      self._close(old)
    worker = child_process.WorkerProcess(
      stage,
      on_line=lambda line: self._send(
        host_messages.Printed(stage=stage, line=line.decode(errors='replace'))
      ),
    )
    self._workers[stage] = worker
    worker.start(
      dataclasses.replace(
        spec, agent_pid=os.getpid(), folder=str(self._store.path)
      ),
      environment,
      (*self._spec.lock_fds, *self._store.lock_fds),
    )
    self._send(host_messages.Started(stage=stage, pid=worker.pid))
    for fd, react in (
      (worker.status_fd, self._on_status),
      (worker.output_fd, self._on_output),
      (worker.pid_fd, self._on_exit),
    ):
      self._selector.register(
        fd, selectors.EVENT_READ, functools.partial(react, worker)
      )

  def _on_status(self, worker: child_process.WorkerProcess) -> None:
    if worker.is_closed:
      return
    messages, ended = worker.read_status()
    if ended:
      self._forget(worker.status_fd)
    for message in messages:
      self._send(host_messages.Said(stage=worker.stage, message=message))

  def _on_output(self, worker: child_process.WorkerProcess) -> None:
    if worker.is_closed:  # by something else that happened at the same time
      return
    if worker.read_output():
      self._forget(worker.output_fd)

  def _on_exit(self, worker: child_process.WorkerProcess) -> None:
    worker.reap()
    self._on_status(worker)
    self._close(worker)
    self._send(
      host_messages.Exited(stage=worker.stage, exit_code=worker.exit_code)
    )

  def _close(self, worker: child_process.WorkerProcess) -> None:
    """Passes on a worker's last output, and closes it."""
    for fd in (worker.status_fd, worker.output_fd, worker.pid_fd):
      self._forget(fd)
    worker.close()

  def _end_workers(self) -> None:
    for worker in self._workers.values():
      worker.kill()
    for worker in self._workers.values():
      self._close(worker)

  def _forget(self, fd: int) -> None:
    if fd >= 0 and fd in self._selector.get_map():
      self._selector.unregister(fd)


def _send(
  spec: host_messages.HostSpec, message: host_messages.FromHost
) -> None:
  """Sends a message to the leader."""
  messages_lib.write(spec.status_fd, messages_lib.pack(message))


def main() -> int:
  """Serves as the spec on stdin says; returns the exit code."""
  spec = codec.decode(host_messages.HostSpec, json.load(sys.stdin))
  linux_process.die_with(spec.agent_pid)
  try:
    store = run_store.open_store(spec.hostmem_dir, spec.run_id, spec.workdir)
    secret = bytes.fromhex(spec.secret)
    server = zmq_server.StoreServer(store.path, secret=secret)
    HostAgent(spec, store, server).run()
  except errors.ConfigError as error:
    _send(spec, notices.Refused.of(error))
    return errors.ExitCode.REFUSED
  except errors.MoetionError as error:
    _send(spec, host_messages.HostFailed(error=str(error)))
    return errors.ExitCode.FAILED
  return errors.ExitCode.FINISHED


if __name__ == '__main__':
  sys.exit(main())
