"""Programs that a worker has prepared before it has a stage: lowered or loaded.

Making them is in `standby`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from moetion_jax.capture import programs as capture_programs
from moetion_jax.programs import compilation, stage as stage_lib
from moetion_jax.training import worker


def captures_of(
  stage: stage_lib.Stage, *, has_devices: bool = True
) -> capture_programs.CapturePrograms:
  """Makes the programs of capture and fold of a stage; compiles nothing."""
  return capture_programs.CapturePrograms(
    stage_lib.layout_of(stage, has_devices=has_devices), records_gradients=True
  )


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A stage without devices, and its programs for one platform.

  Attributes:
    declared: the stage, not bound to devices.
    programs: the training programs.
    captures: the programs of capture and fold.
  """

  declared: stage_lib.Stage
  programs: compilation.LoweredPrograms
  captures: compilation.LoweredPrograms

  def compiled(
    self, stage: stage_lib.Stage, on_program: compilation.OnProgram
  ) -> tuple[compilation.Programs, capture_programs.CapturePrograms]:
    """Compiles the programs for the devices of `stage`: `declared`, bound."""
    programs = self.programs.compile(stage.mesh, on_program, stage.world)
    captures = captures_of(stage)
    captures.compile(on_program, self.captures)
    return programs, captures


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A stage on this process's devices, compiled.

  Attributes:
    stage: the stage, bound to devices.
    programs: the training programs.
    captures: the programs of capture and fold.
  """

  stage: stage_lib.Stage
  programs: compilation.Programs
  captures: capture_programs.CapturePrograms

  def compiled(
    self, stage: stage_lib.Stage, on_program: compilation.OnProgram
  ) -> tuple[compilation.Programs, capture_programs.CapturePrograms]:
    """Returns the programs, which are compiled already."""
    assert stage is self.stage
    on_program('loaded ahead')
    return self.programs, self.captures


@dataclasses.dataclass(frozen=True)
class Prepared:
  """All that a standby has ready.

  Attributes:
    data: the run's data.
    stages: every stage by index: its lowered programs, one for all workers, or
      one for each by position in their world, where they differ.
    loaded: the stages with compiled programs; empty without a backend.
  """

  data: worker.Data
  stages: Mapping[int, Sequence[Lowered]]
  loaded: Mapping[int, Loaded]

  def of(self, stage: int, position: int) -> Lowered:
    """Returns a worker's lowered programs.

    Args:
      stage: the index of its stage.
      position: its position in the stage's world.
    """
    lowered = self.stages[stage]
    return lowered[position] if len(lowered) > 1 else lowered[0]
