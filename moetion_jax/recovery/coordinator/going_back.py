"""Going back: of the stages that lost something, or of all stages together.

All stages go back together under every policy but 'sparse', and under that one
too when entries of the logs were damaged after somebody had verified them: all
that was made of them since then is dropped, whatever its checksums say. A dead
worker is replaced then. All others stop where they are and keep their process
and their programs; with replicas they are replaced as well, since they may hang
in a collective. When nobody works any more, all begin again from the newest
snapshot that all have, with empty logs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from moetion_jax.policies import decision as decision_lib
from moetion_jax.recovery import (
  actions,
  events,
  failures as failures_lib,
  notices,
  orders,
  plan as recovery_plan,
  splice as splice_lib,
)
from moetion_jax.recovery.coordinator import state as state_lib

_TOGETHER = 'all stages go back together'


def goes_together(run: state_lib.Run) -> bool:
  """Returns True if all stages would go back at a failure of this moment."""
  is_under_way = run.rollback.trusted is not None or run.rollback.failed
  return bool(not run.settings.captures.policy.is_local or is_under_way)


# ---- the first time ----------------------------------------------------------


def first_plan(
  run: state_lib.Run,
  last_recorded: int,
  newest: Sequence[int],
  lost: Collection[int],
) -> recovery_plan.RecoveryPlan:
  """Plans that all stages begin: from the initial state, or what was left.

  Args:
    run: the state.
    last_recorded: newest iteration that is written down: later ones are done
      again.
    newest: by stage, the newest iteration of which its logs hold anything.
    lost: the stages whose logs are of no use.
  """
  run.replays_until = max(newest)
  plan = recovery_plan.plan(
    run.inventory.stage_inventories(newest, lost),
    run.stages,
    excluded=_unreported(run, last_recorded),
  )
  if plan.start == run.inventory.initial:
    plan = plan.all_again()  # nothing of an earlier run is used
  run.inventory.begin_at(plan.start)
  run.decisions = [[one] for one in run.planner.decisions(plan.start)]
  return plan


def begin(
  run: state_lib.Run,
  plan: recovery_plan.RecoveryPlan,
  lost: Collection[int],
  last_recorded: int,
) -> state_lib.Asking[None]:
  """Lets everybody train for the first time.

  Args:
    run: the state.
    plan: the plan that says from where.
    lost: the stages whose logs are of no use.
    last_recorded: the newest iteration that an earlier run wrote down.
  """
  policy = run.settings.captures.policy
  if plan.start == run.inventory.initial:
    lost = plan.stages
    run.forget_snapshots()
  if not policy.is_local:
    lost = plan.stages
    run.do(actions.DropLogs())
  if not policy.is_exact and last_recorded:
    yield from _forget_after(run, plan)
  _let_go(run, plan, lost)


# ---- after a failure ---------------------------------------------------------


def after(
  run: state_lib.Run,
  worker: state_lib.Worker,
  reason: str,
  team: tuple[int, ...],
  lost: Collection[int] = (),
) -> state_lib.Asking[recovery_plan.RecoveryPlan | None]:
  """Makes those workers go back that have to after the death of one.

  Args:
    run: the state.
    worker: the dead worker.
    reason: the cause of its death.
    team: the replicas of its stage that have a worker from now on.
    lost: the stages whose logs are gone.

  Returns:
    The plan, if only stages that lost something go back; None if all do.

  Raises:
    errors.MoetionError: there were too many failures, or nothing is left to
      start from.
  """
  if goes_together(run):
    _stop_all(run, worker, reason, team)
    yield from together(run)
    return None
  failed = {worker.stage: reason}
  _count(run, worker, reason, worker.suspects)
  if worker.corrupt:
    run.inventory.lose_entry(*worker.corrupt)
  newest = [run.begun(stage) for stage in run.stages]
  plan = recovery_plan.plan(
    run.inventory.stage_inventories(newest, lost),
    failed.keys(),
    excluded=_unreported(run, run.recorded),
  )
  # No log holds what such a plan needs, and all stages are members; unless
  # records lead from there to where logs begin.
  is_before = plan.start < run.line and not plan.applies
  detect_seconds = run.now - (worker.fault_at or run.now)
  _follow(run, plan, failed, newest, (run.now, detect_seconds), is_before)
  for stage in plan.stages:
    forget_end(run, stage)
    run.replace(stage, team if stage == worker.stage else ())
  if worker.corrupt and worker.corrupt[0] in plan.stages:
    yield from _drop_damaged(run, worker.corrupt[0], plan.first_iteration)
  if is_before and plan.start == run.inventory.initial:
    run.forget_snapshots()
  _let_go(run, plan, plan.stages if is_before else lost)
  return plan


def _count(
  run: state_lib.Run,
  worker: state_lib.Worker,
  reason: str,
  suspects: Sequence[int],
) -> None:
  """Counts a failure; `suspects`: snapshots of it that may be damaged."""
  failed = {worker.stage: reason}
  if worker.is_unmet:
    run.failures.add_unmet(worker.stage, run.line, reason)
  else:
    run.failures.add(failed, run.line, hangs=worker.hangs)
  if suspects:
    run.failures.add_divergence(failed, len(run.stages))
    for stage in failed:
      for iteration in suspects:
        run.inventory.lose(stage, iteration)


def _drop_damaged(
  run: state_lib.Run, stage: int, first_iteration: int
) -> state_lib.Asking[None]:
  """Drops the damaged entries that a stage will publish again."""
  dropped: events.Dropped = yield actions.DropDamaged(
    stage=stage, first_iteration=first_iteration
  )
  for one in dropped.entries:
    run.record(
      'entry_dropped',
      stage=one.stage,
      replica=one.replica,
      iteration=one.iteration,
      entry=one.entry,
    )
  run.dropped += dropped.entries


def _stop_all(
  run: state_lib.Run,
  worker: state_lib.Worker,
  reason: str,
  team: tuple[int, ...],
) -> None:
  """Has everybody stop, because a worker is dead; called for each dead one."""
  rollback = run.rollback
  if not rollback.failed:
    rollback.failed_at = run.now
    rollback.detect_seconds = run.now - (worker.fault_at or run.now)
  rollback.failed[worker.stage] = reason
  # Older snapshots are to be trusted, and newer ones are dropped anyway.
  suspects = () if rollback.trusted is not None else worker.suspects
  _count(run, worker, reason, suspects)
  for stage in run.stages:
    rollback.newest[stage] = max(rollback.newest[stage], run.begun(stage))
    members = list(run.crew[stage].values())
    if stage == worker.stage or len(members) > 1:
      run.replace(stage, team if stage == worker.stage else ())
      continue
    for member in members:
      if not member.is_idle and not member.is_going_back:
        member.is_going_back = True
        run.do(actions.Send(worker=member.name, order=orders.StopHere()))


def stopped_here(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.StoppedHere
) -> state_lib.Asking[None]:
  """Takes in that a worker has stopped; it begins its next generation."""
  del message
  worker.is_idle, worker.is_going_back = True, False
  worker.has_caught_up = False
  worker.reason, worker.suspects, worker.corrupt = '', (), None
  worker.generation += 1
  yield from together(run)


def together(run: state_lib.Run) -> state_lib.Asking[None]:
  """Lets all stages begin again, if they are to and everybody has stopped.

  Raises:
    errors.MoetionError: nothing is left to start from.
  """
  rollback, policy = run.rollback, run.settings.captures.policy
  if not rollback.failed or not all(w.is_idle for w in run.workers):
    return
  if rollback.trusted is not None:
    run.forget_after(rollback.trusted)
    run.dropped.clear()
    run.do(actions.ForgetNewer(iterations=trusted(run, rollback.trusted)))
  yield from run.scan()
  newest = [rollback.newest[stage] for stage in run.stages]
  plan = recovery_plan.plan(
    run.inventory.stage_inventories(newest, run.stages),
    run.stages,
    excluded=_unreported(run, run.recorded),
  )
  if plan.start == run.inventory.initial:
    plan = plan.all_again()
  _follow(
    run,
    plan,
    dict.fromkeys(run.stages, _TOGETHER) | rollback.failed,
    newest,
    (rollback.failed_at, rollback.detect_seconds),
    # No log goes on from the line.
    policy.is_local or plan.start < run.line,
  )
  run.rollback = state_lib.Rollback()
  run.do(actions.DropLogs())  # only now: a start meanwhile finds it again
  if plan.start == run.inventory.initial:
    run.forget_snapshots()
  for stage in plan.stages:
    forget_end(run, stage)
  if not policy.is_exact:
    yield from _forget_after(run, plan)
  _let_go(run, plan, plan.stages)


def trusted(run: state_lib.Run, iteration: int) -> dict[int, int]:
  """Returns what damaged entries leave of each stage (`splice.trusted`)."""
  return splice_lib.trusted(run.inventory.splices, iteration, len(run.stages))


def forget_end(run: state_lib.Run, stage: int) -> None:
  """Forgets what a stage's workers did at the end, since they go back."""
  for names in (run.done, run.asked, run.handed_over):
    names.difference_update({name for name in names if name[0] == stage})


