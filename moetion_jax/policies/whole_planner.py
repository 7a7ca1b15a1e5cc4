"""Planner of whole snapshots, and `make`, which makes the planner of a run.

All planners have the interface `planner.Planner`. They are pure but for what
they remember: reports go in, decisions come out.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Sequence

from moetion_jax import report
from moetion_jax.policies import (
  decision,
  intervals,
  partial_planner,
  planner,
  settings as capture_settings,
  sparse_planner,
)

_NOTICE = sparse_planner.NOTICE_ITERATIONS
# Iterations between snapshots until something is measured. As many come before
# the first snapshot.
_FIRST_INTERVAL = 6
_WARM_UP_ITERATIONS = 12
_MEASURED_ITERATIONS = 9
# Data files beyond those of the snapshots that are kept: the one being written,
# and two until everybody has been told what may go.
_SPARE_FILES = 3
# Data files of 'two_phase' in memory: the one being persisted, and the next.
_MEMORY_FILES = 2
# After this many late iterations, among this many, the interval grows.
_LATE = 3
_LATE_AMONG = 20
_GROWTH = 1.25


def make(
  settings: capture_settings.CaptureSettings,
  stages: Sequence[planner.StageSizes],
  platform: str,
  capacity: float | None = None,
  replicas: int = 1,
) -> planner.Planner:
  """Makes the planner of a run; arguments as in `SparsePlanner.__init__`."""
  if settings.rules.is_whole:
    return WholePlanner(settings, stages, platform, replicas)
  if not settings.rules.is_exact:
    return partial_planner.PartialPlanner(settings, stages, platform, replicas)
  return sparse_planner.SparsePlanner(
    settings, stages, platform, capacity, replicas
  )


class WholePlanner:
  """The `planner.Planner` of 'dense' and 'two_phase': whole snapshots.

  Attributes:
    interval: iterations between snapshots, in force or soon to be.
  """

  def __init__(
    self,
    settings: capture_settings.CaptureSettings,
    stages: Sequence[planner.StageSizes],
    platform: str,
    replicas: int = 1,
  ):
    """Stores the arguments; see `make`."""
    self.interval = settings.interval or _FIRST_INTERVAL
    self._settings = settings
    self._stages = stages
    self._replicas = replicas
    self._target = planner.overlap_target(settings, platform)
    self._first_iteration = 0  # that of the last decision
    self._has_chosen = self._has_grown = False
    self._seconds: collections.deque[float] = collections.deque(
      maxlen=_MEASURED_ITERATIONS
    )
    self._measured_iterations = 0
    self._since_snapshot_seconds = math.inf
    self._late: collections.deque[bool] = collections.deque(maxlen=_LATE_AMONG)
    self._tuner = intervals.TwoPhaseTuner(
      overhead_budget=settings.overhead_budget, interval=self.interval
    )

  @property
  def lag_iterations(self) -> int:
    """See `planner.Planner`."""
    return self.interval * (self._settings.keep_windows - 1)

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
      for stage in self._stages
    )

  def pools(self, workers: int | None = None) -> list[planner.PoolSize]:
    """See `planner.Planner`."""
    files = self._settings.keep_windows + _SPARE_FILES
    if self._settings.rules.is_durable:
      files = _MEMORY_FILES
    return [
      planner.PoolSize(files=files, size_bytes=size)
      for size in self._worker_bytes(workers or self._replicas)
    ]

  def _worker_bytes(self, workers: int) -> list[int]:
    """Returns the state bytes of the worker with most of them, by stage."""
    return [
      max(stage.in_order('static', {}, workers).snapshot_bytes(1, 'rolling'))
      for stage in self._stages
    ]

  def add(self, reports: Sequence[report.Report]) -> planner.Change | None:
    """See `planner.Planner`."""
    iteration = reports[0].iteration
    seconds = max(r.seconds for r in reports)
    takes_snapshot = any(r.snapshot_bytes for r in reports)
    durable_seconds = self._durable_seconds(reports)
    self._seconds.append(seconds)
    self._measured_iterations += 1
    self._late.append(
      any(
        r.blocked_seconds > sparse_planner.LATE_SHARE * r.seconds
        for r in reports
      )
    )
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
    if (
      self._settings.interval
      or self._measured_iterations < _WARM_UP_ITERATIONS
      or iteration < self._first_iteration
      or durable_seconds == math.inf
    ):
      return None
    if self._settings.rules.is_durable:
      return self._tuned(iteration)
    return self._chosen(iteration, reports)

  def _durable_seconds(self, reports: Sequence[report.Report]) -> float:
    """Returns the measured duration of a snapshot; inf while it is unknown."""
    pairs = zip(reports, self._worker_bytes(self._replicas), strict=True)
    return max(
      size / r.copy_bytes_per_second if r.copy_bytes_per_second else math.inf
      for r, size in pairs
    )

  def _chosen(
    self, iteration: int, reports: Sequence[report.Report]
  ) -> planner.Change | None:
    """Chooses the interval of 'dense' by measurement; late copies lengthen it.

    As in `sparse_planner`, there is another look whether a shorter one would
    do.
    """
    passed = iteration - self._first_iteration
    looks_again = sparse_planner.looks_again(passed, self.interval)
    if not self._has_chosen or (looks_again and not self._has_grown):
      seconds = statistics.median(self._seconds)
      bandwidths = [r.copy_bytes_per_second for r in reports]
      interval = intervals.common_dense_interval(
        zip(self._worker_bytes(self._replicas), bandwidths, strict=True),
        iteration_seconds=seconds,
        overlap_target=self._target,
      )
      copy_seconds = self._durable_seconds(reports)
      reason = (
        f'a copy takes {copy_seconds:.3g} s and may take {self._target:g} of '
        f'iterations of {seconds:.3g} s'
      )
      is_shorter = interval <= sparse_planner.SHORTER * self.interval
      if is_shorter or not self._has_chosen:
        self._has_chosen = True
        return self._change(iteration, interval, reason)
    if sum(self._late) < _LATE:
      return None
    self._has_grown = True
    interval = math.ceil(self.interval * _GROWTH)
    return self._change(iteration, interval, 'copies ran late')

  def _tuned(self, iteration: int) -> planner.Change | None:
    """Sets the interval of 'two_phase' that the measured costs ask for."""
    costs = self._tuner.costs
    self._tuner = intervals.tune(self._tuner)
    if costs is None or self._tuner.interval == self.interval:
      return None
    reason = (
      f'a checkpoint costs {costs.overhead_seconds:.3g} s and is on disk after '
      f'{costs.durable_seconds:.3g} s; it may cost '
      f'{self._tuner.overhead_budget:g} of iterations of '
      f'{costs.iteration_seconds:.3g} s'
    )
    return self._change(iteration, self._tuner.interval, reason)

  def _change(
    self, iteration: int, interval: int, reason: str
  ) -> planner.Change | None:
    """Changes to an interval, if it is another one."""
    self._late.clear()
    if interval == self.interval:
      return None
    # It begins with the first snapshot that nobody has begun: none is added.
    first_iteration = iteration + _NOTICE
    passed = first_iteration - self._first_iteration
    first_iteration += -passed % self.interval
    self.interval = interval
    return planner.Change(
      kind='interval',
      fields={
        'first_iteration': first_iteration,
        'interval': interval,
        'reason': reason,
      },
      decisions=self.decisions(first_iteration),
    )
