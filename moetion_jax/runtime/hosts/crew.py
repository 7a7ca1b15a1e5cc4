"""The worker processes of a run: started, replaced, kept warm, ended.

The workers of a stage are its world: they are replaced together, since the
others may hang in a collective with the one that died, and each generation of
a world is a `jax.distributed` job of its own on a fresh port.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import selectors
import socket
from collections.abc import Sequence
from typing import Any

from moetion_jax import job_spec, keys
from moetion_jax.recovery import actions
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

News = tuple[
  child_process.WorkerProcess,
  messages_lib.FromWorker | standbys.LostStandby | None,
]


class Crew:
  """A process for every replica of every stage, and standbys.

  `open` first, `close` last.

  Attributes:
    workers: the workers by stage and replica.
    news: what processes said, in order; None: one has ended, a `LostStandby`
      that was nobody's worker.
  """

  def __init__(
    self,
    job: job_spec.JobSpec,
    hosts: hosts_lib.Hosts,
    selector: selectors.BaseSelector,
    spec: spec_lib.Spec,
    book: faults.FaultBook,
    lock_fds: tuple[tuple[int, ...], tuple[int, ...]],
  ):
    """Stores the arguments.

    Args:
      job: the run's job.
      hosts: the hosts on which the processes run.
      selector: the selector that the caller polls, calling its keys' data.
      spec: a worker's spec, but for what differs between workers.
      book: the scripted faults that have not happened yet.
      lock_fds: descriptors of the locks of the workdir, which all processes
        inherit, and of the store, for those of this host.
    """
    self.workers: dict[tuple[int, int], child_process.WorkerProcess] = {}
    self.news: collections.deque[News] = collections.deque()
    self._replicas = job.train.replicas
    self._hosts = hosts
    self._selector = selector
    self._spec = spec
    self._book = book
    self._workdir_fds, store_fds = lock_fds
    self._lock_fds = (*self._workdir_fds, *store_fds)
    self._standbys = standbys.Standbys(
      self._replicas,
      hosts.standby,
      self._start,
      self.end,
      lambda standby, lost: self.news.append((standby, lost)),
    )
    self._places = placement.place(
      job.train.stages * self._replicas,
      local_devices=job.train.local_devices,
      cores=placement.usable_cores(),
      gpus=placement.visible_gpus(os.environ),
      environment=os.environ,
    )

  def open(self) -> None:
    """Starts the further hosts."""
    self._hosts.start(self._workdir_fds)
    self._hosts.register(self._selector, self._on_news)

  def expect(
    self,
    environment: environment_lib.Record,
    data_fingerprint: dict[str, Any],
  ) -> None:
    """Has workers that start from now on compare what they work with.

    Args:
      environment: the record that all workers have in common.
      data_fingerprint: the fingerprint of the data that all read.
    """
    self._spec = dataclasses.replace(
      self._spec, environment=environment, data_fingerprint=data_fingerprint
    )

  @property
  def standbys(self) -> Sequence[child_process.WorkerProcess]:
    """The processes that have no stage yet."""
    return self._standbys.everyone

  def replace(
    self, start: actions.Replace
  ) -> list[child_process.WorkerProcess]:
    """Ends a stage's workers that live, and starts the next generation.

    Warm standbys take their places; a new process is faster than a standby that
    is not warm.

    Args:
      start: the stage and its new workers.

    Returns:
      The new workers, by replica.
    """
    stage = start.stage
    old = [name for name in self.workers if name[0] == stage]
    for name in old:
      self.workers[name].kill()
    for name in old:
      self.end(self.workers.pop(name))
    for replica in range(self._replicas):
      self._hosts.fence(keys.WorkerId(stage, replica, start.generation))
    taken = self._standbys.take(stage, start.team, self._hosts.names[stage])
    world = taken.world or self._new_world(start.team)
    new = []
    for replica in start.team:
      standby = taken.workers.get(replica)
      worker = standby or self._hosts.worker(stage, replica)
      self.workers[stage, replica] = worker
      new.append(worker)
      spec = self._spec_of(worker, world, start)
      if standby is None:
        self._start(worker, spec)
        continue
      place = self._place_of(worker)
      assert place is not None
      worker.send(
        messages_lib.Promote(spec=spec, environment=place.environment)
      )
    return new

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
    """Starts the missing ones of a world's standbys, see `Standbys.warm`.

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
    """Ends all processes, then the other hosts; may be called twice.

    Last output for which a log has no room is only shown: the run ends anyway.
    """
    everyone = self.everyone()
    for worker in everyone:
      worker.kill()
    for worker in everyone:
      with contextlib.suppress(OSError):
        self.end(worker)
    self._hosts.close()

  def everyone(self) -> Sequence[child_process.WorkerProcess]:
    """Returns all workers and standbys."""
    return [*self.workers.values(), *self._standbys.everyone]

  # ---- processes -------------------------------------------------------------

  def _spec_of(
    self,
    worker: child_process.WorkerProcess,
    world: str,
    start: actions.Replace,
  ) -> spec_lib.Spec:
    place = self._place_of(worker)
    stand_ins = division.stand_ins(self._replicas, start.team)
    return dataclasses.replace(
      self._spec,
      stage=worker.stage,
      replica=worker.replica,
      generation=start.generation,
      world=world,
      team=start.team,
      stands_for=stand_ins[worker.replica],
      host=worker.host,
      cores=place.cores if place else (),
      environment=environment_lib.of_worker(
        self._spec.environment, worker.stage * self._replicas + worker.replica
      ),
      faults=self._book.of_worker(worker.stage, start.begun, worker.replica),
      is_replacement=start.has_begun,
    )

  def _place_of(
    self, worker: child_process.WorkerProcess
  ) -> placement.Placement | None:
    """Returns a worker's place; None for a standby, which is told later."""
    if worker.is_standby:
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
    self.news.extend((worker, message) for message in messages)

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
      self._standbys.died(worker, worker.describe_exit())
      return
    self.news.append((worker, None))

  def _on_news(self, worker: Any) -> None:
    self._on_status(worker)
    if worker.ended and worker.exit_code is None:
      self._on_exit(worker)

  def _forget(self, fd: int) -> None:
    if fd >= 0 and fd in self._selector.get_map():
      self._selector.unregister(fd)
