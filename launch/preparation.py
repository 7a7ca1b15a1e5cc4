"""What a worker can do before it has a stage, or a backend.

A warm standby does all of it for every stage, at low priority, so that a
promotion only binds devices and loads compiled programs. Any other worker does
it for its own stage; it is the same code, and so the same programs.
"""

from __future__ import annotations

import dataclasses

import launch.stage_run  # noqa: F401  with all that it imports
from launch import data as data_lib, local, runtime, settings
from moetion_jax import (
  capture,
  layout,
  programs as programs_lib,
  stage as stage_lib,
)

# More than a first iteration of `tiny` takes; see `runtime.touch_memory`.
_TOUCHED_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A stage without devices, and its programs for one platform.

  Attributes:
    declared: the stage.
    programs: of training.
    captures: of capture and fold.
  """

  declared: stage_lib.Stage
  programs: programs_lib.LoweredPrograms
  captures: programs_lib.LoweredPrograms


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a standby has ready.

  Attributes:
    data: of the run.
    stages: all, by index; of each, the workers that differ, by position in
      their world.
  """

  data: data_lib.Dataset
  stages: dict[int, list[Lowered]]

  def of(self, stage: int, position: int) -> Lowered:
    """Of a worker."""
    lowered = self.stages[stage]
    return lowered[position] if len(lowered) > 1 else lowered[0]


def lower(
  config: settings.RunConfig, index: int, platform: str
) -> list[Lowered]:
  """Traces and lowers a stage's programs; creates no backend.

  Returns:
    One for all of its workers, or where they share the training state one for
    each, by position: those programs that they have in common are lowered once.
  """
  train = config.train
  lowered: list[Lowered] = []
  for position in range(train.replicas if train.shard_optimizer else 1):
    declared = local.declare_stage(config, index, None, position)
    programs = declared.trace(state_only=bool(lowered)).lower(platform)
    if lowered:
      programs = programs_lib.LoweredPrograms(
        {**lowered[0].programs.lowered, **programs.lowered}
      )
    captures = capture.CapturePrograms(
      layout.of_stage(declared, has_devices=False)
    )
    captured = captures.trace(declared.abstract_mesh).lower(platform)
    lowered.append(Lowered(declared, programs, captured))
  return lowered


def prepare(
  config: settings.RunConfig, platform: str, cache_dir: str
) -> Prepared:
  """Everything that can be done without a backend, for all stages.

  Args:
    config: of the run.
    platform: as of `programs.platform_of`.
    cache_dir: see `runtime.configure`.
  """
  runtime.configure(
    local_devices=config.train.local_devices, compilation_cache_dir=cache_dir
  )
  prepared = Prepared(
    local.load_data(config),
    {
      index: lower(config, index, platform)
      for index in range(config.train.stages)
    },
  )
  if platform == 'cpu':
    runtime.touch_memory(_TOUCHED_BYTES)
  assert not programs_lib.has_backend()
  return prepared
