"""Sparse checkpoints for anyone's training loop, without `launch`.

```python
with loop.SparseCheckpointer(step, state, batch, rule, ...) as checkpointer:
  for iteration in range(checkpointer.iteration + 1, 1001):
    state, metrics = step(checkpointer.state, batch(iteration))
    checkpointer.capture(iteration, state)
```

The step is the user's own: pure, `(state, batch) -> (state, ...)`. After a
crash the same program restores what was captured by replaying that very step
on placeholders (DESIGN section 4); gradients of all operators are computed in
a replay too, so that clipping by the global norm inside the user's optax chain
gives the same factor, and every bit comes back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from moetion_jax import (
  base,
  capture,
  coverage,
  hostmem,
  layout as layout_lib,
  operators,
  segment,
  slots,
  snapshot as snapshot_lib,
  snapshot_file,
  snapshot_manifest,
  snapshot_store,
  snapshotter,
  stage_model,
)

Step = Callable[[Any, Any], tuple[Any, ...]]
Batch = Callable[[int], Any]
# The group of a leaf by its path; None: it belongs to no operator (a count, a
# random key) and is part of every snapshot.
Rule = Callable[[str], stage_model.Group | None]
_SHARED = stage_model.Group('shared', False)
_KEPT_WINDOWS = 2
_SLACK = 3  # a snapshot on its way, the next one, one that a reader holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How a loop's state is captured.

  Attributes:
    folder: where snapshots lie: a new folder, or that of the run to go on
      with, in tmpfs ('/dev/shm/my-run'). It is made with mode 0700.
    compute_dtype: in which the step reads its masters.
    window_length: iterations that together capture everything.
    is_master: which leaves are masters (fp32 parameters that the step reads
      through a cast to `compute_dtype`), by path. Of an operator that is not
      restored yet, those are known and everything else is zero.
    compute_dtype_of: for masters that are read in another dtype, by path.
  """

  folder: str | os.PathLike[str]
  compute_dtype: Any = jnp.bfloat16
  window_length: int = 4
  is_master: Callable[[str], bool] = lambda path: path.startswith('params/')
  compute_dtype_of: Callable[[str], Any] | None = None


