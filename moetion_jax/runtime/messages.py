"""Messages between an agent, its workers and the agents of further hosts.

A message is JSON, one object a line (`codec`). The unions at the end say
who sends what to whom.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from moetion_jax import codec, keys
from moetion_jax.logs import remote
from moetion_jax.recovery import events, orders
from moetion_jax.runtime import spec as spec_lib

# ---- a worker to its agent, besides `events` ---------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warm:
  """A standby is prepared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultHappens:
  """A scripted fault happens now, at a time of `time.monotonic`."""

  number: int
  at: float


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
  """Locations of all workers' entries; sent again on a change."""

  locations: tuple[ProducerLocation, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """The recovery line: what is older may be let go of."""

  iteration: int


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
class Fence:
  """Refuse older generations of a worker, this host's or another's."""

  worker: keys.WorkerId


@dataclasses.dataclass(frozen=True, kw_only=True)
class Close:
  """End once all workers are gone, and keep the store or remove it."""

  keep: bool


FromWorker = (
  Warm
  | FaultHappens
  | events.Ready
  | events.Resumed
  | events.CaughtUp
  | events.Stored
  | events.Reported
  | events.Done
  | events.HandedOver
  | events.State
  | events.Answer
  | events.StoppedHere
  | events.Saved
  | events.Damaged
  | events.Rewritten
  | events.Refused
  | events.Failed
)
ToWorker = (
  Promote
  | Locations
  | orders.Go
  | orders.StopHere
  | Line
  | orders.Decide
  | orders.Propose
  | orders.Commit
  | orders.HandOver
  | Save
  | Exit
)
FromHost = (
  Serving | Started | Said | Printed | Exited | events.Refused | HostFailed
)
ToHost = Start | Tell | Kill | Fence | Close
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
