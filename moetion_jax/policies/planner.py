"""What all planners share: sizes of stages and pools, changes, the interface."""

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

# Of the iteration, that a copy may take: where it takes the very cores that
# compute, and where it does not.
_OVERLAP_TARGET = {'cpu': 0.02}
_OTHER_OVERLAP_TARGET = 0.5


def overlap_target(
  settings: capture_settings.CaptureSettings, platform: str
) -> float:
  """Share of an iteration that a copy may take, on a platform."""
  return settings.overlap_target or _OVERLAP_TARGET.get(
    platform, _OTHER_OVERLAP_TARGET
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSizes:
  """The operators of one stage, as its worker tells of them.

  Attributes:
    state_bytes: training state of each.
    compute_bytes: compute weights of each.
    device: of the 'expert' axis that holds it; None: all do.
  """

  state_bytes: Mapping[keys.OperatorId, int]
  compute_bytes: Mapping[keys.OperatorId, int]
  device: Mapping[keys.OperatorId, int | None]

  def to_json(self) -> list[list[Any]]:
    """Plain JSON; `from_json` is the inverse."""
    return [
      [o.group, o.expert, n, self.compute_bytes[o], self.device[o]]
      for o, n in self.state_bytes.items()
    ]

  @classmethod
  def from_json(cls, value: Sequence[Sequence[Any]]) -> StageSizes:
    """The inverse of `to_json`."""
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
    """The operators in an order of `slots.ORDERS`.

    Args:
      order: which one.
      rates: of experts; see `slots`.
      replicas: that capture them together.
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
  """Of the files for one worker's snapshots."""

  files: int
  size_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """Something else is captured from an iteration on.

  Attributes:
    kind: of the event.
    fields: of the event.
    decisions: by stage; all begin with the same iteration.
  """

  kind: str
  fields: Mapping[str, Any]
  decisions: tuple[decision.CaptureDecision, ...]


class Planner(Protocol):
  """The leader's decisions, for all stages alike."""

  @property
  def lag_iterations(self) -> int:
    """By how much the recovery line lags behind the newest snapshot."""
    ...

  def decisions(
    self, first_iteration: int
  ) -> tuple[decision.CaptureDecision, ...]:
    """What every stage captures from an iteration on, until a `Change`."""
    ...

  def pools(self, workers: int | None = None) -> list[PoolSize]:
    """Room for the snapshots of every stage.

    Args:
      workers: of a stage, that share them; None: all replicas do.
    """
    ...

  def add(self, reports: Sequence[report.Report]) -> Change | None:
    """Takes an iteration in: reports of all stages; says what changes."""
    ...
