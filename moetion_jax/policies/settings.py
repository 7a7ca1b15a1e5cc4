"""How the training state is captured, and how much of it is kept."""

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

# Snapshots and iterations beyond what the line keeps: on their way, and until
# everybody was told.
_SLACK = 4
# Where nobody goes back alone, logs are for neighbours that are a little late.
_LATEST_ITERATIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureSettings:
  """How the training state is captured.

  Attributes:
    policy: one of POLICIES.
    window_length: 0 to choose it from what is measured.
    window_mode: one of `slots.MODES`; '' to choose.
    order: one of `slots.ORDERS`.
    max_window_length: of those that may be chosen.
    overlap_target: share of an iteration that a copy may take; 0 for what
      suits the platform.
    keep_windows: of snapshots; the older ones are there in case that one of
      the newest is damaged.
    log_iterations: that there is room for; 0 for what the windows need.
    interval: iterations between snapshots, of other policies than 'sparse'; 0
      to choose it from what is measured.
    overhead_budget: share of the run that checkpoints of 'two_phase' may take.
    partial_experts: of each layer that a checkpoint of 'partial' saves.
    partial_select: one of `policies.SELECTIONS`.
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
    """What the policy promises."""
    return rules_lib.of_name(self.policy)

  @property
  def grows_capacity(self) -> bool:
    """Whether experts that lost tokens take more of them for some time."""
    return self.policy == 'partial' and self.partial_select == 'popularity'

  @property
  def _windows(self) -> int:
    """Windows between the recovery line and the newest snapshot, at most.

    With rolling windows that are always the same every snapshot is a start once
    it is a window old, and the line is `keep_windows` - 1 windows older. An
    aligned window is a start no earlier than at its end; and where slots
    change, a start just before has to wait for a window of the new ones.
    """
    is_steady = (
      self.window_length > 0
      and self.window_mode != 'aligned'
      and self.order == 'static'
    )
    return self.keep_windows + (not is_steady)

  def kept_with(self, window_length: int) -> int:
    """Iterations to keep with windows up to a length."""
    return window_length * self._windows + _SLACK

  def kept_whole(self, every: int) -> int:
    """Snapshots to keep if they are whole, one in so many iterations."""
    return self._windows + 1 + -(-_SLACK // every)

  @property
  def longest_window(self) -> int:
    """The longest window that there may be."""
    if self.window_length:
      return self.window_length
    if not self.log_iterations:
      return self.max_window_length
    fits = (self.log_iterations - _SLACK) // self._windows
    return min(self.max_window_length, fits)

  @property
  def kept_iterations(self) -> int:
    """Iterations whose entries and snapshots are kept, at most."""
    if not self.rules.is_local:
      return self.log_iterations or _LATEST_ITERATIONS
    return self.log_iterations or self.kept_with(self.longest_window)

  @property
  def kept_snapshots(self) -> int:
    """Snapshots that are kept, at most."""
    return self.kept_with(self.longest_window)
