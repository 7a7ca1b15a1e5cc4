"""The language-model job: its data, its stages, its initial state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from launch.lm import checkpoint, data, settings as run_settings
from models import stages
from moetion_jax import errors, job_spec
from moetion_jax.policies import planner
from moetion_jax.programs import (
  compilation,
  mesh as mesh_lib,
  stage as stage_lib,
)
from moetion_jax.state import layout as layout_lib, optimizers, partition


def settings_of(job: job_spec.JobSpec) -> run_settings.RunConfig:
  """Returns the settings of a job of ours."""
  return run_settings.RunConfig.from_json(job.config)


def load_data(config: run_settings.RunConfig) -> data.Dataset:
  """Loads the run's text; raises errors.ConfigError."""
  return data.load(
    data.DataConfig(
      data=config.data,
      data_dtype=config.data_dtype,
      sequence_length=config.model.sequence_length,
      microbatch_size=config.train.microbatch_size,
      microbatches=config.train.global_microbatches,
      vocab_size=config.model.vocab_size,
      seed=config.train.seed,
    )
  )


def declare_stage(
  config: run_settings.RunConfig,
  index: int,
  team: tuple[int, ...] | None = None,
  position: int | None = None,
  max_capacity_factor: float | None = None,
) -> stage_lib.Stage:
  """Declares a stage of the run, without devices; creates no backend.

  Args:
    config: the run's settings.
    index: the stage's number.
    team: the replicas that have a worker; None: all.
    position: a worker's position in its stage world; with --shard_optimizer
      the stage then has that worker's share only. None: the whole stage.
    max_capacity_factor: see `stages.build_stage`.

  Raises:
    errors.ConfigError: the stage cannot be spread like that.
  """
  train = config.train
  spec = stages.cut(config.model, train.stages)[index]
  model = stages.build_stage(
    config.model,
    spec,
    seed=train.seed,
    expert_devices=train.local_devices,
    max_capacity_factor=max_capacity_factor,
  )
  whole = stage_lib.Stage(
    model,
    optimizers.make(train.optimizer),
    mesh_lib.abstract_mesh(train.local_devices),
    compilation.ProgramShape(
      microbatch_size=train.microbatch_size,
      sequence_length=config.model.sequence_length,
      microbatches=train.microbatches,
      replicas=train.replicas,
      team=team,
    ),
  )
  if position is None or not train.shard_optimizer:
    return whole
  return whole.sharded(position) if whole.shape.world_size > 1 else whole


def build_stage(
  config: run_settings.RunConfig,
  index: int,
  team: tuple[int, ...] | None = None,
  position: int | None = None,
) -> stage_lib.Stage:
  """Declares a stage and binds it to local devices; compiles nothing."""
  return bind(config, declare_stage(config, index, team, position))


def bind(
  config: run_settings.RunConfig, declared: stage_lib.Stage
) -> stage_lib.Stage:
  """Binds a declared stage to this process's devices, and to its world if any.

  Raises:
    errors.ConfigError: there are too few devices.
  """
  train = config.train
  devices = jax.local_devices()
  if train.local_devices > len(devices):
    raise errors.ConfigError(
      'local_devices', train.local_devices, f'{len(devices)} are there'
    )
  mesh = mesh_lib.make_mesh(devices[: train.local_devices])
  workers = declared.shape.world_size
  if workers == 1:
    return declared.on(mesh)
  of_process: dict[int, list[Any]] = {}
  for device in jax.devices():
    of_process.setdefault(device.process_index, []).append(device)
  everyone = [
    device
    for _, own in sorted(of_process.items())
    for device in own[: train.local_devices]
  ]
  return declared.on(mesh, mesh_lib.make_mesh(everyone, workers))


def stage_sizes(
  layout: layout_lib.Layout, expert_devices: int
) -> planner.StageSizes:
  """Returns the operator sizes of a stage, as the leader is told them.

  Args:
    layout: the stage's layout, with devices or without.
    expert_devices: number of devices that its experts are, or will be, spread
      over.
  """
  devices = layout.partition.devices(expert_devices)
  return planner.StageSizes(
    state_bytes=layout.state_bytes(),
    compute_bytes=layout.compute_bytes(),
    device={o: devices[o] for o in layout.operators},
  )


def load_initial(
  config: run_settings.RunConfig, stage: stage_lib.Stage
) -> dict[str, Any] | None:
  """Reads the checkpoint that the run starts from, checked against `stage`.

  Returns:
    The checkpoint's tree; None when the run starts from its seed.

  Raises:
    errors.ConfigError: it is missing, damaged, of one stage alone or of another
      model.
  """
  if not config.init_from:
    return None
  tree = checkpoint.load(config.init_from, 'init_from')
  checkpoint.check_all_stages(tree, config.init_from, 'init_from')
  checkpoint.check(
    stage, tree, config.init_from, weights_only=config.init_weights_only
  )
  return tree


def initial_state(
  config: run_settings.RunConfig,
  stage: stage_lib.Stage,
  initial: Mapping[str, Any] | None,
) -> partition.State:
  """Makes state 0 from the seed, or from what `load_initial` read."""
  if initial is None:
    return stage.initial_state()
  return checkpoint.state_of(
    stage, initial, weights_only=config.init_weights_only
  )
