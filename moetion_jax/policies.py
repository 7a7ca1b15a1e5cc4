"""The policies that sparse snapshots are held against, as rules.

What each promises, how often it captures, which experts, and what a restore
loses. Pure Python: the leader decides by these rules, and the simulator asks
the same functions. The papers:

- dense: "GEMINI: Fast Failure Recovery in Distributed Training with In-Memory
  Checkpoints" (SOSP 2023);
- two_phase: "CheckFreq: Frequent, Fine-Grained DNN Checkpointing" (FAST 2021);
- partial: "MoC-System: Efficient Fault Tolerance for Sparse Mixture-of-Experts
  Model Training" (arXiv 2408.04307), whose partial experts checkpointing is
  PEC, and, for `popularity`, the first preprint of MoEtion (arXiv
  2412.15411v1).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from moetion_jax import base, slots

# Of a run with CheckFreq, that checkpoints may take; its paper's default.
OVERHEAD_BUDGET = 0.035
# Of lost tokens, after which PEC saves more experts; MoC-System's default.
PLT_BUDGET = 0.0375
# Of an expert after a fault, with 'popularity'.
MAX_CAPACITY_FACTOR = 2.0
SELECTIONS = ('sequential', 'load_aware', 'popularity')

# So many undisturbed iterations the tuner looks back on.
_KEPT_ITERATIONS = 9
# So many checkpoints in so many iterations: one iteration that was slow for
# another reason must not pass for what a checkpoint costs.
_KEPT_CHECKPOINTS = 3
_KEPT_PERIOD = 12
# Rounding must not make an interval one longer.
_DIGITS = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """What a policy promises.

  Attributes:
    name: one of POLICIES.
    takes_snapshots: whether anything is captured.
    is_local: whether only the stages that lost something go back; otherwise
      all stages go back together to the newest snapshot that all have.
    is_exact: whether a run that recovers comes to the bits of an undisturbed
      one.
    is_whole: whether every snapshot is the whole state.
    is_durable: whether a restore reads what was written to storage: what is in
      memory is lost with the process.
  """

  name: str
  takes_snapshots: bool = True
  is_local: bool = False
  is_exact: bool = True
  is_whole: bool = False
  is_durable: bool = False


_ALL = (
  Policy(name='sparse', is_local=True),
  Policy(name='dense', is_whole=True),
  Policy(name='two_phase', is_whole=True, is_durable=True),
  Policy(name='partial', is_exact=False),
  Policy(name='none', takes_snapshots=False),
)
POLICIES = tuple(policy.name for policy in _ALL)


def of_name(name: str) -> Policy:
  """The policy of that name; raises ConfigError."""
  slots.check_known('policy', name, POLICIES)
  return next(policy for policy in _ALL if policy.name == name)


# ---- dense -------------------------------------------------------------------


def dense_interval(
  *,
  state_bytes: float,
  bandwidth_bytes_per_second: float,
  iteration_seconds: float,
  overlap_target: float = 1.0,
  max_interval: int | None = None,
) -> int:
  """Iterations between whole copies to host memory (GEMINI's aim).

  The smallest interval in which the copy hides: it takes no longer than
  `overlap_target` of the interval's iterations. GEMINI puts the copy into gaps
  of the network traffic and aims at every iteration; where the gaps of one
  iteration are too few, so is what follows from this.

  Args:
    state_bytes: whole training state of the worker with most of it.
    bandwidth_bytes_per_second: device to host, of that worker.
    iteration_seconds: without copies.
    overlap_target: share of an iteration in which a copy may be under way, in
      (0, 1].
    max_interval: it is never longer, even if training then waits.

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
  """The `dense_interval` in which every worker's copy hides.

  Args:
    copies: (state bytes, bytes per second to host memory) of each worker.
    iteration_seconds: as of `dense_interval`.
    overlap_target: as of `dense_interval`.
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
  """What a checkpoint of two phases costs, as measured.

  Phase one, the snapshot, copies the state to memory, and training waits only
  before it changes what is copied; phase two, the persist, writes it to
  storage and runs beside training. Both slow training down.

  Attributes:
    iteration_seconds: of an iteration without a checkpoint under way.
    overhead_seconds: by which one checkpoint makes the run longer, waits and
      slowdown together.
    durable_seconds: from the begin of a snapshot until it is in storage.
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
  """Iterations between checkpoints (CheckFreq's choice of frequency).

  The smallest interval such that checkpoints take no more than the budget of
  the time of training, and that a checkpoint is in storage before the next one
  begins: there is never more than one under way.

  Args:
    costs: as measured.
    overhead_budget: share of the run that checkpoints may take, in (0, 1].
    max_interval: it is never longer.
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
  """Tunes the interval while training runs (CheckFreq's adaptive tuning).

  It is a value: `observe` and `tune` return the next one. Until `interval` is
  set the iterations are profiled without any checkpoint.

  Attributes:
    overhead_budget: share of the run that checkpoints may take.
    interval: in force; 0: no checkpoint was taken so far.
    undisturbed: seconds of the last iterations without a checkpoint under way.
    period: seconds of the iterations since the last snapshot, that of the
      snapshot included; () before the first one.
    overheads: seconds of the last checkpoints, see `TwoPhaseCosts`.
    durables: `durable_seconds` of them.
  """

  overhead_budget: float = OVERHEAD_BUDGET
  interval: int = 0
  undisturbed: tuple[float, ...] = ()
  period: tuple[float, ...] = ()
  overheads: tuple[float, ...] = ()
  durables: tuple[float, ...] = ()

  @property
  def iteration_seconds(self) -> float:
    """Of an iteration without a checkpoint; 0 while none is known."""
    return statistics.median(self.undisturbed) if self.undisturbed else 0.0

  @property
  def kept_checkpoints(self) -> int:
    """Of which the median counts; there is none before there are as many."""
    interval = max(1, self.interval)
    return max(_KEPT_CHECKPOINTS, math.ceil(_KEPT_PERIOD / interval))

  @property
  def costs(self) -> TwoPhaseCosts | None:
    """Medians of what was measured; None while that is too little."""
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
    tuner: so far.
    seconds: of the iteration, waits included.
    takes_snapshot: whether one began in it, which ends the period of the last.
    is_disturbed: whether a checkpoint was under way in it.
    durable_seconds: that the last checkpoint needed; read when its period ends.
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
  that is too long takes long to measure again. And it is never so short that no
  iteration is left to compare with, in which no checkpoint begins or is under
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


# ---- partial -----------------------------------------------------------------


def select_experts(
  kind: str,
  experts: Sequence[base.OperatorId],
  count: int,
  *,
  number: int = 0,
  unsaved_tokens: slots.Rates | None = None,
  popularity: slots.Rates | None = None,
  ages: Mapping[base.OperatorId, int] | None = None,
  max_age: int | None = None,
) -> frozenset[base.OperatorId]:
  """The experts of one layer that a checkpoint saves (PEC).

  - 'sequential' takes them in turn: checkpoint n the `count` that follow those
    of checkpoint n - 1, around and around;
  - 'load_aware' takes those that most tokens have trained since they were
    saved (MoC-System);
  - 'popularity' takes those that most tokens choose (MoEtion's first preprint:
    it makes use of that popularity is skewed).

  Equals go by OperatorId. Whoever was not saved for `max_age` checkpoints comes
  before all others: that is ours, since host memory holds so many of them only.

  Args:
    kind: one of SELECTIONS.
    experts: of the layer.
    count: how many to take; all if there are no more.
    number: of the checkpoint, from 0, for 'sequential'.
    unsaved_tokens: of each expert, for 'load_aware'; 0 where missing.
    popularity: tokens an iteration, for 'popularity'; 0 where missing.
    ages: checkpoints since each expert was saved; 0 where missing.
    max_age: None for no limit.
  """
  slots.check_known('partial_select', kind, SELECTIONS)
  if count < 1 or number < 0:
    raise ValueError(f'{count=} of checkpoint {number=}')
  ordered = sorted(experts)
  if count >= len(ordered):
    return frozenset(ordered)
  if kind == 'sequential':
    first = number * count
    turn = range(first, first + count)
    return frozenset(ordered[i % len(ordered)] for i in turn)
  weight = (unsaved_tokens if kind == 'load_aware' else popularity) or {}
  age = ages or {}
  overdue = {
    expert: age.get(expert, 0)
    for expert in ordered
    if max_age is not None and age.get(expert, 0) >= max_age
  }
  ordered.sort(
    key=lambda expert: (-overdue.get(expert, -1), -weight.get(expert, 0.0))
  )
  return frozenset(ordered[:count])


def partial_bytes(
  state_bytes: slots.Bytes, count: int, kind: str = 'largest'
) -> int:
  """Bytes of a checkpoint of `count` experts a layer and all else whole.

  Args:
    state_bytes: training state of all operators.
    count: experts a layer.
    kind: 'largest' experts of each layer, or the 'mean' of them, rounded up.
  """
  by_layer: dict[str, list[int]] = collections.defaultdict(list)
  total = 0
  for operator, size in state_bytes.items():
    if operator.expert < 0:
      total += size
    else:
      by_layer[operator.group].append(size)
  for sizes in by_layer.values():
    taken = min(count, len(sizes))
    if kind == 'largest':
      total += sum(sorted(sizes, reverse=True)[:taken])
    else:
      total += -(-sum(sizes) * taken // len(sizes))
  return total


def restored_versions(
  saved: Iterable[tuple[int, Iterable[base.OperatorId]]],
  experts: Iterable[base.OperatorId],
  start: int,
) -> dict[base.OperatorId, int]:
  """Of which iteration each expert is that a restore puts together.

  Args:
    saved: iteration of every checkpoint that there is, and its experts.
    experts: all.
    start: iteration of the checkpoint that everything else is taken from:
      what is newer does not count.

  Returns:
    The newest version up to the start; 0, the initial state, for an expert
    that was never saved.
  """
  versions = dict.fromkeys(experts, 0)
  for iteration, held in saved:
    if iteration <= start:
      for expert in held:
        if expert in versions:
          versions[expert] = max(versions[expert], iteration)
  return versions


def lost_tokens(
  loads: Mapping[int, slots.Rates],
  versions: Mapping[base.OperatorId, int],
  start: int,
) -> dict[base.OperatorId, float]:
  """Tokens that trained each expert and that a restore forgets.

  Those after its version and up to the start: what comes later is done again.

  Args:
    loads: by iteration, tokens of each expert.
    versions: see `restored_versions`.
    start: to which the run goes back.
  """
  lost = dict.fromkeys(versions, 0.0)
  for iteration, load in loads.items():
    for expert, version in versions.items():
      if version < iteration <= start:
        lost[expert] += load.get(expert, 0.0)
  return lost


def proportion_of_lost_tokens(lost: float, processed: float) -> float:
  """PLT: lost tokens over all that experts have processed so far.

  A token counts once for each expert that it went to, in both. Of a whole run
  it is the sum over its restores (MoC-System's measure of what PEC costs).

  Args:
    lost: by all experts, in all restores.
    processed: by all experts.
  """
  return lost / processed if processed > 0 else 0.0


def raised_experts(
  count: int, experts: int, plt: float, plt_budget: float = PLT_BUDGET
) -> int:
  """Experts a layer from the next checkpoint on, after a restore.

  Doubled when the proportion of lost tokens is beyond its budget (MoC-System
  raises it as faults accumulate), up to all experts: then nothing is lost.

  Args:
    count: so far.
    experts: that a layer has.
    plt: of all restores so far.
    plt_budget: that may be lost.
  """
  return min(experts, count * 2 if plt > plt_budget else count)


def capacity_factors(
  lost: slots.Rates,
  rates: slots.Rates,
  iterations: int,
  max_factor: float = MAX_CAPACITY_FACTOR,
) -> dict[base.OperatorId, float]:
  """By how much experts' capacities grow after a fault.

  MoEtion's first preprint lets experts that lost tokens take more of them
  after a fault. Here each may take what it lost on top of its rate, spread
  over some iterations.

  Args:
    lost: tokens of each expert, see `lost_tokens`.
    rates: tokens an iteration of each expert.
    iterations: in which to make up for them.
    max_factor: of a capacity.

  Returns:
    A factor from 1 on for each expert; the largest where it has no rate.
  """
  if iterations < 1 or max_factor < 1:
    raise ValueError(f'{iterations=}, {max_factor=}')
  factors = {}
  for expert, tokens in lost.items():
    usual = rates.get(expert, 0.0) * iterations
    factor = 1 + tokens / usual if usual else max_factor if tokens else 1.0
    factors[expert] = min(max_factor, factor)
  return factors


def _ceil(value: float) -> int:
  """At least 1; what is whole but for rounding stays."""
  return max(1, math.ceil(round(value, _DIGITS)))


def _check_positive(**values: float) -> None:
  for name, value in values.items():
    if not 0 < value < math.inf:
      raise ValueError(f'{name}={value} must be positive')
