"""Has workers begin, and begin again: those of one stage, or all together.

A worker that goes back is told from where (`Recoverer`), and gets what it needs
for it: other workers' addresses, logs without what is damaged, stores without
what no longer counts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from moetion_jax import errors, report
from moetion_jax.hostmem import segment_check
from moetion_jax.policies import settings as capture_settings
from moetion_jax.recovery import (
  plan as recovery_plan,
  recoverer as recoverer_lib,
  splice as splice_lib,
  suspicion,
)
from moetion_jax.runtime import messages
from moetion_jax.runtime.agent import (
  final_checkpoint,
  rollback,
  stopper as stopper_lib,
)
from moetion_jax.runtime.hosts import (
  child_process,
  crew as crew_lib,
  hosts as hosts_lib,
  stores as stores_lib,
)
from moetion_jax.runtime.records import recorder as recorder_lib

_DAMAGE_EVENTS = 20  # at most, of one check


class Comeback:
  """Has workers go back and begin again, by the rules of the run's policy."""

  def __init__(
    self,
    stages: int,
    policy: capture_settings.Policy,
    crew: crew_lib.Crew,
    hosts: hosts_lib.Hosts,
    recoverer: recoverer_lib.Recoverer,
    stores: stores_lib.Stores,
    recorder: recorder_lib.Recorder,
    final: final_checkpoint.FinalCheckpoint,
    stopper: stopper_lib.Stopper,
    on_replaced: Callable[[child_process.WorkerProcess], None],
  ):
    """Stores the arguments.

    Args:
      stages: the number of stages.
      policy: the policy, which says who goes back after a failure.
      crew: the workers.
      hosts: the hosts, which know the workers' addresses.
      recoverer: the maker of plans.
      stores: the host stores with logs and snapshots.
      recorder: the recorder, which knows what was reported.
      final: the record of who is done; workers that go back are not.
      stopper: tells workers when to stop.
      on_replaced: called with each new worker.
    """
    self._stages = range(stages)
    self._policy = policy
    self._crew = crew
    self._hosts = hosts
    self._recoverer = recoverer
    self._stores = stores
    self._recorder = recorder
    self._final = final
    self._stopper = stopper
    self._on_replaced = on_replaced
    self._rollback = rollback.Rollback(
      stages, crew, recoverer, stores, on_replaced
    )
    # Damaged entries that were written again: their readers may be wrong.
    self._dropped: list[segment_check.Damage] = []

  @property
  def goes_together(self) -> bool:
    """True if all stages would go back at a failure of this moment."""
    return not self._policy.is_local or self._rollback.is_under_way

  # ---- damaged entries -------------------------------------------------------

  def check_stored(self) -> None:
    """Drops what an earlier run made of damaged entries, before anybody trains.

    An error that an earlier run ended with may have come of them: then it would
    come again.
    """
    reached = min(self._stores.newest_entry([s]) for s in self._stages)
    settled = suspicion.settled(min(self._recorder.last_recorded, reached))
    checks = self._stores.check_logs(settled, drops_unreadable=True)
    finding = suspicion.find(checks, settled_until=settled)
    if finding.trusted is None:
      return
    self._tell(finding, 'The run that is resumed')
    self._recorder.forget_after(finding.trusted)
    self._stores.forget_newer(self._recoverer.trusted(finding.trusted))
    self._stores.drop_logs()  # last: until then, the next start finds it again

  def suspect(self, error: str, *, counts_dropped: bool = True) -> str:
    """Checks all logs, because bits are wrong that a damaged entry may explain.

    If one is damaged, all stages go back to before it as soon as the worker
    that found the wrong bits is dead (`after`).

    Args:
      error: what is wrong.
      counts_dropped: whether those count that were found to be damaged before
        and written again. Whoever finds one has not used it, but others may
        have.

    Returns:
      '' if that is so; otherwise the error, and what the check says.

    Raises:
      errors.MoetionError: that happened too often, or there are no snapshots.
    """
    if self._rollback.trusted is not None:
      return ''
    # A stage that replays may have begun its log anew.
    begun = min(worker.iteration for worker in self._crew.workers)
    settled = suspicion.settled(min(self._recorder.iteration, begun))
    finding = suspicion.find(
      self._stores.check_logs(settled),
      self._dropped if counts_dropped else (),
      self._recoverer.line,
      settled,
    )
    if finding.trusted is None:
      return f'{error} ({finding})'
    if not self._policy.takes_snapshots:
      raise errors.WrongBitsError(
        f'{error} ({finding}; with --policy=none there is nothing to go back '
        'to)'
      )
    self._tell(finding, error)
    reached = max(worker.iteration for worker in self._crew.workers)
    self._recoverer.failures.add_damage(reached, f'{error} ({finding})')
    self._rollback.trusted = finding.trusted
    return ''

  def weigh(self, message: messages.Failed) -> messages.Failed:
    """Returns a worker's last message, of wrong bits, as it is to be taken."""
    text = self.suspect(message.error)
    if not text:
      return dataclasses.replace(message, is_final=False)
    error = '; '.join(filter(None, (text, message.advice)))
    return dataclasses.replace(message, error=error)

  def record(
    self, worker: child_process.WorkerProcess, one: report.Report
  ) -> list[report.Report] | None:
    """Records a report (`Recorder.add`); a wrong one ends its worker.

    Raises:
      errors.WrongBitsError: it is wrong, and no damaged entry explains it.
    """
    try:
      return self._recorder.add(one, [self._crew.team(s) for s in self._stages])
    except errors.WrongBitsError as error:
      if text := self.suspect(str(error)):
        raise type(error)(text) from error
      worker.reason = f'reported other bits: {error}'
      worker.kill()
      return None

  def is_wrong_at_end(self, worker: child_process.WorkerProcess) -> bool:
    """Checks all logs once more, when all are done; True: all go back.

    Args:
      worker: any worker; it is ended if all go back.
    """
    if self.suspect('the run is done', counts_dropped=False):
      return False
    worker.reason = 'was ended, since the last iterations are wrong'
    worker.kill()
    return True

  def _tell(self, finding: suspicion.Finding, what: str) -> None:
    """Tells the user and the events of damaged entries."""
    for one in finding.damaged[:_DAMAGE_EVENTS]:
      self._recorder.event('damage_found', **dataclasses.asdict(one))
    assert finding.trusted is not None
    self._recorder.view.note(
      f'Damaged host memory: {finding}. All that came after iteration '
      f'{finding.trusted} is dropped, lines of metrics.jsonl too, and done '
      f'again. What showed it: {what}'
    )

  # ---- going back ------------------------------------------------------------

  def splice(self, plan: recovery_plan.RecoveryPlan) -> bool:
    """Splices what comes to the run, if it has other bits than what was.

    Call before `begin`. All that comes after the plan's start is removed, but
    for the snapshots that its conversions fold.

    Args:
      plan: the plan with which all stages begin.

    Returns:
      True if all logs are gone.
    """
    one = splice_lib.Splice(
      exact_until=plan.start,
      complete_at=tuple(plan.complete_at[stage] for stage in self._stages),
    )
    is_due = self._recorder.begin_splice(one)
    if is_due:
      self._stores.drop_logs()
      self._stores.forget_newer(plan.complete_at)
      self._recorder.finish_splice(one)
    self._recoverer.splice(self._recorder.splices, is_running=True)
    return is_due

  def begin(
    self,
    plan: recovery_plan.RecoveryPlan,
    lost: frozenset[int],
    last_recorded: int,
  ) -> None:
    """Lets everybody train for the first time.

    Args:
      plan: the plan that says from where.
      lost: the stages whose logs are of no use.
      last_recorded: the newest iteration that an earlier run wrote down; 0 for
        none.
    """
    if not plan.start:
      lost = frozenset(plan.stages)
      self._stores.forget_snapshots(plan.stages)
    if not self._policy.is_local:
      lost = frozenset(plan.stages)
      self._stores.drop_logs()
    if not self._policy.is_exact and last_recorded:
      self._forget_after(plan)
    for worker in self._crew.workers:
      self._let_go(worker, plan, is_fresh=worker.stage in lost)

  def after(
    self,
    worker: child_process.WorkerProcess,
    reason: str,
    lost: frozenset[int],
    team: tuple[int, ...],
  ) -> recovery_plan.RecoveryPlan | None:
    """Makes those workers go back that have to after the death of one.

    Args:
      worker: the dead worker.
      reason: the cause of its death.
      lost: the stages whose logs are gone.
      team: the replicas of its stage that have a worker from now on.

    Returns:
      The plan, if only stages that lost something go back; None if all do.

    Raises:
      errors.MoetionError: there were too many failures, or nothing is left to
        start from.
    """
    if self.goes_together:
      self._rollback.begin(worker, reason, team)
      self.together()
      return None
    plan = self._recoverer.fail(
      {worker.stage: reason},
      [
        max(w.iteration for w in self._crew.of_stage(stage))
        for stage in self._stages
      ],
      lost=lost,
      suspects=worker.suspects,
      corrupt=worker.corrupt,
      detect_seconds=0.0
      if worker.fault_at is None
      else time.monotonic() - worker.fault_at,
      reported=self._recorder.iteration,
    )
    for stage in plan.stages:
      self._final.forget(stage)
      new_team = team if stage == worker.stage else None
      for new in self._crew.replace(stage, team=new_team):
        self._on_replaced(new)
    if worker.corrupt and worker.corrupt[0] in plan.stages:
      self._dropped += self._stores.drop_damaged(
        worker.corrupt[0], plan.first_iteration
      )
    # If everybody goes back, what they need is no longer in anybody's log.
    goes_back = self._recoverer.goes_back(plan)
    if goes_back and not plan.start:
      self._stores.forget_snapshots(plan.stages)
    for stage in plan.stages:
      for new in self._crew.of_stage(stage):
        self._let_go(new, plan, is_fresh=goes_back or stage in lost)
        self._stopper.tell([new])
    if self._hosts.others:
      locations = self._hosts.locations(self._crew.workers)
      for other in self._crew.workers:
        other.send(locations)
    return plan

  def together(self) -> None:
    """Lets all stages begin again, if they are to and everybody has stopped.

    Raises:
      errors.MoetionError: nothing is left to start from.
    """
    trusted = self._rollback.trusted
    if trusted is not None and self._rollback.is_ready:
      self._recorder.forget_after(trusted)
      self._dropped.clear()
    plan = self._rollback.finish(self._recorder.iteration)
    if plan is None:
      return
    for stage in plan.stages:
      self._final.forget(stage)
    if not self._policy.is_exact:
      self._forget_after(plan)
    for worker in self._crew.workers:
      self._let_go(worker, plan, is_fresh=True)
      self._stopper.tell([worker])

  def _forget_after(self, plan: recovery_plan.RecoveryPlan) -> None:
    """Drops all after a plan's start: it will not come out the same again."""
    self._stores.forget_newer(plan.complete_at)
    self._recoverer.lose(plan)
    self._recorder.forget_after(plan.start, is_replanned=True)

  def _let_go(
    self,
    worker: child_process.WorkerProcess,
    plan: recovery_plan.RecoveryPlan,
    *,
    is_fresh: bool,
  ) -> None:
    """Has a worker carry out its part of a plan."""
    if self._hosts.others:
      worker.send(self._hosts.locations(self._crew.workers))
    # From here on the worker replays, though it has not said so yet.
    worker.iteration, worker.is_idle = plan.first_iteration, False
    go = self._recoverer.go(
      worker.stage,
      plan,
      is_fresh=is_fresh,
      workers=len(self._crew.team(worker.stage)),
      generation=worker.generation,
    )
    worker.send(go)
