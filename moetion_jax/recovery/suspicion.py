"""Damaged log entries: all that they make doubtful, and the way back; pure.

A read is verified, but memory can be damaged after that, while a program reads
it: then states, snapshots and later entries come out wrong and have right
checksums. What shows it is a NaN, or a digest that is not the one of before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from moetion_jax.hostmem import segment_check

_NAMED = 3
# When an iteration is reported by all, entries so much older were verified by
# their writers after all programs that had read them ended: one iteration until
# it is reported, two until the look back, and some for a look back that has
# fallen behind, and for a damaged header, whose iteration is a guess.
_SETTLED_ITERATIONS = 6


def settled(reported: int) -> int:
  """Returns the last iteration whose entries nobody read damaged.

  Whoever reads one again verifies it.

  Args:
    reported: the newest iteration that all stages reported.
  """
  return max(0, reported - _SETTLED_ITERATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """The result of a check of all logs.

  Attributes:
    entries: number of entries that were checked.
    damaged: the damaged ones, the oldest iteration first.
  """

  entries: int
  damaged: tuple[segment_check.Damage, ...]

  @property
  def trusted(self) -> int | None:
    """The newest state that no damaged entry went into; None: every one.

    State i is made from entries of iteration i. All that came of a later one is
    to be dropped: snapshots and lines of metrics after this state, and every
    log, since all stages go back together.
    """
    if not self.damaged:
      return None
    return self.damaged[0].iteration - 1

  def __str__(self) -> str:
    if not self.damaged:
      return (
        f'all {self.entries} entries of the logs were checked and are whole'
      )
    names = '; '.join(one.entry for one in self.damaged[:_NAMED])
    more = len(self.damaged) - _NAMED
    if more > 0:
      names += f'; and {more} more'
    return (
      f'{len(self.damaged)} of the {self.entries} entries of the logs '
      f'{"is" if len(self.damaged) == 1 else "are"} damaged: {names}'
    )


def find(
  checks: Iterable[segment_check.SegmentCheck],
  dropped: Sequence[segment_check.Damage] = (),
  line: int = 0,
  settled_until: int = 0,
) -> Finding:
  """Puts together what the checks of all segments found.

  Args:
    checks: one for each segment.
    dropped: entries that were found to be damaged before, and written again:
      whoever had read them may have read the damage.
    line: the recovery line; nobody goes back to a state before it for an entry
      that was dropped.
    settled_until: see `settled`; damage up to it counts for nothing.
  """
  checks = list(checks)
  known = [one for one in dropped if one.iteration > line]
  return Finding(
    entries=sum(one.entries for one in checks) + len(known),
    damaged=tuple(
      sorted(
        {
          one
          for check in checks
          for one in check.damaged
          if one.iteration > settled_until
        }
        | {*known}
      )
    ),
  )
