"""What an agent, its workers and the agents of further hosts tell each other.

A message is JSON, one object a line (`codec`). The unions at the end say
who sends what to whom.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from moetion_jax import codec, errors, report as report_lib
from moetion_jax.logs import remote
from moetion_jax.policies import decision as decision_lib, planner
from moetion_jax.recovery import hang_detection, orders
from moetion_jax.runtime import environment as environment_lib, spec as spec_lib
from moetion_jax.snapshots import coverage

# ---- a worker to its agent --------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warm:
  """A standby is prepared."""


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
    data_fingerprint: fingerprint of the data, from the first worker.
  """

  device: str
  platform: str
  lowering_platform: str
  state_bytes: int
  operators: planner.StageSizes
  environment: environment_lib.Record
  data_fingerprint: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """What the worker does now; sent a few times a second.

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

  iteration: int


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
class FaultHappens:
  """A scripted fault happens now, at a time of `time.monotonic`."""

  number: int
  at: float


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


# ---- an agent to its worker -------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promote:
  """A standby becomes a worker.

  Attributes:
    spec: the worker's spec; its descriptors are those of the standby.
    environment: environment variables to set.
  """

  spec: spec_lib.Spec
  environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProducerLocation:
  """Location of the entries of one worker."""

  stage: int
  replica: int
  location: remote.Location


@dataclasses.dataclass(frozen=True, kw_only=True)
class Locations:
  """Where all workers' entries are; sent again on a change."""

  locations: tuple[ProducerLocation, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopHere:
  """Stop where you are, and keep process and programs: an order follows.

  It is never sent before the first `orders.Go`.
  """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """The recovery line: what is older may be let go of."""

  iteration: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decide:
  """What is captured from now on."""

  decision: decision_lib.CaptureDecision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Propose:
  """Wait after an iteration until more is said."""

  limit: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
  """End after an iteration."""

  limit: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandOver:
  """Put the training state into the store folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Save:
  """Write everyone's state as the final checkpoint.

  Attributes:
    path: the folder of the checkpoint.
    iteration: the iteration of the state.
    digest: its digest, as in `metrics.jsonl`.
    replicas: of each stage, the replicas that have put theirs.
  """

  path: str
  iteration: int
  digest: str
  replicas: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exit:
  """End the process."""


# ---- the agent of a further host to the leader ------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
  """The host's store is open: the address of its server."""

  address: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
  """The worker of a stage runs."""

  stage: int
  pid: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
  """A message of the worker of a stage."""

  stage: int
  message: FromWorker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Printed:
  """A line that the worker of a stage printed."""

  stage: int
  line: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exited:
  """The worker of a stage ended; all its messages came before."""

  stage: int
  exit_code: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostFailed:
  """The host cannot be used."""

  error: str


# ---- the leader to the agent of a further host ------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """Start a worker.

  Attributes:
    spec: the worker's spec, without what only its host's agent knows.
    environment: environment variables to set.
  """

  spec: spec_lib.Spec
  environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tell:
  """Pass a message on to the worker of a stage."""

  stage: int
  message: ToWorker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
  """Kill the worker of a stage."""

  stage: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Close:
  """End once all workers are gone, and keep the store or remove it."""

  keep: bool


# Ignored from a worker that was told to stop and go back.
OfFinishedWork = Resumed | CaughtUp | Stored | Reported | Done | HandedOver
FromWorker = (
  OfFinishedWork
  | Warm
  | Ready
  | State
  | Answer
  | StoppedHere
  | Saved
  | Damaged
  | Rewritten
  | FaultHappens
  | Refused
  | Failed
)
ToWorker = (
  Promote
  | Locations
  | orders.Go
  | StopHere
  | Line
  | Decide
  | Propose
  | Commit
  | HandOver
  | Save
  | Exit
)
FromHost = Serving | Started | Said | Printed | Exited | Refused | HostFailed
ToHost = Start | Tell | Kill | Close
Message = FromWorker | ToWorker | FromHost | ToHost


def write(fd: int, data: bytes) -> None:
  """Writes all of `data` to a blocking pipe, whatever interrupts it."""
  while data:
    data = data[os.write(fd, data) :]


def pack(message: Message) -> bytes:
  """Makes a line of a message."""
  return json.dumps(codec.encode(message, Message)).encode() + b'\n'


def unpack(line: bytes) -> Any:
  """Makes a `Message` of a line.

  Raises:
    ValueError: it is none; names class and field.
  """
  return codec.decode(Message, json.loads(line))


class Lines:
  """Joins the pieces that a pipe delivers into lines."""

  def __init__(self):
    """Starts with no data."""
    self._rest = b''

  def feed(self, data: bytes) -> list[bytes]:
    """Returns the lines that `data` completes, without their ends."""
    *lines, self._rest = (self._rest + data).split(b'\n')
    return lines

  def flush(self) -> list[bytes]:
    """Returns the unfinished last line, if any; call after the last data."""
    rest, self._rest = self._rest, b''
    return [rest] if rest else []
