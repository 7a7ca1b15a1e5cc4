"""Events: all that the coordinator ever learns, as plain values.

Time is one of them: whoever handles an event says `Tick` before it. An answer
follows the action that asked for it (`actions`) before any other event.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moetion_jax import errors, report as report_lib
from moetion_jax.hostmem import segment_check
from moetion_jax.recovery import hang_detection, splice as splice_lib
from moetion_jax.snapshots import coverage

Name = tuple[int, int]  # a worker's stage and replica


class Event:
  """Something that the coordinator learns."""


# ---- what happens ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick(Event):
  """The time is `now`, in seconds of a clock that only goes forward."""

  now: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started(Event):
  """The workers may start; the stores have logs of this generation at most."""

  newest_generation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said(Event):
  """A worker said one of the `notices`."""

  worker: Name
  message: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Died(Event):
  """A worker's process ended; all that it said was handled before."""

  worker: Name
  pid: int
  how: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looked(Event):
  """Somebody looked at the workers' processes, and at the agents of hosts.

  Attributes:
    stopped: the workers that a signal has stopped.
    usage: by worker, for those that are quiet, what they use of their machine.
    away: the agent of another host that a signal has stopped, for people: it
      passes nothing on of its workers, and serves nobody; '' for none.
  """

  stopped: frozenset[Name] = frozenset()
  usage: Mapping[Name, hang_detection.Usage] = dataclasses.field(
    default_factory=dict
  )
  away: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopAsked(Event):
  """The user asked the run to stop, so many times more."""

  times: int = 1


# ---- answers to questions ----------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accepted(Event):
  """Answers `actions.Accept`: the workdir is this run's.

  Attributes:
    last_recorded: the newest iteration that an earlier run wrote down.
    splices: all splices of the run.
  """

  last_recorded: int = 0
  splices: tuple[splice_lib.Splice, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scanned(Event):
  """Answers `actions.Scan`: what the stores hold.

  Attributes:
    shares: by stage that was to be scanned, its snapshots.
    log_bytes: by stage, the size of its smallest log; 0 if one is missing
      or not whole.
    newest: by stage that was to be scanned, the newest iteration of its logs.
    whole_from: by stage that was to be scanned, the first iteration of which
      its logs surely have all entries; 0 if one has none.
    unreadable: why snapshots are left out, one reason each.
    gone: the stores that somebody removed as a whole, for people; '' for none.
  """

  shares: Mapping[int, tuple[coverage.Share, ...]]
  log_bytes: tuple[int, ...]
  newest: Mapping[int, int]
  whole_from: Mapping[int, int]
  unreadable: tuple[str, ...] = ()
  gone: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigestsRead(Event):
  """Answers `actions.ReadDigests`: digests of whole states, by iteration.

  Attributes:
    stored: those that the snapshots of all stages together carry.
    recorded: those that are written down.
  """

  stored: Mapping[int, str] = dataclasses.field(default_factory=dict)
  recorded: Mapping[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogsChecked(Event):
  """Answers `actions.CheckLogs`.

  Attributes:
    checks: one for each log that can be read.
    unreadable: those that cannot: stage, replica and the reason.
    newest: by stage, the newest iteration of its logs, before the check.
  """

  checks: tuple[segment_check.SegmentCheck, ...]
  unreadable: tuple[tuple[int, int, str], ...] = ()
  newest: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spliced(Event):
  """Answers `actions.Splice`: whether one was due, and all of the run."""

  is_due: bool
  splices: tuple[splice_lib.Splice, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged(Event):
  """Answers `actions.Merge`.

  Attributes:
    iteration: the newest iteration that all stages reported and that is
      written.
    reports: those of all stages if the iteration is complete and new.
    skipped: updates in a row, up to that iteration, that were left out.
    wrong: why the report cannot be right; None if it can.
  """

  iteration: int
  reports: tuple[report_lib.Report, ...] = ()
  skipped: int = 0
  wrong: errors.WrongBitsError | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped(Event):
  """Answers `actions.DropDamaged`: the entries that are gone."""

  entries: tuple[segment_check.Damage, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broke(Event):
  """Answers a question of which the answer could not be found."""

  error: errors.MoetionError
