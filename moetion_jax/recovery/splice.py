"""Places where a run went on with other software, and so with other bits.

What was captured before can still be a start: its conversion folds snapshots of
the old trajectory and replays between them with the new software. Which bits
come out follows from those snapshots alone, so they come out again after a
failure, as long as nothing of the new trajectory takes part: captures of the
two are never folded into one state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splice:
  """The place where one trajectory goes over into another.

  All stages start there together, with the snapshots up to `complete_at` that
  the old software took; it has none after that any more. The new software
  captures from the iteration after `complete_at` on.

  Attributes:
    exact_until: the start of the conversions: the last iteration with the bits
      of the old software.
    complete_at: by stage, the last snapshot of its conversion.
  """

  exact_until: int
  complete_at: tuple[int, ...]

  def bars(self, stage: int, start: int) -> bool:
    """Returns True if a conversion from `start` would fold both trajectories.

    A start before `exact_until` would not, since it is complete no later than
    the conversion of the splice.
    """
    return self.exact_until < start <= self.complete_at[stage]


def in_force(splices: Sequence[Splice]) -> tuple[Splice, ...]:
  """Returns the splices behind which something old may still be.

  A later one that goes as far back as an earlier one, or farther, has dropped
  what the earlier one's new software captured.

  Args:
    splices: all splices of a run, in the order in which they were made.
  """
  kept: list[Splice] = []
  for one in splices:
    kept = [x for x in kept if x.exact_until < one.exact_until]
    kept.append(one)
  return tuple(kept)


def allows(
  splices: Sequence[Splice],
  stage: int,
  start: int,
  *,
  is_running: bool,
  initial: int = 0,
) -> bool:
  """Returns whether a conversion may start there.

  Args:
    splices: those in force, in order.
    stage: the stage.
    start: the iteration of the start.
    is_running: whether the run goes on already. Then nothing goes back behind
      the last splice: what is written down of the iterations since the start
      has the bits of the old software.
    initial: iteration of the initial state, which is whole: nothing is folded.
  """
  if start > initial and any(one.bars(stage, start) for one in splices):
    return False
  return not (is_running and splices and start < splices[-1].exact_until)


def trusted(
  splices: Sequence[Splice], iteration: int, stages: int
) -> dict[int, int]:
  """Returns, by stage, the newest snapshot that a damaged entry leaves.

  What the conversion of the last splice folds was captured by the old software:
  no entry that the logs have went into it.

  Args:
    splices: those in force, in order.
    iteration: the newest state that no damaged entry went into.
    stages: the number of stages.
  """
  if not splices or iteration < splices[-1].exact_until:
    return dict.fromkeys(range(stages), iteration)
  folded = splices[-1].complete_at
  return {stage: max(iteration, folded[stage]) for stage in range(stages)}


def unverified_until(splices: Sequence[Splice], stage: int) -> int:
  """Returns the last iteration whose recorded digests say nothing; 0: none.

  Args:
    splices: those in force, in order.
    stage: the stage.
  """
  return splices[-1].complete_at[stage] if splices else 0
