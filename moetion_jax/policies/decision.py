"""The leader's decision on what snapshots hold from some iteration on."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from moetion_jax import errors, keys
from moetion_jax.snapshots import coverage

MODES = ('rolling', 'aligned')
# Snapshots without compute weights: a restore takes what one lacks from older
# ones.
PARTIAL = 'partial'
# How a partial state becomes whole: iterations are done again, forward and
# backward, or recorded gradients are applied once more.
MICROBATCHES, UPDATES = REPLAYS = ('microbatches', 'updates')
Slots = tuple[keys.Operators, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureDecision:
  """A published decision on what snapshots hold from one iteration on.

  Attributes:
    first_iteration: the iteration from which the decision holds; its snapshot
      captures slot 0.
    window_length: number of slots.
    mode: one of MODES, or PARTIAL.
    every: iterations from one slot to the next. More than 1 only with a window
      of 1, or with records: a frozen operator needs its compute weights of
      *every* replayed iteration, so snapshots with gaps must each be whole.
    slots: disjoint sets, together all operators of the stage; in mode PARTIAL
      the operators that the next snapshots hold beside those in `always`.
    always: operators whose training state every snapshot holds.
    replay: one of REPLAYS; it says what a snapshot holds of the operators
      outside its slot: compute weights, or the iteration's gradients.
  """

  first_iteration: int
  window_length: int
  mode: str
  every: int = 1
  slots: Slots
  always: keys.Operators = frozenset()
  replay: str = MICROBATCHES

  def __post_init__(self) -> None:
    errors.check_known('window_mode', self.mode, (*MODES, PARTIAL))
    errors.check_known('replay', self.replay, REPLAYS)
    if self.replay == UPDATES and self.mode != MODES[0]:
      raise ValueError(f'records of gradients go with {MODES[0]} windows only')
    if self.first_iteration < 0:
      raise ValueError(f'first_iteration={self.first_iteration} is negative')
    if self.window_length < 1 or self.window_length != len(self.slots):
      raise ValueError(f'{len(self.slots)} slots, not {self.window_length}')
    check_distinct(list(itertools.chain.from_iterable(self.slots)))
    is_recorded = self.replay == UPDATES
    if self.every < 1 or (
      self.every > 1 and self.window_length > 1 and not is_recorded
    ):
      raise ValueError(
        f'every={self.every} with window_length={self.window_length}: no '
        'replay gets across iterations without a snapshot unless each is whole'
      )

  @property
  def is_whole(self) -> bool:
    """True if every snapshot holds the training state of all operators."""
    return self.window_length == 1 and self.mode != PARTIAL

  def slot_index(self, iteration: int) -> int | None:
    """Returns the slot's position in the window; None without a snapshot.

    Raises:
      ValueError: the decision does not hold yet at the iteration.
    """
    passed = iteration - self.first_iteration
    if passed < 0:
      raise ValueError(f'iteration {iteration} < {self.first_iteration=}')
    snapshots, skipped = divmod(passed, self.every)
    return None if skipped else snapshots % self.window_length

  def captured(self, iteration: int) -> coverage.Contents | None:
    """Returns what the snapshot of an iteration holds; None without one.

    Gradients are recorded in every iteration, also where slots are captured in
    every k-th only: then of all operators.
    """
    index = self.slot_index(iteration)
    if self.replay == UPDATES:
      everything = frozenset[keys.OperatorId]().union(*self.slots)
      slot = frozenset() if index is None else self.slots[index]
      return coverage.Contents(state=slot, gradients=everything - slot)
    if index is None:
      return None
    if self.mode == PARTIAL:
      return coverage.Contents(state=self.slots[index] | self.always)
    others = list(self.slots[index + 1 :])
    if self.mode == 'rolling':
      others += self.slots[:index]
    return coverage.Contents(
      state=self.slots[index], compute=frozenset().union(*others)
    )


def active(
  decisions: Iterable[CaptureDecision], iteration: int
) -> CaptureDecision:
  """Returns the decision that holds at an iteration: the last one begun.

  Raises:
    ValueError: none holds yet, or two different ones begin together.
  """
  begun = [d for d in decisions if d.first_iteration <= iteration]
  if not begun:
    raise ValueError(f'no decision holds at iteration {iteration}')
  newest = max(d.first_iteration for d in begun)
  last, *others = (d for d in begun if d.first_iteration == newest)
  if any(other != last for other in others):
    raise ValueError(f'two decisions begin with iteration {newest}')
  return last


def check_distinct(operators: Sequence[keys.OperatorId]) -> None:
  """Raises ValueError if operators come twice, and names them."""
  if len(set(operators)) < len(operators):
    twice = [o for o, n in collections.Counter(operators).items() if n > 1]
    raise ValueError(f'operators come twice: {", ".join(map(str, twice))}')
