"""Decides from which snapshots a dense state can be made.

A snapshot holds the training state of some operators and the compute weights or
the gradients of others. Folded one after the other, with an iteration or its
update replayed between two, they make a dense state. Which snapshots do is
decided here, from names alone.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from moetion_jax import keys


class ShareName(NamedTuple):
  """The name of a share among all shares of a stage.

  Attributes:
    iteration: the iteration after which the state was captured.
    replicas: number of shares that make the stage's snapshot.
    replica: the worker's replica, from 0.
  """

  iteration: int
  replicas: int
  replica: int


class Contents(NamedTuple):
  """The operators of a snapshot, by what it holds of them.

  Attributes:
    state: operators whose training state it holds.
    compute: operators whose compute weights it holds.
    gradients: operators whose gradients it holds.
  """

  state: frozenset[keys.OperatorId] = frozenset()
  compute: frozenset[keys.OperatorId] = frozenset()
  gradients: frozenset[keys.OperatorId] = frozenset()

  def of(self, share: frozenset[keys.OperatorId]) -> Contents:
    """Returns what it holds of some operators."""
    return Contents(*(held & share for held in self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """The contents of one worker's snapshot of one iteration.

  Attributes:
    iteration: the iteration after which the state was captured.
    replica: the worker's replica, from 0.
    replicas: number of shares that make the stage's snapshot.
    state: operators whose training state it holds.
    compute: operators whose compute weights it holds.
    gradients: operators whose gradients it holds.
    is_record: whether it says all that the iteration's report does.
  """

  iteration: int
  replica: int = 0
  replicas: int = 1
  state: keys.Operators
  compute: keys.Operators
  gradients: keys.Operators = frozenset()
  is_record: bool = False

  def __post_init__(self):
    if self.iteration < 0 or not 0 <= self.replica < self.replicas:
      raise ValueError(
        f'share {self.replica} of {self.replicas} of iteration {self.iteration}'
      )

  @property
  def name(self) -> ShareName:
    """Name of the share; its copies have the same."""
    return ShareName(self.iteration, self.replicas, self.replica)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotRecord:
  """The contents of a whole stage's snapshot: the union of its shares.

  Attributes:
    iteration: the iteration after which the state was captured.
    state: operators whose training state it holds.
    compute: operators whose compute weights it holds.
    gradients: operators whose gradients it holds.
    is_record: whether it says all that the iteration's report does.
  """

  iteration: int
  state: frozenset[keys.OperatorId]
  compute: frozenset[keys.OperatorId]
  gradients: frozenset[keys.OperatorId] = frozenset()
  is_record: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Start:
  """A snapshot from which a conversion can start, and where it ends.

  Attributes:
    iteration: iteration of the first snapshot that is folded.
    complete_at: iteration of the last one: with it every operator is active.
      The conversion replays iteration + 1 to complete_at.
    applied_until: the last iteration to which recorded gradients lead, one
      after the other, and at least complete_at; 0 where iterations are done
      again from the start on.
  """

  iteration: int
  complete_at: int
  applied_until: int = 0


def whole_teams(names: Iterable[ShareName]) -> dict[int, list[ShareName]]:
  """Finds the snapshots of a stage that have all their shares.

  A stage that changed its number of replicas may have captured an iteration
  twice, with the same bits in other shares. Shares of the two never make a
  snapshot together; if both are complete, the one with fewer shares is taken.

  Args:
    names: the names of the shares that there are.

  Returns:
    The shares that make each snapshot, by replica; by iteration, ascending.
  """
  teams: dict[tuple[int, int], set[ShareName]] = {}
  for name in names:
    teams.setdefault((name.iteration, name.replicas), set()).add(name)
  whole: dict[int, list[ShareName]] = {}
  for (iteration, replicas), team in sorted(teams.items()):
    if len(team) == replicas:
      whole.setdefault(iteration, sorted(team))
  return whole


def complete_records(shares: Iterable[Share]) -> tuple[SnapshotRecord, ...]:
  """Finds the snapshots that have all their shares, see `whole_teams`.

  Args:
    shares: shares of one stage, in any order; copies of a share count once.

  Returns:
    The snapshots, one per iteration, ascending by iteration.

  Raises:
    ValueError: two shares of one iteration, replica and number of replicas hold
      different operators.
  """
  named: dict[ShareName, Share] = {}
  for share in shares:
    if named.setdefault(share.name, share) != share:
      raise ValueError(
        f'iteration {share.iteration} has two different shares '
        f'{share.replica} of {share.replicas}'
      )
  return tuple(
    SnapshotRecord(
      iteration=iteration,
      state=frozenset().union(*(named[name].state for name in team)),
      compute=frozenset().union(*(named[name].compute for name in team)),
      gradients=frozenset().union(*(named[name].gradients for name in team)),
      is_record=all(named[name].is_record for name in team),
    )
    for iteration, team in whole_teams(named).items()
  )


def initial_record(
  operators: Iterable[keys.OperatorId], iteration: int = 0
) -> SnapshotRecord:
  """Returns the snapshot of the initial state, complete by definition."""
  return SnapshotRecord(
    iteration=iteration, state=frozenset(operators), compute=frozenset()
  )


def valid_starts(
  records: Iterable[SnapshotRecord], operators: Iterable[keys.OperatorId]
) -> tuple[Start, ...]:
  """Finds the snapshots from which a conversion can start.

  Snapshot s is a valid start when snapshots s, s + 1, ..., e exist without a
  gap, each operator's training state is in one of them, and one of these holds:
    - all after s are records, and hold of each operator its gradients or its
      training state: the gradients are applied;
    - each operator's compute weights are in all before the one with its
      training state: until it is active, every iteration that is done again
      runs it on those.
  The first such e is `complete_at`. Where both hold, gradients are applied.

  These rules cover rolling windows, aligned windows, an order or a length that
  changes, and snapshots of every k-th iteration (of those, with k > 1, only one
  that holds everything is a start, unless gradients are recorded between them).

  Args:
    records: the stage's snapshots in any order, one per iteration.
    operators: all operators of the stage.

  Returns:
    The starts, ascending by iteration.

  Raises:
    ValueError: two records are of the same iteration.
  """
  operators = frozenset(operators)
  newest_first = sorted(records, key=lambda r: r.iteration, reverse=True)
  for newer, older in itertools.pairwise(newest_first):
    if newer.iteration == older.iteration:
      raise ValueError(f'two records of iteration {older.iteration}')
  starts = {
    s.iteration: s for s in _starts_of_microbatches(newest_first, operators)
  }
  starts |= {
    s.iteration: s for s in _starts_of_updates(newest_first, operators)
  }
  return tuple(starts[iteration] for iteration in sorted(starts))


class _Coverage:
  """From which snapshot on each operator is active, if one goes back in time.

  An operator moves to the end when its training state is found in an older
  snapshot, so the first one is always the last to become active. Thus a record
  costs as much as it captures, plus a few operations on whole sets.
  """

  def __init__(self, operators: frozenset[keys.OperatorId]):
    """Begins without any snapshot."""
    self._operators = operators
    self._active_from: collections.OrderedDict[keys.OperatorId, int] = (
      collections.OrderedDict()
    )
    self._lost = set(operators)  # those that would never be active

  def clear(self) -> None:
    """Forgets all: no replay gets from older snapshots to these."""
    self._lost = set(self._operators)
    self._active_from.clear()

  def lose(self, operators: frozenset[keys.OperatorId]) -> None:
    """Forgets operators that no older snapshot helps to get here."""
    for operator in operators - self._lost:
      del self._active_from[operator]
      self._lost.add(operator)

  def add(self, record: SnapshotRecord) -> None:
    """Takes in the training states of the next older snapshot."""
    for operator in self._operators & record.state:
      self._active_from[operator] = record.iteration
      self._active_from.move_to_end(operator)
      self._lost.discard(operator)

  def complete_at(self, start: int) -> int | None:
    """Returns the last snapshot that a start needs; None if it is none."""
    return None if self._lost else next(iter(self._active_from.values()), start)


def _starts_of_microbatches(
  newest_first: Sequence[SnapshotRecord], operators: frozenset[keys.OperatorId]
) -> Iterator[Start]:
  """Yields starts from which iterations are done again."""
  covered, newer = _Coverage(operators), None
  for record in newest_first:
    if newer != record.iteration + 1:
      covered.clear()
    covered.lose(operators - record.compute - record.state)
    covered.add(record)
    newer = record.iteration
    complete_at = covered.complete_at(record.iteration)
    if complete_at is not None:
      yield Start(iteration=record.iteration, complete_at=complete_at)


def _starts_of_updates(
  newest_first: Sequence[SnapshotRecord], operators: frozenset[keys.OperatorId]
) -> Iterator[Start]:
  """Yields starts from which gradients are applied, once at least."""
  covered, newer, until = _Coverage(operators), None, 0
  for record in newest_first:
    if newer is None or not (
      newer.iteration == record.iteration + 1
      and newer.is_record
      and operators <= newer.gradients | newer.state
    ):
      covered.clear()
      until = record.iteration
    covered.add(record)
    newer = record
    complete_at = covered.complete_at(record.iteration)
    if complete_at is not None and until > record.iteration:
      yield Start(
        iteration=record.iteration, complete_at=complete_at, applied_until=until
      )
