"""The beginning: workers start, and train from what an earlier run left."""

from __future__ import annotations

import dataclasses

from moetion_jax import errors
from moetion_jax.recovery import (
  actions,
  events,
  failures as failures_lib,
  inventory,
  notices,
  plan as recovery_plan,
  splice as splice_lib,
  suspicion,
)
from moetion_jax.recovery.coordinator import (
  failing,
  going_back,
  state as state_lib,
)

# Iterations of which a snapshot may be stored before their lines are written:
# reports are one late, and on their way.
_LATE_REPORTS = 2


def started(state: state_lib.Beginning, event: events.Started) -> None:
  """Starts a worker for every replica of every stage."""
  replicas = state.train.replicas
  log_bytes = sum(state.log_size(s).file_bytes for s in state.stages)
  state.do(actions.CheckRoom(needed_bytes=log_bytes * replicas))
  each = f' of {replicas} replicas' if replicas > 1 else ''
  state.note(f'Starting workers of {len(state.stages)} stage(s){each} ...')
  state.do(actions.Open())
  for stage in state.stages:
    state.crew.append({})
    state.start(
      actions.Replace(
        stage=stage,
        team=tuple(range(replicas)),
        generation=event.newest_generation + 1,
        has_begun=False,
      )
    )


def ready(
  state: state_lib.Beginning, worker: state_lib.Worker, message: notices.Ready
) -> state_lib.Asking[state_lib.Run | None]:
  """Takes in that a worker can train; with the last one, the run begins.

  Returns:
    The state of the run that has begun; None before.
  """
  state.ready[worker.name] = message
  if len(state.ready) < len(state.workers):
    return None
  run = _make_run(state)
  pools = run.planner.pools()
  # In the end the stores hold the logs and all states (`final_state`).
  states = sum(state.ready[stage, 0].state_bytes for stage in run.stages)
  stores = run.train.replicas * sum(
    run.log_size(stage).file_bytes + pool.files * pool.size_bytes
    for stage, pool in enumerate(pools)
  )
  run.do(actions.CheckRoom(needed_bytes=stores + states))
  accepted: events.Accepted = yield actions.Accept(ready=dict(state.ready))
  run.inventory.splices = splice_lib.in_force(accepted.splices)
  last_recorded = yield from _check_stored(run, accepted.last_recorded)
  yield from _begin(run, max(last_recorded, run.inventory.initial))
  return run


def _make_run(state: state_lib.Beginning) -> state_lib.Run:
  """Makes the state of a run whose workers can train.

  Raises:
    errors.ConfigError: the window is longer than a stage can have.
  """
  settings = state.settings
  first = [state.ready[stage, 0] for stage in state.stages]
  sizes = [message.operators for message in first]
  planner = settings.captures.policy.planner(
    settings.captures,
    sizes,
    first[0].platform,
    settings.job.expert_capacity,
    state.train.replicas,
  )
  base = {
    f.name: getattr(state, f.name) for f in dataclasses.fields(state_lib.State)
  }
  return state_lib.Run(
    **base,
    lowering_platform=first[0].lowering_platform,
    planner=planner,
    inventory=inventory.Inventory(
      settings.captures.policy,
      [s.state_bytes for s in sizes],
      planner.lag_iterations,
      settings.job.initial_iteration,
      settings.captures.log_lag,
    ),
    failures=failures_lib.Failures(settings.max_failures),
  )


def _check_stored(
  run: state_lib.Run, last_recorded: int
) -> state_lib.Asking[int]:
  """Drops what an earlier run made of damaged entries, before anybody trains.

  An error that an earlier run ended with may have come of them: then it would
  come again.

  Returns:
    The newest iteration that is written down then.
  """
  checked: events.LogsChecked = yield actions.CheckLogs(drops_unreadable=True)
  settled = suspicion.settled(min(last_recorded, *checked.newest))
  finding = suspicion.find(checked.checks, settled_until=settled)
  if finding.trusted is None:
    return last_recorded
  failing.tell_damage(run, finding, 'The run that is resumed')
  run.forget_after(finding.trusted)
  kept = going_back.trusted(run, finding.trusted)
  run.do(actions.ForgetNewer(iterations=kept))
  run.do(actions.DropLogs())  # last: until then, the next start finds it again
  return min(last_recorded, finding.trusted)


