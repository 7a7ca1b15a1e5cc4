"""Inventory of every stage's host store, as the coordinator knows it.

Workers report each snapshot once it counts; after a death the manifests are
read instead, since a snapshot may have been committed and never reported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from moetion_jax import keys
from moetion_jax.policies import settings
from moetion_jax.recovery import plan as recovery_plan, splice as splice_lib
from moetion_jax.snapshots import coverage


class Inventory:
  """All stages' snapshots, and the recovery line that follows from them.

  Attributes:
    initial: iteration of the initial state.
    line: the recovery line, see `plan.recovery_line`.
    entry_line: the last iteration of which nobody needs entries any more. It is
      the line, where iterations are done again; beyond it, where recorded
      gradients lead to newer states.
    kept_from: iteration from which on snapshots are kept; before the line if a
      start there takes a part of its state from older ones.
    splices: where the run went on with other software, in order.
    is_running: whether the run goes on already, see `splice.allows`.
  """

  def __init__(
    self,
    policy: settings.Policy,
    operators: Sequence[Collection[keys.OperatorId]],
    lag_iterations: int,
    initial: int = 0,
    log_lag: int = 0,
  ):
    """Starts without any snapshot but the initial state.

    Args:
      policy: the policy, which tells what is a start.
      operators: the operators of each stage.
      lag_iterations: iterations by which the line lags behind, see
        `plan.recovery_line`.
      initial: iteration of the initial state; older snapshots do not count.
      log_lag: iterations by which the entry line lags behind the newest state
        that recorded gradients lead to.
    """
    self.initial = self.line = self.kept_from = self.entry_line = initial
    self._log_lag = log_lag
    self.splices: tuple[splice_lib.Splice, ...] = ()
    self.is_running = False
    self.lag_iterations = lag_iterations
    self._policy = policy
    self._operators = [frozenset(o) for o in operators]
    self._shares: list[dict[coverage.ShareName, coverage.Share]] = [
      {} for _ in operators
    ]
    self._excluded: set[tuple[int, int]] = set()
    self._corrupt: set[tuple[int, int]] = set()
    self._log_first = [initial + 1] * len(operators)
    # Snapshots up to there say nothing of the log, which is newer than they.
    self._unlogged = [0] * len(operators)

  def stored(self, stage: int, share: coverage.Share) -> None:
    """Takes in a snapshot that counts from now on."""
    self._shares[stage][share.name] = share
    self._excluded.discard((stage, share.iteration))

  def rescan(self, stage: int, shares: Iterable[coverage.Share]) -> None:
    """Replaces what is known of a stage by what its store holds."""
    self._shares[stage] = {share.name: share for share in shares}

  def lose(self, stage: int, iteration: int) -> None:
    """Excludes a snapshot that is damaged: it no longer counts."""
    self._excluded.add((stage, iteration))

  def excluded(self, stage: int) -> tuple[int, ...]:
    """Returns the iterations of a stage's damaged snapshots, ascending."""
    return tuple(sorted(i for s, i in self._excluded if s == stage))

  def lose_entry(self, stage: int, iteration: int) -> None:
    """Takes in that an entry of a stage's log is damaged."""
    self._corrupt.add((stage, iteration))

  def log_began(self, stage: int, start: int) -> None:
    """Takes in that a stage's log is new: it has nothing up to the start."""
    self._log_first[stage] = start + 1
    self._unlogged[stage] = self.newest(stage)

  def logs_found(
    self, whole_from: Mapping[int, int], newest: Mapping[int, int]
  ) -> None:
    """Takes in what the logs of an earlier start have.

    Args:
      whole_from: by stage, the first iteration of which all entries are there;
        0 if it has none.
      newest: by stage, the newest iteration of which one is there.
    """
    for stage, first in whole_from.items():
      self._log_first[stage] = max(self._log_first[stage], first)
      if newest[stage] <= self.newest(stage):  # it may have begun anew
        self._unlogged[stage] = self.newest(stage)

  def published_again(self, stage: int) -> None:
    """Forgets the damage to a stage's log: in recovering it wrote it again."""
    self._corrupt = {x for x in self._corrupt if x[0] != stage}

  def newest(self, stage: int) -> int:
    """Returns the iteration of a stage's newest snapshot; 0 without any."""
    return max((name[0] for name in self._shares[stage]), default=0)

  def oldest(self, stage: int) -> int:
    """Returns the iteration of a stage's oldest snapshot; 0 without any."""
    return min((name[0] for name in self._shares[stage]), default=0)

  @property
  def operators(self) -> tuple[frozenset[keys.OperatorId], ...]:
    """The operators of each stage."""
    return tuple(self._operators)

  def iterations(self, stage: int) -> frozenset[int]:
    """Returns the iterations of which a stage has a whole snapshot."""
    return frozenset(coverage.whole_teams(self._shares[stage]))

  def starts(self, stage: int) -> tuple[coverage.Start, ...]:
    """Returns the valid starts of a stage, the initial state included."""
    starts = self._policy.starts(
      self._records(stage), self._operators[stage], self.line
    )
    return tuple(
      start
      for start in starts
      if splice_lib.allows(
        self._barring,
        stage,
        start.iteration,
        is_running=self.is_running,
        initial=self.initial,
      )
    )

  @property
  def _barring(self) -> tuple[splice_lib.Splice, ...]:
    """The splices that bar starts: none if all after a start is forgotten."""
    return self.splices if self._policy.is_exact else ()

  def _records(self, stage: int) -> tuple[coverage.SnapshotRecord, ...]:
    return (
      coverage.initial_record(self._operators[stage], self.initial),
      *coverage.complete_records(
        share
        for (iteration, *_), share in self._shares[stage].items()
        if iteration > self.initial and (stage, iteration) not in self._excluded
      ),
    )

  def versions(self, start: int) -> dict[keys.OperatorId, int]:
    """Returns the versions (`Policy.versions`) in a start's state."""
    found: dict[keys.OperatorId, int] = {}
    for stage, operators in enumerate(self._operators):
      found |= self._policy.versions(self._records(stage), operators, start)
    return found

  def begin_at(self, iteration: int) -> None:
    """Sets the line to the start with which all stages begin."""
    self.line = self.entry_line = iteration
    self.kept_from = min(self.versions(iteration).values(), default=iteration)

  def go_back(self, iteration: int) -> None:
    """Takes all stages back to a state before the line, with empty logs.

    Args:
      iteration: the state's iteration; if it is the initial one, no snapshot
        is left.
    """
    self._corrupt.clear()
    if iteration == self.initial:
      self._excluded.clear()
      for shares in self._shares:
        shares.clear()
    self.begin_at(iteration)

  def advance(
    self, reported: int, *, frozen: bool, keeps_older: bool = True
  ) -> bool:
    """Moves the lines on; returns True if one moved.

    Args:
      reported: newest iteration that is written down: what comes before the
        line is never done again, and nobody needs entries of it.
      frozen: see `plan.recovery_line`.
      keeps_older: whether the line lags behind, in case the newest snapshots
        are damaged.
    """
    lag_iterations = self.lag_iterations if keeps_older else 0
    if self._barring and self.line == self._barring[-1].exact_until:
      # Until the first start behind a splice all is kept since its own: stores
      # and logs have no room for more.
      lag_iterations = 0
    starts = [self.starts(stage) for stage in range(len(self._operators))]
    line = recovery_plan.recovery_line(
      [
        [s.iteration for s in of_stage if s.iteration <= reported]
        for of_stage in starts
      ],
      self.line,
      lag_iterations,
      frozen=frozen,
    )
    lines = self.line, self.entry_line
    if line != self.line:
      self._move_to(line)
    if not frozen:
      self._move_entry_line(starts)
    return lines != (self.line, self.entry_line)

  def _move_to(self, line: int) -> None:
    before = self.kept_from, self.entry_line
    self.begin_at(line)
    self.kept_from = max(self.kept_from, before[0])
    self.entry_line = max(self.entry_line, before[1])
    for shares in self._shares:
      for name in [n for n in shares if n[0] < self.kept_from]:
        del shares[name]

  def _move_entry_line(
    self, starts: Sequence[Sequence[coverage.Start]]
  ) -> None:
    """Moves the entry line: to what records lead to in all stages, less a lag.

    All stages have a state there without anybody's entries, as long as their
    records are whole; if one is not, everybody goes back to before it.
    """
    newest = min(
      max((start.applied_until for start in of_stage), default=0)
      for of_stage in starts
    )
    self.entry_line = max(self.entry_line, newest - self._log_lag)

  def stage_inventories(
    self, newest: Sequence[int], lost: Collection[int] = ()
  ) -> list[recovery_plan.StageInventory]:
    """Returns the input of `plan.plan`.

    Args:
      newest: the iteration that each stage has begun.
      lost: stages whose logs are gone.
    """
    stored_by_stage = [
      self._records(stage)[-1].iteration for stage in range(len(newest))
    ]
    return [
      recovery_plan.StageInventory(
        stage=stage,
        starts=self.starts(stage),
        log_first=max(self.entry_line + 1, self._log_first[stage]),
        log_lost=stage in lost,
        corrupt=frozenset(i for s, i in self._corrupt if s == stage),
        newest=begun,
        sources={self.initial: (recovery_plan.INITIAL,)},
        unrecorded_until=splice_lib.unverified_until(self.splices, stage),
        stored=stored if stored > self._unlogged[stage] else 0,
      )
      for stage, (begun, stored) in enumerate(
        zip(newest, stored_by_stage, strict=True)
      )
    ]
