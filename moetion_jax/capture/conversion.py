"""Turns sparse snapshots into dense state: fold, replay, fold.

The replay between two folds is the worker's ordinary iteration, or its update
alone where the gradients were recorded. A conversion only says where it begins,
what the updates consumed, and what is folded after each, and compares the
result with the digests that the snapshots carry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moetion_jax import errors, keys
from moetion_jax.capture import programs as capture_programs
from moetion_jax.snapshots import coverage, snapshot as snapshot_lib
from moetion_jax.state import partition

# Names of the arrays that a stage's snapshot carries beside its operators, and
# of a field of its metadata.
DIGESTS, PARTIALS, LOAD = snapshot_lib.DIGESTS, 'partials', 'load'
EVAL_LOSS = 'eval_loss'


class DivergedError(errors.WrongBitsError):
  """A rebuilt operator has other bits than the one that was lost.

  Attributes:
    operator: the rebuilt operator.
    iteration: iteration of the state.
  """

  def __init__(
    self, operator: keys.OperatorId, iteration: int, suspects: range
  ):
    super().__init__(
      f'{operator} of state {iteration}, rebuilt from snapshot(s) '
      f'{suspects[0]} to {suspects[-1]}, has another digest than before the '
      'failure: a snapshot or a log entry is damaged in a way that its '
      'checksum does not show'
    )
    self.operator = operator
    self.iteration = iteration
    self.suspects = tuple(suspects)


class ReplayMismatchError(errors.WrongBitsError):
  """A replay published an entry with other bits than before the failure."""

  def __init__(self, error: errors.EntryMismatchError, suspects: range):
    super().__init__(
      f'{error}: snapshot(s) {suspects[0]} to {suspects[-1]} may be damaged in '
      'a way that their checksums do not show'
    )
    self.suspects = tuple(suspects)


class SnapshotLostError(errors.StoreError):
  """A snapshot that a conversion needs cannot be had."""

  def __init__(self, iteration: int, reason: errors.StoreError):
    super().__init__(f'snapshot {iteration} is needed and lost: {reason}')
    self.suspects = (iteration,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
  """The snapshots that a conversion goes through.

  Attributes:
    start: a valid start.
    newest: iteration of the newest snapshot that can be loaded.
    initial: iteration of the initial state; a start there is that state.
    unverified_until: the last iteration whose snapshot was taken with other
      software (`recovery/splice`). What is replayed up to there comes to other
      bits than its digests and scalars say; what is folded in has its digests
      all the same.
    applied: iterations whose recorded gradients are applied; the others are
      done again.
  """

  start: coverage.Start
  newest: int
  initial: int = 0
  unverified_until: int = 0
  applied: range = range(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """What the update of an iteration consumed, and what its report said.

  Attributes:
    gradients: the reduced gradients, fp32, by parameter; zeros for operators
      of which the record has none, whose new state is folded in instead. None
      if that is so for all.
    partials: all stages' scalars, f32[stages, 4].
    load: choices of each expert, i32[L, E].
    eval_loss: the held-out loss after the iteration; None where unknown.
  """

  gradients: Mapping[str, np.ndarray] | None
  partials: np.ndarray
  load: np.ndarray
  eval_loss: float | None


class Advanced(NamedTuple):
  """A state after an iteration of a conversion.

  Attributes:
    state: the state.
    digests: its digests, if it was compared; else None.
  """

  state: partition.State
  digests: jax.Array | None


class Conversion:
  """One conversion of one stage.

  Call `begin` for the state of the start; then, in every following iteration,
  `advance` after its update.

  Attributes:
    start: the snapshot to start from, and where the conversion ends.
    active: operators whose training state is restored so far.
    damaged: iterations whose snapshots could not be read and were not needed.
  """

  def __init__(
    self,
    programs: capture_programs.CapturePrograms,
    digest: Callable[[Any], jax.Array],
    initial: Callable[[], partition.State],
    load: Callable[[int], snapshot_lib.Snapshot],
    route: Route,
  ):
    """Stores the arguments.

    Args:
      programs: the stage's programs, for the operators that this worker has.
      digest: the stage's digest program.
      initial: makes the initial state, which is complete by definition.
      load: reads the snapshot of an iteration and verifies it.
      route: the snapshots that it goes through.
    """
    self.start = route.start
    self._initial_iteration = route.initial
    self.active: frozenset[keys.OperatorId] = frozenset()
    self.damaged: set[int] = set()
    self._programs = programs
    self._digest = digest
    self._initial = initial
    self._load = load
    self._newest = route.newest
    self._unverified_until = route.unverified_until
    self._applied = route.applied
    self._own = frozenset(programs.layout.operators)
    self._expected: dict[keys.OperatorId, np.ndarray] = {}
    self._loaded: tuple[int, snapshot_lib.Snapshot] | None = None

  @property
  def is_complete(self) -> bool:
    """True if every operator is active."""
    return len(self.active) == len(self._own)

  def begin(self) -> partition.State:
    """Makes the partial state of the start.

    Raises:
      SnapshotLostError: a snapshot is damaged.
      DivergedError: the bits of an operator are not what they were.
    """
    if self.start.iteration == self._initial_iteration:
      self.active = self._own
      return self._initial()
    return self._fold(self.start.iteration, None).state

  def applies(self, iteration: int) -> bool:
    """Returns True if the recorded gradients of an iteration are applied."""
    return iteration in self._applied

  def record(self, iteration: int) -> Record:
    """Returns the record of an iteration, which is one that is applied.

    Raises:
      SnapshotLostError: it is damaged, or it is no whole record.
    """
    snapshot = self._snapshot(iteration)
    if snapshot is None:
      reason = errors.StoreError('it is damaged')
      raise SnapshotLostError(iteration, reason)
    missing = sorted(
      self.active - snapshot.gradients.keys() - snapshot.state.keys()
    )
    if (
      missing or PARTIALS not in snapshot.extras or LOAD not in snapshot.extras
    ):
      what = f'gradients of {missing[0]}' if missing else 'scalars'
      raise SnapshotLostError(iteration, errors.StoreError(f'it has no {what}'))
    eval_loss = snapshot.metadata.get(EVAL_LOSS)
    is_whole = self._own <= snapshot.state.keys()
    return Record(
      gradients=None
      if is_whole
      else snapshot_lib.gradients_of(self._programs.layout, snapshot),
      partials=snapshot.extras[PARTIALS],
      load=snapshot.extras[LOAD],
      eval_loss=None if eval_loss is None else float.fromhex(eval_loss),
    )

  def partials(self, iteration: int) -> np.ndarray | None:
    """Returns all stages' scalars, f32[stages, 4]; None if not recorded."""
    if iteration <= self._unverified_until:
      return None  # those of another trajectory
    snapshot = self._snapshot(iteration)
    return snapshot.extras.get(PARTIALS) if snapshot else None

  def advance(self, iteration: int, state: partition.State) -> Advanced:
    """Folds the snapshot of `iteration` in, if anything still needs that.

    It does if it is frozen; and where a record was applied, if the record has
    the new state of an operator and no gradients.

    Args:
      iteration: iteration of `state`.
      state: the state after the update; donated when something is folded.

    Raises:
      SnapshotLostError: a snapshot is damaged.
      DivergedError: an active operator has other bits than it had.
    """
    if self.applies(iteration):
      return self._fold(iteration, state)
    digests = self._verify(iteration, state)
    if self.is_complete:
      return Advanced(state, digests)
    return self._fold(iteration, state)

  def frozen_digests(self) -> Mapping[keys.OperatorId, np.ndarray]:
    """Returns the recorded digests of the operators that are still frozen."""
    return {o: d for o, d in self._expected.items() if o not in self.active}

  def _fold(self, iteration: int, state: partition.State | None) -> Advanced:
    snapshot = self._snapshot(iteration)
    assert snapshot is not None, 'no snapshot, or a start that was not valid'
    # The snapshot may also hold operators of other replicas of the stage.
    restored = self._own.intersection(snapshot.state)
    kept = self.active
    if self.applies(iteration):
      kept -= restored
    if state is None or kept != self._own:
      new = self._programs.fold(state, snapshot, kept)
    else:
      new = state
    self.active |= restored
    return Advanced(new, self._verify(iteration, new, restored))

  def _verify(
    self,
    iteration: int,
    state: partition.State,
    folded: frozenset[keys.OperatorId] = frozenset(),
  ) -> jax.Array | None:
    """Compares the digests of active operators with the recorded ones.

    Args:
      iteration: iteration of the state.
      state: the state to check.
      folded: operators just folded in from this iteration's snapshot.

    Returns:
      The digests of the state; None if there are none to compare with.
    """
    layout = self._programs.layout
    snapshot = self._snapshot(iteration)
    recorded = snapshot.extras.get(DIGESTS) if snapshot else None
    if snapshot is None or recorded is None:
      return None
    names = layout.partition.operators
    if DIGESTS in snapshot.metadata:
      names = snapshot_lib.names_of_digests(snapshot.metadata[DIGESTS])
    self._expected = {
      operator: row
      for operator, row in zip(names, np.array(recorded), strict=True)
      if operator in self._own
    }
    is_other = iteration <= self._unverified_until
    compared = folded & self.active if is_other else self.active
    digests = self._digest(state)
    found = layout.partition.by_operator(digests)
    for operator in sorted(compared):
      if not np.array_equal(found[operator], self._expected[operator]):
        # What an applied record is added to was compared one iteration before.
        is_alone = operator in folded or self.applies(iteration)
        first = iteration if is_alone else self.start.iteration
        raise DivergedError(operator, iteration, range(first, iteration + 1))
    return digests

  def _snapshot(self, iteration: int) -> snapshot_lib.Snapshot | None:
    """Returns the snapshot of an iteration; None if there is none."""
    if iteration > self._newest:  # the loaded snapshot is no longer needed
      self._loaded = None
    if not 0 < iteration <= self._newest or iteration in self.damaged:
      return None
    if self._loaded is None or self._loaded[0] != iteration:
      try:
        self._loaded = (iteration, self._load(iteration))
      except errors.StoreError as error:
        if not self.is_complete:
          raise SnapshotLostError(iteration, error) from error
        self.damaged.add(iteration)
        return None
    return self._loaded[1]
