"""Messages between the leader and the agents of further hosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from moetion_jax import keys
from moetion_jax.recovery import notices
from moetion_jax.runtime import messages, spec as spec_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostSpec:
  """Everything that the agent of a further host is told when it starts.

  Attributes:
    name: the host's name in the location map.
    run_id: the name of its store folder.
    hostmem_dir: the directory of that folder.
    workdir: the run's workdir, absolute, for the folder's owner file.
    secret: the job's secret, in hex.
    agent_pid: pid of the leader, with which this process dies.
    lock_fds: descriptors of locks that it holds and hands on to its workers.
    status_fd: the descriptor to which it writes.
    control_fd: the descriptor from which it reads.
  """

  name: str
  run_id: str
  hostmem_dir: str
  workdir: str
  secret: str = dataclasses.field(repr=False)
  agent_pid: int
  lock_fds: tuple[int, ...]
  status_fd: int
  control_fd: int


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
  message: messages.FromWorker


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
  message: messages.ToWorker


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


FromHost = (
  Serving | Started | Said | Printed | Exited | notices.Refused | HostFailed
)
ToHost = Start | Tell | Kill | Fence | Close
