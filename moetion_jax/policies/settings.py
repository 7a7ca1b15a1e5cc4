"""Settings of capture, and the interface of the policies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

from moetion_jax import errors, keys
from moetion_jax.policies import (
  decision,
  intervals,
  partial,
  planner as planner_lib,
  popularity,
)
from moetion_jax.snapshots import coverage

# Snapshots and iterations beyond what the line keeps: those on their way, and
# those kept until everybody has been told.
_SLACK = 4
# Where nobody goes back alone, logs serve neighbours that are a little late.
_LATEST_ITERATIONS = 4
# The way of replay is chosen from measurements; see `replay_choice`.
AUTO = 'auto'
REPLAYS = (AUTO, *decision.REPLAYS)
# Mean time between failures of the whole job, if the user expects no other.
EXPECTED_MTBF_SECONDS = 3600.0
# Share of an iteration that a copy may take: where it uses the very cores that
# compute, and where it does not.
_COPY_SHARE = {'cpu': 0.02}
_OTHER_COPY_SHARE = 0.5


def lag_iterations(window_iterations: int, keep_windows: int) -> int:
  """Returns the iterations by which the recovery line lags behind.

  Args:
    window_iterations: iterations of one window, or of one interval.
    keep_windows: windows of snapshots to keep.
  """
  return window_iterations * (keep_windows - 1)


class Policy:
  """What a run captures, and who goes back to what after a failure.

  A policy has no state: `registry.POLICIES` has one object of each.

  Attributes:
    name: the name that the user gives.
    planner: makes the planner of a run, see `kinds.base.MeasuringPlanner`;
      raises errors.ConfigError if a window is longer than a stage can have.
    takes_snapshots: whether anything is captured.
    has_windows: whether snapshots are parts of a window, not at an interval.
    is_local: whether only the stages that lost something go back; otherwise
      all stages go back together to the newest snapshot that all have.
    is_exact: whether a run that recovers ends with the bits of an undisturbed
      one. Otherwise all that came after the start is forgotten.
    is_durable: whether a restore reads what was written to storage.
    may_record_gradients: whether snapshots may hold gradients, see
      `CaptureSettings.replay`.
  """

  name: ClassVar[str]
  planner: ClassVar[Callable[..., planner_lib.Planner]]
  takes_snapshots: ClassVar[bool] = True
  has_windows: ClassVar[bool] = False
  is_local: ClassVar[bool] = False
  is_exact: ClassVar[bool] = True
  is_durable: ClassVar[bool] = False
  may_record_gradients: ClassVar[bool] = False

  def grows_capacity(self, settings: CaptureSettings) -> bool:
    """Returns True if experts that lost tokens take more for some time."""
    del settings
    return False

  def starts(
    self,
    records: Sequence[coverage.SnapshotRecord],
    operators: Collection[keys.OperatorId],
    line: int,
  ) -> tuple[coverage.Start, ...]:
    """Returns the starts of a stage, ascending, the initial state included.

    Args:
      records: the stage's snapshots, ascending; the first is the initial state.
      operators: all operators of the stage.
      line: the recovery line; what older starts need may be gone.
    """
    del line
    return coverage.valid_starts(records, operators)

  def versions(
    self,
    records: Sequence[coverage.SnapshotRecord],
    operators: Collection[keys.OperatorId],
    start: int,
  ) -> dict[keys.OperatorId, int]:
    """Returns the iteration of the operators that a start has older ones of.

    Args:
      records: the stage's snapshots, ascending; the first is the initial state.
      operators: all operators of the stage.
      start: the start's iteration.
    """
    del records, operators, start
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureSettings:
  """The user's settings of capture.

  Attributes:
    policy: the policy, from `registry.POLICIES`.
    window_length: number of slots; 0 to choose it from measurements.
    window_mode: one of `decision.MODES`; '' to choose it.
    replay: one of REPLAYS; where no gradients can be recorded, AUTO means
      `decision.MICROBATCHES`.
    expected_mtbf_seconds: mean time between failures of the whole job, which
      AUTO goes by.
    order: one of `popularity.ORDERS`.
    max_window_length: the longest window that may be chosen.
    overlap_target: share of an iteration that a copy may take; 0 for the
      platform's default.
    keep_windows: windows of snapshots to keep; the older ones are there in case
      one of the newest is damaged.
    log_iterations: iterations that the logs have room for; 0 for what is kept.
    log_lag: iterations by which logs lag behind the newest states that recorded
      gradients lead to: a record so new is passed without anybody else, if it
      is damaged.
    interval: iterations between snapshots, for policies without windows; 0 to
      choose it from measurements.
    overhead_budget: share of the run that checkpoints of 'two_phase' may take.
    partial_experts: experts of each layer that a checkpoint of 'partial' saves.
    partial_select: one of `partial.SELECTIONS`.
    plt_budget: share of all tokens that restores of 'partial' may lose before
      more experts are saved.
  """

  policy: Policy
  window_length: int = 0
  window_mode: str = ''
  replay: str = decision.MICROBATCHES
  expected_mtbf_seconds: float = EXPECTED_MTBF_SECONDS
  order: str = 'static'
  max_window_length: int = 8
  overlap_target: float = 0.0
  keep_windows: int = 2
  log_iterations: int = 0
  log_lag: int = 2
  interval: int = 0
  overhead_budget: float = intervals.OVERHEAD_BUDGET
  partial_experts: int = 1
  partial_select: str = partial.SELECTIONS[0]
  plt_budget: float = partial.PLT_BUDGET

  def __post_init__(self) -> None:
    errors.check_known(
      'partial_select', self.partial_select, partial.SELECTIONS
    )
    errors.check_known('order', self.order, popularity.ORDERS)
    if self.window_mode:
      errors.check_known('window_mode', self.window_mode, decision.MODES)
    errors.check_known('replay', self.replay, REPLAYS)
    if self.replay == decision.UPDATES and not self._may_record_gradients:
      raise errors.ConfigError(
        'replay', self.replay, 'is of --policy=sparse with rolling windows'
      )
    for name, least in (
      ('window_length', 0),
      ('max_window_length', 1),
      ('keep_windows', 1),
      ('interval', 0),
      ('partial_experts', 1),
      ('log_lag', 0),
    ):
      if getattr(self, name) < least:
        raise errors.ConfigError(
          name, getattr(self, name), f'must be at least {least}'
        )
    if not 0 <= self.overlap_target <= 1:
      raise errors.ConfigError(
        'overlap_target', self.overlap_target, 'must be in [0, 1]'
      )
    if not 0 < self.expected_mtbf_seconds < math.inf:
      raise errors.ConfigError(
        'expected_mtbf', self.expected_mtbf_seconds, 'must be above 0 seconds'
      )
    for name in ('overhead_budget', 'plt_budget'):
      if not 0 < getattr(self, name) <= 1:
        raise errors.ConfigError(name, getattr(self, name), 'must be in (0, 1]')
    if self.interval and self.policy.has_windows:
      raise errors.ConfigError(
        'interval',
        self.interval,
        f'means nothing with --policy={self.policy.name}',
      )
    if self.window_length and not self.policy.has_windows:
      raise errors.ConfigError(
        'window_length', self.window_length, 'is of --policy=sparse'
      )
    if not self.policy.is_local:
      return
    least = self.kept_with(self.window_length or 1)
    why = (
      f'--window_length={self.window_length or 1} and --keep_windows='
      f'{self.keep_windows}'
    )
    if self.records_gradients:
      least, why = self._logged, f'--log_lag={self.log_lag}'
    if self.log_iterations and self.log_iterations < least:
      raise errors.ConfigError(
        'log_iterations',
        self.log_iterations,
        f'must be at least {least} with {why}',
      )

  def under(self, policy: Policy) -> CaptureSettings:
    """Returns the same settings for another policy, but for those it has not.

    Args:
      policy: the other policy.
    """
    has_windows = policy.has_windows
    return dataclasses.replace(
      self,
      policy=policy,
      window_length=self.window_length if has_windows else 0,
      interval=0 if has_windows else self.interval,
      replay=self.replay
      if policy.may_record_gradients
      else decision.MICROBATCHES,
    )

  @property
  def _may_record_gradients(self) -> bool:
    is_rolling = self.window_mode in ('', decision.MODES[0])
    return self.policy.may_record_gradients and is_rolling

  @property
  def replays(self) -> tuple[str, ...]:
    """The ways of replay that there may be in the run, that of its begin first.

    There are several if one of them is chosen after the warm-up.
    """
    if self.replay != AUTO:
      return (self.replay,)
    if self._may_record_gradients:
      return decision.REPLAYS
    return (decision.MICROBATCHES,)

  @property
  def records_gradients(self) -> bool:
    """True if all of a run's snapshots hold gradients."""
    return self.replays == (decision.UPDATES,)

  def copy_share(self, platform: str) -> float:
    """Returns the share of an iteration that a copy may take, on a platform."""
    default = _COPY_SHARE.get(platform, _OTHER_COPY_SHARE)
    return self.overlap_target or default

  def hides_copies(self, platform: str) -> bool:
    """Returns True if copies on a platform do not use the cores that train."""
    return platform not in _COPY_SHARE

  @property
  def _windows(self) -> int:
    """Most windows between the recovery line and the newest snapshot.

    With rolling windows that never change, every snapshot is a start once it is
    a window old, and the line is `keep_windows` - 1 windows older. An aligned
    window is a start no earlier than at its end; and where slots change, or the
    way of replay, a start just before has to wait for a window of the new ones.
    """
    is_steady = (
      self.window_length > 0
      and self.window_mode != 'aligned'
      and self.order == 'static'
      and len(self.replays) == 1
    )
    return self.keep_windows + (not is_steady)

  def kept_with(self, window_length: int) -> int:
    """Returns the iterations to keep with windows up to a length."""
    return window_length * self._windows + _SLACK

  def kept_whole(self, every: int) -> int:
    """Returns the whole snapshots to keep, one in `every` iterations."""
    return self._windows + 1 + -(-_SLACK // every)

  @property
  def longest_window(self) -> int:
    """The longest window that is allowed."""
    if self.window_length:
      return self.window_length
    if not self.log_iterations or self.records_gradients:
      return self.max_window_length
    fits = (self.log_iterations - _SLACK) // self._windows
    return min(self.max_window_length, fits)

  @property
  def kept_iterations(self) -> int:
    """Most iterations whose entries are kept."""
    if not self.policy.is_local:
      return self.log_iterations or _LATEST_ITERATIONS
    if self.records_gradients:
      return self.log_iterations or self._logged
    return self.log_iterations or self.kept_with(self.longest_window)

  @property
  def _logged(self) -> int:
    """Iterations in the logs where recorded gradients lead to newer states.

    Behind the newest state that all stages have are `log_lag`; before it are
    those whose snapshots are on their way, and the one at hand; and where a
    record is missing, a window, until others lead to a state again.
    """
    return self.longest_window + self.log_lag + _SLACK + 1

  @property
  def kept_snapshots(self) -> int:
    """Most snapshots that are kept."""
    return self.kept_with(self.longest_window)