def _check_lines(run: state_lib.Run, last_recorded: int) -> None:
  """Checks that snapshots are not of no use for want of lines alone.

  Those before the recovery line are let go only when all up to it is written
  down: if none as old as the last line is left, later lines were lost. The
  first that a run takes, it may have taken before it wrote any line.

  Raises:
    errors.ConfigError: lines were lost; nothing has been removed yet.
  """
  inventories = run.inventory.stage_inventories([0] * len(run.stages))
  start = recovery_plan.plan(inventories, run.stages).start
  oldest = max(map(run.inventory.oldest, run.stages))
  taken = (run.decisions[stage][0] for stage in run.stages)
  first = max(one.first_iteration + one.every for one in taken)
  is_usable = start > run.inventory.initial
  if is_usable and oldest > max(last_recorded + _LATE_REPORTS, first):
    raise errors.ConfigError(
      'workdir',
      run.settings.workdir,
      f'metrics.jsonl in it ends with iteration {last_recorded}, but the run '
      f'has snapshots of iterations {oldest} and later in '
      f'{run.settings.snapshots}: lines are missing. Put the whole file back, '
      'then the same command goes on; --fresh starts over',
    )


def _check_digests(
  run: state_lib.Run, last_recorded: int
) -> state_lib.Asking[None]:
  """Checks that the snapshots are of the states that are written down.

  Nothing else would tell those of another run with the same settings: they have
  right checksums, and from the last line on nothing is compared.

  Raises:
    errors.ConfigError: they are not; nothing has been removed yet.
  """
  if not run.settings.captures.policy.is_exact:
    return
  of_stages = [run.inventory.iterations(stage) for stage in run.stages]
  iterations = sorted(
    iteration
    for iteration in frozenset.intersection(*of_stages)
    if run.inventory.initial < iteration <= last_recorded
    # What was taken with other software has digests of another trajectory.
    and not any(
      one.bars(stage, iteration)
      for one in run.inventory.splices
      for stage in run.stages
    )
  )
  if not iterations:
    return
  found: events.DigestsRead = yield actions.ReadDigests(
    iterations=tuple(iterations), operators=run.inventory.operators
  )
  for iteration, stored in found.stored.items():
    recorded = found.recorded.get(iteration)
    if recorded and stored != recorded:
      raise errors.ConfigError(
        'workdir',
        run.settings.workdir,
        f'metrics.jsonl in it has digest {recorded} for iteration {iteration}, '
        f'but the snapshot of it in {run.settings.snapshots} has {stored}: it '
        'is of another run, or that line was changed. Put back what belongs '
        'there, then the same command goes on; once these snapshots are moved '
        'away, it does the iterations again; --fresh starts over',
      )


def _begin(run: state_lib.Run, last_recorded: int) -> state_lib.Asking[None]:
  """Lets everybody train: from what an earlier run left, if it left any."""
  found = yield from run.scan()
  # A log that is too small now is not needed: everybody goes back alike. Where
  # nobody goes back alone no log is used.
  lost = {
    stage
    for stage, size in enumerate(found.log_bytes)
    if size < run.log_size(stage).file_bytes
    or not run.settings.captures.policy.is_local
  }
  if found.unreadable:
    run.note(
      f'{len(found.unreadable)} snapshot(s) cannot be read and will be written '
      f'again, the first of them: {found.unreadable[0]}'
    )
  run.inventory.logs_found(found.whole_from, found.newest)
  newest = [found.newest[stage] for stage in run.stages]
  plan = going_back.first_plan(run, last_recorded, newest, lost)
  initial = run.inventory.initial
  if plan.start == initial:
    _check_lines(run, last_recorded)
  else:
    yield from _check_digests(run, last_recorded)
  spliced: events.Spliced = yield actions.Splice(
    splice=splice_lib.Splice(
      exact_until=plan.start,
      complete_at=tuple(plan.complete_at[stage] for stage in run.stages),
    )
  )
  if spliced.is_due:
    yield from run.scan()
    lost, last_recorded = set(run.stages), min(last_recorded, plan.start)
    plan = plan.until_complete()  # later ones are gone
  run.inventory.splices = splice_lib.in_force(spliced.splices)
  run.inventory.is_running = True
  run.recorded = plan.start
  run.do(actions.Keep(keeps=plan.start > initial))
  source, base = run.settings.snapshots, run.settings.job.base
  if plan.start == initial:
    source = base.path if base else ''
  else:
    source = f'the snapshots in {source}'
  if source:
    run.record('resumed', first_iteration=plan.first_iteration)
    run.note(f'Going on with iteration {plan.first_iteration}, from {source}.')
  if plan.start == initial and last_recorded > initial:
    run.note(
      f'{run.settings.workdir} has {last_recorded - initial} iterations of '
      'this run; they are done again and compared.'
    )
  if remarks := run.planner.remarks(plan.start):
    run.record(remarks.kind, **remarks.fields)
  run.do(actions.Begin(iteration=plan.start))
  yield from going_back.begin(run, plan, lost, last_recorded)
