"""The leader's knowledge of and decisions on snapshots and recoveries.

`Recoverer` starts no process and sends nothing: the agent asks it, and does
what it says.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from moetion_jax import job_spec, report
from moetion_jax.logs import size
from moetion_jax.policies import (
  decision as decision_lib,
  planner,
  settings as capture_settings,
)
from moetion_jax.recovery import (
  failures as failures_lib,
  inventory,
  orders,
  plan as recovery_plan,
  splice as splice_lib,
)
from moetion_jax.snapshots import coverage

Event = Callable[..., None]  # called with the kind and the fields
_TOGETHER = 'all stages go back together'


class Recoverer:
  """Keeps the snapshots of all stages, the line and plans; call `begin` first.

  Attributes:
    line: the recovery line.
    failures: the count of each stage's failures.
    is_resumed: whether the run goes on with an earlier run's store.
  """

  def __init__(
    self,
    job: job_spec.JobSpec,
    captures: capture_settings.CaptureSettings,
    max_failures: int,
    event: Event,
  ):
    """Stores the arguments.

    Args:
      job: the run's job.
      captures: the settings of capture.
      max_failures: failures of one stage allowed without progress of the line;
        one more ends the run.
      event: writes one event.
    """
    self.is_resumed = False
    self._job = job
    self._settings = captures
    self._event = event
    self._recoveries: dict[int, failures_lib.OngoingRecovery] = {}
    self.failures = failures_lib.Failures(max_failures)
    self._replays_until = 0
    self._gone_back: recovery_plan.RecoveryPlan | None = None
    self._decisions: list[list[decision_lib.CaptureDecision]] = []
    self._loss: planner.Loss | None = None  # that of the last recovery

  @property
  def line(self) -> int:
    """The recovery line."""
    return self._inventory.line

  @property
  def kept_from(self) -> int:
    """The iteration from which on snapshots are kept."""
    return self._inventory.kept_from

  @property
  def recovering(self) -> Collection[int]:
    """The stages on their way back."""
    return self._recoveries.keys()

  def trusted(self, iteration: int) -> dict[int, int]:
    """Returns what damaged entries leave of each stage (`splice.trusted`)."""
    return splice_lib.trusted(
      self._inventory.splices, iteration, self._job.train.stages
    )

  def log_size(self, stage: int) -> size.LogSize:
    """Returns the size of a stage's log: what the line keeps, and some more."""
    return size.log_size(self._job, stage, self._settings.kept_iterations)

  def begin(self, sizes: Sequence[planner.StageSizes], platform: str) -> None:
    """Makes planner and inventory, once all stages can train.

    Args:
      sizes: the sizes of each stage's operators.
      platform: JAX's name of the devices' platform.

    Raises:
      errors.ConfigError: the window is longer than a stage can have.
    """
    self._planner = self._settings.policy.make_planner(
      self._settings,
      sizes,
      platform,
      self._job.expert_capacity,
      self._job.train.replicas,
    )
    self._inventory = inventory.Inventory(
      self._settings.policy,
      [s.state_bytes for s in sizes],
      self._planner.lag_iterations,
    )
    self._pools = self._planner.pools()

  def room_bytes(self) -> int:
    """Returns the host memory that logs and snapshots of all stages take."""
    return self._job.train.replicas * sum(
      self.log_size(stage).file_bytes + pool.files * pool.size_bytes
      for stage, pool in enumerate(self._pools)
    )

  def rescan(self, stage: int, shares: Collection[coverage.Share]) -> None:
    """Takes in the shares that a stage's store holds."""
    self._inventory.rescan(stage, shares)
    self.is_resumed = self.is_resumed or bool(shares)

  def newest_snapshot(self, stage: int) -> int:
    """Returns the iteration of a stage's newest snapshot; 0 without any."""
    return self._inventory.newest(stage)

  def first_plan(
    self, reported: int, newest: int
  ) -> recovery_plan.RecoveryPlan:
    """Plans that all stages begin: from the initial state, or what was left.

    Args:
      reported: newest iteration that is written down: later ones are done
        again.
      newest: newest iteration of which the logs hold anything.
    """
    stages = range(self._job.train.stages)
    self._replays_until = newest
    plan = recovery_plan.plan(
      self._inventory.stage_inventories([0] * len(stages)),
      stages,
      excluded=self._unreported(reported),
    )
    self._inventory.begin_at(plan.start)
    self._decisions = [
      [decision] for decision in self._planner.decisions(plan.start)
    ]
    return plan

  def splice(
    self, splices: Sequence[splice_lib.Splice], *, is_running: bool
  ) -> None:
    """Takes in all splices of the run; `is_running`: see `splice.allows`."""
    self._inventory.splices = splice_lib.in_force(splices)
    self._inventory.is_running = is_running

  def _unreported(
    self, reported: int, *, whole_only: bool = False
  ) -> set[tuple[int, int]]:
    """Returns starts after which an iteration would never be written down.

    Args:
      reported: newest iteration that all stages reported.
      whole_only: whether only starts with whole snapshots count. With any other
        the stage has done an iteration after the start too, and so had
        reported that of the start: reports are one iteration late.
    """
    return {
      (stage, start.iteration)
      for stage in range(self._job.train.stages)
      for start in self._inventory.starts(stage)
      if start.iteration > reported
      and (not whole_only or start.complete_at == start.iteration)
    }

  def go(
    self,
    stage: int,
    plan: recovery_plan.RecoveryPlan,
    *,
    is_fresh: bool,
    workers: int = 1,
    generation: int = 0,
  ) -> orders.Go:
    """Returns the order to the workers of a member of `plan`.

    Args:
      stage: the member.
      plan: the plan that is carried out.
      is_fresh: whether its logs begin empty.
      workers: number of the stage's workers, which share its snapshots.
      generation: the workers' generation.
    """
    log, pool = self.log_size(stage), self._planner.pools(workers)[stage]
    held = decision_lib.active(
      self._decisions[stage],
      max(plan.start, self._decisions[stage][0].first_iteration),
    )
    later = [
      d
      for d in self._decisions[stage]
      if d.first_iteration > held.first_iteration
    ]
    target = self._recoveries[stage].target if stage in self._recoveries else 0
    return orders.Go(
      start=plan.start,
      complete_at=plan.complete_at[stage],
      newest=self._inventory.newest(stage),
      excluded=self._inventory.excluded(stage),
      target=target,
      replays_until=max(target, self._replays_until),
      line=self.kept_from,
      is_fresh=is_fresh,
      ring_bytes=log.ring_bytes,
      cells=log.cells,
      pool_files=pool.files,
      pool_bytes=pool.size_bytes,
      decisions=(held, *later),
      generation=generation,
      keeps_entries=self._settings.policy.is_local,
      merges=bool(plan.start) and not self._settings.policy.is_exact,
      capacity=self._planner.capacity(stage),
      capacity_until=self._loss.capacity_until if self._loss else 0,
      unverified_until=splice_lib.unverified_until(
        self._inventory.splices, stage
      ),
    )

  # ---- while it runs --------------------------------------------------------

  def stored(self, stage: int, share: coverage.Share) -> None:
    """Takes in a snapshot that counts from now on."""
    self._inventory.stored(stage, share)

  def advance(self, reported: int, *, keeps_older: bool = True) -> bool:
    """Moves the line on; returns True if it moved.

    Args:
      reported: newest iteration that all stages reported.
      keeps_older: see `Inventory.advance`.
    """
    # A stage that goes back before the line has a long way: it fills stores and
    # logs, so the line moves on.
    frozen = any(not one.goes_back for one in self._recoveries.values())
    moved = self._inventory.advance(
      reported, frozen=frozen, keeps_older=keeps_older
    )
    if moved:
      self.failures.line_moved()
    return moved

  def add(
    self, reports: Sequence[report.Report]
  ) -> list[decision_lib.CaptureDecision] | None:
    """Takes in an iteration that all stages reported, in order.

    Returns:
      The new decision of each stage; None if nothing changes.
    """
    change = self._planner.add(reports)
    self._inventory.lag_iterations = self._planner.lag_iterations
    if change is None:
      return None
    if change.kind:
      self._event(change.kind, **change.fields)
    for known, decision in zip(self._decisions, change.decisions, strict=True):
      if not self._settings.policy.is_exact:  # no replay needs older ones
        known.clear()
      known.append(decision)
    return list(change.decisions)

  # ---- failures -------------------------------------------------------------

  def count(
    self,
    failed: Mapping[int, str],
    *,
    suspects: Sequence[int] = (),
    corrupt: tuple[int, int] | None = None,
  ) -> None:
    """Takes failures in.

    Args:
      failed: the reason of each failed stage.
      suspects: iterations of those stages' snapshots that may be damaged.
      corrupt: stage and iteration of a damaged log entry.

    Raises:
      errors.MoetionError: there were too many failures.
    """
    self.failures.add(failed, self.line)
    if corrupt:
      self._inventory.lose_entry(*corrupt)
    if suspects:
      self.failures.add_divergence(failed, len(self._pools))
      for stage in failed:
        for iteration in suspects:
          self._inventory.lose(stage, iteration)

  def fail(
    self,
    failed: Mapping[int, str],
    newest: Sequence[int],
    *,
    lost: Collection[int] = (),
    suspects: Sequence[int] = (),
    corrupt: tuple[int, int] | None = None,
    detect_seconds: float = 0.0,
    reported: int | None = None,
  ) -> recovery_plan.RecoveryPlan:
    """Plans the recovery of stages whose workers are dead.

    Args:
      failed: the reason of each failed stage.
      newest: the iteration that each stage had begun.
      lost: stages whose logs are gone.
      suspects: see `count`.
      corrupt: see `count`.
      detect_seconds: time between failure and notice, where known.
      reported: newest iteration that all stages reported; None if they reported
        all.

    Raises:
      errors.MoetionError: there were too many failures, or nothing is left to
        start from.
    """
    self.count(failed, suspects=suspects, corrupt=corrupt)
    plan = recovery_plan.plan(
      self._inventory.stage_inventories(newest, lost),
      failed.keys(),
      excluded=set()
      if reported is None
      else self._unreported(reported, whole_only=True),
    )
    self._follow(plan, failed, newest, time.monotonic(), detect_seconds)
    return plan

  def plan_together(
    self,
    failed: Mapping[int, str],
    newest: Sequence[int],
    reported: int,
    *,
    failed_at: float,
    detect_seconds: float = 0.0,
  ) -> recovery_plan.RecoveryPlan:
    """Plans that all stages go back together; nobody works any more.

    Args:
      failed: the reason of each failed stage; already counted.
      newest: the iteration that each stage had begun.
      reported: newest iteration that is written down: later ones are done
        again.
      failed_at: time at which the failure was noticed, `time.monotonic`.
      detect_seconds: time between failure and notice, where known.

    Raises:
      errors.MoetionError: nothing is left to start from.
    """
    stages = range(len(newest))
    plan = recovery_plan.plan(
      self._inventory.stage_inventories(newest, stages),
      stages,
      excluded=self._unreported(reported),
    )
    reasons = dict.fromkeys(stages, _TOGETHER) | dict(failed)
    if self._settings.policy.is_local:  # no log goes on from the line
      self._go_back(plan)
    self._follow(plan, reasons, newest, failed_at, detect_seconds)
    return plan

  def lose(self, plan: recovery_plan.RecoveryPlan) -> None:
    """Takes in what a plan of a policy that is not exact loses.

    Everything after the plan's start is forgotten, here and in the stores.
    """
    versions = self._inventory.versions(plan.start)
    self._loss = self._planner.restart_from(plan.start, versions)
    self._decisions = [
      [decision] for decision in self._planner.decisions(plan.start)
    ]
    fields = dataclasses.asdict(self._loss) if self._loss else {}
    self._event('rolled_back', iteration=plan.start, **fields)

  def _follow(
    self,
    plan: recovery_plan.RecoveryPlan,
    reasons: Mapping[int, str],
    newest: Sequence[int],
    now: float,
    detect_seconds: float,
  ) -> None:
    """Puts the members of a plan on their way back."""
    if plan.start < self.line:
      self._go_back(plan)
    goes_back = self.goes_back(plan)
    for stage in plan.stages:
      before = self._recoveries.get(stage)
      self._recoveries[stage] = failures_lib.OngoingRecovery(
        plan=plan,
        target=max(newest[stage], before.target if before else 0),
        reason=reasons.get(stage) or plan.reasons[stage],
        failed_at=before.failed_at if before else now,
        detect_seconds=detect_seconds,
        goes_back=goes_back or bool(before and before.goes_back),
      )
      self._event(
        'recovery_started',
        stage=stage,
        replica=0,
        reason=self._recoveries[stage].reason,
        first_iteration=plan.first_iteration,
        target=self._recoveries[stage].target,
      )

  def goes_back(self, plan: recovery_plan.RecoveryPlan) -> bool:
    """Returns True if a plan starts before the line: all logs begin empty.

    No log holds what its stages need, and all stages are members.
    """
    return plan is self._gone_back

  def _go_back(self, plan: recovery_plan.RecoveryPlan) -> None:
    self._gone_back = plan
    self._inventory.go_back(plan.start)
    self._decisions = [
      [
        dataclasses.replace(
          first, first_iteration=min(first.first_iteration, plan.start)
        ),
        *later,
      ]
      for first, *later in self._decisions
    ]

  def resumed(self, stage: int, fetch_seconds: float) -> None:
    """Takes in that a recovering worker has its state and begins to replay."""
    if one := self._recoveries.get(stage):
      one.fetch_seconds, one.resumed_at = fetch_seconds, time.monotonic()

  def caught_up(self, stage: int) -> str:
    """Takes in that a worker has done what its predecessor had begun.

    Returns:
      The text to show to the user; '' for a worker that did not recover.
    """
    one = self._recoveries.pop(stage, None)
    if one is None or one.fetch_seconds is None:
      return ''
    self._inventory.published_again(stage)
    now = time.monotonic()
    self._event(
      'recovered',
      stage=stage,
      replica=0,
      source=self._source(one.plan, stage),
      **one.measured(now),
      # A worker that finds another digest ends; it never catches up.
      digest_verified=self._settings.policy.is_exact,
      **self._lost_fields(),
    )
    if not self._recoveries:
      self.failures.all_caught_up()
    is_exact = self._settings.policy.is_exact
    return f'stage {stage} recovered {one.describe(now, is_exact=is_exact)}'

  def _lost_fields(self) -> dict[str, float]:
    if self._loss is None:
      return {}
    return {'lost_tokens': self._loss.lost_tokens, 'plt': self._loss.plt}

  def _source(self, plan: recovery_plan.RecoveryPlan, stage: int) -> str:
    """Returns the name of the place from which a stage got its state."""
    if plan.start and self._settings.policy.is_durable:
      return recovery_plan.DURABLE
    return plan.sources.get(stage, recovery_plan.OWN)
