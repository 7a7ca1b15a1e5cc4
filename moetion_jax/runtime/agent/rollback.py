"""All stages go back together.

That is the recovery of every policy but 'sparse', and of that one too when
entries of the logs were damaged after somebody had verified them: all that was
made of them since then is dropped, whatever its checksums say.

A dead worker is replaced. All others stop where they are and keep their
process and their programs; with replicas they are replaced as well, since they
may hang in a collective. When nobody works any more, all begin again from the
newest snapshot that all have, with empty logs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from moetion_jax.recovery import (
  plan as recovery_plan,
  recoverer as recoverer_lib,
)
from moetion_jax.runtime.hosts import (
  child_process,
  crew as crew_lib,
  stores as stores_lib,
)


class Rollback:
  """One roll back of all stages.

  Call `begin` at a failure, and `finish` whenever a worker has stopped.

  Attributes:
    trusted: the newest state that is made of nothing damaged; None: every one.
  """

  def __init__(
    self,
    stages: int,
    crew: crew_lib.Crew,
    recoverer: recoverer_lib.Recoverer,
    stores: stores_lib.Stores,
    on_replaced: Callable[[child_process.WorkerProcess], None],
  ):
    """Stores the arguments.

    Args:
      stages: the number of stages.
      crew: the workers, which stop or are replaced.
      recoverer: the maker of the plan.
      stores: the host stores, which nobody writes meanwhile.
      on_replaced: called with each new worker.
    """
    self._stages = range(stages)
    self._crew = crew
    self._recoverer = recoverer
    self._stores = stores
    self._on_replaced = on_replaced
    self.trusted: int | None = None
    self._failed: dict[int, str] = {}
    self._newest = [0] * stages
    self._failed_at = 0.0
    self._detect_seconds = 0.0

  @property
  def is_under_way(self) -> bool:
    """True while all stages are to go back and have not begun again."""
    return self.trusted is not None or bool(self._failed)

  @property
  def is_ready(self) -> bool:
    """True if everybody has stopped to go back."""
    return bool(self._failed) and all(w.is_idle for w in self._crew.workers)

  def begin(
    self,
    worker: child_process.WorkerProcess,
    reason: str,
    team: tuple[int, ...],
  ) -> None:
    """Has everybody stop, because a worker is dead; called for each dead one.

    Args:
      worker: the dead worker.
      reason: the cause of its death.
      team: the replicas of its stage that have a worker from now on.

    Raises:
      errors.MoetionError: there were too many failures.
    """
    now = time.monotonic()
    if not self._failed:
      self._failed_at = now
      self._detect_seconds = now - (worker.fault_at or now)
    self._failed[worker.stage] = reason
    self._recoverer.count(
      {worker.stage: reason},
      # Older snapshots are to be trusted, and newer ones are dropped anyway.
      suspects=() if self.trusted is not None else worker.suspects,
      corrupt=None,
    )
    for stage in self._stages:
      members = self._crew.of_stage(stage)
      begun = max(w.iteration for w in members)
      self._newest[stage] = max(self._newest[stage], begun)
      if stage == worker.stage or len(members) > 1:
        new_team = team if stage == worker.stage else None
        for new in self._crew.replace(stage, team=new_team):
          self._on_replaced(new)
        continue
      for member in members:
        member.stop_here()

  def finish(self, reported: int) -> recovery_plan.RecoveryPlan | None:
    """Plans what all do now, if everybody has stopped to go back.

    Args:
      reported: the newest iteration that all reported and that is written down.

    Returns:
      The plan; None if no roll back is under way, or somebody still works.

    Raises:
      errors.MoetionError: nothing is left to start from.
    """
    if not self.is_ready:
      return None
    if self.trusted is None:
      self._stores.rescan()
    else:
      self._stores.forget_newer(self._recoverer.trusted(self.trusted))
    plan = self._recoverer.plan_together(
      self._failed,
      self._newest,
      reported,
      failed_at=self._failed_at,
      detect_seconds=self._detect_seconds,
    )
    self._failed, self._newest = {}, [0] * len(self._stages)
    self.trusted = None
    self._stores.drop_logs()  # only now: a start meanwhile finds it again
    if not plan.start:
      self._stores.forget_snapshots(plan.stages)
    return plan