def _forget_after(
  run: state_lib.Run, plan: recovery_plan.RecoveryPlan
) -> state_lib.Asking[None]:
  """Drops all after a plan's start: it will not come out the same again."""
  run.do(actions.ForgetNewer(iterations=plan.complete_at))
  yield from run.scan()
  versions = run.inventory.versions(plan.start)
  run.loss = run.planner.restart_from(plan.start, versions)
  run.decisions = [[one] for one in run.planner.decisions(plan.start)]
  lost = dataclasses.asdict(run.loss) if run.loss else {}
  run.record('rolled_back', iteration=plan.start, **lost)
  run.forget_after(plan.start, is_replanned=True)


def _unreported(run: state_lib.Run, recorded: int) -> set[tuple[int, int]]:
  """Returns starts after which an iteration would never be written down.

  A worker never reports the iteration of the state that it begins with. That
  it, or one before it, has done so is not known of every snapshot: some are of
  an earlier run, which may have ended before it wrote their lines.

  Args:
    run: the state.
    recorded: newest iteration that is written down.
  """
  return {
    (stage, start.iteration)
    for stage in run.stages
    for start in run.inventory.starts(stage)
    if start.iteration > recorded
  }


def _follow(
  run: state_lib.Run,
  plan: recovery_plan.RecoveryPlan,
  reasons: Mapping[int, str],
  newest: Sequence[int],
  failed: tuple[float, float],
  is_before: bool,
) -> None:
  """Puts the members of a plan on their way back.

  Args:
    run: the state.
    plan: the plan.
    reasons: by stage, why it goes back; the plan says it of others.
    newest: by stage, the iteration that it had begun.
    failed: time at which the failure was noticed, and seconds before that.
    is_before: whether all begin with empty logs, as at the line.
  """
  if is_before:
    run.inventory.go_back(plan.start)
    for decisions in run.decisions:
      first = min(decisions[0].first_iteration, plan.start)
      decisions[0] = dataclasses.replace(decisions[0], first_iteration=first)
  for stage in plan.stages:
    before = run.recoveries.get(stage)
    one = failures_lib.OngoingRecovery(
      stage=stage,
      plan=plan,
      target=max(newest[stage], before.target if before else 0),
      reason=reasons.get(stage) or plan.reasons[stage],
      failed_at=before.failed_at if before else failed[0],
      detect_seconds=failed[1],
      goes_back=is_before or bool(before and before.goes_back),
      # What is forgotten is compared with nothing.
      recorded=run.recorded if run.settings.captures.policy.is_exact else 0,
    )
    run.recoveries[stage] = one
    run.record(
      'recovery_started',
      stage=stage,
      replica=0,
      reason=one.reason,
      first_iteration=plan.first_iteration,
      target=one.target,
    )


