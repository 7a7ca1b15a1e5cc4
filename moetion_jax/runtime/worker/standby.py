"""The work that needs no stage and no backend, done ahead by a standby.

A warm standby does all of it for every stage, at low priority, so that a
promotion only binds devices and loads compiled programs. Any other worker does
it for its own stage; it is the same code, and so the same programs.

On an accelerator a standby has no backend: that would take memory from the
workers. On CPU a backend takes nothing, so the programs are loaded ahead too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import moetion_jax.runtime.read_environment  # noqa: F401  versions as of now
import moetion_jax.runtime.worker.generation  # noqa: F401  with all it imports
from moetion_jax import job_spec
from moetion_jax.programs import compilation, jax_internals
from moetion_jax.runtime import xla_setup
from moetion_jax.runtime.worker import (
  fingerprints,
  prepared as prepared_lib,
)
from moetion_jax.training import job as job_lib

# More than a first iteration of `tiny` takes; see `xla_setup.touch_memory`.
_TOUCHED_BYTES = 256 << 20


def lower(
  job: job_lib.Job, index: int, platform: str
) -> list[prepared_lib.Lowered]:
  """Traces and lowers a stage's programs; creates no backend.

  Returns:
    One element for all of the stage's workers, or, where they share the
    training state, one for each, by position; programs that they have in common
    are lowered once.
  """
  train = job.spec.train
  lowered: list[prepared_lib.Lowered] = []
  for position in range(train.replicas if train.shard_optimizer else 1):
    declared = job.declare_stage(index, None, position)
    programs = declared.trace(state_only=bool(lowered)).lower(platform)
    if lowered:
      programs = compilation.LoweredPrograms(
        {**lowered[0].programs.lowered, **programs.lowered}
      )
    captures = prepared_lib.captures_of(declared, has_devices=False)
    captured = captures.trace(declared.abstract_mesh, platform).lower(platform)
    lowered.append(prepared_lib.Lowered(declared, programs, captured))
  return lowered


def load(
  job: job_lib.Job, lowered: prepared_lib.Lowered
) -> prepared_lib.Loaded:
  """Binds a stage to this process's devices and compiles its programs.

  Raises:
    errors.ConfigError: there are too few devices.
  """
  stage = job.bind(lowered.declared)
  return prepared_lib.Loaded(stage, *lowered.compiled(stage, lambda _: None))


def prepare(
  spec: job_spec.JobSpec,
  platform: str,
  cache_dir: str,
  make_backend: Callable[[], None] | None = None,
  position: int = 0,
) -> prepared_lib.Prepared:
  """Prepares all that can be done ahead, for all stages.

  Args:
    spec: the run's job.
    platform: the lowering platform, as `compilation.platform_of` names it.
    cache_dir: the compilation cache, see `xla_setup.configure`.
    make_backend: makes a backend, with replicas in a world with the others;
      None: no programs are loaded ahead.
    position: the process's position in that world.
  """
  train = spec.train
  xla_setup.configure(
    local_devices=train.local_devices, compilation_cache_dir=cache_dir
  )
  job = job_lib.make(spec)
  data = job.data()
  if not fingerprints.sources_of(data):
    data.fingerprint()  # kept where the text is, so that it is quick later
  stages = {i: lower(job, i, platform) for i in range(train.stages)}
  if platform == 'cpu':
    xla_setup.touch_memory(_TOUCHED_BYTES)
  assert not jax_internals.has_backend()
  if make_backend is None:
    return prepared_lib.Prepared(data, stages, {})
  make_backend()
  prepared = prepared_lib.Prepared(data, stages, {})
  loaded = {i: load(job, prepared.of(i, position)) for i in stages}
  return dataclasses.replace(prepared, loaded=loaded)
