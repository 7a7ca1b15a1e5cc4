"""Processes that are prepared to take the place of any worker of this host.

There are as many as a stage has replicas, since its workers are replaced
together. On CPU they have met by then: they are a stage world that has no stage
yet, and hold the programs of every stage. It is taken as a whole or not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from moetion_jax.runtime import messages
from moetion_jax.runtime.hosts import child_process

# Of which none became warm: then there are none any more.
_ATTEMPTS = 3

Make = Callable[[int], child_process.WorkerProcess]
Start = Callable[[child_process.WorkerProcess, messages.Spec], None]
End = Callable[[child_process.WorkerProcess], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TakenStandby:
  """Standbys that became workers of a stage.

  Attributes:
    workers: by replica; those that are missing have to be started.
    world: in which they have met; '' if they have not.
  """

  workers: dict[int, child_process.WorkerProcess] = dataclasses.field(
    default_factory=dict
  )
  world: str = ''


class Standbys:
  """All of a run. Knows who is warm; processes are its owner's to start.

  Attributes:
    everyone: that lives, warm or not.
  """

  def __init__(self, replicas: int, make: Make, start: Start, end: End):
    """Stores the arguments.

    Args:
      replicas: of each stage.
      make: makes one, of which replica it will be if it joins a world.
      start: has a process run.
      end: has it killed and reaped.
    """
    self.everyone: list[child_process.WorkerProcess] = []
    self._replicas = replicas
    self._make = make
    self._start = start
    self._end = end
    self._attempts = 0
    self._world = ''

  def warm(self, spec: messages.Spec, new_world: Callable[[], str]) -> None:
    """Starts those that are missing, unless they keep dying.

    Args:
      spec: of each but for who it is.
      new_world: makes the address of one, where they are to meet ahead.
    """
    team = tuple(range(self._replicas))
    meets = spec.loads_ahead and len(team) > 1
    if meets and self.everyone:
      return  # one that has joined is of no use to others
    self._world = new_world() if meets else ''
    while (
      len(self.everyone) < len(team)
      and self._attempts < _ATTEMPTS * self._replicas
    ):
      self._attempts += 1
      worker = self._make(len(self.everyone))
      worker.state = 'warming'
      self.everyone.append(worker)
      self._start(
        worker,
        dataclasses.replace(
          spec,
          replica=worker.replica,
          host=worker.host,
          team=team,
          world=self._world,
        ),
      )

  def warmed(self, worker: child_process.WorkerProcess) -> None:
    """One is prepared."""
    worker.is_warm, worker.state = True, 'standby'
    self._attempts = 0

  def take(
    self, stage: int, team: Sequence[int], generation: int, host: str
  ) -> TakenStandby:
    """Has those that are warm become workers of a stage.

    One that is not is of no use: a new process is faster.

    Args:
      stage: that they become.
      team: the replicas that have a worker.
      generation: of the workers.
      host: on which they have to be.
    """
    warm = [
      worker
      for worker in self.everyone
      if worker.is_warm and worker.exit_code is None and worker.host == host
    ]
    world = self._world
    if world and len(team) != len(warm):
      return TakenStandby()
    taken = dict(zip(team, warm, strict=False))
    for replica, worker in taken.items():
      self.everyone.remove(worker)
      worker.become(stage, replica, generation)
    return TakenStandby(workers=taken, world=world)

  def died(self, worker: child_process.WorkerProcess) -> None:
    """One has ended; with a world that it was in."""
    gone = list(self.everyone) if self._world else [worker]
    for one in gone:
      self.everyone.remove(one)
      self._end(one)
