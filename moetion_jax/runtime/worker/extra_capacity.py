"""Experts that lost tokens take more of them for some time (policy 'partial').

MoEtion's first preprint adjusts experts' capacities after a fault (its choice
of popular experts is a value of `--partial_select`). Seats for more tokens cost
time, so there are two more programs for those iterations only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moetion_jax import keys
from moetion_jax.policies import partial
from moetion_jax.programs import compilation, stage as stage_lib
from moetion_jax.recovery import orders
from moetion_jax.training import worker


def compile_programs(
  stage: stage_lib.Stage, on_program: compilation.OnProgram
) -> dict[str, Callable[..., Any]]:
  """Compiles `forward` and `backward` with capacities that are scaled.

  Args:
    stage: the worker's stage, bound to devices.
    on_program: called with each program's name.

  Returns:
    The programs by name; none for a stage whose experts take all tokens.
  """
  if stage.model.scaled is None:
    return {}
  declared = stage_lib.Stage.declare(
    stage.model.scaled(partial.MAX_CAPACITY_FACTOR),
    stage.functions.optimizer,
    stage.functions.expert_devices,
    stage.shape,
  )
  traced = declared.trace(on_program).traced
  wanted = {name: traced[name] for name in ('forward', 'backward')}
  lowered = compilation.TracedPrograms(wanted).lower(
    compilation.platform_of(stage.mesh)
  )
  return lowered.compile_each(stage.mesh, on_program)


def make(
  go: orders.Go,
  stage: stage_lib.Stage,
  programs: dict[str, Callable[..., Any]],
) -> worker.GrownCapacity | None:
  """Makes the grown capacities after a restore; None for the usual ones.

  Args:
    go: the order that says from where the worker trains.
    stage: the worker's stage.
    programs: the programs of `compile_programs`.
  """
  if not go.capacity or not programs:
    return None
  factors = {keys.OperatorId(g, n): factor for g, n, factor in go.capacity}
  partition = stage.whole.partition
  return worker.GrownCapacity(
    **programs,
    factors=np.array(
      [
        [factors.get(o, 1.0) for o in partition.operators_of(group)]
        for group in partition.stacked_groups
      ],
      np.float32,
    ),
    until=go.capacity_until,
  )
