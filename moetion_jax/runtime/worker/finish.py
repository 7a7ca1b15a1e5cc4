"""A worker's part in the final checkpoint, once it has trained to the end.

Its state goes into the store; one worker takes everybody's out again, compares
them with what the devices had, and saves them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping

import numpy as np

from moetion_jax import errors, keys, report
from moetion_jax.recovery import hang_detection, notices, orders
from moetion_jax.runtime import (
  faults,
  final_state,
  messages,
  spec as spec_lib,
)
from moetion_jax.runtime.checkpoints import file as checkpoint_file
from moetion_jax.runtime.worker import agent_link, fault_damage
from moetion_jax.state import partition as partition_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastState:
  """A worker's part of its stage's state after the last iteration.

  Attributes:
    iteration: the last iteration.
    state: the state, on the device.
    digests: the digests of its operators, as they were reported.
    partition: the partition of the state.
  """

  iteration: int
  state: partition_lib.State
  digests: Mapping[keys.OperatorId, np.ndarray]
  partition: partition_lib.Partition


class Finish:
  """A worker's part in the end of the run; `obey` does it."""

  def __init__(
    self,
    spec: spec_lib.Spec,
    link: agent_link.AgentLink,
    injector: faults.FaultInjector,
    last: LastState,
  ):
    """Stores the arguments.

    Args:
      spec: the worker's spec.
      link: the link to the agent, whose commands are obeyed.
      injector: performs the faults that are due in END_PHASES.
      last: the worker's state after the last iteration.
    """
    self._spec = spec
    self._link = link
    self._injector = injector
    self._last = last

  def obey(self) -> messages.Exit | orders.StopHere:
    """Obeys the agent until it says one of these two; returns that."""
    while True:
      match command := self._link.command():
        case orders.HandOver():
          self._hand_over()
        case messages.Save():
          self._save(command)
        case messages.Exit() | orders.StopHere():
          return command

  def _hand_over(self) -> None:
    spec, last = self._spec, self._last
    final_state.put(
      spec.handover_folder,
      spec.stage,
      last.state,
      last.digests,
      math.inf,  # that is the coordinator's to decide
      lambda: self._link.blocked(
        hang_detection.Shortage.ROOM,
        'the final state: free host memory, or name a larger tmpfs with '
        '--hostmem_dir',
      ),
      replica=spec.replica,
      partition=last.partition,
    )
    self._link.blocked(None)
    folder = final_state.folder_of(
      spec.handover_folder, spec.stage, spec.replica
    )
    self._script(folder)
    self._injector.phase('hand_over', last.iteration)
    self._link.send(notices.HandedOver())

  def _save(self, command: messages.Save) -> None:
    """Saves everybody's state, or tells whose arrived damaged."""
    try:
      stages = [
        final_state.get(self._spec.handover_folder, stage, replicas)
        for stage, replicas in enumerate(command.replicas)
      ]
    except final_state.DamagedError as error:
      self._link.send(
        notices.Damaged(
          stage=error.stage,
          replica=error.replica,
          what=str(error),
          is_sent_so=error.is_sent_so,
        )
      )
      return
    digests = {o: d for stage in stages for o, d in stage.digests.items()}
    check_whole(digests, command.digest, command.iteration)
    checkpoint_file.save(
      command.path,
      [stage.state for stage in stages],
      command.iteration,
      self._spec.job.config,
      digests,
      self._on_written,
      lambda what: self._link.send(notices.Rewritten(what=what)),
    )
    self._link.send(notices.Saved())

  def _on_written(self, path: str) -> None:
    """Performs the fault that is due before the checkpoint is read back."""
    self._script(path)
    self._injector.phase('save', self._last.iteration)

  def _script(self, folder: str | os.PathLike[str]) -> None:
    """Lets a scripted fault damage what was just written into a folder."""

    def damage(fault: faults.Fault, iteration: int) -> None:
      del fault, iteration
      fault_damage.flip_bit_in_largest(folder)

    self._injector.acts[faults.Place.FINAL_STATE] = damage


def check_whole(
  digests: Mapping[keys.OperatorId, np.ndarray], wanted: str, iteration: int
) -> None:
  """Compares all stages' final state with what was recorded.

  Args:
    digests: the digests of all operators of all stages.
    wanted: the digest that `metrics.jsonl` has.
    iteration: the iteration of the state.

  Raises:
    errors.StoreError: it is another one.
  """
  if (found := report.combine(digests)) != wanted:
    raise errors.StoreError(
      f'the final state has digest {found}, but metrics.jsonl has '
      f'{wanted or "none"} for iteration {iteration}: what a worker had after '
      'it is damaged, in the memory of its device or its host. No checkpoint '
      'was written; the same command rebuilds the state'
    )
