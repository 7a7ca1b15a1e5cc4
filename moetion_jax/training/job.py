"""The worker's half of a job: its data, its stages, its initial state.

The agent's half is `job_spec.JobSpec`. Whoever trains another model writes a
subclass of `Job`, and names it in the spec; nothing else knows the model.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable
from typing import Any

import jax
import optax

from moetion_jax import errors, job_spec
from moetion_jax.policies import planner
from moetion_jax.programs import (
  compilation,
  mesh as mesh_lib,
  stage as stage_lib,
)
from moetion_jax.state import (
  layout as layout_lib,
  model as model_lib,
  partition,
)
from moetion_jax.training import worker


class Job(abc.ABC):
  """A job as its workers know it; each makes its own.

  All that it returns must be the same in every process, whenever that runs:
  a replay comes to the bits of the first run by that alone.

  Attributes:
    spec: the agent's half.
  """

  def __init__(self, spec: job_spec.JobSpec):
    """Stores the argument."""
    self.spec = spec

  @abc.abstractmethod
  def stage_model(self, index: int) -> model_lib.StageModel:
    """Declares a stage of the model; creates no backend.

    Raises:
      errors.ConfigError: the stage cannot be spread as the spec says.
    """

  @abc.abstractmethod
  def optimizer(self) -> optax.GradientTransformation:
    """Makes the transform of one operator's gradients."""

  @abc.abstractmethod
  def data(self) -> worker.Data:
    """Opens the data; raises errors.ConfigError."""

  def initial(self, stage: stage_lib.Stage) -> Callable[[], partition.State]:
    """Reads what a stage starts from, and checks that it fits.

    Args:
      stage: the stage, bound to devices.

    Returns:
      The function that makes state 0, on the devices: from the seed, unless a
      job reads a checkpoint.

    Raises:
      errors.ConfigError: it is missing, damaged or of another model.
    """
    return stage.initial_state

  def declare_stage(
    self,
    index: int,
    team: tuple[int, ...] | None = None,
    position: int | None = None,
  ) -> stage_lib.Stage:
    """Declares a stage, without devices; creates no backend.

    Args:
      index: the stage's number.
      team: the replicas that have a worker; None: all.
      position: a worker's position in its stage world; where replicas share
        the training state the stage then has that worker's share only. None:
        the whole stage.

    Raises:
      errors.ConfigError: the stage cannot be spread like that.
    """
    train = self.spec.train
    model = self.stage_model(index)
    whole = stage_lib.Stage.declare(
      model,
      self.optimizer(),
      train.local_devices,
      compilation.ProgramShape(
        microbatch_size=train.microbatch_size,
        sequence_length=model.hidden_shape[0],
        microbatches=train.microbatches,
        replicas=train.replicas,
        team=team,
      ),
    )
    if position is None or not train.shard_optimizer:
      return whole
    return whole.sharded(position) if whole.shape.world_size > 1 else whole

  def bind(self, declared: stage_lib.Stage) -> stage_lib.Stage:
    """Binds a declared stage to this process's devices, and to its world.

    Raises:
      errors.ConfigError: there are too few devices.
    """
    wanted, devices = self.spec.train.local_devices, jax.local_devices()
    if wanted > len(devices):
      raise errors.ConfigError(
        'local_devices', wanted, f'{len(devices)} are there'
      )
    mesh = mesh_lib.make_mesh(devices[:wanted])
    workers = declared.shape.world_size
    if workers == 1:
      return declared.on(mesh)
    of_process: dict[int, list[Any]] = {}
    for device in jax.devices():
      of_process.setdefault(device.process_index, []).append(device)
    everyone = [
      device for _, own in sorted(of_process.items()) for device in own[:wanted]
    ]
    return declared.on(mesh, mesh_lib.make_mesh(everyone, workers))

  def build_stage(
    self,
    index: int,
    team: tuple[int, ...] | None = None,
    position: int | None = None,
  ) -> stage_lib.Stage:
    """Declares a stage and binds it to local devices; compiles nothing."""
    return self.bind(self.declare_stage(index, team, position))


def make(spec: job_spec.JobSpec) -> Job:
  """Makes the job that a spec names."""
  module, _, function = spec.factory.partition(':')
  return getattr(importlib.import_module(module), function)(spec)


def stage_sizes(
  layout: layout_lib.Layout, expert_devices: int
) -> planner.StageSizes:
  """Returns the operator sizes of a stage, as the agent is told them.

  Args:
    layout: the stage's layout, with devices or without.
    expert_devices: number of devices that its experts are, or will be, spread
      over.
  """
  devices = layout.partition.devices(expert_devices)
  return planner.StageSizes(
    state_bytes=layout.state_bytes(),
    compute_bytes=layout.compute_bytes(),
    gradient_bytes=layout.gradient_bytes(),
    device={o: devices[o] for o in layout.operators},
  )
