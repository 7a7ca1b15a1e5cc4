"""Choice of the window length from measured times (the paper's Algorithm 1).

Pure functions: the leader measures, chooses, and publishes a
`decision.CaptureDecision`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from moetion_jax import errors, keys
from moetion_jax.policies import decision, slots as slots_lib
from moetion_jax.state import division

_GROWTH = 1.25  # least factor by which a window grows if copies run late


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOperators:
  """One stage's operators and their sizes.

  Attributes:
    order: the result of `slots.order_operators`.
    state_bytes: bytes of each operator's training state.
    rest_bytes: bytes that a snapshot has of each operator outside its slot.
    device_of: device of the 'expert' axis that holds each operator.
    keep_order: whether slots follow the order; False for 'static'.
    shares: operators that each replica captures; () if one captures all.
  """

  order: tuple[keys.OperatorId, ...]
  state_bytes: slots_lib.Bytes
  rest_bytes: slots_lib.Bytes
  device_of: division.DeviceOf = division.on_no_device
  keep_order: bool = True
  shares: tuple[frozenset[keys.OperatorId], ...] = ()

  def slots(self, window_length: int) -> decision.Slots:
    """Cuts the operators into a window's slots; see `slots.make_slots`."""
    return slots_lib.make_slots(
      self.order,
      self.state_bytes,
      window_length,
      self.device_of,
      keep_order=self.keep_order,
    )

  def snapshot_bytes(self, window_length: int, mode: str) -> tuple[int, ...]:
    """Returns the bytes of each snapshot of a window.

    See `slots.snapshot_bytes`. With several replicas the largest share counts.
    """
    slots = self.slots(window_length)
    if not self.shares:
      return slots_lib.snapshot_bytes(
        slots, self.state_bytes, self.rest_bytes, mode
      )
    of_shares = [
      slots_lib.snapshot_bytes(
        tuple(slot & share for slot in slots),
        {o: self.state_bytes[o] for o in share},
        {o: self.rest_bytes[o] for o in share},
        mode,
      )
      for share in self.shares
    ]
    return tuple(map(max, zip(*of_shares, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyBudget:
  """The measured room for copies to the host beside training.

  Attributes:
    iteration_seconds: duration of an iteration without snapshots.
    bandwidth_bytes_per_second: copy rate from device to host, of all of a
      worker's devices together.
    overlap_target: fraction of an iteration that a copy may take, in (0, 1].
  """

  iteration_seconds: float
  bandwidth_bytes_per_second: float
  overlap_target: float = 1.0

  def __post_init__(self) -> None:
    for name in ('iteration_seconds', 'bandwidth_bytes_per_second'):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f'{name}={getattr(self, name)} must be positive')
    if not 0 < self.overlap_target <= 1:
      raise errors.ConfigError(
        'overlap_target', self.overlap_target, 'must be in (0, 1]'
      )

  @property
  def iteration_bytes(self) -> float:
    """Bytes that a copy moves in a whole iteration; a larger copy runs late."""
    return self.iteration_seconds * self.bandwidth_bytes_per_second

  @property
  def target_bytes(self) -> float:
    """Most bytes that a snapshot should have."""
    return self.overlap_target * self.iteration_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowChoice:
  """A window, and the reason for it.

  Attributes:
    window_length: number of slots.
    mode: one of `decision.MODES`.
    every: iterations from one snapshot to the next.
    reason: a sentence for the event.
    pinned: whether the user set the length; then it never grows.
  """

  window_length: int
  mode: str
  every: int = 1
  reason: str
  pinned: bool = False


def choose_window(
  stage: StageOperators,
  budget: CopyBudget | None,
  *,
  max_window_length: int | None = None,
  pinned_length: int | None = None,
  pinned_mode: str | None = None,
) -> WindowChoice:
  """Chooses the window of one stage (Algorithm 1, with measured inputs).

  It is the first of these that there is:
  1. the pinned length, rolling unless the mode is pinned as well; a stage with
     fewer operators has empty slots, since the length is common to all;
  2. the shortest rolling window whose largest snapshot is within
     `target_bytes`. A rolling snapshot is never below all compute weights, so
     there may be none, however long;
  3. the shortest aligned window whose snapshots are within `target_bytes` on
     average and each within `iteration_bytes`. The first ones are the largest;
     later ones leave the link to others. More than `iteration_bytes` would
     make training wait in every window, since at most one copy is in flight;
  4. whole snapshots (a window of 1), each taking several iterations to copy.
     They must be whole: no replay gets across an iteration of which the
     compute weights of frozen operators are unknown.

  A pinned mode leaves out the other one.

  Args:
    stage: the stage's operators.
    budget: the measured budget; None is allowed only with a pinned length.
    max_window_length: the longest window that the boundary logs have room for;
      None for no limit.
    pinned_length: the length set by --window_length; None if not set.
    pinned_mode: the mode set by --window_mode; None if not set.

  Raises:
    errors.ConfigError: the pinned length or mode is impossible.
    ValueError: there are no operators, or an argument is missing.
  """
  limit = _limit(stage, max_window_length)
  if pinned_mode is not None:
    errors.check_known('window_mode', pinned_mode, decision.MODES)
  if pinned_length is not None:
    _check_pinned(pinned_length, max_window_length)
    return WindowChoice(
      window_length=pinned_length,
      mode=pinned_mode or decision.MODES[0],
      reason='pinned',
      pinned=True,
    )
  if budget is None:
    raise ValueError('a window that is not pinned needs a measured budget')
  modes = decision.MODES if pinned_mode is None else (pinned_mode,)
  for mode in modes:
    length = _shortest(stage, mode, limit, budget)
    if length is not None:
      reason = _reason(stage.snapshot_bytes(length, mode), budget)
      if mode != modes[0]:
        reason += f'; no {modes[0]} window fits'
      return WindowChoice(window_length=length, mode=mode, reason=reason)
  # At least 2: a window of 1 that fits was found above.
  whole = _whole(stage, budget, max_window_length, least=2)
  reason = f'no {" or ".join(modes)} window fits; {whole.reason}'
  return dataclasses.replace(whole, mode=modes[0], reason=reason)


def choose_common_window(
  stages: Sequence[StageOperators],
  budgets: Sequence[CopyBudget],
  *,
  max_window_length: int | None = None,
  pinned_mode: str | None = None,
  may_be_whole: bool = False,
) -> WindowChoice:
  """Chooses one window for all stages: the longest that one of them wants.

  Or it chooses whole snapshots every few iterations, where that way fewer
  iterations have to be done again after a failure. That is so where a copy may
  take only a small part of an iteration, as on CPU, where training loses what a
  copy takes. A copy that may take all of several iterations is late by those,
  and it needs device memory for the whole state: that is what windows are for.

  Args:
    stages: the operators of each stage.
    budgets: the measured budget of each stage.
    max_window_length: see `choose_window`.
    pinned_mode: see `choose_window`.
    may_be_whole: whether devices have the memory for a copy of everything.

  Raises:
    errors.ConfigError, ValueError: see `choose_window`.
  """
  pairs = list(zip(stages, budgets, strict=True))
  choice = longest(
    choose_window(
      stage,
      budget,
      max_window_length=max_window_length,
      pinned_mode=pinned_mode,
    )
    for stage, budget in pairs
  )
  if not may_be_whole or pinned_mode or choice.every > 1:
    return choice
  whole = longest(
    _whole(stage, budget, max_window_length) for stage, budget in pairs
  )
  again, again_whole = (
    max(done_again(c, stage, budget) for stage, budget in pairs)
    for c in (choice, whole)
  )
  hides = all(
    _whole_bytes(stage) <= whole.every * budget.target_bytes
    for stage, budget in pairs
  )
  if not hides or again_whole >= again:
    return choice
  reason = (
    f'{whole.reason}; {again_whole:.3g} iterations are done again on average, '
    f'{again:.3g} with {choice.mode} windows of {choice.window_length}'
  )
  return dataclasses.replace(whole, reason=reason)


def longest(choices: Iterable[WindowChoice]) -> WindowChoice:
  """Returns, of what each stage wants, the choice that every stage can take."""
  return max(
    choices, key=lambda c: (c.every, c.mode == 'aligned', c.window_length)
  )


def done_again(
  choice: WindowChoice,
  stage: StageOperators,
  budget: CopyBudget,
  replay: str = decision.MICROBATCHES,
) -> float:
  """Returns the iterations that a stage does again after a failure, on average.

  The interrupted one counts, and those in which the last copy was under way.
  Rolling: a window ends in every iteration. Aligned: 1.5 windows (the paper's
  E[R]). Whole snapshots: the newest is half their distance old. Where gradients
  are recorded, in every iteration, no others are done again.

  Args:
    choice: the window in force.
    stage: the stage's operators.
    budget: the measured budget.
    replay: one of `decision.REPLAYS`.
  """
  copied = stage.snapshot_bytes(choice.window_length, choice.mode)
  late = max(copied) / budget.iteration_bytes
  if replay == decision.UPDATES:
    return 1 + late
  if choice.mode == 'aligned':
    return 1.5 * choice.window_length - 0.5 + late
  return choice.window_length + (choice.every - 1) / 2 + late


def enlarge(
  choice: WindowChoice,
  stage: StageOperators,
  *,
  max_window_length: int | None = None,
) -> WindowChoice:
  """Chooses the window to change to when copies run late.

  Returns:
    The shortest window that is at least a quarter longer and whose largest
    snapshot is smaller; for whole snapshots, a quarter more iterations between
    them. `choice` itself when it is pinned or nothing within the limit helps.
  """
  limit = _limit(stage, max_window_length)
  if choice.pinned:
    return choice
  if choice.every > 1:
    every = math.ceil(choice.every * _GROWTH)
    every = min(every, max_window_length or every)
    if every <= choice.every:
      return choice
    reason = f'copies ran late with every={choice.every}'
    return dataclasses.replace(choice, every=every, reason=reason)
  length = choice.window_length
  largest = max(stage.snapshot_bytes(length, choice.mode))
  # The last step up to the limit may be a smaller one.
  start = max(length + 1, min(math.ceil(length * _GROWTH), limit))
  for longer in range(start, limit + 1):
    smaller = max(stage.snapshot_bytes(longer, choice.mode))
    if smaller < largest:
      reason = (
        f'copies ran late with window_length={length}: largest snapshot '
        f'{_megabytes(smaller)}, was {_megabytes(largest)}'
      )
      return dataclasses.replace(choice, window_length=longer, reason=reason)
  return choice


def _whole(
  stage: StageOperators,
  budget: CopyBudget,
  max_window_length: int | None,
  least: int = 1,
) -> WindowChoice:
  """Chooses whole snapshots, as often as the copies stay within the budget."""
  whole_bytes = _whole_bytes(stage)
  needed = max(least, math.ceil(whole_bytes / budget.target_bytes))
  every = min(needed, max_window_length or needed)
  reason = f'whole snapshots: {_reason((whole_bytes,), budget)}'
  if every < needed:
    reason += f'; more than it may: logs have room for {every} iterations only'
  return WindowChoice(
    window_length=1, mode=decision.MODES[0], every=every, reason=reason
  )


def _whole_bytes(stage: StageOperators) -> int:
  (whole_bytes,) = stage.snapshot_bytes(1, decision.MODES[0])
  return whole_bytes


def _limit(stage: StageOperators, max_window_length: int | None) -> int:
  """Returns the longest window that makes sense and has room."""
  if not stage.order:
    raise ValueError('a stage without operators has no window')
  if max_window_length is None:
    return len(stage.order)
  if max_window_length < 1:
    raise ValueError(f'max_window_length={max_window_length} is below 1')
  return min(len(stage.order), max_window_length)


def _check_pinned(length: int, max_window_length: int | None) -> None:
  """Raises ConfigError if no stage can have windows of this length."""
  reason = None
  if length < 1:
    reason = 'must be at least 1'
  elif max_window_length is not None and length > max_window_length:
    reason = f'the logs have room for {max_window_length} iterations only'
  if reason is not None:
    raise errors.ConfigError('window_length', length, reason)


def _shortest(
  stage: StageOperators, mode: str, limit: int, budget: CopyBudget
) -> int | None:
  """Returns the shortest window that fits the budget, if there is one."""
  replicas = max(1, len(stage.shares))
  state = [stage.state_bytes[o] / replicas for o in stage.order]
  rest = [stage.rest_bytes[o] / replicas for o in stage.order]
  # No balance gets below these; they save the work of making most slots.
  least = [min(s, c) for s, c in zip(state, rest, strict=True)]
  rolling = mode == 'rolling'
  floor = sum(least)
  if rolling:
    floor += max(s - n for s, n in zip(state, least, strict=True))
  if floor > (budget.target_bytes if rolling else budget.iteration_bytes):
    return None
  for length in range(1, limit + 1):
    total = sum(state) + (sum(rest) * (length - 1) if rolling else 0)
    if total > length * budget.target_bytes:
      continue
    copied = stage.snapshot_bytes(length, mode)
    if rolling:
      fits = max(copied) <= budget.target_bytes
    else:
      fits = sum(copied) <= length * budget.target_bytes
      fits = fits and max(copied) <= budget.iteration_bytes
    if fits:
      return length
  return None


def _reason(copied: tuple[int, ...], budget: CopyBudget) -> str:
  return (
    f'largest snapshot {_megabytes(max(copied))}, average '
    f'{_megabytes(sum(copied) / len(copied))}; {budget.overlap_target:g} of an '
    f'iteration copies {_megabytes(budget.target_bytes)}'
  )


def _megabytes(count: float) -> str:
  return f'{count / 1e6:.3g} MB'
