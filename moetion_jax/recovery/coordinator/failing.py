"""Failures: workers that died, that hang, or that found wrong bits."""

from __future__ import annotations

import dataclasses

from moetion_jax import errors
from moetion_jax.hostmem import segment_check
from moetion_jax.recovery import (
  actions,
  events,
  failures as failures_lib,
  hang_detection,
  notices,
  suspicion,
)
from moetion_jax.recovery.coordinator import going_back, state as state_lib

_DAMAGE_EVENTS = 20  # at most, of one check
_NO_FAILURE = ' (that counts as no failure)'


def died_early(state: state_lib.Beginning, event: events.Died) -> None:
  """Replaces a worker that died before there was anything to recover.

  Raises:
    failures_lib.WorkerError: there were too many such deaths.
  """
  worker = state.worker(event.worker)
  what = state.describe(worker, event)
  is_unmet = _judge_unmet(worker)
  cause = failures_lib.HangError(what) if worker.hangs else None
  if is_unmet:
    cause = errors.UnmetError(what)
  error = failures_lib.WorkerError(
    worker.stage, worker.iteration, what, cause=cause
  )
  if is_unmet:
    state.unmet += 1
  else:
    state.deaths += 1
  if max(state.deaths, state.unmet) > state.settings.max_failures:
    raise error
  if is_unmet:
    _record(state, worker, error)
  state.note(f'{error}{_NO_FAILURE * is_unmet}; it is started again.')
  state.replace(worker.stage, has_begun=False)
  for replica in state.team(worker.stage):
    state.ready.pop((worker.stage, replica), None)


def died(run: state_lib.Run, event: events.Died) -> state_lib.Asking[None]:
  """Handles a worker's death: its stage goes back, or all stages do.

  Raises:
    failures_lib.WorkerError: the run cannot go on.
  """
  worker = run.worker(event.worker)
  stage = worker.stage
  found = yield from run.scan((stage,))
  if found.gone:
    yield from _lose_stores(run, found.gone)
  lost = _lost_logs(run, found)
  if others := lost - {stage}:  # who lost a log may have lost all
    yield from run.scan(tuple(sorted(others)))
  if stage not in run.recoveries:  # else: of another
    worker.reached(max(found.newest[stage], run.inventory.newest(stage)))
  what = run.describe(worker, event)
  error = failures_lib.WorkerError(stage, worker.iteration, what)
  _judge_unmet(worker)
  _record(run, worker, error)
  try:
    team = _team_without(run, worker, what)
    if going_back.goes_together(run):
      run.note(f'{error}; all stages go back together.')
    plan = yield from going_back.after(run, worker, what, team, lost)
  except errors.MoetionError as why:
    raise failures_lib.WorkerError(
      stage, worker.iteration, str(why), cause=why
    ) from why
  if plan is not None:
    stages = ', '.join(map(str, plan.stages))
    run.note(
      f'{error}{_NO_FAILURE * worker.is_unmet}; stage(s) {stages} recover(s) '
      f'from iteration {plan.first_iteration} on, the others wait.'
    )


def _lose_stores(run: state_lib.Run, gone: str) -> state_lib.Asking[None]:
  """Takes in that stores were removed: logs and snapshots are lost at once.

  Otherwise each worker would find it out for itself, and no replacement could
  begin.
  """
  run.record('store_lost', path=gone)
  run.do(actions.MakeStores())
  yield from run.scan()
  if not any(map(run.inventory.newest, run.stages)):
    run.do(actions.Keep(keeps=False))
  run.note(
    f'{gone}: was removed while its run lived. What it held is lost, logs and '
    'snapshots; it is made anew'
  )


def _judge_unmet(worker: state_lib.Worker) -> bool:
  """Returns True, and notes it, if a dead worker's world did not come together.

  It has said so, or died before it had met the others: JAX ends processes that
  do not meet, and on a machine that has much to do they may not, or be killed.
  """
  is_meeting = worker.state is hang_detection.WorkerState.MEETING
  worker.is_unmet = worker.is_unmet or is_meeting
  return worker.is_unmet


def _record(
  state: state_lib.State,
  worker: state_lib.Worker,
  error: failures_lib.WorkerError,
) -> None:
  state.record(
    'unmet' if worker.is_unmet else 'failure',
    stage=worker.stage,
    replica=worker.replica,
    iteration=worker.iteration,
    generation=worker.generation,
    error=str(error),
  )


def _lost_logs(run: state_lib.Run, found: events.Scanned) -> set[int]:
  """Returns the stages whose logs are gone, or cut.

  A stage that never trained in this run may not have made its log yet.
  """
  return {stage for stage in run.trained if not found.log_bytes[stage]}


