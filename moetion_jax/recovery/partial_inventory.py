"""Inventory of the stores when no checkpoint holds everything.

A checkpoint is a start if every expert is in it or in an older one. The stores
therefore keep all from the oldest version on that the line needs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moetion_jax import keys
from moetion_jax.policies import partial
from moetion_jax.recovery import inventory, plan as recovery_plan
from moetion_jax.snapshots import coverage


class PartialInventory(inventory.Inventory):
  """An `Inventory` of checkpoints that hold some experts only.

  Attributes:
    line: the iteration from which on checkpoints are kept. The first one from
      which all can start may be later.
  """

  def __init__(
    self, operators: Sequence[Collection[keys.OperatorId]], lag_iterations: int
  ):
    """See `Inventory`."""
    super().__init__(operators, lag_iterations)
    self._first_start = 0

  def _records(self, stage: int) -> list[coverage.SnapshotRecord]:
    shares = [
      share
      for (iteration, *_), share in self._shares[stage].items()
      if (stage, iteration) not in self._excluded
    ]
    return list(coverage.complete_records(shares))

  def starts(self, stage: int) -> tuple[coverage.Start, ...]:
    """See `Inventory`; an expert that was never saved is the initial one."""
    others = {o for o in self._operators[stage] if o.expert < 0}
    return tuple(
      coverage.Start(iteration=i, complete_at=i)
      for i, held in (
        (0, self._operators[stage]),
        *((r.iteration, r.state) for r in self._records(stage)),
      )
      if others <= held and (not i or i >= self._first_start)
    )

  def versions(self, start: int) -> dict[keys.OperatorId, int]:
    """Returns the version, an iteration, of each expert in a start's state."""
    found: dict[keys.OperatorId, int] = {}
    for stage, operators in enumerate(self._operators):
      found |= partial.restored_versions(
        [(r.iteration, r.state) for r in self._records(stage)],
        [o for o in operators if o.expert >= 0],
        start,
      )
    return found

  def begin_at(self, iteration: int) -> None:
    """See `Inventory`."""
    self._first_start = iteration
    self.line = min(self.versions(iteration).values(), default=iteration)

  def go_back(self, iteration: int) -> None:
    """See `Inventory`."""
    super().go_back(iteration)
    self._first_start = iteration

  def advance(
    self, reported: int, *, frozen: bool, keeps_older: bool = True
  ) -> bool:
    """See `Inventory`."""
    starts = [
      [s.iteration for s in self.starts(stage) if s.iteration <= reported]
      for stage in range(len(self._operators))
    ]
    first_start = recovery_plan.recovery_line(
      starts,
      self._first_start,
      self.lag_iterations if keeps_older else 0,
      frozen=frozen,
    )
    moved = first_start > self._first_start
    if moved:
      self._first_start = first_start
      versions = self.versions(first_start).values()
      self.line = max(self.line, min(versions, default=first_start))
      for shares in self._shares:
        for name in [n for n in shares if n[0] < self.line]:
          del shares[name]
    return moved
