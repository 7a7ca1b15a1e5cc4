"""Sparse checkpoints for a user's own training loop, without `launch`.

```python
with loop.SparseCheckpointer(step, state, batch, rule, ...) as checkpointer:
  for iteration in range(checkpointer.iteration + 1, 1001):
    state, metrics = step(checkpointer.state, batch(iteration))
    checkpointer.capture(iteration, state)
```

The step is the user's own: pure, `(state, batch) -> (state, ...)`. After a
crash the same program restores what was captured by replaying that very step on
placeholders; gradients of all operators are computed in a replay too, so that
clipping by the global norm inside the user's optax chain gives the same factor,
and every bit comes back. Every snapshot has the digests of the whole state,
with which the restored state is compared: a step that is not what
`LoopSettings` says is found out, and by `rehearse` before it matters.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from moetion_jax import errors, keys
from moetion_jax.capture import (
  conversion,
  programs as capture_programs,
  snapshotter,
)
from moetion_jax.hostmem import raw_bytes, store_folder
from moetion_jax.loop import settings as loop_settings, trajectory
from moetion_jax.policies import decision, slots
from moetion_jax.snapshots import (
  coverage,
  manifest,
  reader,
  registry,
  snapshot as snapshot_lib,
)
from moetion_jax.state import (
  digest,
  layout,
  loop_template,
  model,
  partition as partition_lib,
)

Step = Callable[[Any, Any], tuple[Any, ...]]
Batch = Callable[[int], Any]
# The group of a leaf, by its path; None: the leaf belongs to no operator (a
# count, a random key) and is part of every snapshot.
Rule = Callable[[str], model.Group | None]
_NOTHING = coverage.Start(iteration=0, complete_at=0)  # the initial state
_SHARED = model.Group('(shared)', False)
_KEPT_WINDOWS = 2
_SLACK = 3  # snapshots: one on its way, the next one, one that a reader holds
_WEAK = 'weak'  # key in a snapshot's metadata: paths of weakly typed leaves

_log = logging.getLogger(__name__)


class NotExactError(errors.MoetionError):
  """A restored state has other bits than the captured one.

  Attributes:
    operator: the first operator that differs.
    iteration: the iteration of the state.
  """

  def __init__(self, found: conversion.DivergedError, folder: pathlib.Path):
    super().__init__(
      f'{folder}: {found.operator} of iteration {found.iteration}, restored '
      f'from snapshots {found.suspects[0]} to {found.suspects[-1]}, has other '
      'bits than it had. They are as they were written, so the step is not '
      'what it is said to be: a master is read in another dtype than '
      'compute_dtype, or is not named by is_master; an update couples the '
      'rows of a stacked group; the batch is not a function of the iteration; '
      'or the program, its software or its kind of device is another than '
      'then (on GPUs a step that is compiled anew may be: keep '
      "JAX's compilation cache, set --xla_gpu_deterministic_ops). Mend that "
      'and start again: nothing was removed. '
      'must_be_exact=False takes the state as it is, window_length=1 captures '
      'it whole, without replay, from then on.'
    )
    self.operator = found.operator
    self.iteration = found.iteration


class _OtherStateError(errors.MoetionError):
  """A snapshot is of a state with other operators or leaves."""


class SparseCheckpointer:
  """Captures a part of the state after every iteration, and restores all of it.

  Use it as a context manager, or call `start` and `close`; from one process and
  one thread.

  Attributes:
    state: the newest state: initial, restored or last captured. The caller may
      donate it.
    iteration: the iteration of that state; 0 for the initial one.
    replayed_iterations: number of iterations that the restoration replayed.
  """

  def __init__(
    self,
    step: Step,
    state: Any,
    batch: Batch,
    rule: Rule,
    settings: loop_settings.LoopSettings,
  ):
    """Stores the arguments.

    Args:
      step: the training step: pure; returns a tuple whose first item is the
        next state. It may donate its state.
      state: the initial state, a pytree of arrays, random keys and numbers. A
        restored state is placed on the same devices. The rows of a leaf of a
        stacked group must not depend on one another in the update (`jax.vmap`
        an optimizer for which they do).
      batch: returns the batch of an iteration, from 1; a pure function.
      rule: returns the group of a leaf, by its path.
      settings: the settings for capturing.

    Raises:
      ValueError: the state is no such pytree, or the rule does not fit it.
    """
    self.state = state
    self.iteration = 0
    self.replayed_iterations = 0
    self._step = step
    self._batch = batch
    self._settings = settings
    self._folder = pathlib.Path(settings.folder)
    self._trajectory = trajectory.Trajectory(
      self._folder, settings.accept_changes
    )
    self._template = loop_template.Template(state)
    self._layout = _layout(self._template, state, rule, settings)
    self._window_length = min(
      settings.window_length, len(self._layout.operators)
    )
    self._programs = capture_programs.CapturePrograms(self._layout)
    self._digest = jax.jit(self._digests)
    dtypes = self._layout.compute_dtypes
    self._compute_of = jax.jit(
      # Copy even where the dtype is the same: the step may donate.
      lambda masters: {
        name: jnp.array(master, dtypes[name], copy=True)
        for name, master in masters.items()
      }
    )
    self._stored = registry.stored(self._folder)
    self._snapshots: snapshotter.Snapshotter | None = None

  def start(self) -> None:
    """Restores what the folder holds, then captures into it.

    Raises:
      StoreError: the folder cannot be used, or holds snapshots of another
        state, or of other software.
      ConfigError: a name in `accept_changes` is unknown.
      NotExactError: the restored state is not what was captured.
    """
    window_length = self._window_length
    sizes = self._layout.state_bytes(), self._layout.compute_bytes()
    made = slots.make_slots(
      slots.order_operators('static', self._layout.operators, {}),
      sizes[0],
      window_length,
      keep_order=False,
    )
    largest = max(slots.snapshot_bytes(made, *sizes, 'rolling'))
    parts = 1 + len(self._layout.leaves) * len(self._layout.operators)
    store = registry.make(
      self._folder,
      largest
      + self._shared_bytes()
      + 8 * len(self._layout.partition.operators)  # digests
      + parts * raw_bytes.ALIGNMENT_BYTES,
      window_length * _KEPT_WINDOWS + _SLACK,
    )
    self._programs.compile()
    if self._folder.is_dir():
      store_folder.check_private(self._folder)
      store.check_is_ours()
      self._trajectory.check()
      start = _NOTHING
      if restored := self._restored():
        self.state, start = restored
      self.iteration = start.complete_at
      self.replayed_iterations = start.complete_at - start.iteration
      self._trajectory.go_on(start)
    else:
      self._trajectory.check()
    self._snapshots = snapshotter.Snapshotter(
      self._programs,
      store,
      decision.CaptureDecision(
        first_iteration=0,
        window_length=window_length,
        mode='rolling',
        slots=made,
      ),
      {},
    )
    self._snapshots.start()
    self._trajectory.record()
    for later in self._stored.iterations():
      if later > self.iteration:  # of no use or damaged: it is taken again
        self._snapshots.distrust(later)

  def close(self) -> None:
    """Waits until the last snapshot counts; keeps the folder. Idempotent."""
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
      iteration: the iteration, from 1, without a gap.
      state: the state after it. It may be donated once `capture` has returned.

    Raises:
      StoreError: an earlier snapshot could not be stored.
      ValueError: an iteration was left out, or the state's structure, shapes
        or dtypes are not those of the initial one.
    """
    assert self._snapshots is not None, 'start() was not called'
    if iteration != self.iteration + 1:
      raise ValueError(f'iteration {iteration} follows {self.iteration}')
    arrays = self._template.plain(state)
    weak = self._template.weak(arrays)
    plain = self._layout.partition.unflatten(
      list(map(loop_template.auto, arrays))
    )
    self._snapshots.retain(iteration - self._window_length * _KEPT_WINDOWS)
    fields: dict[str, Any] = {_WEAK: weak}
    self._snapshots.take(
      iteration,
      plain,
      self._compute_of(self._masters(plain)),
      {conversion.DIGESTS: self._digest(plain)},
      **fields,
    )
    self._snapshots.release()  # the caller's next step may donate the state
    self.state, self.iteration = state, iteration

  def rehearse(self) -> int:
    """Restores what was captured so far, beside the state, and forgets it.

    Call it once, when `window_length` iterations have been captured: what would
    prevent a restoration shows then, and not after a crash. It takes the memory
    of a second state, and the time of a window.

    Returns:
      The iteration whose state was restored, with all its bits.

    Raises:
      NotExactError: some bits differ; with must_be_exact=False that is logged.
      StoreError: a snapshot could not be stored, or there is no whole window.
    """
    assert self._snapshots is not None, 'start() was not called'
    self._snapshots.flush()
    restored = self._restored()
    if restored is None:
      raise errors.StoreError(
        f'{self._folder}: no whole window of snapshots after iteration '
        f'{self.iteration}'
      )
    return restored[1].complete_at

  def _shared_bytes(self) -> int:
    return sum(
      leaf.operator_bytes
      for leaf in self._layout.leaves
      if leaf.path in self._layout.shared
    )

  def _masters(self, plain: Any) -> dict[str, jax.Array]:
    leaves = zip(self._layout.leaves, jax.tree.leaves(plain), strict=True)
    return {
      leaf.path: value
      for leaf, value in leaves
      if leaf.path in self._layout.compute
    }

  def _digests(self, plain: Any) -> jax.Array:
    """Returns u32[operators, 2] in the partition's order; traceable."""
    groups: dict[str, dict[str, jax.Array]] = {}
    for leaf, value in zip(
      self._layout.leaves, jax.tree.leaves(plain), strict=True
    ):
      groups.setdefault(leaf.group.name, {})[leaf.path] = value
    return jnp.concatenate(
      [
        digest.digest_leaves(groups[name], group.stacked)
        for name, group in self._layout.partition.groups.items()
      ]
    )

  # ---- restoration ---------------------------------------------------------

  def _restored(self) -> tuple[Any, coverage.Start] | None:
    """Restores the newest state that the snapshots allow.

    Returns:
      The state, and where its conversion started and was complete; None if
      there is none.

    Raises:
      NotExactError: every state that can be restored has other bits than it
        had.
      StoreError: the snapshots are of another state.
    """
    lost: set[int] = set()
    diverged: list[tuple[coverage.Start, conversion.DivergedError]] = []
    while True:
      records = self._records(lost)
      starts = [
        start
        for start in coverage.valid_starts(records, self._layout.operators)
        if start not in [tried for tried, _ in diverged]
        and self._trajectory.allows(start)
      ]
      if not starts:
        break
      newest = max(record.iteration for record in records)
      try:
        restored = self._converted(starts[-1], newest)
        if diverged:
          _log.warning(
            '%s: goes on from an older state: %s', self._folder, diverged[0][1]
          )
        return restored
      except _OtherStateError as error:
        raise errors.StoreError(
          f'{self._folder}: {error}; name another folder, or remove this one'
        ) from error
      except conversion.SnapshotLostError as error:
        _log.warning('%s', error)
        lost.update(error.suspects)
      except conversion.DivergedError as error:
        diverged.append((starts[-1], error))
    if not diverged:
      if iterations := self._stored.iterations():
        _log.warning(
          '%s: the state does not come back, it begins anew: there are '
          'snapshots of iterations %s, but no whole window that can be read',
          self._folder,
          ', '.join(map(str, iterations)),
        )
      return None
    start, error = diverged[0]
    if self._settings.must_be_exact:
      raise NotExactError(error, self._folder) from error
    _log.warning('%s', NotExactError(error, self._folder))
    return self._converted(start, start.complete_at, is_compared=False)

  def _records(self, lost: set[int]) -> list[coverage.SnapshotRecord]:
    """Returns records of the readable snapshots; adds damaged ones to `lost`.

    Raises:
      StoreError: a snapshot is of another state.
    """
    records = []
    operators = frozenset(self._layout.operators)
    for iteration, path in self._stored.paths().items():
      if iteration in lost:
        continue
      try:
        metadata = self._stored.manifest(iteration).metadata
      except manifest.SnapshotCorruptError as error:
        _log.warning('%s', error)
        lost.add(iteration)
        continue
      record = coverage.SnapshotRecord(
        iteration=iteration,
        state=keys.operators_from_json(metadata['state']),
        compute=keys.operators_from_json(metadata['compute']),
      )
      for operator in sorted((record.state | record.compute) ^ operators):
        raise errors.StoreError(
          f'{path}: only it or the state has {operator}: it is of another one; '
          'name another folder, or remove this one'
        )
      records.append(record)
    return records

  def _converted(
    self, start: coverage.Start, newest: int, *, is_compared: bool = True
  ) -> tuple[Any, coverage.Start]:
    """Folds and replays up to `start.complete_at`.

    Raises:
      SnapshotLostError: a snapshot is damaged.
      DivergedError: bits are not what they were.
      _OtherStateError: a snapshot is not one of this state.
    """
    weak: dict[int, list[str]] = {}

    def load(iteration: int) -> snapshot_lib.Snapshot:
      try:
        snapshot = reader.load(self._layout, iteration, [self._stored])
      except manifest.SnapshotCorruptError:
        raise
      except errors.StoreError as error:
        raise _OtherStateError(str(error)) from error
      weak[iteration] = snapshot.metadata.get(_WEAK, [])
      return (
        snapshot if is_compared else dataclasses.replace(snapshot, extras={})
      )

    going = conversion.Conversion(
      self._programs,
      lambda plain: self._digest(jax.tree.map(loop_template.auto, plain)),
      dict,  # no start is iteration 0
      load,
      conversion.Route(
        start=start,
        newest=newest,
        unverified_until=self._trajectory.unverified_until(start),
      ),
    )
    plain = going.begin()
    for iteration in range(start.iteration + 1, start.complete_at + 1):
      state = self._state(plain, weak[iteration - 1])
      state = self._step(state, self._batch(iteration))[0]
      arrays = self._template.plain(state)
      plain = self._layout.partition.unflatten(arrays)
      plain = going.advance(iteration, plain).state
    return self._state(plain, weak[start.complete_at]), start

  def _state(self, plain: Any, weak: list[str]) -> Any:
    return self._template.state(jax.tree.leaves(plain), weak)


def _layout(
  template: loop_template.Template,
  state: Any,
  rule: Rule,
  settings: loop_settings.LoopSettings,
) -> layout.Layout:
  """Returns the layout of a loop's state; raises ValueError."""
  plain = jax.tree.unflatten(jax.tree.structure(state), template.plain(state))
  partition = partition_lib.Partition(plain, lambda path: rule(path) or _SHARED)
  if all(group == _SHARED for group in partition.groups.values()):
    raise ValueError('the rule gives no leaf a group: nothing is an operator')
  of = settings.compute_dtype_of or (lambda path: settings.compute_dtype)
  shared = {x.path for x in partition.leaves if x.group == _SHARED}
  masters = [
    x.path
    for x in partition.leaves
    if x.path not in shared and settings.is_master(x.path)
  ]
  return layout.Layout(
    partition=partition,
    compute={path: path for path in masters},
    compute_dtypes={path: np.dtype(of(path)) for path in masters},
    shared=frozenset(shared),
    placements=template.placements,
  )
