"""Decides from which snapshots a dense state can be made.

A snapshot holds the training state of some operators and the compute weights of
others. Folded one after the other, with an iteration replayed between two,
they make a dense state. Which snapshots do is decided here, from names alone.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """The contents of one worker's snapshot of one iteration.

  Attributes:
    iteration: the iteration after which the state was captured.
    replica: the worker's replica, from 0.
    replicas: number of shares that make the stage's snapshot.
    state: operators whose training state it holds.
    compute: operators whose compute weights it holds.
  """

  iteration: int
  replica: int = 0
  replicas: int = 1
  state: keys.Operators
  compute: keys.Operators

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
  """

  iteration: int
  state: frozenset[keys.OperatorId]
  compute: frozenset[keys.OperatorId]


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Start:
  """A snapshot from which a conversion can start, and where it ends.

  Attributes:
    iteration: iteration of the first snapshot that is folded.
    complete_at: iteration of the last one: with it every operator is active.
      The conversion replays iteration + 1 to complete_at.
  """

  iteration: int
  complete_at: int


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
  gap, each operator's training state is in one of them, and its compute
  weights are in all before that one: until it is active, every replayed
  iteration runs it on those. The first such e is `complete_at`.

  This one rule covers rolling windows, aligned windows, an order or a length
  that changes, and snapshots of every k-th iteration (of those, with k > 1,
  only one that holds everything is a start).

  Args:
    records: the stage's snapshots in any order, one per iteration.
    operators: all operators of the stage.

  Returns:
    The starts, ascending by iteration.

  Raises:
    ValueError: two records are of the same iteration.
  """
  operators = frozenset(operators)
  starts: list[Start] = []
  # Going back in time, with s the record at hand: for each operator, the
  # snapshot from which it would be active if s were the start. Operators that
  # would never be active are in `lost` instead. An operator whose training
  # state is in s moves to the end, so the first one is always the last to
  # become active. Thus a record costs as much as it captures, plus a few
  # operations on whole sets.
  active_from: collections.OrderedDict[keys.OperatorId, int] = (
    collections.OrderedDict()
  )
  lost = set(operators)
  newer = None
  for record in sorted(records, key=lambda r: r.iteration, reverse=True):
    s = record.iteration
    if s == newer:
      raise ValueError(f'two records of iteration {s}')
    if newer != s + 1:
      lost = set(operators)
      active_from.clear()
    for operator in operators - record.compute - record.state - lost:
      del active_from[operator]
      lost.add(operator)
    for operator in operators & record.state:
      active_from[operator] = s
      active_from.move_to_end(operator)
      lost.discard(operator)
    newer = s
    if not lost:
      complete_at = next(iter(active_from.values()), s)
      starts.append(Start(iteration=s, complete_at=complete_at))
  return tuple(reversed(starts))
