"""Processes that are prepared to take the place of any worker of this host.

There are as many as a stage has replicas, since its workers are replaced
together. On CPU they join each other ahead: they are a stage world that has no
stage yet, and hold the programs of every stage. Such a world is taken as a
whole or not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from moetion_jax.runtime import linux_process, spec as spec_lib
from moetion_jax.runtime.hosts import child_process

Make = Callable[[int], child_process.WorkerProcess]
Start = Callable[[child_process.WorkerProcess, spec_lib.Spec], None]
End = Callable[[child_process.WorkerProcess], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LostStandby:
  """A standby that ended though nobody wanted it to.

  Attributes:
    how: the way in which it ended, for people.
    deaths: so many were lost since one took the place of a worker.
    pause: the iterations until another one is started.
  """

  how: str
  deaths: int
  pause: int

  def __str__(self) -> str:
    again = f'another one is started {self.pause} iteration(s) later'
    return (
      f'a standby {self.how}; that makes {self.deaths} since one was needed, '
      f'and {again if self.pause else "another one is started"}'
    )


Tell = Callable[[child_process.WorkerProcess, LostStandby], None]


def pause_after(deaths: int) -> int:
  """Returns the iterations to wait after so many deaths in a row: 0, 1, 3, 7.

  A standby costs the workers time until it is warm: what ends one after the
  other, as a lack of memory may, must not have the run pay for each.
  """
  return 2 ** (deaths - 1) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TakenStandby:
  """The standbys that became workers of a stage.

  Attributes:
    workers: the workers, by replica; missing ones have to be started.
    world: address of the world that they have joined; '' if none.
  """

  workers: dict[int, child_process.WorkerProcess] = dataclasses.field(
    default_factory=dict
  )
  world: str = ''


class Standbys:
  """All standbys of a run; their owner's functions start and end them.

  Attributes:
    everyone: the living standbys, warm or not.
  """

  def __init__(
    self, replicas: int, make: Make, start: Start, end: End, tell: Tell
  ):
    """Stores the arguments.

    Args:
      replicas: number of replicas of each stage.
      make: makes a standby; its argument is the replica that it becomes if it
        joins a world.
      start: starts its process.
      end: kills and reaps its process.
      tell: called for each that is lost.
    """
    self.everyone: list[child_process.WorkerProcess] = []
    self._replicas = replicas
    self._make = make
    self._start = start
    self._end = end
    self._tell = tell
    self._deaths = self._pause = 0
    self._world = ''

  def warm(self, spec: spec_lib.Spec, new_world: Callable[[], str]) -> None:
    """Starts the standbys that are missing, unless it is better to wait.

    Call it once an iteration.

    Args:
      spec: each standby's spec, but for who it is.
      new_world: makes a world's address, for standbys that join one ahead.
    """
    team = tuple(range(self._replicas))
    meets = spec.loads_ahead and len(team) > 1
    if meets and self.everyone:
      return  # one that has joined a world is of no use to others
    if self._pause:
      self._pause -= 1
      return
    self._world = new_world() if meets else ''
    while len(self.everyone) < len(team):
      worker = self._make(len(self.everyone))
      self.everyone.append(worker)
      full = dataclasses.replace(
        spec,
        replica=worker.replica,
        host=worker.host,
        team=team,
        world=self._world,
      )
      try:
        self._start(worker, full)
      except OSError as error:  # a run does without, for some time
        self.died(worker, f'cannot be started: {error}')
        return

  def warmed(self, worker: child_process.WorkerProcess) -> None:
    """Takes in that a standby is prepared."""
    worker.is_warm = True

  def take(self, stage: int, team: Sequence[int], host: str) -> TakenStandby:
    """Has the warm standbys become workers of a stage.

    One that is not warm is of no use: a new process is faster. One that is
    stopped is ended: with a stage it would be found to be, and fail that again.

    Args:
      stage: the stage whose workers they become.
      team: the replicas that have a worker.
      host: name of the host on which they have to be.
    """
    for worker in [*self.everyone]:
      if worker in self.everyone and linux_process.is_stopped(worker.pid):
        self.died(worker, 'was stopped (SIGSTOP)')
    warm = [
      worker
      for worker in self.everyone
      if worker.is_warm and worker.exit_code is None and worker.host == host
    ]
    world = self._world
    if world and len(team) != len(warm):
      return TakenStandby()
    taken = dict(zip(team, warm, strict=False))
    if taken:
      self._deaths = self._pause = 0
    for replica, worker in taken.items():
      self.everyone.remove(worker)
      worker.become(stage, replica)
    return TakenStandby(workers=taken, world=world)

  def died(self, worker: child_process.WorkerProcess, how: str) -> None:
    """Removes a standby that ended, and with it all members of its world.

    Args:
      worker: the standby.
      how: the way in which it ended, for people.
    """
    self._deaths += 1
    self._pause = pause_after(self._deaths)
    self._tell(
      worker, LostStandby(how=how, deaths=self._deaths, pause=self._pause)
    )
    gone = list(self.everyone) if self._world else [worker]
    for one in gone:
      self.everyone.remove(one)
      self._end(one)
