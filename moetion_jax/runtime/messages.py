"""Messages between an agent and its workers: JSON, one object a line."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from moetion_jax import codec
from moetion_jax.logs import remote
from moetion_jax.recovery import notices, orders
from moetion_jax.runtime import spec as spec_lib

# ---- a worker to its agent, besides `notices` --------------------------------


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
  """The recovery line and the entry line: what is older may be let go of.

  Attributes:
    iteration: the first iteration whose snapshots are kept.
    entry_line: the last iteration whose entries may be dropped.
  """

  iteration: int
  entry_line: int


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


FromWorker = (
  Warm
  | FaultHappens
  | notices.Ready
  | notices.Resumed
  | notices.CaughtUp
  | notices.Stored
  | notices.Reported
  | notices.Done
  | notices.HandedOver
  | notices.State
  | notices.Answer
  | notices.StoppedHere
  | notices.Saved
  | notices.Damaged
  | notices.Rewritten
  | notices.Refused
  | notices.Failed
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


def write(fd: int, data: bytes) -> None:
  """Writes all of `data` to a blocking pipe, whatever interrupts it."""
  while data:
    data = data[os.write(fd, data) :]


def pack(message: Any) -> bytes:
  """Makes a line of a message."""
  return json.dumps(codec.encode_kind(message)).encode() + b'\n'


def unpack(kinds: Any, line: bytes) -> Any:
  """Makes a message of a line.

  Args:
    kinds: the union of all messages that may come.
    line: what `pack` made.

  Raises:
    ValueError: it is none of them; names class and field.
  """
  return codec.decode(kinds, json.loads(line))


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
