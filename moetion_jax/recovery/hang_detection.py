"""Detection of workers that hang or are stopped, and of deadlock.

The decisions are pure functions. A worker that waits is never to blame: its
neighbour is, or the network (DESIGN section 6). Nor are the others of its stage
world, which wait for it in a collective that cannot tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

# Reason of a blocked worker that may not overwrite any of its snapshots.
SNAPSHOTS_FULL = 'all its snapshots are needed'

# A worker speaks four times a second. One that is silent for this long is
# stopped, or so starved that nobody is served by waiting.
_SILENCE_SECONDS = 10.0
_STOPPED_SILENCE_SECONDS = 0.6  # if the kernel says that it is stopped
_DEADLOCK_SECONDS = 30.0
# States in which a worker lets the others of its world wait for it.
_EXCUSES = ('waiting', 'blocked', 'compiling')
_COLLECTIVE = 'reduce'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
  """The known state of one worker.

  Attributes:
    stage: the stage that the worker trains.
    replica: the worker's replica of the stage.
    state: 'compiling', 'running', 'waiting', 'done' or another one.
    detail: the program that it runs, the entry that it waits for, or the like.
    state_seconds: time for which it has been doing just that.
    silent_seconds: time for which it has said nothing.
    is_stopped: whether the kernel says that it is stopped.
  """

  stage: int
  state: str
  detail: str
  state_seconds: float
  silent_seconds: float
  is_stopped: bool = False
  replica: int = 0


def hanging(
  one: Seen, hang_timeout_seconds: float, everyone: Sequence[Seen] = ()
) -> str:
  """Returns why a worker must be replaced; '' if it need not be.

  Args:
    one: the worker.
    hang_timeout_seconds: time that one program may run.
    everyone: all workers, among them those of its stage world.
  """
  if one.is_stopped and one.silent_seconds > _STOPPED_SILENCE_SECONDS:
    return f'was stopped (SIGSTOP) while {one.state} {one.detail}'.rstrip()
  if one.silent_seconds > _SILENCE_SECONDS:
    return f'said nothing for {one.silent_seconds:.0f} s'
  if (
    one.state == 'running'
    and one.state_seconds > hang_timeout_seconds
    and not any(x.state in _EXCUSES for x in everyone if x.stage == one.stage)
  ):
    return (
      f'hung: it has been running {one.detail} for {one.state_seconds:.0f} s '
      f'(--hang_timeout={hang_timeout_seconds:g})'
    )
  if _is_full(one) and all(
    x.state_seconds >= _DEADLOCK_SECONDS
    and (x.state == 'waiting' or _is_full(x))
    for x in (one, *everyone)
  ):
    return (
      f'hung: {SNAPSHOTS_FULL} for {one.state_seconds:.0f} s, and nobody '
      'does anything'
    )
  return ''


def _is_full(one: Seen) -> bool:
  """Returns True if a worker waits until a snapshot may go."""
  return one.state == 'blocked' and one.detail == SNAPSHOTS_FULL


def deadlock(everyone: Sequence[Seen]) -> str:
  """Returns who waits for what if all have waited too long; else ''."""
  waiters = [one for one in everyone if one.state == 'waiting']
  worlds = {one.stage for one in waiters}
  if not everyone or any(
    one.state_seconds < _DEADLOCK_SECONDS
    or not (
      one.state == 'waiting'
      or (one.detail == _COLLECTIVE and one.stage in worlds)
    )
    for one in everyone
  ):
    return ''
  return 'every stage waits: ' + '; '.join(
    f'stage {one.stage} for {one.detail}' for one in waiters
  )


def is_stopped(pid: int) -> bool:
  """Returns True if the kernel has a process of this host stopped."""
  try:
    with open(f'/proc/{pid}/stat', 'rb') as file:
      stat = file.read()
  except OSError:
    return False
  # The process's name, in parentheses, may hold anything.
  return stat.rpartition(b')')[2].split()[:1] == [b'T']