# ---- orders ------------------------------------------------------------------


def _let_go(
  run: state_lib.Run,
  plan: recovery_plan.RecoveryPlan,
  fresh: Collection[int],
) -> None:
  """Has the members of a plan begin; logs of `fresh` stages begin empty.

  So do those that were to begin so before, of a worker that died before it did.
  """
  generations = {w.name: w.generation for w in run.workers}
  run.do(actions.Locate(generations=generations))
  for stage in plan.stages:
    team = run.crew[stage].values()
    is_fresh = stage in fresh or any(w.name in run.unbegun for w in team)
    run.unbegun = {name for name in run.unbegun if name[0] != stage}
    if is_fresh:
      run.inventory.log_began(stage, plan.applied_until[stage])
      run.unbegun |= {worker.name for worker in team}
    for worker in team:
      # From here on it replays, though it has not said so yet.
      worker.iteration = plan.applied_until[stage] + 1
      worker.is_idle = False
      order = _order(run, worker, plan, is_fresh=is_fresh)
      run.do(actions.Send(worker=worker.name, order=order))
      tell_stop(run, worker)


def tell_stop(run: state_lib.Run, worker: state_lib.Worker) -> None:
  """Tells a worker when to stop, if that is so."""
  if run.stop is not None:
    kind = orders.Commit if run.stop.commit else orders.Propose
    run.do(actions.Send(worker=worker.name, order=kind(limit=run.stop.limit)))


def _order(
  run: state_lib.Run,
  worker: state_lib.Worker,
  plan: recovery_plan.RecoveryPlan,
  *,
  is_fresh: bool,
) -> orders.Go:
  """Returns the order to a worker of a member of a plan."""
  stage, policy = worker.stage, run.settings.captures.policy
  log = run.log_size(stage)
  pool = run.planner.pools(len(run.crew[stage]))[stage]
  decisions = run.decisions[stage]
  held = decision_lib.active(
    decisions, max(plan.start, decisions[0].first_iteration)
  )
  later = [d for d in decisions if d.first_iteration > held.first_iteration]
  recovery = run.recoveries.get(stage)
  target = recovery.target if recovery else 0
  applied_until = plan.applied_until[stage]
  return orders.Go(
    start=plan.start,
    complete_at=plan.complete_at[stage],
    applied_until=applied_until if applied_until > plan.start else 0,
    newest=run.inventory.newest(stage),
    excluded=run.inventory.excluded(stage),
    target=target,
    replays_until=max(target, run.replays_until),
    line=run.inventory.kept_from,
    entry_line=run.inventory.entry_line,
    is_fresh=is_fresh,
    ring_bytes=log.ring_bytes,
    cells=log.cells,
    pool_files=pool.files,
    pool_bytes=pool.size_bytes,
    decisions=(held, *later),
    generation=worker.generation,
    keeps_entries=policy.is_local,
    merges=plan.start > run.inventory.initial and not policy.is_exact,
    capacity=run.planner.capacity(stage),
    capacity_until=run.loss.capacity_until if run.loss else 0,
    unverified_until=splice_lib.unverified_until(run.inventory.splices, stage),
  )
