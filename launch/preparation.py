"""What a worker can do before it has a stage, or a backend.

A warm standby does all of it for every stage, at low priority, so that a
promotion only binds devices and loads compiled programs. Any other worker does
it for its own stage; it is the same code, and so the same programs.

On an accelerator a standby has no backend: that would take memory from the
workers. On CPU it takes nothing, so the programs are loaded ahead as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

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

  def compiled(
    self, stage: stage_lib.Stage, on_program: programs_lib.OnProgram
  ) -> tuple[programs_lib.Programs, capture.CapturePrograms]:
    """The programs on the devices of `stage`, which is `declared`, bound."""
    programs = self.programs.compile(stage.mesh, on_program, stage.world)
    captures = capture.CapturePrograms(layout.of_stage(stage))
    captures.compile(on_program, self.captures)
    return programs, captures


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A stage on this process's devices, compiled.

  Attributes:
    stage: bound.
    programs: of training.
    captures: of capture and fold.
  """

  stage: stage_lib.Stage
  programs: programs_lib.Programs
  captures: capture.CapturePrograms

  def compiled(
    self, stage: stage_lib.Stage, on_program: programs_lib.OnProgram
  ) -> tuple[programs_lib.Programs, capture.CapturePrograms]:
    """The programs, which are there."""
    assert stage is self.stage
    on_program('loaded ahead')
    return self.programs, self.captures


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a standby has ready.

  Attributes:
    data: of the run.
    stages: all, by index; of each, the workers that differ, by position in
      their world.
    loaded: stages with compiled programs; empty without a backend.
  """

  data: data_lib.Dataset
  stages: Mapping[int, Sequence[Lowered]]
  loaded: Mapping[int, Loaded]

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
    captured = captures.trace(declared.abstract_mesh, platform).lower(platform)
    lowered.append(Lowered(declared, programs, captured))
  return lowered


def load(config: settings.RunConfig, lowered: Lowered) -> Loaded:
  """Binds a stage to this process's devices and compiles its programs.

  Raises:
    base.ConfigError: there are too few devices.
  """
  stage = local.bind(config, lowered.declared)
  return Loaded(stage, *lowered.compiled(stage, lambda _: None))


def prepare(
  config: settings.RunConfig,
  platform: str,
  cache_dir: str,
  make_backend: Callable[[], None] | None = None,
  position: int = 0,
) -> Prepared:
  """Everything that can be done ahead, for all stages.

  Args:
    config: of the run.
    platform: as of `programs.platform_of`.
    cache_dir: see `runtime.configure`.
    make_backend: makes one, if programs are to be loaded ahead; with replicas
      in a world with the others.
    position: in that world.
  """
  runtime.configure(
    local_devices=config.train.local_devices, compilation_cache_dir=cache_dir
  )
  data = local.load_data(config)
  stages = {
    index: lower(config, index, platform)
    for index in range(config.train.stages)
  }
  if platform == 'cpu':
    runtime.touch_memory(_TOUCHED_BYTES)
  assert not programs_lib.has_backend()
  if make_backend is None:
    return Prepared(data, stages, {})
  make_backend()
  prepared = Prepared(data, stages, {})
  loaded = {i: load(config, prepared.of(i, position)) for i in stages}
  return dataclasses.replace(prepared, loaded=loaded)
