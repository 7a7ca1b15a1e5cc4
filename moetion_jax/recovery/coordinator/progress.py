"""Progress: what workers do, store and report, the line, the agreed end."""

from __future__ import annotations

from moetion_jax import errors
from moetion_jax.policies import decision as decision_lib
from moetion_jax.recovery import (
  actions,
  events,
  hang_detection,
  notices,
  orders,
  plan as recovery_plan,
  stopping,
)
from moetion_jax.recovery.coordinator import (
  failing,
  going_back,
  state as state_lib,
)

# How long a worker may wait until the line has freed a snapshot.
_FULL_SECONDS = 1.0


def says(
  state: state_lib.State, worker: state_lib.Worker, message: notices.State
) -> None:
  """Takes in what a worker does now."""
  said = message.state, message.detail, message.steps
  known = worker.state, worker.detail, worker.steps
  iteration = max(worker.iteration, message.iteration)
  if (*said, iteration) != (*known, worker.iteration):
    worker.state_since = state.watched
  worker.state, worker.detail, worker.steps = said
  worker.shortage, worker.iteration = message.shortage, iteration


def trains(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.State
) -> None:
  """Takes in what a worker that trains does now; some need help."""
  blocked = hang_detection.WorkerState.BLOCKED
  if message.shortage is hang_detection.Shortage.SNAPSHOTS:
    # With gaps in the stores the line may stay behind, and nothing would free
    # snapshots: to go on is worth more than an older start.
    if run.watched - worker.state_since > _FULL_SECONDS:
      _advance(run, keeps_older=False)
  elif message.state is blocked and worker.state is not blocked:
    run.note(
      f'{run.name_of(worker)} is blocked: {message.detail}; the run ends if '
      f'that lasts {run.settings.full_seconds:g} s'
    )
  says(run, worker, message)


def resumed(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.Resumed
) -> None:
  """Takes in that a worker has its state and begins to train, or to replay."""
  run.trained.add(worker.stage)
  run.unbegun.discard(worker.name)
  worker.reached(message.first_iteration)
  if one := run.recoveries.get(worker.stage):
    one.fetch_seconds, one.resumed_at = message.fetch_seconds, run.now


def caught_up(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.CaughtUp
) -> None:
  """Takes in that a worker has done what its predecessor had begun."""
  del message
  worker.has_caught_up = True
  stage = worker.stage
  if not all(w.has_caught_up for w in run.crew[stage].values()):
    return
  one = run.recoveries.pop(stage, None)
  if one is not None and one.fetch_seconds is not None:
    run.inventory.published_again(stage)
    policy, loss = run.settings.captures.policy, run.loss
    is_on_disk = one.plan.start and policy.is_durable
    run.record(
      'recovered',
      stage=stage,
      replica=0,
      source=recovery_plan.DURABLE
      if is_on_disk
      else one.plan.sources.get(stage, recovery_plan.OWN),
      **one.measured(run.now),
      digest_verified=policy.is_exact and one.compared_iterations > 0,
      **({'lost_tokens': loss.lost_tokens, 'plt': loss.plt} if loss else {}),
    )
    if not run.recoveries:
      run.failures.all_caught_up()
    how = one.describe(run.now, is_exact=policy.is_exact)
    run.note(f'stage {stage} recovered {how}')
  _advance(run)


def stored(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.Stored
) -> None:
  """Takes in a snapshot that counts from now on."""
  worker.reached(message.share.iteration)
  if not any(map(run.inventory.newest, run.stages)):
    run.do(actions.Keep(keeps=True))  # now there is something to go on with
  run.inventory.stored(worker.stage, message.share)
  _advance(run)


def _advance(run: state_lib.Run, *, keeps_older: bool = True) -> None:
  """Moves the recovery line on, if it can; see `Inventory.advance`."""
  # A stage that goes back before the line has a long way: it fills stores and
  # logs, so the line moves on.
  frozen = any(not one.goes_back for one in run.recoveries.values())
  line = run.line
  if run.inventory.advance(
    run.recorded, frozen=frozen, keeps_older=keeps_older
  ):
    if run.line != line:
      run.failures.line_moved()
    run.do(
      actions.MoveLine(
        kept_from=run.inventory.kept_from, entry_line=run.inventory.entry_line
      )
    )


def reported(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.Reported
) -> state_lib.Asking[None]:
  """Has a report written down; a wrong one ends its worker.

  Raises:
    errors.WrongBitsError: it is wrong, or too many updates are not finite, and
      no damaged entry explains it.
  """
  worker.reached(message.report.iteration)
  merged: events.Merged = yield actions.Merge(
    report=message.report, teams=tuple(map(run.team, run.stages))
  )
  if merged.wrong:
    if text := (yield from failing.suspect(run, str(merged.wrong))):
      raise type(merged.wrong)(text) from merged.wrong
    run.kill(worker, f'reported other bits: {merged.wrong}')
    return
  run.recorded = merged.iteration
  if not merged.reports:
    return
  if merged.skipped > run.settings.max_skipped:
    what = (
      f'{merged.skipped} updates in a row, up to that of iteration '
      f'{merged.iteration}, were left out, since their loss or norm is not '
      f'finite; more than --max_skipped={run.settings.max_skipped} end the run'
    )
    if text := (yield from failing.suspect(run, what)):
      raise errors.NonFiniteError(
        text, 'raise it, or lower --learning_rate and start over with --fresh'
      )
    run.kill(worker, f'was ended: {what}')
    return
  _advance(run)
  if run.settings.warms_standbys and not run.signals and not run.recoveries:
    # Between iterations: starts and recoveries need the cores.
    run.do(actions.Warm(platform=run.lowering_platform))
  _decide(run, merged)
  yield from failing.grow(run)


def _decide(run: state_lib.Run, merged: events.Merged) -> None:
  """Tells everybody what is captured from now on, if that changes."""
  change = run.planner.add(merged.reports)
  run.inventory.lag_iterations = run.planner.lag_iterations
  if change is None:
    return
  if change.kind:
    run.record(change.kind, **change.fields)
  if not change.decisions:
    return
  for known, decision in zip(run.decisions, change.decisions, strict=True):
    first = max(run.line, known[0].first_iteration)
    del known[: known.index(decision_lib.active(known, first))]
    known.append(decision)
  for worker in run.workers:
    order = orders.Decide(decision=change.decisions[worker.stage])
    run.do(actions.Send(worker=worker.name, order=order))


# ---- all end after the same iteration ----------------------------------------


def propose_end(run: state_lib.Run) -> None:
  """Proposes to stop soon."""
  newest = max(worker.iteration for worker in run.workers)
  _stop(run, stopping.first_proposal(newest, run.train.iterations))


def answered(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.Answer
) -> None:
  """Takes in a worker's answer to a proposal."""
  if run.stop is None or message.limit != run.stop.limit:
    return  # it answers an earlier proposal
  run.answers[worker.name] = message.begun
  if decision := stopping.decide(
    message.limit, run.answers, len(run.workers), run.train.iterations
  ):
    _stop(run, decision)


def _stop(run: state_lib.Run, decision: stopping.StopDecision) -> None:
  run.stop = decision
  run.answers.clear()
  for worker in run.workers:
    going_back.tell_stop(run, worker)
