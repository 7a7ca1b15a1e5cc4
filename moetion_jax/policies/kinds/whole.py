"""The policies `dense` and `two_phase`: whole snapshots now and then."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moetion_jax import report
from moetion_jax.policies import (
  decision,
  intervals,
  planner,
  settings as capture_settings,
)
from moetion_jax.policies.kinds import base

# Data files beyond those of the snapshots that are kept: the one being written,
# and two until everybody has been told what may go.
_SPARE_FILES = 3
_GROWTH = 1.25  # of the interval if copies run late


class _WholePlanner(base.IntervalPlanner):
  """A planner of whole snapshots."""

  def decisions(
    self, first_iteration: int
  ) -> tuple[decision.CaptureDecision, ...]:
    """See `planner.Planner`."""
    self._first_iteration = first_iteration
    return tuple(
      decision.CaptureDecision(
        first_iteration=first_iteration,
        window_length=1,
        mode=decision.MODES[0],
        every=self.interval,
        slots=(frozenset(stage.state_bytes),),
      )
      for stage in self.stages
    )

  def _worker_bytes(self, workers: int) -> list[int]:
    """Returns the state bytes of the worker with most of them, by stage."""
    return [
      max(stage.in_order('static', {}, workers).snapshot_bytes(1, 'rolling'))
      for stage in self.stages
    ]

  def _copy_seconds(self, reports: Sequence[report.Report]) -> float:
    """Returns the measured duration of a snapshot; inf while it is unknown."""
    pairs = zip(reports, self._worker_bytes(self.replicas), strict=True)
    return max(
      size / r.copy_bytes_per_second if r.copy_bytes_per_second else math.inf
      for r, size in pairs
    )

  def _may_change(self, reports: Sequence[report.Report]) -> bool:
    return (
      not self.settings.interval
      and self._is_warm
      and reports[0].iteration >= self._first_iteration
      and self._copy_seconds(reports) < math.inf
    )

  def _change(
    self, iteration: int, interval: int, reason: str
  ) -> planner.Change | None:
    """Changes to an interval, if it is another one."""
    self._late.clear()
    if interval == self.interval:
      return None
    # It begins with the first snapshot that nobody has begun: none is added.
    first_iteration = iteration + base.NOTICE_ITERATIONS
    passed = first_iteration - self._first_iteration
    first_iteration += -passed % self.interval
    self.interval = interval
    return self._interval_change(
      first_iteration, reason, self.decisions(first_iteration)
    )


class DensePlanner(_WholePlanner):
  """A planner of snapshots whose copies hide behind training.

  The interval is chosen by measurement; late copies lengthen it.
  """

  @property
  def _files(self) -> int:
    return self.settings.keep_windows + _SPARE_FILES

  def add(self, reports: Sequence[report.Report]) -> planner.Change | None:
    """See `planner.Planner`."""
    self._take_in(reports)
    self._note_late(reports)
    if not self._may_change(reports):
      return None
    iteration = reports[0].iteration
    passed = iteration - self._first_iteration
    if not self._has_chosen or self._looks_again(passed, self.interval):
      interval = self._hiding_interval(reports)
      is_first, self._has_chosen = not self._has_chosen, True
      if is_first or self._is_clearly_shorter(interval, self.interval):
        return self._change(
          iteration,
          interval,
          f'a copy takes {self._copy_seconds(reports):.3g} s and may take '
          f'{self._target:g} of iterations of {self._iteration_seconds:.3g} s',
        )
    if not self._runs_late:
      return None
    self._has_grown = True
    interval = math.ceil(self.interval * _GROWTH)
    return self._change(iteration, interval, 'copies ran late')


class TwoPhasePlanner(_WholePlanner):
  """A planner that keeps what checkpoints cost within a budget."""

  def __post_init__(self) -> None:
    super().__post_init__()
    self._since_snapshot_seconds = math.inf
    self._tuner = intervals.TwoPhaseTuner(
      overhead_budget=self.settings.overhead_budget, interval=self.interval
    )

  @property
  def _files(self) -> int:
    return 2  # in memory: the one being persisted, and the next

  def add(self, reports: Sequence[report.Report]) -> planner.Change | None:
    """See `planner.Planner`."""
    self._take_in(reports)
    seconds = max(r.seconds for r in reports)
    takes_snapshot = any(r.snapshot_bytes for r in reports)
    durable_seconds = self._copy_seconds(reports)
    self._tuner = intervals.observe(
      self._tuner,
      seconds,
      takes_snapshot=takes_snapshot,
      is_disturbed=self._since_snapshot_seconds <= durable_seconds,
      durable_seconds=durable_seconds if durable_seconds < math.inf else 0.0,
    )
    self._since_snapshot_seconds += seconds
    if takes_snapshot:  # of the state at the iteration's end
      self._since_snapshot_seconds = 0.0
    if not self._may_change(reports):
      return None
    costs = self._tuner.costs
    self._tuner = intervals.tune(self._tuner)
    if costs is None or self._tuner.interval == self.interval:
      return None
    return self._change(
      reports[0].iteration,
      self._tuner.interval,
      f'a checkpoint costs {costs.overhead_seconds:.3g} s and is on disk after '
      f'{costs.durable_seconds:.3g} s; it may cost '
      f'{self._tuner.overhead_budget:g} of iterations of '
      f'{costs.iteration_seconds:.3g} s',
    )


class Dense(capture_settings.Policy):
  """Whole snapshots in host memory, as often as copies hide (GEMINI)."""

  name = 'dense'
  planner = DensePlanner


class TwoPhase(capture_settings.Policy):
  """Whole snapshots that are written to storage (CheckFreq).

  A restore reads what is there; memory is lost with the process.
  """

  name = 'two_phase'
  planner = TwoPhasePlanner
  is_durable = True
