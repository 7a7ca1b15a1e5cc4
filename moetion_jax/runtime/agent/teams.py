"""Decides which replicas of a stage have a worker, if not all can have one."""

from __future__ import annotations

from moetion_jax import errors
from moetion_jax.recovery import recoverer as recoverer_lib
from moetion_jax.runtime.agent import settings as agent_settings
from moetion_jax.runtime.hosts import (
  child_process,
  crew as crew_lib,
  stores as stores_lib,
)
from moetion_jax.runtime.records import recorder as recorder_lib


class NoReplacementError(errors.MoetionError):
  """A dead worker has no successor; a run that starts again has new workers."""

  is_passing = True


class Teams:
  """Shrinks stages whose workers cannot be replaced, and grows them again."""

  def __init__(
    self,
    replicas: int,
    where: agent_settings.AgentSettings,
    crew: crew_lib.Crew,
    recoverer: recoverer_lib.Recoverer,
    stores: stores_lib.Stores,
    recorder: recorder_lib.Recorder,
  ):
    """Stores the arguments.

    Args:
      replicas: the number of each stage's replicas.
      where: the settings, which say what may be done.
      crew: the workers, of which the teams are made.
      recoverer: the counter of failures.
      stores: the host stores, in which snapshots lose and get their writer.
      recorder: the recorder, which is told.
    """
    self._everybody = tuple(range(replicas))
    self._where = where
    self._crew = crew
    self._recoverer = recoverer
    self._stores = stores
    self._recorder = recorder
    self._shrunk_at: dict[int, int] = {}  # iteration, by stage

  def without(
    self, worker: child_process.WorkerProcess, what: str
  ) -> tuple[int, ...]:
    """Returns the team after a worker's death: without it, if need be.

    Args:
      worker: the dead worker.
      what: the description of what happened to it.

    Returns:
      The replicas of its stage that have a worker from now on.

    Raises:
      NoReplacementError: the worker cannot be replaced, and nobody may stand in
        for it.
    """
    if not self._where.captures.policy.takes_snapshots:
      raise NoReplacementError(
        f'{what}; with --policy=none there is nothing to recover from'
      )
    team = self._crew.team(worker.stage)
    has_none = not self._may_start(len(team))
    is_hopeless = has_none or self._recoverer.failures.is_crash_loop(
      worker.stage
    )
    if is_hopeless and self._where.on_failure == 'shrink' and len(team) > 1:
      team = tuple(r for r in team if r != worker.replica)
      self._recoverer.failures.forgive(worker.stage)
      self._shrunk_at[worker.stage] = self._recorder.iteration
      self._stores.orphan(worker.stage, team)
      self._recorder.event(
        'shrunk', stage=worker.stage, replica=worker.replica, team=team
      )
      self._recorder.view.note(
        f'stage {worker.stage} goes on without replica {worker.replica}: the '
        'others do its microbatches'
      )
    elif has_none:
      raise NoReplacementError(
        f'{what}; --max_workers={self._where.max_workers} processes were '
        'started, and nobody can take its place'
      )
    return team

  def grow(self) -> list[int]:
    """Returns the stages that get all their workers back now."""
    if not self._where.grow_after or self._recoverer.recovering:
      return []
    for stage, iteration in self._shrunk_at.items():
      is_time = self._recorder.iteration >= iteration + self._where.grow_after
      if is_time and self._may_start(len(self._everybody)):
        del self._shrunk_at[stage]
        self._stores.orphan(stage, self._everybody)
        # That the stage begins again is no failure.
        self._recoverer.failures.forgive(stage)
        self._recorder.event('grown', stage=stage, team=self._everybody)
        return [stage]  # one at a time
    return []

  def _may_start(self, count: int) -> bool:
    limit = self._where.max_workers
    return not limit or self._crew.started + count <= limit
