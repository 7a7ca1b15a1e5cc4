"""Settings of capture: how state is captured, and how much of it is kept."""

from __future__ import annotations

import dataclasses

from moetion_jax import errors
from moetion_jax.policies import (
  decision,
  intervals,
  partial,
  popularity,
  rules as rules_lib,
)

# Snapshots and iterations beyond what the line keeps: those on their way, and
# those kept until everybody has been told.
_SLACK = 4
# Where nobody goes back alone, logs serve neighbours that are a little late.
_LATEST_ITERATIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureSettings:
  """The user's settings of capture.

  Attributes:
    policy: one of `rules.POLICIES`.
    window_length: number of slots; 0 to choose it from measurements.
    window_mode: one of `decision.MODES`; '' to choose it.
    order: one of `popularity.ORDERS`.
    max_window_length: the longest window that may be chosen.
    overlap_target: share of an iteration that a copy may take; 0 for the
      platform's default.
    keep_windows: windows of snapshots to keep; the older ones are there in case
      one of the newest is damaged.
    log_iterations: iterations that the logs have room for; 0 for what the
      windows need.
    interval: iterations between snapshots, for policies other than 'sparse'; 0
      to choose it from measurements.
    overhead_budget: share of the run that checkpoints of 'two_phase' may take.
    partial_experts: experts of each layer that a checkpoint of 'partial' saves.
    partial_select: one of `partial.SELECTIONS`.
    plt_budget: share of all tokens that restores of 'partial' may lose before
      more experts are saved.
  """

  policy: str = 'sparse'
  window_length: int = 0
  window_mode: str = ''
  order: str = 'static'
  max_window_length: int = 8
  overlap_target: float = 0.0
  keep_windows: int = 2
  log_iterations: int = 0
  interval: int = 0
  overhead_budget: float = intervals.OVERHEAD_BUDGET
  partial_experts: int = 1
  partial_select: str = partial.SELECTIONS[0]
  plt_budget: float = partial.PLT_BUDGET

  def __post_init__(self) -> None:
    rules_lib.check_known('policy', self.policy, rules_lib.POLICIES)
    rules_lib.check_known(
      'partial_select', self.partial_select, partial.SELECTIONS
    )
    rules_lib.check_known('order', self.order, popularity.ORDERS)
    if self.window_mode:
      rules_lib.check_known('window_mode', self.window_mode, decision.MODES)
    for name, least in (
      ('window_length', 0),
      ('max_window_length', 1),
      ('keep_windows', 1),
      ('interval', 0),
      ('partial_experts', 1),
    ):
      if getattr(self, name) < least:
        raise errors.ConfigError(
          name, getattr(self, name), f'must be at least {least}'
        )
    if not 0 <= self.overlap_target <= 1:
      raise errors.ConfigError(
        'overlap_target', self.overlap_target, 'must be in [0, 1]'
      )
    for name in ('overhead_budget', 'plt_budget'):
      if not 0 < getattr(self, name) <= 1:
        raise errors.ConfigError(name, getattr(self, name), 'must be in (0, 1]')
    if self.interval and self.policy in ('sparse', 'none'):
      raise errors.ConfigError(
        'interval', self.interval, f'means nothing with --policy={self.policy}'
      )
    if self.window_length and self.policy not in ('sparse', 'none'):
      raise errors.ConfigError(
        'window_length', self.window_length, 'is of --policy=sparse'
      )
    if not self.rules.is_local:
      return
    least = self.kept_with(self.window_length or 1)
    if self.log_iterations and self.log_iterations < least:
      raise errors.ConfigError(
        'log_iterations',
        self.log_iterations,
        f'must be at least {least} with --window_length='
        f'{self.window_length or 1} and --keep_windows={self.keep_windows}',
      )

  @property
  def rules(self) -> rules_lib.Policy:
    """The promises of the policy."""
    return rules_lib.of_name(self.policy)

  @property
  def grows_capacity(self) -> bool:
    """True if experts that lost tokens take more of them for some time."""
    return self.policy == 'partial' and self.partial_select == 'popularity'

  @property
  def _windows(self) -> int:
    """Most windows between the recovery line and the newest snapshot.

    With rolling windows that never change, every snapshot is a start once it is
    a window old, and the line is `keep_windows` - 1 windows older. An aligned
    window is a start no earlier than at its end; and where slots change, a
    start just before has to wait for a window of the new ones.
    """
    is_steady = (
      self.window_length > 0
      and self.window_mode != 'aligned'
      and self.order == 'static'
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
    if not self.log_iterations:
      return self.max_window_length
    fits = (self.log_iterations - _SLACK) // self._windows
    return min(self.max_window_length, fits)

  @property
  def kept_iterations(self) -> int:
    """Most iterations whose entries and snapshots are kept."""
    if not self.rules.is_local:
      return self.log_iterations or _LATEST_ITERATIONS
    return self.log_iterations or self.kept_with(self.longest_window)

  @property
  def kept_snapshots(self) -> int:
    """Most snapshots that are kept."""
    return self.kept_with(self.longest_window)
