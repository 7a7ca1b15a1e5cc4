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
from moetion_jax.policies import planner
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
  """A worker said one of the messages below."""

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
  """Somebody looked which workers' processes are stopped by a signal."""

  stopped: frozenset[Name] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopAsked(Event):
  """The user asked the run to stop, so many times more."""

  times: int = 1


# ---- what workers say --------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
  """The worker is able to train.

  Attributes:
    device: kind of its devices.
    platform: JAX's name of their platform.
    lowering_platform: the platform that programs are lowered for, see
      `compilation.platform_of`.
    state_bytes: bytes of the stage's training state.
    operators: sizes of the stage's operators.
    environment: what it computes with.
    data_fingerprint: fingerprint of the data that it reads.
  """

  device: str
  platform: str
  lowering_platform: str
  state_bytes: int
  operators: planner.StageSizes
  environment: dict[str, dict[str, Any]]
  data_fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """Current state of the worker; sent a few times a second.

  Attributes:
    state: its state.
    detail: the program that runs, the entry that it waits for, or the like.
    shortage: what a blocked worker lacks.
    iteration: the iteration that it works on.
    steps: count of what it did.
  """

  state: hang_detection.WorkerState
  detail: str
  shortage: hang_detection.Shortage | None = None
  iteration: int
  steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumed:
  """The worker has its state and trains from now on.

  Attributes:
    first_iteration: the first iteration that it does.
    fetch_seconds: time that it took to get its state.
  """

  first_iteration: int
  fetch_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaughtUp:
  """The iteration in which the worker's predecessor died is done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
  """A snapshot counts from now on: the worker's share of it."""

  share: coverage.Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reported:
  """An iteration is done."""

  report: report_lib.Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """The reply to `Propose`: the newest iteration that the worker has begun."""

  limit: int
  begun: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
  """The training loop ended after this iteration."""

  iteration: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoppedHere:
  """The worker has stopped, as it was told, and waits for `orders.Go`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandedOver:
  """The worker's state is in the store folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
  """The final checkpoint is written and was read back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damaged:
  """Nothing was saved: a worker handed over another state than it had.

  Attributes:
    stage: that worker's stage.
    replica: that worker's replica.
    what: what is damaged, for people.
    is_sent_so: whether that is what it sent (`final_state.DamagedError`).
  """

  stage: int
  replica: int
  what: str
  is_sent_so: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewritten:
  """The checkpoint was read back damaged, and is written once more."""

  what: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faulted:
  """A scripted fault happens now.

  Attributes:
    at: the time at which the worker announced it.
    iteration: the iteration in which it happens; 0 before training.
    fields: the fields of its event.
  """

  at: float
  iteration: int
  fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
  """A setting is wrong; fields as in `errors.ConfigError`. Also of a host."""

  flag: str
  value: str
  reason: str

  @classmethod
  def of(cls, error: errors.ConfigError) -> Refused:
    """Makes the message of the error."""
    return cls(flag=error.flag, value=str(error.value), reason=error.reason)

  def error(self) -> errors.ConfigError:
    """Makes the error again."""
    return errors.ConfigError(self.flag, self.value, self.reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
  """The worker ends now.

  Attributes:
    error: the reason.
    advice: what to do if no damage explains it; '' for nothing.
    iteration: the iteration that it had begun.
    is_final: whether another attempt would end the same way.
    has_wrong_bits: whether a damaged log entry may be the cause, though nobody
      found it.
    suspects: iterations of snapshots that may be damaged.
    corrupt: stage and iteration of a damaged log entry.
  """

  error: str
  advice: str = ''
  iteration: int
  is_final: bool = False
  has_wrong_bits: bool = False
  suspects: tuple[int, ...] = ()
  corrupt: tuple[int, int] | None = None


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
    unreadable: why snapshots are left out, one reason each.
  """

  shares: Mapping[int, tuple[coverage.Share, ...]]
  log_bytes: tuple[int, ...]
  newest: Mapping[int, int]
  unreadable: tuple[str, ...] = ()


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
