"""The worker processes of a run: started, replaced, kept warm, ended.

No JAX here: the agent never creates a JAX backend.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import selectors
from collections.abc import Sequence
from typing import Any, Protocol

from launch import (
  fault_book,
  hosts as hosts_lib,
  placement,
  processes,
  protocol,
  settings,
)

_STANDBY_ATTEMPTS = 3


class Listener(Protocol):
  """Who hears of what processes do."""

  def on_message(
    self, worker: processes.WorkerProcess, message: protocol.Message
  ) -> None:
    """It said something."""
    ...

  def on_exit(self, worker: processes.WorkerProcess) -> None:
    """It ended; everything that it said was heard."""
    ...


class Crew:
  """One process a stage, and a standby. `start` first, `close` last.

  Attributes:
    workers: by stage.
    standby: that may take any stage of this host; None without.
  """

  def __init__(
    self,
    config: settings.RunConfig,
    hosts: hosts_lib.Hosts,
    selector: selectors.BaseSelector,
    listener: Listener,
    spec: protocol.Spec,
    book: fault_book.FaultBook,
  ):
    """Stores the arguments.

    Args:
      config: of the run.
      hosts: on which the processes run.
      selector: that the caller polls; its keys' data are called.
      listener: see there.
      spec: of a worker, but for what differs between workers.
      book: of scripted faults.
    """
    self._book = book
    self.workers: list[processes.WorkerProcess] = []
    self.standby: processes.WorkerProcess | None = None
    self._config = config
    self._hosts = hosts
    self._selector = selector
    self._listener = listener
    self._spec = spec
    self._lock_fds: tuple[int, ...] = ()
    self._standby_attempts = 0
    self._places = placement.place(
      config.train.stages,
      local_devices=config.train.local_devices,
      cores=placement.usable_cores(),
      gpus=placement.visible_gpus(os.environ),
      environment=os.environ,
    )

  def start(self, lock_fds: tuple[int, ...], generation: int) -> None:
    """Starts a worker for every stage.

    Args:
      lock_fds: that all inherit.
      generation: of the workers.
    """
    self._lock_fds = lock_fds
    self._hosts.start(lock_fds[:1])
    self._hosts.register(self._selector, self._on_news)
    for stage in range(self._config.train.stages):
      worker = self._hosts.worker(stage, generation)
      self.workers.append(worker)
      self._start(worker, self._spec_of(worker))

  def replace(
    self, stage: int, *, has_begun: bool = True
  ) -> processes.WorkerProcess:
    """Ends a stage's worker, if it lives, and starts the next generation.

    The standby takes its place, if there is one that is warm; a process that
    is not is faster from the beginning.

    Args:
      stage: whose.
      has_begun: whether the run goes on already.
    """
    old = self.workers[stage]
    self.end(old)
    generation = old.generation + 1

    def spec(worker: processes.WorkerProcess) -> protocol.Spec:
      return dataclasses.replace(
        self._spec_of(worker, old.iteration), is_replacement=has_begun
      )

    standby = self.standby
    if (
      standby is not None
      and standby.is_warm
      and standby.exit_code is None
      and old.host == standby.host
    ):
      self.standby = None
      worker = standby
      worker.become(stage, generation)
      worker.send(
        'promote',
        spec=spec(worker).to_json(),
        environment=self._places[stage].environment,
      )
    else:
      worker = self._hosts.worker(stage, generation)
      self._start(worker, spec(worker))
    self.workers[stage] = worker
    return worker

  def warm_standby(self, platform: str) -> None:
    """Starts to warm a standby, unless there is one or they keep dying."""
    if self.standby is not None or self._standby_attempts >= _STANDBY_ATTEMPTS:
      return
    self._standby_attempts += 1
    worker = self._hosts.standby()
    worker.state = 'warming'
    self.standby = worker
    spec = self._spec_of(worker)
    self._start(worker, dataclasses.replace(spec, platform=platform))

  def warmed(self, worker: processes.WorkerProcess) -> None:
    """A standby is prepared."""
    worker.is_warm, worker.state = True, 'standby'
    self._standby_attempts = 0

  def end(self, worker: processes.WorkerProcess) -> None:
    """Kills a process and waits for its end; passes on its last words."""
    worker.kill()
    for fd in (worker.status_fd, worker.output_fd, worker.pid_fd):
      self._forget(fd)
    worker.close()

  def close(self) -> None:
    """Ends all processes, then the other hosts."""
    everyone = [*self.workers, *filter(None, [self.standby])]
    for worker in everyone:
      worker.kill()
    for worker in everyone:
      self.end(worker)
    self._hosts.close()

  def everyone(self) -> Sequence[processes.WorkerProcess]:
    """All workers and the standby."""
    return [*self.workers, *filter(None, [self.standby])]

  # ---- processes -------------------------------------------------------------

  def _spec_of(
    self, worker: processes.WorkerProcess, begun: int = 0
  ) -> protocol.Spec:
    """Of a worker whose predecessor had begun that iteration."""
    cores = () if worker.stage < 0 else self._places[worker.stage].cores
    return dataclasses.replace(
      self._spec,
      stage=worker.stage,
      generation=worker.generation,
      host=worker.host,
      cores=cores,
      faults=self._book.of_worker(worker.stage, begun),
    )

  def _start(
    self, worker: processes.WorkerProcess, spec: protocol.Spec
  ) -> None:
    environment = (
      placement.memory_variables(os.environ)
      if worker.stage == protocol.STANDBY
      else self._places[worker.stage].environment
    )
    worker.start(spec.to_json(), environment, self._lock_fds)
    for fd, react in (
      (worker.status_fd, self._on_status),
      (worker.output_fd, self._on_output),
      (worker.pid_fd, self._on_exit),
    ):
      if fd >= 0:  # workers of other hosts have none
        self._selector.register(
          fd, selectors.EVENT_READ, functools.partial(react, worker)
        )

  def _on_status(self, worker: processes.WorkerProcess) -> None:
    if worker.is_closed:  # with something else that happened at the same time
      return
    messages, ended = worker.read_status()
    if ended:
      self._forget(worker.status_fd)
    for message in messages:
      self._listener.on_message(worker, message)

  def _on_output(self, worker: processes.WorkerProcess) -> None:
    if worker.is_closed:
      return
    if worker.read_output():
      self._forget(worker.output_fd)

  def _on_exit(self, worker: processes.WorkerProcess) -> None:
    if worker.exit_code is not None:
      return
    worker.reap()
    self._forget(worker.pid_fd)
    self._on_status(worker)  # its last words say more than its exit code
    if worker is self.standby:
      self.standby = None
      self.end(worker)
      return
    self._listener.on_exit(worker)

  def _on_news(self, worker: Any) -> None:
    self._on_status(worker)
    if worker.ended and worker.exit_code is None:
      self._on_exit(worker)

  def _forget(self, fd: int) -> None:
    if fd >= 0 and fd in self._selector.get_map():
      self._selector.unregister(fd)
