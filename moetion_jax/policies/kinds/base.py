"""Bookkeeping that the planners share: what was measured, and what was late.

Planners are pure but for what they remember: reports go in, decisions come out.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import statistics
from collections.abc import Sequence

from moetion_jax import report
from moetion_jax.policies import (
  decision,
  intervals,
  planner,
  settings as capture_settings,
)

# A decision holds from this many iterations after the newest reported one: no
# stage has begun that one. (If one had, nothing but its slots would differ.)
NOTICE_ITERATIONS = 3
# An iteration that waited for a copy for longer than this share of it was late;
# after this many late ones, among this many, snapshots get smaller or rarer.
_LATE_SHARE = 0.02
_LATE_ITERATIONS = 3
_LATE_AMONG = 20
# After this many windows, and iterations, there is another look whether a
# shorter window would do: while a run begins, copies and iterations are slower
# than later. It has to be shorter by a quarter: measurements are noisy.
_LOOK_WINDOWS = 4
_LOOK_ITERATIONS = 12
_SHORTER = 0.75
# Iterations between snapshots until something is measured. As many come before
# the first snapshot.
_FIRST_INTERVAL = 6


def is_late(blocked_seconds: float, seconds: float) -> bool:
  """Returns True if `seconds` of training waited too long for a copy."""
  return blocked_seconds > _LATE_SHARE * seconds


@dataclasses.dataclass(eq=False)
class MeasuringPlanner(planner.Planner):
  """A planner that remembers the last reports.

  Attributes:
    settings: the run's settings of capture.
    stages: the operators of each stage.
    platform: the platform, as JAX names it.
    expert_capacity: tokens that an expert takes in an iteration at most.
    replicas: number of replicas of each stage.
    WARM_UP_ITERATIONS: iterations before anything is chosen.
    MEASURED_ITERATIONS: the last ones, which a choice goes by.
  """

  WARM_UP_ITERATIONS = 12
  MEASURED_ITERATIONS = 9

  settings: capture_settings.CaptureSettings
  stages: Sequence[planner.StageSizes]
  platform: str
  expert_capacity: float | None = None
  replicas: int = 1

  def __post_init__(self) -> None:
    self._target = self.settings.copy_share(self.platform)
    self._measured: collections.deque[Sequence[report.Report]] = (
      collections.deque(maxlen=self.MEASURED_ITERATIONS)
    )
    self._iterations = 0  # that were reported
    self._late: collections.deque[bool] = collections.deque(maxlen=_LATE_AMONG)
    self._first_iteration = 0  # that of the last decision
    self._has_chosen = False  # from measurements
    self._has_grown = False  # since copies ran late

  def _take_in(self, reports: Sequence[report.Report]) -> None:
    self._measured.append(reports)
    self._iterations += 1

  def _note_late(self, reports: Sequence[report.Report]) -> None:
    late = any(is_late(r.blocked_seconds, r.seconds) for r in reports)
    self._late.append(late)

  @property
  def _is_warm(self) -> bool:
    return self._iterations >= self.WARM_UP_ITERATIONS

  @property
  def _runs_late(self) -> bool:
    return sum(self._late) >= _LATE_ITERATIONS

  def _looks_again(self, passed: int, window_iterations: int) -> bool:
    """Returns True when it is time to look whether a shorter window would do.

    It never is after copies ran late: a window that was too short is not tried
    again.

    Args:
      passed: iterations since the window came into force.
      window_iterations: iterations of one window.
    """
    every = max(_LOOK_WINDOWS * window_iterations, _LOOK_ITERATIONS)
    is_time = passed > 0 and passed % every == 0
    return is_time and self._has_chosen and not self._has_grown

  def _is_clearly_shorter(self, iterations: int, than: int) -> bool:
    return iterations <= _SHORTER * than


class IntervalPlanner(MeasuringPlanner):
  """A planner of snapshots at equal distances.

  Attributes:
    interval: iterations between snapshots, in force or soon to be.
  """

  def __post_init__(self) -> None:
    super().__post_init__()
    self.interval = self.settings.interval or _FIRST_INTERVAL
    self._has_chosen = bool(self.settings.interval)

  @property
  def lag_iterations(self) -> int:
    """See `planner.Planner`."""
    return capture_settings.lag_iterations(
      self.interval, self.settings.keep_windows
    )

  @property
  @abc.abstractmethod
  def _files(self) -> int:
    """Data files of a worker."""

  @abc.abstractmethod
  def _worker_bytes(self, workers: int) -> list[int]:
    """Returns the bytes of the largest snapshot of a worker, by stage."""

  def pools(self, workers: int | None = None) -> list[planner.PoolSize]:
    """See `planner.Planner`."""
    return [
      planner.PoolSize(files=self._files, size_bytes=size)
      for size in self._worker_bytes(workers or self.replicas)
    ]

  @property
  def _iteration_seconds(self) -> float:
    return statistics.median(
      max(r.seconds for r in reports) for reports in self._measured
    )

  def _hiding_interval(self, reports: Sequence[report.Report]) -> int:
    """Returns the interval in which every worker's copy hides."""
    bandwidths = [r.copy_bytes_per_second for r in reports]
    return intervals.common_dense_interval(
      zip(self._worker_bytes(self.replicas), bandwidths, strict=True),
      iteration_seconds=self._iteration_seconds,
      overlap_target=self._target,
    )

  def _interval_change(
    self,
    first_iteration: int,
    reason: str,
    decisions: tuple[decision.CaptureDecision, ...],
  ) -> planner.Change:
    return planner.Change(
      kind='interval',
      fields={
        'first_iteration': first_iteration,
        'interval': self.interval,
        'reason': reason,
      },
      decisions=decisions,
    )
