"""Notices: what a worker tells the coordinator, which answers with `orders`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moetion_jax import errors, report as report_lib
from moetion_jax.policies import planner
from moetion_jax.recovery import hang_detection
from moetion_jax.snapshots import coverage


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
    is_unmet: whether the members of its world did not come together.
    has_wrong_bits: whether a damaged log entry may be the cause, though nobody
      found it.
    suspects: iterations of snapshots that may be damaged.
    corrupt: stage and iteration of a damaged log entry.
  """

  error: str
  advice: str = ''
  iteration: int
  is_final: bool = False
  is_unmet: bool = False
  has_wrong_bits: bool = False
  suspects: tuple[int, ...] = ()
  corrupt: tuple[int, int] | None = None
