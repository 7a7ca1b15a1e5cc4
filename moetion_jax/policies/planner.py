"""Interface of the planners: sizes of stages and pools, and changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moetion_jax import keys, report
from moetion_jax.policies import (
  decision,
  popularity,
  settings as capture_settings,
  slots,
  window,
)
from moetion_jax.state import division

# Share of an iteration that a copy may take: where it uses the very cores that
# compute, and where it does not.
_OVERLAP_TARGET = {'cpu': 0.02}
_OTHER_OVERLAP_TARGET = 0.5


def overlap_target(
  settings: capture_settings.CaptureSettings, platform: str
) -> float:
  """Returns the share of an iteration that a copy may take, on a platform."""
  return settings.overlap_target or _OVERLAP_TARGET.get(
    platform, _OTHER_OVERLAP_TARGET
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSizes:
  """The operators of one stage, as its worker reports them.

  Attributes:
    state_bytes: bytes of each operator's training state.
    compute_bytes: bytes of each operator's compute weights.
    device: device of the 'expert' axis that holds each operator; None if all
      hold it.
  """

  state_bytes: Mapping[keys.OperatorId, int]
  compute_bytes: Mapping[keys.OperatorId, int]
  device: Mapping[keys.OperatorId, int | None]

  def to_json(self) -> list[list[Any]]:
    """Converts to plain JSON; `from_json` is the inverse."""
    return [
      [o.group, o.expert, n, self.compute_bytes[o], self.device[o]]
      for o, n in self.state_bytes.items()
    ]

  @classmethod
  def from_json(cls, value: Sequence[Sequence[Any]]) -> StageSizes:
    """Inverts `to_json`."""
    names = [keys.OperatorId(row[0], row[1]) for row in value]
    columns = [
      dict(zip(names, c, strict=True))
      for c in list(zip(*value, strict=True))[2:]
    ]
    return cls(
      state_bytes=columns[0], compute_bytes=columns[1], device=columns[2]
    )

  def in_order(
    self, order: str, rates: popularity.Rates, replicas: int = 1
  ) -> window.StageOperators:
    """Returns the operators in an order of `popularity.ORDERS`.

    Args:
      order: the order's name.
      rates: rate of each expert; see `slots.order_operators`.
      replicas: number of replicas that capture the operators together.
    """
    return window.StageOperators(
      order=slots.order_operators(order, self.state_bytes, rates),
      state_bytes=self.state_bytes,
      compute_bytes=self.compute_bytes,
      device_of=self.device.get,
      keep_order=order != 'static',
      shares=division.divide(self.state_bytes, replicas, self.device.get)
      if replicas > 1
      else (),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolSize:
  """Number and size of the files for one worker's snapshots."""

  files: int
  size_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """A change of what is captured, from an iteration on.

  Attributes:
    kind: kind of the event to write; '' for none.
    fields: fields of that event.
    decisions: decisions by stage; all begin with the same iteration.
  """

  kind: str
  fields: Mapping[str, Any]
  decisions: tuple[decision.CaptureDecision, ...]


class Planner(Protocol):
  """Makes the leader's decisions, for all stages alike."""

  @property
  def lag_iterations(self) -> int:
    """Iterations by which the recovery line lags behind the newest snapshot."""
    ...

  def decisions(
    self, first_iteration: int
  ) -> tuple[decision.CaptureDecision, ...]:
    """Returns what each stage captures from an iteration until a `Change`."""
    ...

  def pools(self, workers: int | None = None) -> list[PoolSize]:
    """Returns the room for the snapshots of each stage.

    Args:
      workers: number of a stage's workers that share the snapshots; None for
        all replicas.
    """
    ...

  def add(self, reports: Sequence[report.Report]) -> Change | None:
    """Takes in all stages' reports on an iteration; returns any change."""
    ...
