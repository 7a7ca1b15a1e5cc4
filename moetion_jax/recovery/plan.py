"""The recovery line, and the plan for a recovery.

Both are pure functions of what the stores hold, with names and numbers only.
The workers' ordinary loop executes a plan, from the plan's start with a partial
state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from moetion_jax import errors
from moetion_jax.snapshots import coverage

OWN = 'own'
DURABLE = 'durable'
INITIAL = 'initial'

_INITIAL_START = coverage.Start(iteration=0, complete_at=0)


class UnrecoverableError(errors.MoetionError):
  """No state is left from which the run could go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageInventory:
  """The contents of the stores of one stage, all its replicas together.

  Attributes:
    stage: the stage's number, from 0.
    starts: the starts of a conversion, ascending, counted from verified copies
      in the places that are required. Contains that of the initial state, where
      it can be made again (from the seed or a checkpoint).
    log_first: the first iteration of which the stage's log has all entries, up
      to those of the iteration that it works on.
    log_lost: whether the log is gone or damaged as a whole: it has no entries.
    corrupt: iterations of which a log entry is known to be corrupt.
    newest: the newest iteration that the stage has begun; 0 before the first. A
      stage that replays has begun what it replays. One that has finished may
      say one more than the last: it needs nothing of the last any more.
    sources: by start iteration, the names of places that have the stage's
      snapshots, best first. Without any, the source is the initial state for
      iteration 0 and the stage's own store for others.
    unrecorded_until: the last iteration whose snapshot does not say the scalars
      that others publish now: it is of other software. 0 for none.
    stored: the newest iteration whose snapshot counts, which it does once all
      entries of the iteration can be read; 0 for none.
  """

  stage: int
  starts: tuple[coverage.Start, ...] = (_INITIAL_START,)
  log_first: int = 1
  log_lost: bool = False
  corrupt: frozenset[int] = frozenset()
  newest: int
  sources: Mapping[int, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  unrecorded_until: int = 0
  stored: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
  """A plan that says which stages go back, and from where.

  The members restart from snapshots of `start`, all of one iteration, and
  replay. Each applies the gradients that were recorded, up to some iteration;
  what comes after that it does again and publishes again. Nobody else does
  anything.

  Attributes:
    stages: the recovering set, ascending; empty if nobody needs anything.
    start: the iteration from whose snapshots all members start.
    complete_at: by member, the last snapshot of its conversion.
    applied_until: by member, the last iteration whose gradients it applies;
      the start itself, if it does all again.
    sources: by member, the name of the place to read the snapshots from.
    reasons: by member, why it is one.
  """

  stages: tuple[int, ...]
  start: int
  complete_at: Mapping[int, int]
  applied_until: Mapping[int, int]
  sources: Mapping[int, str]
  reasons: Mapping[int, str]

  @property
  def first_iteration(self) -> int:
    """The first iteration that is replayed."""
    return self.start + 1

  @property
  def applies(self) -> bool:
    """True if a member applies recorded gradients."""
    return any(until > self.start for until in self.applied_until.values())

  def all_again(self) -> RecoveryPlan:
    """Returns the same plan with nothing but iterations that are done again."""
    return dataclasses.replace(
      self, applied_until=dict.fromkeys(self.stages, self.start)
    )

  def until_complete(self) -> RecoveryPlan:
    """Returns the same plan without the snapshots that no conversion needs."""
    until = {
      stage: min(iteration, max(self.start, self.complete_at[stage]))
      for stage, iteration in self.applied_until.items()
    }
    return dataclasses.replace(self, applied_until=until)


def recovery_line(
  starts_by_stage: Sequence[Sequence[int]],
  previous: int,
  lag_iterations: int,
  *,
  frozen: bool = False,
) -> int:
  """Returns the iteration from which a recovery can always start.

  It is the largest one that is a valid start of every stage and at least
  `lag_iterations` older than the newest such: if its successors turn out to be
  corrupt it is still there.

  Args:
    starts_by_stage: the valid starts of each stage, in any order.
    previous: the line so far; the result is never below it.
    lag_iterations: iterations to lag behind, normally one window.
    frozen: whether a recovery is under way, which leaves the line as it is.
  """
  if frozen or not starts_by_stage:
    return previous
  common = set(starts_by_stage[0]).intersection(*starts_by_stage[1:])
  newest = max(common, default=previous)
  return max(
    (s for s in common if previous < s <= newest - lag_iterations),
    default=previous,
  )


def replayed_iterations(plan: RecoveryPlan, stage: int, newest: int) -> int:
  """Returns the number of iterations that a member does again.

  Args:
    plan: the plan in which the stage is a member.
    stage: the stage.
    newest: the iteration that the stage had begun, which is replayed as well.
  """
  return max(newest - plan.applied_until[stage], 0)


def plan(
  inventories: Sequence[StageInventory],
  failed: Collection[int],
  excluded: Collection[tuple[int, int]] = frozenset(),
) -> RecoveryPlan:
  """Decides who recovers from where, so that every needed entry will exist.

  Entries are needed by members, which read those of their neighbours from the
  first iteration on that they do again, and the scalars of all others from the
  iteration on that follows their conversion (a snapshot holds the scalars of
  its own iteration); and by all other stages, which read everybody's from the
  iteration on that they work on. A member publishes again what it does again.
  So the recovering set is, for a given start, the smallest one that
    - contains every stage that failed,
    - contains every stage whose entries are needed by another, and are lost,
      dropped or corrupt,
    - contains every stage that works on an iteration whose entries a member
      lost and cannot publish again.
  Each member applies recorded gradients as far as they lead, but not beyond
  what others need of it and it has lost: the greatest fixpoint.

  A start is possible if it is valid for each member of its set. Of the possible
  ones, the one with the smallest set is taken; of those, the newest.

  A failure during a recovery needs a new plan: call this again, with both
  failures and new inventories.

  Args:
    inventories: one inventory a stage, of all stages.
    failed: stages of which a worker died, or is to be restarted.
    excluded: (stage, start iteration) of conversions that failed because what
      they read was corrupt; they are not tried again from any place. (If it is
      known which snapshot it was, an inventory without it says more.)

  Raises:
    UnrecoverableError: nothing is left to start from.
    ValueError: an inventory is missing.
  """
  by_stage = sorted(inventories, key=lambda i: i.stage)
  if [i.stage for i in by_stage] != list(range(len(by_stage))):
    raise ValueError(f'inventories of stages {[i.stage for i in by_stage]}')
  if not set(failed) <= set(range(len(by_stage))):
    raise ValueError(f'failed: {sorted(failed)} of {len(by_stage)} stages')
  case = _Case(
    inventories=by_stage,
    starts=[_usable(i.stage, i.starts, excluded) for i in by_stage],
  )
  initial = case.initial_members(failed)
  if not initial:
    return RecoveryPlan(
      stages=(),
      start=0,
      complete_at={},
      applied_until={},
      sources={},
      reasons={},
    )
  candidates = _common([case.starts[stage] for stage in initial])
  best: tuple[int, _Members] | None = None
  for start in sorted(candidates, reverse=True):
    members = case.closed_members(initial, start)
    if members.is_possible:
      if best is None or len(members.reasons) < len(best[1].reasons):
        best = start, members
      if len(members.reasons) == len(initial):
        break  # no other start has a smaller set
  if best is None:
    raise UnrecoverableError(case.explain(candidates, initial))
  return case.make_plan(*best)


# By the iteration of each.
_Starts = dict[int, coverage.Start]


@dataclasses.dataclass(kw_only=True)
class _Members:
  """A recovering set.

  Attributes:
    reasons: by member, why it is one.
    until: by member, the newest iteration that it does not do again.
    is_possible: whether the start is valid for all, and all are served.
  """

  reasons: dict[int, str] = dataclasses.field(default_factory=dict)
  until: dict[int, int] = dataclasses.field(default_factory=dict)
  is_possible: bool = True


def _usable(
  stage: int,
  starts: Sequence[coverage.Start],
  excluded: Collection[tuple[int, int]],
) -> _Starts:
  return {
    s.iteration: s for s in starts if (stage, s.iteration) not in excluded
  }


def _common(starts: Sequence[_Starts]) -> set[int]:
  return set(starts[0]).intersection(*starts[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
  """The input of `plan`, checked; sequences are by stage."""

  inventories: Sequence[StageInventory]
  starts: Sequence[_Starts]

  def initial_members(self, failed: Collection[int]) -> dict[int, str]:
    """Returns who recovers whatever the start is, with the reasons."""
    members = {stage: 'died' for stage in sorted(failed)}
    live = [i for i in self.inventories if i.stage not in members]
    for producer in live:
      for reader in live:
        if producer is not reader and (
          lack := _lack(producer, _working_on(reader), reader.stage)
        ):
          members.setdefault(producer.stage, lack)
    return members

  def closed_members(self, initial: Mapping[int, str], start: int) -> _Members:
    """Returns the recovering set for a start, with the reasons."""
    members = self._closed(initial, start)
    if len(members.reasons) == len(initial):
      return members
    # Who joined late may need less, as a member, than was lost for it before.
    return self.closed_members(members.reasons, start)

  def _closed(self, initial: Mapping[int, str], start: int) -> _Members:
    members = _Members()
    queue: list[int] = []
    for stage, reason in initial.items():
      self._join(stage, reason, start, members, queue)
    for member in queue:  # which grows meanwhile
      for other in range(len(self.inventories)):
        if other == member:
          continue
        if other not in members.reasons:
          needed_from = self._needed_from(member, other, start, members)
          reason = _lack(self.inventories[other], needed_from, member)
          reason = reason or self._serve(member, other, start, members, queue)
          if reason:
            self._join(other, reason, start, members, queue)
          continue
        for producer, reader in ((member, other), (other, member)):
          if self._serve(producer, reader, start, members, queue):
            members.is_possible = False
    return members

  def _join(
    self,
    stage: int,
    reason: str,
    start: int,
    members: _Members,
    queue: list[int],
  ) -> None:
    """Makes a stage a member."""
    known = self.starts[stage].get(start)
    members.reasons[stage] = reason
    members.until[stage] = max(start, known.applied_until if known else start)
    members.is_possible &= known is not None
    queue.append(stage)

  def _needed_from(
    self, reader: int, producer: int, start: int, members: _Members
  ) -> int:
    """Returns the first iteration of which a stage needs another's entries."""
    if reader not in members.reasons:
      return _working_on(self.inventories[reader])
    until = members.until[reader]
    recorded = start >= self.inventories[reader].unrecorded_until
    known = self.starts[reader].get(start)
    if recorded and known and abs(producer - reader) > 1:
      # Scalars: the conversion has those that it needs.
      until = max(until, known.complete_at)
    return until + 1

  def _serve(
    self,
    member: int,
    reader: int,
    start: int,
    members: _Members,
    queue: list[int],
  ) -> str | None:
    """Has a member do again what its log has not and a reader needs.

    Returns:
      Why the reader cannot have that; None if it can.
    """
    needed_from = self._needed_from(reader, member, start, members)
    until = members.until[member]
    gap = _gap(self.inventories[member], needed_from, until)
    if gap is None:
      return None
    known = self.starts[member].get(start)
    if known is None or not known.complete_at < gap <= known.applied_until:
      return (
        f'it needs entries of iteration {gap}, which stage {member} has not '
        f'and does not publish again from iteration {start}'
      )
    members.until[member] = gap - 1
    queue.append(member)  # now it needs more itself
    return None

  def make_plan(self, start: int, members: _Members) -> RecoveryPlan:
    """Makes the plan to start from snapshots of the members or their peers."""
    default = (INITIAL if start == 0 else OWN,)
    stages = sorted(members.reasons)
    return RecoveryPlan(
      stages=tuple(stages),
      start=start,
      complete_at={m: self.starts[m][start].complete_at for m in stages},
      applied_until={m: members.until[m] for m in stages},
      sources={
        m: (self.inventories[m].sources.get(start) or default)[0]
        for m in stages
      },
      reasons={m: members.reasons[m] for m in stages},
    )

  def explain(
    self, candidates: Collection[int], initial: Mapping[int, str]
  ) -> str:
    """Returns the error message for a case without a plan."""
    members, blamed, where = dict(initial), sorted(initial), 'to recover'
    if candidates:
      start = max(candidates)
      members = self.closed_members(initial, start).reasons
      blamed = [m for m in sorted(members) if start not in self.starts[m]]
      where = f'to recover with the others from iteration {start}'
    stages = '; '.join(
      f'stage {m} ({members[m]}) has {where}: {_listing(self.starts[m])}'
      for m in blamed
    )
    return (
      f'no common start is left. Valid starts that {stages}. Start over with '
      '--fresh'
    )


def _working_on(inventory: StageInventory) -> int:
  """Returns the first iteration of which a stage needs others' entries."""
  return max(_begun(inventory), 1)


def _begun(inventory: StageInventory) -> int:
  """Returns the first iteration of which it may not have published all."""
  return max(inventory.newest, inventory.stored + 1 if inventory.stored else 0)


def _lack(
  producer: StageInventory, needed_from: int, reader: int
) -> str | None:
  """Returns what a reader needs and a stage that goes on as it is lacks.

  Entries of iterations not yet begun are not lacking: they will be published.
  """
  if producer.log_lost:
    if needed_from <= producer.newest:
      return f'its log is lost and stage {reader} needs it'
    return None
  if needed_from < producer.log_first:
    return (
      f'its entries before iteration {producer.log_first} are gone and stage '
      f'{reader} needs them'
    )
  corrupt = min((i for i in producer.corrupt if i >= needed_from), default=None)
  if corrupt is not None:
    return (
      f'an entry of iteration {corrupt} is corrupt and stage {reader} needs it'
    )
  return None


def _gap(member: StageInventory, first: int, last: int) -> int | None:
  """Returns the first of these iterations of which a member lacks entries.

  It may not have published all entries of the newest one that it had begun.
  """
  if first > last:
    return None
  begun = _begun(member)
  if member.log_lost or first < member.log_first or first >= begun:
    return first
  gaps = {i for i in member.corrupt if first <= i <= last}
  if begun <= last:
    gaps.add(begun)
  return min(gaps, default=None)


def _listing(iterations: Collection[int]) -> str:
  """Returns the newest few iterations as text."""
  newest = sorted(iterations)[-5:]
  more = '..., ' if len(iterations) > len(newest) else ''
  return more + (', '.join(map(str, newest)) or 'none')