def failed_early(
  state: state_lib.State, worker: state_lib.Worker, message: notices.Failed
) -> None:
  """Ends the run, since a worker cannot begin, or would fail again.

  Raises:
    failures_lib.WorkerError: always, but for a world that does not meet.
  """
  if message.is_unmet:
    worker.is_unmet = True
    state.kill(worker, f'failed: {message.error}')
    return
  raise failures_lib.WorkerError(worker.stage, message.iteration, message.error)


def failed(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.Failed
) -> state_lib.Asking[None]:
  """Takes in a worker's last message, and ends it.

  Raises:
    errors.MoetionError: another attempt would end the same way.
  """
  if message.has_wrong_bits:
    text = yield from suspect(run, message.error)
    if text and message.advice:
      text = f'{text}; {message.advice}'
    message = dataclasses.replace(
      message,
      error=text or message.error,
      is_final=bool(text) and message.is_final,
    )
  if message.is_final:
    failed_early(run, worker, message)
  worker.reached(message.iteration)
  worker.suspects, worker.corrupt = message.suspects, message.corrupt
  worker.is_unmet = message.is_unmet
  # Quicker than its own end, and cannot hang.
  run.kill(worker, f'failed: {message.error}')


def refused(
  state: state_lib.State, worker: state_lib.Worker, message: notices.Refused
) -> None:
  """Ends a run that cannot begin, or go on; raises the error that says why."""
  if isinstance(state, state_lib.Run):
    raise failures_lib.WorkerError(
      worker.stage, worker.iteration, str(message.error())
    )
  raise message.error()


def faulted(
  state: state_lib.State, worker: state_lib.Worker, message: notices.Faulted
) -> None:
  """Takes in that a scripted fault happens."""
  state.record('fault', **message.fields)
  worker.fault_at = message.at
  worker.reached(message.iteration)


# ---- teams -------------------------------------------------------------------


def _team_without(
  run: state_lib.Run, worker: state_lib.Worker, what: str
) -> tuple[int, ...]:
  """Returns a stage's team after a worker's death: without it, if need be.

  Raises:
    failures_lib.NoReplacementError: the worker cannot be replaced, and nobody
      may stand in for it.
  """
  stage, settings = worker.stage, run.settings
  if not settings.captures.policy.takes_snapshots:
    raise failures_lib.NoReplacementError(
      f'{what}; with --policy=none there is nothing to recover from'
    )
  team = run.team(stage)
  has_none = not _may_start(run, len(team))
  is_loop = run.failures.is_crash_loop(stage, is_unmet=worker.is_unmet)
  is_hopeless = has_none or is_loop
  if is_hopeless and settings.shrinks and len(team) > 1:
    team = tuple(r for r in team if r != worker.replica)
    run.failures.forgive(stage)
    run.shrunk_at[stage] = run.recorded
    run.do(actions.Orphan(stage=stage, team=team))
    run.record('shrunk', stage=stage, replica=worker.replica, team=team)
    run.note(
      f'stage {stage} goes on without replica {worker.replica}: the others do '
      'its microbatches'
    )
  elif has_none:
    raise failures_lib.NoReplacementError(
      f'{what}; --max_workers={settings.max_workers} processes were started, '
      'and nobody can take its place'
    )
  return team


def grow(run: state_lib.Run) -> state_lib.Asking[None]:
  """Gives a shrunk stage its workers back, when it is time; one at a time."""
  settings = run.settings
  everybody = tuple(range(run.train.replicas))
  if not settings.grow_after or run.recoveries or run.signals:
    return
  for stage, iteration in run.shrunk_at.items():
    is_time = run.recorded >= iteration + settings.grow_after
    if is_time and _may_start(run, len(everybody)):
      del run.shrunk_at[stage]
      run.do(actions.Orphan(stage=stage, team=everybody))
      # That the stage begins again is no failure.
      run.failures.forgive(stage)
      run.record('grown', stage=stage, team=everybody)
      first, *_ = run.crew[stage].values()
      yield from going_back.after(run, first, 'its replicas return', everybody)
      return


def _may_start(run: state_lib.Run, count: int) -> bool:
  limit = run.settings.max_workers
  return not limit or run.started + count <= limit


# ---- workers that hang -------------------------------------------------------


def looked_early(state: state_lib.Beginning, event: events.Looked) -> None:
  """Ends workers that are stopped before all can train.

  Those that are silent may import or compile.

  Raises:
    failures_lib.HangError: the agent of another host stays stopped.
  """
  _note_looks(state, event)
  for worker in state.workers:
    if hang_detection.is_stopped(worker) and not worker.reason:
      why = f'was stopped (SIGSTOP) while {worker.state}'
      state.kill(worker, why, hangs=True)


