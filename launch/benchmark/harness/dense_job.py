"""The baseline: Orbax saves the whole state every so many iterations.

`DenseSaver` takes the place of a `Snapshotter` in `Worker.train`. As a program
this module is one process that trains a whole model and continues from its
newest checkpoint: `launch.benchmark recovery` kills it and starts it again.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

from launch.lm import settings as run_settings, transformer_job
from moetion_jax import keys, report
from moetion_jax.capture import snapshotter
from moetion_jax.logs import memory_log
from moetion_jax.programs import stage as stage_lib
from moetion_jax.runtime import xla_setup
from moetion_jax.training import worker as worker_lib


class DenseSaver:
  """Saves the whole state every `every` iterations; keeps the newest."""

  bandwidth = 0.0

  def __init__(self, folder: pathlib.Path, every: int):
    """Makes Orbax's AsyncCheckpointer with its usual handler.

    Args:
      folder: parent of the checkpoints, each named by its iteration.
      every: iterations from one checkpoint to the next.
    """
    self._folder = folder
    self._every = every
    self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

  def slot(self, iteration: int) -> frozenset[keys.OperatorId]:
    """Returns no operators: nothing is selected."""
    del iteration
    return frozenset()

  def retain(self, iteration: int) -> None:
    """Removes all checkpoints but the newest and the one being saved."""
    del iteration
    for old in self._committed()[:-1]:
      shutil.rmtree(self._folder / str(old), ignore_errors=True)

  def take(
    self, iteration: int, state: Any, *unused: Any, **fields: Any
  ) -> snapshotter.TakenSnapshot:
    """Saves if it is due; waits for the last save first, as Orbax does."""
    del unused, fields
    if iteration % self._every == 0:
      self._checkpointer.save(
        self._folder / str(iteration), args=ocp.args.StandardSave(state)
      )
    return snapshotter.TakenSnapshot()

  def release(self) -> float:
    """Returns 0: `take` waited for the copy, so the state may be donated."""
    return 0.0

  def restore(self, stage: stage_lib.Stage) -> tuple[int, Any]:
    """Returns (iteration, state) of the newest checkpoint, or (0, None)."""
    committed = self._committed()
    if not committed:
      return 0, None
    shapes = jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=sharding
      ),
      stage.state_shapes,
      stage.shardings(stage.state_specs),
    )
    state = self._checkpointer.restore(
      self._folder / str(committed[-1]), args=ocp.args.StandardRestore(shapes)
    )
    return committed[-1], state

  def _committed(self) -> list[int]:
    names = (path.name for path in self._folder.iterdir())
    return sorted(int(name) for name in names if name.isdecimal())

  def flush(self) -> None:
    """Waits for the save in progress."""
    self._checkpointer.wait_until_finished()

  def close(self) -> None:
    """Ends Orbax's threads."""
    self._checkpointer.close()


def main() -> None:
  """Trains until killed; prints each finished iteration and its digest.

  The only argument is JSON: `preset`, `folder`, `every`, `cache_dir`,
  `microbatches` (null for the preset's own).
  """
  given = json.loads(sys.argv[1])
  xla_setup.configure(local_devices=1, compilation_cache_dir=given['cache_dir'])
  config = run_settings.make(
    given['preset'],
    model_overrides=[],
    train_overrides={
      'stages': 1,
      'eval_every': 0,
      'iterations': 100_000,
      'microbatches': given['microbatches'],
    },
    optimizer_overrides={},
  )
  data = transformer_job.of(config).data()
  stage = transformer_job.of(config).build_stage(0)
  programs = stage.compile()
  saver = DenseSaver(pathlib.Path(given['folder']), given['every'])
  iteration, state = saver.restore(stage)
  if state is None:
    state = stage.initial_state()
  log = memory_log.MemoryLog(keys.WorkerId(0, 0, 1), memory_log.MemoryStore())
  worker = worker_lib.Worker(0, stage, programs, state, log, data)
  worker.train(
    config.train,
    lambda done: print(
      done.iteration, report.combine(done.digests), flush=True
    ),
    first_iteration=iteration + 1,
    snapshots=saver,  # type: ignore[arg-type]  # has the methods that are used
  )


if __name__ == '__main__':
  main()
