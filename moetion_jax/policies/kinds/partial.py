"""The policy `partial`: some experts of each layer, and all else (PEC).

Its planner makes one decision a checkpoint, published before anybody begins its
iteration. A checkpoint is a start if every expert is in it or in an older one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from moetion_jax import keys, report
from moetion_jax.policies import (
  decision,
  partial,
  planner,
  settings as capture_settings,
)
from moetion_jax.policies.kinds import base
from moetion_jax.snapshots import coverage
from moetion_jax.state import division

_POPULARITY_ITERATIONS = 20  # iterations over which popularity is measured
# An expert that was not saved for this many rounds (checkpoints in which all
# experts could be saved) is due, however few tokens choose it.
_MAX_ROUNDS = 2
# Data files beyond those of the snapshots that are kept.
_SPARE_FILES = 3


class PartialPlanner(base.IntervalPlanner):
  """A planner of checkpoints that hold some experts of each layer.

  Attributes:
    experts: experts of each layer that a checkpoint saves.
    capacity_factors: growth of experts' capacities after the last restore;
      empty if none grow.
  """

  def __post_init__(self) -> None:
    super().__post_init__()
    self._layers: dict[str, list[keys.OperatorId]] = {}
    for stage in self.stages:
      for operator in stage.state_bytes:
        if operator.expert >= 0:
          self._layers.setdefault(operator.group, []).append(operator)
    self._largest_layer = max(map(len, self._layers.values()), default=1)
    self.experts = min(self.settings.partial_experts, self._largest_layer)
    self._longest_round = self._round  # it gets shorter with more experts
    self._number = 0  # that of the next checkpoint
    self._versions: dict[keys.OperatorId, int] = dict.fromkeys(
      (e for layer in self._layers.values() for e in layer), 0
    )
    self._loads: dict[int, Mapping[keys.OperatorId, float]] = {}
    self._processed_before = 0.0  # tokens of iterations that `_loads` lacks
    self._lost = 0.0
    self.capacity_factors: dict[keys.OperatorId, float] = {}

  @property
  def _round(self) -> int:
    """Number of checkpoints in which all experts can be saved."""
    return -(-self._largest_layer // self.experts)

  def decisions(
    self, first_iteration: int
  ) -> tuple[decision.CaptureDecision, ...]:
    """See `planner.Planner`; for checkpoints too near to give notice of."""
    soon = base.NOTICE_ITERATIONS // self.interval * self.interval
    return self._decide(first_iteration, first_iteration + soon, bool(soon))

  def _decide(
    self, first_iteration: int, saved_at: int, is_certain: bool = True
  ) -> tuple[decision.CaptureDecision, ...]:
    """Selects experts for the checkpoints from an iteration on.

    Args:
      first_iteration: the decision's first iteration.
      saved_at: iteration of the last checkpoint that certainly follows it.
      is_certain: whether there is such a checkpoint.
    """
    self._first_iteration = first_iteration
    selected = self._select(first_iteration)
    if is_certain:
      self._number += 1
      self._versions |= dict.fromkeys(selected, saved_at)
    return tuple(
      decision.CaptureDecision(
        first_iteration=first_iteration,
        window_length=1,
        mode=decision.PARTIAL,
        every=self.interval,
        slots=(selected & frozenset(stage.state_bytes),),
        always=frozenset(o for o in stage.state_bytes if o.expert < 0),
      )
      for stage in self.stages
    )

  def _select(self, first_iteration: int) -> frozenset[keys.OperatorId]:
    """Selects the experts of the checkpoint at an iteration, or the next."""
    unsaved = partial.lost_tokens(
      self._loads, self._versions, max(self._loads, default=0)
    )
    popularity = self._popularity()
    ages = {
      expert: (first_iteration - version) // self.interval
      for expert, version in self._versions.items()
    }
    selected: frozenset[keys.OperatorId] = frozenset()
    for layer in self._layers.values():
      selected |= partial.select_experts(
        self.settings.partial_select,
        layer,
        self.experts,
        number=self._number,
        unsaved_tokens=unsaved,
        popularity=popularity,
        ages=ages,
        max_age=_MAX_ROUNDS * self._round,
      )
    return selected

  def _popularity(self) -> dict[keys.OperatorId, float]:
    total = dict.fromkeys(self._versions, 0.0)
    for iteration in sorted(self._loads)[-_POPULARITY_ITERATIONS:]:
      for expert, tokens in self._loads[iteration].items():
        total[expert] += tokens
    return total

  @property
  def _files(self) -> int:
    """See `IntervalPlanner`; reaches back as far as the oldest expert may."""
    rounds = 1 + _MAX_ROUNDS * (self.settings.partial_select != 'sequential')
    kept = rounds * self._longest_round + self.settings.keep_windows
    return kept + _SPARE_FILES

  def _worker_bytes(self, workers: int) -> list[int]:
    return [
      max(
        partial.partial_bytes(
          {o: stage.state_bytes[o] for o in share}, self.experts
        )
        for share in division.divide(stage.state_bytes, workers)
      )
      for stage in self.stages
    ]

  def add(self, reports: Sequence[report.Report]) -> planner.Change | None:
    """See `planner.Planner`."""
    iteration = reports[0].iteration
    loads = {o: float(n) for one in reports for o, n in one.load.items()}
    self._loads[iteration] = loads
    self._forget()
    self._take_in(reports)
    following = iteration + base.NOTICE_ITERATIONS
    passed = following - self._first_iteration
    if passed <= 0 or passed % self.interval:
      return None
    reason = self._choose(reports)
    decisions = self._decide(following, following)
    if not reason:
      return planner.Change(kind='', fields={}, decisions=decisions)
    return self._interval_change(following, reason, decisions)

  def _choose(self, reports: Sequence[report.Report]) -> str:
    """Sets the interval once, from measurements; returns why, or ''."""
    if (
      self._has_chosen
      or not self._is_warm
      or not all(r.copy_bytes_per_second for r in reports)
    ):
      return ''
    self._has_chosen = True
    self.interval = self._hiding_interval(reports)
    return (
      f'{self.experts} expert(s) a layer; a copy may take {self._target:g} of '
      f'iterations of {self._iteration_seconds:.3g} s'
    )

  def _forget(self) -> None:
    """Drops loads that nothing can ask for any more."""
    keep = _POPULARITY_ITERATIONS + (1 + _MAX_ROUNDS) * self._round * (
      self.interval * (1 + self.settings.keep_windows)
    )
    while len(self._loads) > keep:
      oldest = min(self._loads)
      self._processed_before += sum(self._loads.pop(oldest).values())

  def capacity(self, stage: int) -> tuple[tuple[str, int, float], ...]:
    """See `planner.Planner`."""
    return tuple(
      (operator.group, operator.expert, factor)
      for operator, factor in self.capacity_factors.items()
      if operator in self.stages[stage].state_bytes
    )

  def restart_from(
    self, start: int, versions: Mapping[keys.OperatorId, int]
  ) -> planner.Loss:
    """See `planner.Planner`; experts may be of older checkpoints."""
    self._loads = {i: x for i, x in self._loads.items() if i <= start}
    lost_tokens = partial.lost_tokens(self._loads, versions, start)
    lost = sum(lost_tokens.values())
    self._lost += lost
    processed = self._processed_before + sum(
      sum(load.values()) for load in self._loads.values()
    )
    plt = partial.proportion_of_lost_tokens(self._lost, processed)
    self.experts = partial.raised_experts(
      self.experts, self._largest_layer, plt, self.settings.plt_budget
    )
    self._versions = dict(versions)
    return planner.Loss(
      lost_tokens=lost,
      plt=plt,
      experts=self.experts,
      capacity_until=self._grow(start, lost_tokens),
    )

  def _grow(
    self, start: int, lost_tokens: Mapping[keys.OperatorId, float]
  ) -> int:
    """Lets experts that lost tokens take more of them; returns until when.

    It lasts for as many iterations as the oldest of them was not saved; 0 means
    that none takes more.
    """
    self.capacity_factors = {}
    lost = [self._versions[o] for o, tokens in lost_tokens.items() if tokens]
    oldest = min(lost, default=start)
    if (
      not self.settings.policy.grows_capacity(self.settings) or oldest == start
    ):
      return 0
    measured = sorted(self._loads)[-_POPULARITY_ITERATIONS:]
    rates = {o: n / len(measured) for o, n in self._popularity().items()}
    self.capacity_factors = partial.capacity_factors(
      lost_tokens, rates, start - oldest
    )
    return start + (start - oldest)


class Partial(capture_settings.Policy):
  """Some experts in each checkpoint; a restore has the others from older ones.

  What the others had learned since is lost.
  """

  name = 'partial'
  planner = PartialPlanner
  is_exact = False

  def grows_capacity(self, settings: capture_settings.CaptureSettings) -> bool:
    """See `Policy`."""
    return settings.partial_select == 'popularity'

  def starts(
    self,
    records: Sequence[coverage.SnapshotRecord],
    operators: Collection[keys.OperatorId],
    line: int,
  ) -> tuple[coverage.Start, ...]:
    """See `Policy`; an expert that was never saved is the initial one."""
    others = {o for o in operators if o.expert < 0}
    initial = records[0].iteration
    return tuple(
      coverage.Start(iteration=record.iteration, complete_at=record.iteration)
      for record in records
      if others <= record.state and not initial < record.iteration < line
    )

  def versions(
    self,
    records: Sequence[coverage.SnapshotRecord],
    operators: Collection[keys.OperatorId],
    start: int,
  ) -> dict[keys.OperatorId, int]:
    """See `Policy`."""
    return partial.restored_versions(
      [(r.iteration, r.state) for r in records],
      [o for o in operators if o.expert >= 0],
      start,
    )
