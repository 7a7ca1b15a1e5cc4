"""The leader's decision on what snapshots hold from some iteration on."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from moetion_jax import errors, keys

MODES = ('rolling', 'aligned')
# Snapshots without compute weights: a restore takes what one lacks from older
# ones.
PARTIAL = 'partial'
Slots = tuple[keys.Operators, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureDecision:
  """A published decision on what snapshots hold from one iteration on.

  Attributes:
    first_iteration: the iteration from which the decision holds; its snapshot
      captures slot 0.
    window_length: number of slots.
    mode: one of MODES, or PARTIAL.
    every: iterations from one snapshot to the next. More than 1 only with a
      window of 1: a frozen operator needs its compute weights of *every*
      replayed iteration, so snapshots with gaps must each be whole.
    slots: disjoint sets, together all operators of the stage; in mode PARTIAL
      the operators that the next snapshots hold beside those in `always`.
    always: operators whose training state every snapshot holds.
  """

  first_iteration: int
  window_length: int
  mode: str
  every: int = 1
  slots: Slots
  always: keys.Operators = frozenset()

  def __post_init__(self) -> None:
    errors.check_known('window_mode', self.mode, (*MODES, PARTIAL))
    if self.first_iteration < 0:
      raise ValueError(f'first_iteration={self.first_iteration} is negative')
    if self.window_length < 1 or self.window_length != len(self.slots):
      raise ValueError(f'{len(self.slots)} slots, not {self.window_length}')
    check_distinct(list(itertools.chain.from_iterable(self.slots)))
    if self.every < 1 or (self.every > 1 and self.window_length > 1):
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

  def captured(
    self, iteration: int
  ) -> tuple[frozenset[keys.OperatorId], frozenset[keys.OperatorId]] | None:
    """Returns what the snapshot of an iteration holds; None without one.

    Returns:
      The operators whose training state it holds, and those whose compute
      weights it holds.
    """
    index = self.slot_index(iteration)
    if index is None:
      return None
    if self.mode == PARTIAL:
      return self.slots[index] | self.always, frozenset()
    others = list(self.slots[index + 1 :])
    if self.mode == 'rolling':
      others += self.slots[:index]
    return self.slots[index], frozenset().union(*others)


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
