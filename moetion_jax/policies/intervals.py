"""Intervals at which `dense` and `two_phase` capture the whole state.

Pure functions; the leader and the simulator decide by the same ones. The
papers:

- dense: "GEMINI: Fast Failure Recovery in Distributed Training with In-Memory
  Checkpoints" (SOSP 2023);
- two_phase: "CheckFreq: Frequent, Fine-Grained DNN Checkpointing" (FAST 2021).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable

# Share of the run that CheckFreq's checkpoints may take; its paper's default.
OVERHEAD_BUDGET = 0.035

# Undisturbed iterations that the tuner looks back on.
_KEPT_ITERATIONS = 9
# At least this many checkpoints, and over this many iterations: one iteration
# that was slow for another reason must not pass for the cost of a checkpoint.
_KEPT_CHECKPOINTS = 3
_KEPT_PERIOD = 12
# Rounding must not make an interval one longer.
_DIGITS = 9


# ---- dense -------------------------------------------------------------------


def dense_interval(
  *,
  state_bytes: float,
  bandwidth_bytes_per_second: float,
  iteration_seconds: float,
  overlap_target: float = 1.0,
  max_interval: int | None = None,
) -> int:
  """Returns the iterations between whole copies to host memory (GEMINI's aim).

  It is the smallest interval in which the copy hides: it takes no longer than
  `overlap_target` of the interval's iterations. GEMINI puts the copy into gaps
  of the network traffic and aims at every iteration; where the gaps of one
  iteration are too few, this interval is what follows.

  Args:
    state_bytes: whole training state of the worker with most of it.
    bandwidth_bytes_per_second: that worker's copy rate from device to host.
    iteration_seconds: duration of an iteration without copies.
    overlap_target: share of an iteration in which a copy may be under way, in
      (0, 1].
    max_interval: upper bound, which holds even if training then waits; None
      for no bound.

  Raises:
    ValueError: an argument is out of range.
  """
  if not 0 < overlap_target <= 1:
    raise ValueError(f'{overlap_target=} must be in (0, 1]')
  _check_positive(
    bandwidth_bytes_per_second=bandwidth_bytes_per_second,
    iteration_seconds=iteration_seconds,
  )
  copy_seconds = state_bytes / bandwidth_bytes_per_second
  interval = _ceil(copy_seconds / (iteration_seconds * overlap_target))
  return min(interval, max_interval or interval)


def common_dense_interval(
  copies: Iterable[tuple[float, float]],
  *,
  iteration_seconds: float,
  overlap_target: float = 1.0,
) -> int:
  """Returns the `dense_interval` in which every worker's copy hides.

  Args:
    copies: (state bytes, bytes per second to host memory) of each worker.
    iteration_seconds: see `dense_interval`.
    overlap_target: see `dense_interval`.
  """
  return max(
    dense_interval(
      state_bytes=state_bytes,
      bandwidth_bytes_per_second=bandwidth,
      iteration_seconds=iteration_seconds,
      overlap_target=overlap_target,
    )
    for state_bytes, bandwidth in copies
  )


# ---- two_phase ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPhaseCosts:
  """The measured costs of a checkpoint of two phases.

  Phase one, the snapshot, copies the state to memory, and training waits only
  before it changes what is copied; phase two, the persist, writes it to
  storage and runs beside training. Both slow training down.

  Attributes:
    iteration_seconds: duration of an iteration without a checkpoint under way.
    overhead_seconds: time that one checkpoint adds to the run, waits and
      slowdown together.
    durable_seconds: time from the begin of a snapshot until it is in storage.
  """

  iteration_seconds: float
  overhead_seconds: float
  durable_seconds: float = 0.0

  def __post_init__(self) -> None:
    _check_positive(iteration_seconds=self.iteration_seconds)


def two_phase_interval(
  costs: TwoPhaseCosts,
  overhead_budget: float = OVERHEAD_BUDGET,
  max_interval: int | None = None,
) -> int:
  """Returns the iterations between checkpoints (CheckFreq's choice).

  It is the smallest interval such that checkpoints take no more than the budget
  of the training time, and that a checkpoint is in storage before the next one
  begins: there is never more than one under way.

  Args:
    costs: the measured costs.
    overhead_budget: share of the run that checkpoints may take, in (0, 1].
    max_interval: upper bound; None for none.
  """
  if not 0 < overhead_budget <= 1:
    raise ValueError(f'{overhead_budget=} must be in (0, 1]')
  within_budget = costs.overhead_seconds / (
    overhead_budget * costs.iteration_seconds
  )
  one_at_a_time = costs.durable_seconds / costs.iteration_seconds
  interval = _ceil(max(within_budget, one_at_a_time))
  return min(interval, max_interval or interval)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPhaseTuner:
  """State of the tuning while training runs (CheckFreq's adaptive tuning).

  It is a value: `observe` and `tune` return the next one. Until `interval` is
  set the iterations are profiled without any checkpoint.

  Attributes:
    overhead_budget: share of the run that checkpoints may take.
    interval: the interval in force; 0 while no checkpoint was taken.
    undisturbed: seconds of the last iterations without a checkpoint under way.
    period: seconds of the iterations since the last snapshot, that of the
      snapshot included; () before the first one.
    overheads: `overhead_seconds` of the last checkpoints.
    durables: `durable_seconds` of the last checkpoints.
  """

  overhead_budget: float = OVERHEAD_BUDGET
  interval: int = 0
  undisturbed: tuple[float, ...] = ()
  period: tuple[float, ...] = ()
  overheads: tuple[float, ...] = ()
  durables: tuple[float, ...] = ()

  @property
  def iteration_seconds(self) -> float:
    """Median seconds of the undisturbed iterations; 0 without any."""
    return statistics.median(self.undisturbed) if self.undisturbed else 0.0

  @property
  def kept_checkpoints(self) -> int:
    """Checkpoints that the medians need; only this many are remembered."""
    interval = max(1, self.interval)
    return max(_KEPT_CHECKPOINTS, math.ceil(_KEPT_PERIOD / interval))

  @property
  def costs(self) -> TwoPhaseCosts | None:
    """Medians of the measurements; None while there are too few."""
    if len(self.overheads) < self.kept_checkpoints or not self.undisturbed:
      return None
    return TwoPhaseCosts(
      iteration_seconds=self.iteration_seconds,
      overhead_seconds=statistics.median(self.overheads),
      durable_seconds=statistics.median(self.durables),
    )


def observe(
  tuner: TwoPhaseTuner,
  seconds: float,
  *,
  takes_snapshot: bool,
  is_disturbed: bool,
  durable_seconds: float = 0.0,
) -> TwoPhaseTuner:
  """Takes an iteration in.

  Args:
    tuner: the tuner so far.
    seconds: duration of the iteration, waits included.
    takes_snapshot: whether a snapshot began in it, which ends the period of the
      last one.
    is_disturbed: whether a checkpoint was under way in it.
    durable_seconds: time until the last checkpoint was in storage; read when
      its period ends.
  """
  _check_positive(seconds=seconds)
  overheads, durables = tuner.overheads, tuner.durables
  period = (*tuner.period, seconds) if tuner.period else ()
  if takes_snapshot:
    if tuner.period and tuner.undisturbed:
      expected = len(tuner.period) * tuner.iteration_seconds
      extra = max(0.0, sum(tuner.period) - expected)
      kept = tuner.kept_checkpoints
      overheads = (*overheads, extra)[-kept:]
      durables = (*durables, durable_seconds)[-kept:]
    period = (seconds,)
  undisturbed = tuner.undisturbed
  if not takes_snapshot and not is_disturbed:
    undisturbed = (*undisturbed, seconds)[-_KEPT_ITERATIONS:]
  return dataclasses.replace(
    tuner,
    undisturbed=undisturbed,
    period=period,
    overheads=overheads,
    durables=durables,
  )


def tune(
  tuner: TwoPhaseTuner, max_interval: int | None = None
) -> TwoPhaseTuner:
  """Sets the interval that the measured costs ask for.

  It is raised at once when the budget is exceeded or checkpoints are not in
  storage in time, and lowered only to half or less. For the budget it is at
  most doubled at a time: the measurement of overheads is noisy, and an interval
  that is too long takes long to measure again. It is never so short that no
  iteration is left, to compare with, in which no checkpoint begins or is under
  way. Without costs nothing changes.
  """
  costs = tuner.costs
  if costs is None:
    return tuner
  wanted = two_phase_interval(costs, tuner.overhead_budget)
  if tuner.interval:
    wanted = min(wanted, 2 * tuner.interval)
  disturbed = _ceil(costs.durable_seconds / costs.iteration_seconds)
  wanted = max(wanted, disturbed + 2)
  wanted = min(wanted, max_interval or wanted)
  if tuner.interval // 2 < wanted <= tuner.interval:
    return tuner
  return dataclasses.replace(
    tuner, interval=wanted, overheads=(), durables=(), period=()
  )


def _ceil(value: float) -> int:
  """Rounds up, at least 1, tolerating floating-point noise."""
  return max(1, math.ceil(round(value, _DIGITS)))


def _check_positive(**values: float) -> None:
  for name, value in values.items():
    if not 0 < value < math.inf:
      raise ValueError(f'{name}={value} must be positive')
