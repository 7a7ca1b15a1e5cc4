"""The policies' methods in a simulation: their costs and decisions; pure.

Each method is a value with its costs, made by `policies.make` from a cluster or
by `predict` from measurements. After a failure it decides by the functions that
the system runs on: valid starts (`coverage`), the recovery line and the plan
(`recovery.plan`).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Mapping

from launch.simulate import world as world_lib
from moetion_jax import keys
from moetion_jax.policies import (
  decision as decision_lib,
  settings as capture_settings,
)
from moetion_jax.recovery import plan as recovery_plan
from moetion_jax.snapshots import coverage

_PEER = 'peer'
_NOWHERE = 'nowhere'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads:
  """Seconds until a stage has what it goes on from.

  Attributes:
    own_seconds: seconds from its own hosts' memory.
    peer_seconds: seconds of a new host, from its peer's memory.
    durable_seconds: seconds of everybody, from the durable store.
  """

  own_seconds: float = 0.0
  peer_seconds: float = 0.0
  durable_seconds: float = 0.0

  def of(self, where: str) -> float:
    """Returns the seconds from a place, as `recovery.plan` names it."""
    return {
      recovery_plan.OWN: self.own_seconds,
      _PEER: self.peer_seconds,
      recovery_plan.DURABLE: self.durable_seconds,
      recovery_plan.INITIAL: 0.0,
    }[where]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Durable:
  """Whole states that are also written to the durable store.

  Attributes:
    every: iterations between two; 0 for none.
    landing_seconds: seconds from the end of the iteration until one is there.
  """

  every: int = 0
  landing_seconds: float = 0.0

  def newest(self, situation: world_lib.Situation) -> int:
    """Returns the newest that is there; 0, the initial state, if none is."""
    if not self.every:
      return 0
    newest = situation.completed // self.every * self.every
    passed = situation.pace.between(newest, situation.completed)
    is_late = passed + situation.since_seconds < self.landing_seconds
    if newest > situation.resumed_from and is_late:
      newest -= self.every
    return max(0, newest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Timed:
  """The fields that all methods have; see `world.Method`."""

  name: str
  pace: world_lib.Pace
  detect_seconds: float
  start_seconds: float
  reads: Reads
  durable: Durable = Durable()

  @property
  def label(self) -> str:
    """See `world.Method`."""
    return self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing(_Timed):
  """No snapshots: everybody goes back to the durable or the initial state."""

  def recover(
    self, world: world_lib.World, situation: world_lib.Situation
  ) -> world_lib.Outcome:
    """See `world.Method`."""
    start = self.durable.newest(situation)
    seconds = self.reads.durable_seconds if start else 0.0
    return everybody(world, start, seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(_Timed):
  """Everybody goes back to the newest whole snapshot (dense, two_phase).

  Attributes:
    interval: iterations between two snapshots.
    landing_seconds: seconds from the end of the iteration until one counts.
    in_storage: whether it is read from the durable store, not from memory.
    taken: iterations that have one, ascending, of a run whose interval changed;
      () for the multiples of `interval`.
  """

  interval: int
  landing_seconds: float
  in_storage: bool = False
  taken: tuple[int, ...] = ()

  @property
  def label(self) -> str:
    """See `world.Method`."""
    return f'{self.name}, every {self.interval}'

  def newest(self, completed: int) -> int:
    """Returns the iteration of the newest snapshot; 0 if there is none."""
    if self.taken:
      place = bisect.bisect_right(self.taken, completed)
      return self.taken[place - 1] if place else 0
    return completed // self.interval * self.interval

  def start(
    self, world: world_lib.World, situation: world_lib.Situation
  ) -> tuple[int, str]:
    """Returns the iteration all go back to, and its snapshot's place."""
    newest = self.newest(situation.completed)
    passed = situation.pace.between(newest, situation.completed)
    is_late = passed + situation.since_seconds < self.landing_seconds
    if newest > situation.resumed_from and is_late:
      # No copy begins before the last one has landed.
      newest = max(self.newest(newest - 1), situation.resumed_from)
    where = recovery_plan.DURABLE
    if not self.in_storage:
      lost = situation.lost_hosts
      where = _PEER if lost else recovery_plan.OWN
      if not all(world.has_copy(host, lost) for host in lost):
        where = _NOWHERE
    if newest == 0 or where == _NOWHERE:
      newest = self.durable.newest(situation)
      where = recovery_plan.DURABLE if newest else recovery_plan.INITIAL
    return newest, where

  def recover(
    self, world: world_lib.World, situation: world_lib.Situation
  ) -> world_lib.Outcome:
    """See `world.Method`."""
    start, where = self.start(world, situation)
    return everybody(world, start, self.reads.of(where))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windowed(_Timed):
  """Sparse snapshots; with logs only the stages that lost something replay.

  Attributes:
    decision: the capture decision of one stage; others differ in operators
      only.
    landing_seconds: by slot, seconds from the end of a snapshot's iteration
      until it landed.
    replay_seconds: seconds of an iteration that a stage replays alone.
    pipeline_seconds: seconds by which that is longer for every further
      neighbour that replays with it.
    update_seconds: seconds of one update from recorded gradients.
    frozen_share: by operator, the share of an iteration's replay that it saves
      while frozen; one that is missing saves nothing.
    logs: upstream logging; without it all stages go back.
    replays_interrupted: whether the interrupted iteration counts as replayed
      as a whole, as in a run's event `recovered`. Otherwise the stage replays
      what the others have of it, and goes on with them from there.
    replicated_logs: whether a host's log is at its peers as well.
    keep_windows: windows by which the recovery line lags, see `launch.train`.
  """

  decision: decision_lib.CaptureDecision
  landing_seconds: tuple[float, ...]
  replay_seconds: float
  pipeline_seconds: float = 0.0
  update_seconds: float = 0.0
  frozen_share: Mapping[keys.OperatorId, float] = dataclasses.field(
    default_factory=dict
  )
  logs: bool = True
  replays_interrupted: bool = False
  replicated_logs: bool = False
  keep_windows: int = 2

  @property
  def label(self) -> str:
    """See `world.Method`."""
    every = f' every {self.decision.every}' if self.decision.every > 1 else ''
    return (
      f'{self.name}, window {self.decision.window_length} {self.decision.mode}'
      + every
      + (', updates' if self.decision.replay == decision_lib.UPDATES else '')
      + ('' if self.logs else ', no logs')
    )

  @property
  def period(self) -> int:
    """Iterations of a window."""
    return self.decision.window_length * self.decision.every

  @functools.cached_property
  def operators(self) -> frozenset[keys.OperatorId]:
    """The stage's operators."""
    return frozenset().union(*self.decision.slots)

  @functools.cached_property
  def _known_starts(self) -> dict[tuple[int, int], tuple[coverage.Start, ...]]:
    return {}

  def landed(self, situation: world_lib.Situation) -> int:
    """Returns the iteration up to which all snapshots are there."""
    for iteration in range(situation.completed, situation.resumed_from, -1):
      index = self.decision.slot_index(iteration)
      if index is None:
        continue
      passed = situation.pace.between(iteration, situation.completed)
      if passed + situation.since_seconds >= self.landing_seconds[index]:
        return iteration
    return situation.resumed_from

  def starts(self, landed: int) -> tuple[coverage.Start, ...]:
    """Returns the valid starts of a conversion, without the initial state."""
    period = self.period
    first = max(1, landed + 1 - period * (self.keep_windows + 2))
    # Snapshots repeat after a period: starts found once hold there as well.
    shift = (first - 1) // period * period
    key = first - shift, landed - shift
    if key not in self._known_starts:
      records = []
      for iteration in range(key[0], key[1] + 1):
        if (captured := self.decision.captured(iteration)) is not None:
          records.append(
            coverage.SnapshotRecord(
              iteration=iteration, is_record=True, **captured._asdict()
            )
          )
      self._known_starts[key] = coverage.valid_starts(records, self.operators)
    return tuple(
      coverage.Start(
        iteration=s.iteration + shift,
        complete_at=s.complete_at + shift,
        applied_until=s.applied_until and s.applied_until + shift,
      )
      for s in self._known_starts[key]
    )

  def recover(
    self, world: world_lib.World, situation: world_lib.Situation
  ) -> world_lib.Outcome:
    """See `world.Method`."""
    starts = self.starts(self.landed(situation))
    line = recovery_plan.recovery_line(
      [[s.iteration for s in starts]] * world.stages,
      situation.line,
      capture_settings.lag_iterations(self.period, self.keep_windows),
      frozen=bool(situation.recovering),
    )
    inventories = [
      self._inventory(world, situation, stage, starts, line)
      for stage in range(world.stages)
    ]
    failed = situation.failed if self.logs else range(world.stages)
    plan = recovery_plan.plan(inventories, failed)
    if len(plan.stages) == world.stages:
      # Where a state of the durable store is newer, all go back to that. All
      # train again, and capture: there is no replay to lose if one dies.
      durable = self.durable.newest(situation)
      if durable > plan.start:
        return everybody(world, durable, self.reads.durable_seconds)
      if plan.start == 0:
        return everybody(world, 0, 0.0)
    since, part = self._interrupted(situation)
    members: dict[int, world_lib.Recovery] = {}
    for segment in _neighbours(plan.stages):
      applied = min(plan.applied_until[stage] for stage in segment)
      seconds = self.update_seconds * (applied - plan.start)
      seconds += self.replay(
        applied,
        situation.completed - applied,
        len(segment),
        part,
        has_frozen=applied == plan.start,
      )
      for stage in segment:
        fetch = self.reads.of(plan.sources[stage])
        members[stage] = world_lib.Recovery(
          start=plan.start,
          fetch_seconds=fetch,
          replay_seconds=seconds,
          applied_until=applied,
        )
    return world_lib.Outcome(
      completed=situation.completed,
      since_seconds=since,
      stages=members,
      line=line,
    )

  def _interrupted(self, situation: world_lib.Situation) -> tuple[float, float]:
    """Returns the interrupted iteration's kept seconds and replayed share."""
    seconds = situation.pace.of(situation.completed + 1)
    if not self.logs:
      return 0.0, 0.0
    if self.replays_interrupted:
      return seconds, 1.0
    return situation.since_seconds, situation.since_seconds / seconds

  def replay(
    self,
    start: int,
    count: int,
    neighbours: int,
    part: float = 0.0,
    *,
    has_frozen: bool = True,
  ) -> float:
    """Returns the seconds of replaying iterations start + 1 and later.

    Args:
      start: iteration of the snapshot that the stages go on from.
      count: number of whole iterations.
      neighbours: number of stages that replay together.
      part: share of one more iteration.
      has_frozen: whether operators are frozen at first. They are not after
        gradients were applied.
    """
    seconds = self.replay_seconds + self.pipeline_seconds * (neighbours - 1)
    saved = 0.0
    if self.frozen_share and start and has_frozen:
      frozen = set(self.operators)
      for number in range(min(count, self.period)):
        if (captured := self.decision.captured(start + number)) is not None:
          frozen -= captured.state
        saved += sum(self.frozen_share.get(o, 0.0) for o in frozen)
    return seconds * (count + part - saved)

  def _inventory(
    self,
    world: world_lib.World,
    situation: world_lib.Situation,
    stage: int,
    starts: tuple[coverage.Start, ...],
    line: int,
  ) -> recovery_plan.StageInventory:
    lost = [h for h in world.hosts_of_stage(stage) if h in situation.lost_hosts]
    copied = all(world.has_copy(h, situation.lost_hosts) for h in lost)
    initial = coverage.Start(iteration=0, complete_at=0)
    held = starts if copied else ()
    return recovery_plan.StageInventory(
      stage=stage,
      starts=(initial, *held),
      log_first=max(line + 1, situation.log_first.get(stage, 1)),
      log_lost=bool(lost) and not (self.replicated_logs and copied),
      newest=situation.recovering.get(stage, situation.completed + 1),
      sources={s.iteration: (_PEER,) for s in held} if lost else {},
    )


def everybody(
  world: world_lib.World, start: int, seconds: float
) -> world_lib.Outcome:
  """Makes the outcome of all stages going back together and training on."""
  one = world_lib.Recovery(
    start=start, fetch_seconds=seconds, replay_seconds=0.0
  )
  return world_lib.Outcome(
    completed=start,
    stages=dict.fromkeys(range(world.stages), one),
    line=start,
  )


def _neighbours(stages: tuple[int, ...]) -> list[list[int]]:
  """Groups stages into runs of adjacent ones, ascending."""
  runs: list[list[int]] = []
  for stage in stages:
    if runs and runs[-1][-1] == stage - 1:
      runs[-1].append(stage)
    else:
      runs.append([stage])
  return runs