def _note_looks(state: state_lib.State, event: events.Looked) -> None:
  for worker in state.workers:
    # Whoever has the agent of its host go on does so with it, a moment later.
    is_stopped = worker.name in event.stopped and not event.away
    worker.stopped_looks = (worker.stopped_looks + 1) * is_stopped
    if usage := event.usage.get(worker.name):
      worker.uses(usage, state.now)
  timeout_seconds = state.settings.hang_timeout_seconds
  if not event.away:
    state.away_seconds = 0.0
  elif not state.away:
    state.note(
      f'{event.away} is stopped (SIGSTOP), and all wait for it; the run ends '
      f'if that lasts {timeout_seconds:g} s'
    )
  elif state.away_seconds > timeout_seconds:
    raise failures_lib.HangError(
      f'{event.away} was stopped (SIGSTOP) for {state.away_seconds:.0f} s '
      f'(--hang_timeout={timeout_seconds:g})'
    )
  state.away = event.away


def looked(run: state_lib.Run, event: events.Looked) -> state_lib.Asking[None]:
  """Ends a worker that hangs.

  Raises:
    failures_lib.WorkerError: there is no room for what a worker has.
    failures_lib.HangError: the agent of another host stays stopped.
    errors.MoetionError: everybody waits for somebody, and no damaged entry
      explains it.
  """
  _note_looks(run, event)
  timeout_seconds = run.settings.hang_timeout_seconds
  for worker in run.workers:
    if why := hang_detection.hanging(
      worker, timeout_seconds, run.watched, run.workers
    ):
      run.kill(worker, why, hangs=True)
      return
    if (
      worker.shortage is hang_detection.Shortage.ROOM
      and run.watched - worker.state_since > run.settings.full_seconds
    ):
      raise failures_lib.WorkerError(
        worker.stage,
        worker.iteration,
        f'{worker.detail}; that was so for {run.settings.full_seconds:g} s',
      )
  if why := hang_detection.deadlock(run.workers, run.watched):
    found = yield from run.scan()
    for stage in sorted(_lost_logs(run, found)):
      worker, *_ = run.crew[stage].values()
      run.kill(worker, f'lost its log: {why}')
      return
    if text := (yield from suspect(run, why)):
      raise failures_lib.HangError(f'{text}; this is a defect of the program')
    run.kill(run.workers[0], f'waits for an entry that was lost: {why}')


# ---- damaged entries ---------------------------------------------------------


def suspect(
  run: state_lib.Run, error: str, *, counts_dropped: bool = True
) -> state_lib.Asking[str]:
  """Checks all logs, because bits are wrong that a damaged entry may explain.

  If one is damaged, all stages go back to before it as soon as the worker that
  found the wrong bits is dead (`going_back.after`).

  Args:
    run: the state.
    error: what is wrong.
    counts_dropped: whether those count that were found to be damaged before and
      written again. Whoever finds one has not used it, but others may have.

  Returns:
    '' if that is so; otherwise the error, and what the check says.

  Raises:
    errors.MoetionError: that happened too often, or there are no snapshots.
  """
  if run.rollback.trusted is not None:
    return ''
  # A stage that replays may have begun its log anew.
  begun = min(worker.iteration for worker in run.workers)
  settled = suspicion.settled(min(run.recorded, begun))
  checked: events.LogsChecked = yield actions.CheckLogs()
  # All of a log that cannot be read counts as damaged.
  unreadable = [
    segment_check.Damage(settled + 1, *one) for one in checked.unreadable
  ]
  finding = suspicion.find(
    [
      *checked.checks,
      *(segment_check.SegmentCheck(1, (one,)) for one in unreadable),
    ],
    run.dropped if counts_dropped else (),
    run.line,
    settled,
  )
  if finding.trusted is None:
    return f'{error} ({finding})'
  if not run.settings.captures.policy.takes_snapshots:
    raise errors.WrongBitsError(
      f'{error} ({finding}; with --policy=none there is nothing to go back to)'
    )
  tell_damage(run, finding, error)
  reached = max(worker.iteration for worker in run.workers)
  run.failures.add_damage(reached, f'{error} ({finding})')
  run.rollback.trusted = finding.trusted
  return ''


def tell_damage(
  run: state_lib.Run, finding: suspicion.Finding, what: str
) -> None:
  """Tells the user and the events of damaged entries, and what showed it."""
  for one in finding.damaged[:_DAMAGE_EVENTS]:
    run.record('damage_found', **dataclasses.asdict(one))
  run.note(
    f'Damaged host memory: {finding}. All that came after iteration '
    f'{finding.trusted} is dropped, lines of metrics.jsonl too, and done '
    f'again. What showed it: {what}'
  )
