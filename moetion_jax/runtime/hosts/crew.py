"""The worker processes of a run: started, replaced, kept warm, ended.

The workers of a stage are its world: they are replaced together, since the
others may hang in a collective with the one that died, and each generation of
a world is a `jax.distributed` job of its own on a fresh port.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import selectors
import socket
from collections.abc import Sequence
from typing import Any, Protocol

from moetion_jax import job_spec
from moetion_jax.runtime import (
  environment as environment_lib,
  faults,
  messages as messages_lib,
  placement,
  spec as spec_lib,
)
from moetion_jax.runtime.hosts import (
  child_process,
  hosts as hosts_lib,
  standbys,
)
from moetion_jax.state import division


class Listener(Protocol):
  """The receiver of what processes say, and of their ends."""

  def on_message(
    self, worker: child_process.WorkerProcess, message: messages_lib.FromWorker
  ) -> None:
    """Handles a message from a worker."""
    ...

  def on_exit(self, worker: child_process.WorkerProcess) -> None:
    """Handles a worker's end; all its messages were handled before."""
    ...


class Crew:
  """A process for every replica of every stage, and standbys.

  `start` first, `close` last.

  Attributes:
    started: number of workers started; a standby counts once promoted.
  """

  def __init__(
    self,
    job: job_spec.JobSpec,
    hosts: hosts_lib.Hosts,
    selector: selectors.BaseSelector,
    listener: Listener,
    spec: spec_lib.Spec,
    book: faults.FaultBook,
  ):
    """Stores the arguments.

    Args:
      job: the run's job.
      hosts: the hosts on which the processes run.
      selector: the selector that the caller polls, calling its keys' data.
      listener: who is told of messages and ends.
      spec: a worker's spec, but for what differs between workers.
      book: the scripted faults that have not happened yet.
    """
    self._book = book
    self.started = 0
    self._of_stage: list[list[child_process.WorkerProcess]] = []
    self._replicas = job.train.replicas
    self._job = job
    self._hosts = hosts
    self._selector = selector
    self._listener = listener
    self._spec = spec
    self._lock_fds: tuple[int, ...] = ()
    self._standbys = standbys.Standbys(
      self._replicas, hosts.standby, self._start, self.end
    )
    self._places = placement.place(
      job.train.stages * self._replicas,
      local_devices=job.train.local_devices,
      cores=placement.usable_cores(),
      gpus=placement.visible_gpus(os.environ),
      environment=os.environ,
    )

  def start(self, lock_fds: tuple[int, ...], generation: int) -> None:
    """Starts a worker for every replica of every stage.

    Args:
      lock_fds: descriptors of locks that all processes inherit.
      generation: the workers' generation.
    """
    self._lock_fds = lock_fds
    self._hosts.start(lock_fds[:1])
    self._hosts.register(self._selector, self._on_news)
    everybody = tuple(range(self._replicas))
    for stage in range(self._job.train.stages):
      world = self._new_world(everybody)
      self._of_stage.append([])
      for replica in everybody:
        worker = self._hosts.worker(stage, replica, generation)
        self._of_stage[stage].append(worker)
        self._begin(worker, self._spec_of(worker, world, everybody))

  def expect(self, environment: environment_lib.Record) -> None:
    """Has workers that start from now on compare what they compute with.

    Args:
      environment: the record that all workers have in common.
    """
    self._spec = dataclasses.replace(self._spec, environment=environment)

  @property
  def workers(self) -> list[child_process.WorkerProcess]:
    """All workers, by stage, then replica."""
    return [worker for team in self._of_stage for worker in team]

  def of_stage(self, stage: int) -> list[child_process.WorkerProcess]:
    """Returns the workers of a stage, by replica."""
    return list(self._of_stage[stage])

  def givers(self) -> list[child_process.WorkerProcess]:
    """Returns workers that together have the whole state of every stage."""
    if self._job.train.shard_optimizer:
      return self.workers
    stages = range(self._job.train.stages)
    return [self.of_stage(stage)[0] for stage in stages]

  def team(self, stage: int) -> tuple[int, ...]:
    """Returns the replicas of a stage that have a worker."""
    return tuple(worker.replica for worker in self._of_stage[stage])

  def replace(
    self,
    stage: int,
    *,
    has_begun: bool = True,
    team: tuple[int, ...] | None = None,
  ) -> list[child_process.WorkerProcess]:
    """Ends a stage's workers that live, and starts the next generation.

    Warm standbys take their places; a new process is faster than a standby that
    is not warm.

    Args:
      stage: the stage.
      has_begun: whether the run has begun.
      team: the replicas that have a worker from now on; None: as before.

    Returns:
      The new workers, by replica.
    """
    old = self._of_stage[stage]
    team = self.team(stage) if team is None else team
    for worker in old:
      worker.kill()
    for worker in old:
      self.end(worker)
    begun = max(worker.iteration for worker in old)
    generation = old[0].generation + 1
    taken = self._standbys.take(stage, team, generation, old[0].host)
    world = taken.world or self._new_world(team)
    self._of_stage[stage] = []
    for replica in team:
      standby = taken.workers.get(replica)
      worker = standby or self._hosts.worker(stage, replica, generation)
      self._of_stage[stage].append(worker)
      spec = dataclasses.replace(
        self._spec_of(worker, world, team, begun), is_replacement=has_begun
      )
      if not standby:
        self._begin(worker, spec)
        continue
      place = self._place_of(worker)
      assert place is not None
      self.started += 1
      worker.send(
        messages_lib.Promote(spec=spec, environment=place.environment)
      )
    return self.of_stage(stage)

  def _begin(
    self, worker: child_process.WorkerProcess, spec: spec_lib.Spec
  ) -> None:
    self.started += 1
    self._start(worker, spec)

  def _new_world(self, team: tuple[int, ...]) -> str:
    """Returns an unused address for a coordinator; '' for a worker alone.

    Somebody else may take the port before the world does: then its workers
    fail, and the next generation has another one.
    """
    if len(team) == 1:
      return ''
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      return f'127.0.0.1:{probe.getsockname()[1]}'

  def warm_standbys(self, platform: str) -> None:
    """Starts the missing ones of a world's standbys, unless they keep dying.

    Args:
      platform: the platform for which they lower their programs.
    """
    # As many cores as a standby will have, whichever stage it becomes.
    cores = [place.cores for place in self._places]
    same = len({len(one) for one in cores}) == 1
    spec = dataclasses.replace(
      self._spec,
      platform=platform,
      cores=cores[0] if same else (),
    )
    everybody = tuple(range(self._replicas))
    self._standbys.warm(spec, lambda: self._new_world(everybody))

  def warmed(self, worker: child_process.WorkerProcess) -> None:
    """Takes in that a standby is prepared."""
    self._standbys.warmed(worker)

  def end(self, worker: child_process.WorkerProcess) -> None:
    """Kills a process and waits for its end; passes on its last output."""
    worker.kill()
    for fd in (worker.status_fd, worker.output_fd, worker.pid_fd):
      self._forget(fd)
    worker.close()

  def close(self) -> None:
    """Ends all processes, then the other hosts."""
    everyone = self.everyone()
    for worker in everyone:
      worker.kill()
    for worker in everyone:
      self.end(worker)
    self._hosts.close()

  def everyone(self) -> Sequence[child_process.WorkerProcess]:
    """Returns all workers and standbys."""
    return [*self.workers, *self._standbys.everyone]

  # ---- processes -------------------------------------------------------------

  def _spec_of(
    self,
    worker: child_process.WorkerProcess,
    world: str,
    team: tuple[int, ...],
    begun: int = 0,
  ) -> spec_lib.Spec:
    """Returns the spec of a worker whose predecessor had begun `begun`."""
    place = self._place_of(worker)
    stand_ins = division.stand_ins(self._replicas, team)
    return dataclasses.replace(
      self._spec,
      stage=worker.stage,
      replica=worker.replica,
      generation=worker.generation,
      world=world,
      team=team,
      stands_for=stand_ins[worker.replica],
      host=worker.host,
      cores=place.cores if place else (),
      environment=environment_lib.of_worker(
        self._spec.environment, worker.stage * self._replicas + worker.replica
      ),
      faults=self._book.of_worker(worker.stage, begun, worker.replica),
    )

  def _place_of(
    self, worker: child_process.WorkerProcess
  ) -> placement.Placement | None:
    """Returns a worker's place; None for a standby, which is told later."""
    if worker.stage == spec_lib.STANDBY:
      return None
    return self._places[worker.stage * self._replicas + worker.replica]

  def _start(
    self, worker: child_process.WorkerProcess, spec: spec_lib.Spec
  ) -> None:
    place = self._place_of(worker)
    environment = (
      place.environment if place else placement.memory_variables(os.environ)
    )
    worker.start(spec, environment, self._lock_fds)
    for fd, react in (
      (worker.status_fd, self._on_status),
      (worker.output_fd, self._on_output),
      (worker.pid_fd, self._on_exit),
    ):
      if fd >= 0:  # workers of other hosts have none
        self._selector.register(
          fd, selectors.EVENT_READ, functools.partial(react, worker)
        )

  def _on_status(self, worker: child_process.WorkerProcess) -> None:
    if worker.is_closed:  # by something else that happened at the same time
      return
    messages, ended = worker.read_status()
    if ended:
      self._forget(worker.status_fd)
    for message in messages:
      self._listener.on_message(worker, message)

  def _on_output(self, worker: child_process.WorkerProcess) -> None:
    if worker.is_closed:
      return
    if worker.read_output():
      self._forget(worker.output_fd)

  def _on_exit(self, worker: child_process.WorkerProcess) -> None:
    if worker.exit_code is not None:
      return
    worker.reap()
    self._forget(worker.pid_fd)
    self._on_status(worker)  # its last message says more than its exit code
    if worker in self._standbys.everyone:
      self._standbys.died(worker)
      return
    self._listener.on_exit(worker)

  def _on_news(self, worker: Any) -> None:
    self._on_status(worker)
    if worker.ended and worker.exit_code is None:
      self._on_exit(worker)

  def _forget(self, fd: int) -> None:
    if fd >= 0 and fd in self._selector.get_map():
      self._selector.unregister(fd)
