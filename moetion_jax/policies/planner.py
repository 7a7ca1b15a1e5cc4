"""Interface of the planners: sizes of stages and pools, and changes."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moetion_jax import keys, report
from moetion_jax.policies import decision, popularity, slots, window
from moetion_jax.state import division


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSizes:
  """The operators of one stage, as its worker reports them.

  Attributes:
    state_bytes: bytes of each operator's training state.
    compute_bytes: bytes of each operator's compute weights.
    gradient_bytes: bytes of each operator's gradients.
    device: device of the 'expert' axis that holds each operator; None if all
      hold it.
  """

  state_bytes: Mapping[keys.OperatorId, int]
  compute_bytes: Mapping[keys.OperatorId, int]
  gradient_bytes: Mapping[keys.OperatorId, int]
  device: Mapping[keys.OperatorId, int | None]

  def in_order(
    self,
    order: str,
    rates: popularity.Rates,
    replicas: int = 1,
    replay: str = decision.MICROBATCHES,
  ) -> window.StageOperators:
    """Returns the operators in an order of `popularity.ORDERS`.

    Args:
      order: the order's name.
      rates: rate of each expert; see `slots.order_operators`.
      replicas: number of replicas that capture the operators together.
      replay: one of `decision.REPLAYS`.
    """
    is_recorded = replay == decision.UPDATES
    return window.StageOperators(
      order=slots.order_operators(order, self.state_bytes, rates),
      state_bytes=self.state_bytes,
      rest_bytes=self.gradient_bytes if is_recorded else self.compute_bytes,
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
    decisions: decisions by stage; all begin with the same iteration. () if the
      event is all: what was decided before goes on.
  """

  kind: str
  fields: Mapping[str, Any]
  decisions: tuple[decision.CaptureDecision, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
  """The losses of a restore, and what follows from them.

  Attributes:
    lost_tokens: number of tokens that trained an expert and are forgotten; a
      token counts once for each expert that it went to.
    plt: proportion of lost tokens, of all restores so far; see
      `partial.proportion_of_lost_tokens`.
    experts: experts of each layer that a checkpoint saves from now on.
    capacity_until: iteration up to which experts take more tokens, to make up
      for what they lost; 0 if they do not.
  """

  lost_tokens: float
  plt: float
  experts: int
  capacity_until: int = 0


class Planner(abc.ABC):
  """Makes the leader's decisions, for all stages alike."""

  @property
  @abc.abstractmethod
  def lag_iterations(self) -> int:
    """Iterations by which the recovery line lags behind the newest snapshot."""

  @abc.abstractmethod
  def decisions(
    self, first_iteration: int
  ) -> tuple[decision.CaptureDecision, ...]:
    """Returns what each stage captures from an iteration until a `Change`."""

  @abc.abstractmethod
  def pools(self, workers: int | None = None) -> list[PoolSize]:
    """Returns the room for the snapshots of each stage.

    Args:
      workers: number of a stage's workers that share the snapshots; None for
        all replicas.
    """

  @abc.abstractmethod
  def add(self, reports: Sequence[report.Report]) -> Change | None:
    """Takes in an iteration, which decides on any change.

    Args:
      reports: one report a stage, of the iteration after the last one's.
    """

  def remarks(self, first_iteration: int) -> Change | None:
    """Returns the event that the first decisions are worth, if any.

    Args:
      first_iteration: the iteration with which a run begins.
    """
    del first_iteration
    return None

  def restart_from(
    self, start: int, versions: Mapping[keys.OperatorId, int]
  ) -> Loss | None:
    """Takes in that all stages go back, and that all since is forgotten.

    Args:
      start: iteration of the snapshot that they go back to.
      versions: see `settings.Policy.versions`.

    Returns:
      The losses; None under an exact policy.
    """
    del start, versions
    return None

  def capacity(self, stage: int) -> tuple[tuple[str, int, float], ...]:
    """Returns a stage's experts that take more tokens; see `orders.Go`."""
    del stage
    return ()
