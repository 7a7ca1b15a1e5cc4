"""What damaged log entries make doubtful, and from where to go on; pure.

A read is verified, but memory can be damaged after that, while a program reads
it: then states, snapshots and later entries come out wrong and have right
checksums. What shows it is a NaN, or a digest that is not the one of before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from moetion_jax.hostmem import segment_check

_NAMED = 3


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
      f'{len(self.damaged)} of the {self.entries} entries of the logs are '
      f'damaged: {names}'
    )


def find(
  checks: Iterable[segment_check.SegmentCheck],
  dropped: Sequence[segment_check.Damage] = (),
  line: int = 0,
) -> Finding:
  """Puts together what the checks of all segments found.

  Args:
    checks: one for each segment.
    dropped: entries that were found to be damaged before, and written again:
      whoever had read them may have read the damage.
    line: the recovery line; nobody goes back to a state before it for an entry
      that was dropped.
  """
  checks = list(checks)
  known = [one for one in dropped if one.iteration > line]
  return Finding(
    entries=sum(one.entries for one in checks) + len(known),
    damaged=tuple(sorted({d for c in checks for d in c.damaged} | {*known})),
  )