class SparseCheckpointer:
  """Captures a part of the state after every iteration, and restores all of it.

  A context manager, or `start` and `close`. One process, one thread.

  Attributes:
    state: the newest one: restored, or the initial one. Yours to donate.
    iteration: of that state; 0 for the initial one.
    replayed_iterations: how many the restoration did again.
  """

  def __init__(
    self, step: Step, state: Any, batch: Batch, rule: Rule, settings: Settings
  ):
    """Stores the arguments.

    Args:
      step: pure; returns a tuple whose first item is the next state. It may
        donate its state.
      state: the initial one, a pytree of arrays. The rows of a leaf of a
        stacked group must not depend on one another in the update.
      batch: what `step` gets in an iteration, from 1; a pure function.
      rule: the group of every leaf.
      settings: see there.
    """
    self.state = state
    self.iteration = 0
    self.replayed_iterations = 0
    self._step = step
    self._batch = batch
    self._settings = settings
    self._layout = _layout(state, rule, settings)
    self._programs = capture.CapturePrograms(self._layout)
    dtypes = self._layout.compute_dtypes
    self._compute_of = jax.jit(
      # A copy, also where the dtype is the same: the step may donate.
      lambda masters: {
        name: jnp.array(master, dtypes[name], copy=True)
        for name, master in masters.items()
      }
    )
    self._snapshots: snapshotter.Snapshotter | None = None

  def start(self) -> None:
    """Restores what the folder holds, then captures into it.

    Raises:
      StoreError: the folder cannot be used, or holds snapshots of another
        state.
    """
    window_length = min(
      self._settings.window_length, len(self._layout.operators)
    )
    sizes = self._layout.state_bytes(), self._layout.compute_bytes()
    made = slots.make_slots(
      slots.order_operators('static', self._layout.operators, {}),
      sizes[0],
      window_length,
      keep_order=False,
    )
    largest = max(slots.snapshot_bytes(made, *sizes, 'rolling'))
    parts = len(self._layout.leaves) * len(self._layout.operators)
    store = snapshot_store.SnapshotStore(
      self._settings.folder,
      largest + self._shared_bytes() + parts * segment.ALIGNMENT_BYTES,
      window_length * _KEPT_WINDOWS + _SLACK,
    )
    self._programs.compile()
    self._kept_iterations = window_length * _KEPT_WINDOWS
    if os.path.isdir(self._settings.folder):
      hostmem.check_private(self._settings.folder)
      self._restore()
    self._snapshots = snapshotter.Snapshotter(
      self._programs,
      store,
      slots.Decision(
        first_iteration=0,
        window_length=window_length,
        mode='rolling',
        slots=made,
      ),
      {},
    )
    self._snapshots.start()
    for later in self._paths():
      if later > self.iteration:  # of no use, or damaged: take it again
        self._snapshots.distrust(later)

  def close(self) -> None:
    """Waits until the last snapshot counts. The folder stays. Idempotent."""
    if self._snapshots is not None:
      snapshots, self._snapshots = self._snapshots, None
      snapshots.close()

  def __enter__(self) -> SparseCheckpointer:
    self.start()
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def capture(self, iteration: int, state: Any) -> None:
    """Takes the snapshot of an iteration; call it after each.

    Waits only while the last snapshot is still being copied.

    Args:
      iteration: from 1, without a gap.
      state: after it. It may be donated when this returned.

    Raises:
      StoreError: an earlier snapshot could not be stored.
      ValueError: an iteration was left out.
    """
    assert self._snapshots is not None, 'start() was not called'
    if iteration != self.iteration + 1:
      raise ValueError(f'iteration {iteration} follows {self.iteration}')
    leaves = jax.tree.leaves(state)
    masters = {
      leaf.path: value
      for leaf, value in zip(self._layout.leaves, leaves, strict=True)
      if leaf.path in self._layout.compute
    }
    self._snapshots.retain(iteration - self._kept_iterations)
    self._snapshots.take(iteration, state, self._compute_of(masters), {})
    self._snapshots.release()  # the next thing done to it may be a donation
    self.state, self.iteration = state, iteration

  def _shared_bytes(self) -> int:
    return sum(
      leaf.operator_bytes
      for leaf in self._layout.leaves
      if leaf.path in self._layout.shared
    )

  def _restore(self) -> None:
    """Goes to the newest state that the snapshots lead to."""
    broken: set[int] = set()
    while True:
      records = self._records(broken)
      starts = coverage.valid_starts(records, self._layout.operators)
      if not starts:
        return
      start = starts[-1]
      try:
        self._convert(start)
        return
      except _BrokenError as error:
        broken.add(error.iteration)

  def _records(self, broken: set[int]) -> list[coverage.SnapshotRecord]:
    records = []
    for iteration, path in self._paths().items():
      if iteration in broken:
        continue
      try:
        metadata = snapshot_file.read_manifest(path).metadata
      except snapshot_manifest.SnapshotCorruptError:
        continue
      records.append(
        coverage.SnapshotRecord(
          iteration=iteration,
          state=base.operators_from_json(metadata['state']),
          compute=base.operators_from_json(metadata['compute']),
        )
      )
    return records

  def _paths(self):
    return snapshot_file.list_snapshots(self._settings.folder)

  def _convert(self, start: coverage.Start) -> None:
    """Folds and replays; ends with the state of `start.complete_at`."""
    active: frozenset[base.OperatorId] = frozenset()
    state = None
    for iteration in range(start.iteration, start.complete_at + 1):
      if state is not None:
        state = self._step(state, self._batch(iteration))[0]
      snapshot = self._load(iteration)
      state = self._programs.fold(state, snapshot, active)
      active |= frozenset(snapshot.state)
    self.state, self.iteration = state, start.complete_at
    self.replayed_iterations = start.complete_at - start.iteration

  def _load(self, iteration: int) -> snapshot_lib.Snapshot:
    try:
      stored = snapshot_file.open_snapshot(
        self._paths()[iteration], verify=True
      )
    except snapshot_manifest.SnapshotCorruptError as error:
      raise _BrokenError(iteration) from error
    return snapshot_lib.from_arrays(
      self._layout, stored.metadata, stored.arrays
    )


class _BrokenError(base.StoreError):
  """A snapshot turned out to be damaged."""

  def __init__(self, iteration: int):
    super().__init__(f'snapshot {iteration} is damaged')
    self.iteration = iteration


def _layout(state: Any, rule: Rule, settings: Settings) -> layout_lib.Layout:
  partition = operators.Partition(state, lambda path: rule(path) or _SHARED)
  of = settings.compute_dtype_of or (lambda path: settings.compute_dtype)
  shared = {x.path for x in partition.leaves if x.group == _SHARED}
  masters = [
    x.path
    for x in partition.leaves
    if x.path not in shared and settings.is_master(x.path)
  ]
  return layout_lib.Layout(
    partition=partition,
    compute={path: path for path in masters},
    compute_dtypes={path: np.dtype(of(path)) for path in masters},
    shared=frozenset(shared),
  )
