"""Detection of workers that hang or are stopped, and of deadlock.

The decisions are pure functions. A worker that waits is never to blame: its
neighbour is, or the network. Nor are the others of its stage world, which wait
for it in a collective that cannot tell.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence


class WorkerState(enum.StrEnum):
  """State of a worker, as in `workers.json`."""

  STARTING = 'starting'
  WARMING = 'warming'  # a standby that prepares
  STANDBY = 'standby'
  MEETING = 'meeting'  # the others of its stage world, for the first time
  COMPILING = 'compiling'
  RUNNING = 'running'
  WAITING = 'waiting'  # for an entry
  BLOCKED = 'blocked'
  DONE = 'done'
  STOPPED = 'stopped'  # these three: the run ended so
  FINISHED = 'finished'
  FAILED = 'failed'


class Shortage(enum.StrEnum):
  """Shortage that blocks a worker, in words for people."""

  SNAPSHOTS = 'all its snapshots are needed'  # none may be overwritten
  ROOM = 'no room'

  def describe(self, what: str) -> str:
    """Says it, and for `what` there is no room, if that is it."""
    return f'{self} for {what}' if self is Shortage.ROOM else str(self)


# A worker speaks four times a second. One that is silent for this long is
# stopped, or hangs as a whole, unless it starves.
_SILENCE_SECONDS = 10.0
_QUIET_SECONDS = 1.0  # of this long it is looked at what the machine gives it
# The parts of a silence: so much of it in a queue for a core says that it
# starves, and so much of it at work says that it does not.
_QUEUED_PART = 0.5
_WORKED_PART = 0.05
_STOPPED_SILENCE_SECONDS = 0.6  # if the kernel says that it is stopped
_DEADLOCK_SECONDS = 30.0
# States in which a worker lets the others of its world wait for it.
_EXCUSES = (
  WorkerState.WAITING,
  WorkerState.BLOCKED,
  WorkerState.MEETING,
  WorkerState.COMPILING,
)
_COLLECTIVE = 'reduce'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
  """The use that a process makes of its machine, as the kernel counts it.

  Attributes:
    worked_seconds: time that its threads had a core, together.
    queued_seconds: time that they waited for one, together. The wait at hand
      may not be counted yet.
    is_held: whether one of them waits for a core or a disk now, or runs.
  """

  worked_seconds: float
  queued_seconds: float
  is_held: bool


def is_starved(before: Usage, now: Usage, seconds: float) -> bool:
  """Returns True if the machine gave a process no time to speak.

  Args:
    before: its use of the machine soon after it spoke last.
    now: the same as of now.
    seconds: the time between them.
  """
  queued_seconds = now.queued_seconds - before.queued_seconds
  worked_seconds = now.worked_seconds - before.worked_seconds
  return queued_seconds >= _QUEUED_PART * seconds or (
    now.is_held and worked_seconds <= _WORKED_PART * seconds
  )


@dataclasses.dataclass(kw_only=True)
class Seen:
  """The known state of one worker.

  Attributes:
    stage: the stage that the worker trains.
    replica: the worker's replica of the stage.
    state: what it does.
    detail: the program that it runs, the entry that it waits for, or the like.
    shortage: what it lacks, if it is blocked.
    state_since: time since which it has been doing just that.
    heard_at: time of its last message.
    stopped_looks: looks in a row at which the kernel said that it is stopped.
    is_starved: whether the machine gave it no time since then.
  """

  stage: int
  replica: int = 0
  state: WorkerState = WorkerState.STARTING
  detail: str = ''
  shortage: Shortage | None = None
  state_since: float
  heard_at: float
  stopped_looks: int = 0
  is_starved: bool = False


def is_quiet(one: Seen, now: float) -> bool:
  """Returns True if a worker is silent for so long that `Usage` is of use."""
  return now - one.heard_at > _QUIET_SECONDS


def is_stopped(one: Seen) -> bool:
  """Returns True if a worker is stopped by a signal.

  One look is not enough: whoever continues the agent continues the workers a
  moment later.
  """
  return one.stopped_looks > 1


def hanging(
  one: Seen,
  hang_timeout_seconds: float,
  now: float,
  everyone: Sequence[Seen] = (),
) -> str:
  """Returns why a worker must be replaced; '' if it need not be.

  Args:
    one: the worker.
    hang_timeout_seconds: time that one program may run.
    now: the time, in seconds that count: not those in which nobody watched.
    everyone: all workers, among them those of its stage world.
  """
  silent_seconds, state_seconds = now - one.heard_at, now - one.state_since
  if is_stopped(one) and silent_seconds > _STOPPED_SILENCE_SECONDS:
    return f'was stopped (SIGSTOP) while {one.state} {one.detail}'.rstrip()
  # Until its first word nobody tells for it: on a busy machine imports alone
  # may take longer than a worker may be silent.
  is_new = one.state is WorkerState.STARTING
  may_be_silent_seconds = hang_timeout_seconds if is_new else _SILENCE_SECONDS
  if one.is_starved:
    may_be_silent_seconds = max(hang_timeout_seconds, _SILENCE_SECONDS)
  if silent_seconds > may_be_silent_seconds:
    return f'said nothing for {silent_seconds:.0f} s'
  if (
    one.state is WorkerState.RUNNING
    and state_seconds > hang_timeout_seconds
    and not any(x.state in _EXCUSES for x in everyone if x.stage == one.stage)
  ):
    return (
      f'hung: it has been running {one.detail} for {state_seconds:.0f} s '
      f'(--hang_timeout={hang_timeout_seconds:g})'
    )
  if one.shortage is Shortage.SNAPSHOTS and all(
    now - x.state_since >= _DEADLOCK_SECONDS
    and (x.state is WorkerState.WAITING or x.shortage is Shortage.SNAPSHOTS)
    for x in (one, *everyone)
  ):
    return (
      f'hung: {one.shortage} for {state_seconds:.0f} s, and nobody '
      'does anything'
    )
  return ''


def deadlock(everyone: Sequence[Seen], now: float) -> str:
  """Returns who waits for what if all have waited too long; else ''.

  A worker that is done has published all that it will.
  """
  waiters = [one for one in everyone if one.state is WorkerState.WAITING]
  worlds = {one.stage for one in waiters}
  if not waiters or any(
    now - one.state_since < _DEADLOCK_SECONDS
    or not (
      one.state in (WorkerState.WAITING, WorkerState.DONE)
      or (one.detail == _COLLECTIVE and one.stage in worlds)
    )
    for one in everyone
  ):
    return ''
  return 'every stage waits: ' + '; '.join(
    f'stage {one.stage} for {one.detail}' for one in waiters
  )
