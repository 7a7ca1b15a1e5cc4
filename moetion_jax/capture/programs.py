"""Programs for capture and fold on the device.

`capture` copies the operators of a slot into buffers of their own, so that the
training thread may donate the state right after: by leaf (`rows`) on CPU,
packed (`packed`) elsewhere. `fold` puts the operators of one snapshot into a
partial state (`folds`). Both work on any pytree whose leaves a `layout.Layout`
describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from moetion_jax import keys
from moetion_jax.capture import folds, packed, rows, sources, transfer
from moetion_jax.programs import compilation
from moetion_jax.snapshots import blocks, coverage, snapshot as snapshot_lib
from moetion_jax.state import layout as layout_lib


class CapturePrograms:
  """The compiled programs of capture and fold for one layout.

  Call `compile` first. Capture is compiled once for groups whose leaves have
  equal shapes, and for each number of operators that a call may take; which
  operators is a dynamic index.
  """

  def __init__(
    self,
    layout: layout_lib.Layout,
    is_packed: bool | None = None,
    *,
    records_gradients: bool = False,
  ):
    """Stores the arguments; `compile` does the work.

    Args:
      layout: layout of the state.
      is_packed: whether captures are packed; None: what suits the platform.
      records_gradients: whether gradients may be captured too.
    """
    self.layout = layout
    self._programs: dict[str, Callable[..., Any]] = {}
    self._copy: Callable[..., Any] | None = None
    self._is_packed = is_packed
    self._kinds = (blocks.STATE, blocks.COMPUTE)
    if records_gradients:
      self._kinds += (blocks.GRADIENTS,)
    self._sources = list(sources.sources(layout, self._kinds))
    self._captures: rows.RowCaptures | packed.PackedCaptures | None = (
      None  # once the platform is known
    )
    self._folds: folds.Folds | None = None  # once the devices are

  # ---- compilation ---------------------------------------------------------

  def trace(
    self, mesh: jax.sharding.AbstractMesh, platform: str
  ) -> compilation.TracedPrograms:
    """Traces all programs over a mesh; needs no backend.

    Args:
      mesh: the mesh to trace over.
      platform: the platform to compile for, as JAX calls it.
    """
    traced = {}
    # The layout may have no devices yet.
    captures = self._choose(platform, mesh.shape['expert'])
    for program in (
      *captures.programs(),
      *self._make_folds(mesh.shape['expert']),
    ):
      traced[program.name], _ = compilation.trace(
        mesh,
        program.function,
        program.in_specs,
        program.out_specs,
        program.shapes,
        program.donate,
      )
    return compilation.TracedPrograms(traced)

  def compile(
    self,
    on_program: Callable[[str], None] = lambda _: None,
    lowered: compilation.LoweredPrograms | None = None,
  ) -> None:
    """Compiles all programs.

    Args:
      on_program: called with each program's name before it is compiled.
      lowered: the lowered result of `trace`, if that was done ahead.
    """
    mesh = self.layout.mesh
    if mesh is None:  # the caller's own state, wherever it lies
      captures = self._choose(jax.default_backend(), 1)
      functions: dict[Callable[..., Any], Callable[..., Any]] = {}
      for program in (*captures.programs(), *self._make_folds(1)):
        self._programs[program.name] = functions.setdefault(
          program.function,
          jax.jit(program.function, donate_argnums=program.donate),
        )
      return
    platform = compilation.platform_of(mesh)
    if lowered is None:
      traced = self.trace(mesh.abstract_mesh, platform)
      lowered = traced.lower(platform, on_program)
    self._choose(platform, self.layout.expert_devices)
    self._make_folds(self.layout.expert_devices)
    self._programs = lowered.compile_each(mesh, on_program)

  def _choose(
    self, platform: str, devices: int
  ) -> rows.RowCaptures | packed.PackedCaptures:
    """Chooses how the state is captured.

    Args:
      platform: the platform, as JAX calls it.
      devices: number of devices of the axis 'expert'.
    """
    is_packed = self._is_packed
    if is_packed is None:
      is_packed = platform != 'cpu' and not self.layout.is_spread
    if is_packed:
      self._captures = packed.PackedCaptures(self._sources, devices)
    else:
      self._captures = rows.RowCaptures(
        self._sources, devices, self.layout.is_spread
      )
    return self._captures

  def _make_folds(self, devices: int) -> list[sources.Program]:
    """Makes the folds; returns their programs, none for leaves placed apart."""
    self._folds = folds.Folds(self.layout, devices)
    return [] if self.layout.placements else list(self._folds.programs())

  # ---- capture -------------------------------------------------------------

  def capture(
    self,
    state: Any,
    compute: Mapping[str, jax.Array],
    operators: coverage.Contents,
    gradients: Mapping[str, jax.Array] | None = None,
  ) -> transfer.Captured:
    """Copies operators on the device; returns when the copies are dispatched.

    Args:
      state: the training state; may be donated as soon as this has returned.
      compute: the compute weights, which nobody may donate.
      operators: the operators to capture.
      gradients: what the update consumed, by parameter, which nobody may
        donate; None if the snapshot holds none of it.
    """
    values = jax.tree.leaves(state)
    assert self._captures is not None, 'compile() was not called'
    arrays = (values, compute, gradients or {})
    assert len(self._kinds) == len(arrays) or not operators.gradients
    parts = self._captures.capture(
      self._programs,
      dict(zip(self._kinds, arrays, strict=False)),
      dict(zip(self._kinds, operators, strict=False)),
    )
    return transfer.Captured(
      parts=tuple(parts),
      operators=operators,
      shared=self._copy_shared(values),
    )

  def _copy_shared(self, values: Sequence[jax.Array]) -> dict[str, jax.Array]:
    if not self.layout.shared:
      return {}
    places = {
      x.path: i
      for i, x in enumerate(self.layout.leaves)
      if x.path in self.layout.shared
    }
    if self._copy is None:
      self._copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x))
    return self._copy({path: values[i] for path, i in places.items()})

  # ---- fold ----------------------------------------------------------------

  def fold(
    self,
    state: Any,
    snapshot: snapshot_lib.Snapshot,
    active: frozenset[keys.OperatorId],
  ) -> Any:
    """Puts a snapshot into a partial state.

    Args:
      state: the partial state, donated; None for the first fold.
      snapshot: snapshot of the state's iteration.
      active: operators that keep what they have.

    Returns:
      The new state: the slot's operators whole, others with compute weights
      on placeholders; the rest of the frozen ones is as it was, at first zero.

    Raises:
      StoreError: an operator is neither active nor in the snapshot.
    """
    operators = snapshot_lib.folded(self.layout, snapshot, active)
    if self.layout.placements:
      return self._fold_on_host(state, snapshot, operators)
    assert self._folds is not None, 'compile() was not called'
    if state is None:
      values = self._folds.placeholders(self._programs)
    else:
      values = jax.tree.leaves(state)
    self._folds.fold(self._programs, values, snapshot, operators)
    return self.layout.partition.unflatten(jax.block_until_ready(values))

  def _fold_on_host(
    self,
    state: Any,
    snapshot: snapshot_lib.Snapshot,
    operators: frozenset[keys.OperatorId],
  ) -> Any:
    """Folds leaves that the caller placed; they stay where they are."""
    layout = self.layout
    none = [None] * len(layout.leaves)
    old = none if state is None else jax.tree.leaves(state)
    new = []
    for leaf, before in zip(layout.leaves, old, strict=True):
      where = layout.placements.get(leaf.path)
      if before is None:
        value = np.zeros(leaf.shape, leaf.dtype)
      else:
        where = before.sharding if before.committed else None
        value = np.array(before)
      if leaf.path in layout.shared:
        value[...] = snapshot.shared[leaf.path]
      else:
        its = layout.partition.operators_of(leaf.group.name)
        for place, operator in enumerate(its):
          if operator in operators:
            row = snapshot_lib.row(layout, snapshot, operator, leaf)
            value[place if leaf.group.stacked else ...] = row
      new.append(jax.device_put(value, where))
    return layout.partition.unflatten(jax.block_until_ready(new))
