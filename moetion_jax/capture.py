"""Capture and fold on the device (DESIGN sections 4 and 5).

`capture` copies the operators of a slot into buffers of their own, so that the
training thread may donate the state right after. `fold` puts the operators of
one snapshot into a partial state. Both work on any pytree whose leaves a
`layout.Layout` explains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from moetion_jax import (
  base,
  layout as layout_lib,
  programs as programs_lib,
  snapshot as snapshot_lib,
)

_EXPERT, _SAME = PartitionSpec('expert'), PartitionSpec()
# Names of programs; those of capture are 'capture GROUP'.
_FOLD, _PLACE = 'fold', 'fold the first one'


class _Class(NamedTuple):
  """Groups whose rows one program captures."""

  stacked: bool
  leaves: tuple[tuple[tuple[int, ...], np.dtype], ...]  # shape, dtype


class CapturePrograms:
  """The compiled programs of capture and fold for one layout.

  `compile` first. One compilation of capture for each class of groups whose
  leaves have equal shapes; which operator is a dynamic index.
  """

  def __init__(self, layout: layout_lib.Layout):
    """Stores; `compile` does the work."""
    self.layout = layout
    self._programs: dict[str, Callable[..., Any]] = {}
    self._copy: Callable[..., Any] | None = None
    # The leaves of each group, found once: capture runs every iteration.
    self._places = {g: layout.leaves_of(g) for g in layout.partition.groups}
    # The program of each class is named after its first group.
    self._classes: dict[_Class, str] = {}
    self._program_of = {
      group: self._classes.setdefault(self._class_of(group), f'capture {group}')
      for group in layout.partition.groups
    }

  # ---- compilation ---------------------------------------------------------

  def trace(
    self, mesh: jax.sharding.AbstractMesh
  ) -> programs_lib.TracedPrograms:
    """Traces all programs over a mesh; needs no backend."""
    traced = {}
    for shapes, name in self._classes.items():
      function, specs = _row_of_each, (_EXPERT,) * (1 + len(shapes.leaves))
      arguments = (jax.ShapeDtypeStruct((mesh.shape['expert'],), np.int32),)
      if not shapes.stacked:
        function, specs = _whole, (_SAME,) * len(shapes.leaves)
        arguments = ()
      traced[name], _ = programs_lib.trace(
        mesh,
        function,
        specs,
        _EXPERT if shapes.stacked else _SAME,
        (*arguments, *(jax.ShapeDtypeStruct(*x) for x in shapes.leaves)),
      )
    specs = tuple(
      _EXPERT if x.group.stacked else _SAME for x in self.layout.leaves
    )
    leaves = tuple(
      jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.layout.leaves
    )
    masks = tuple(
      jax.ShapeDtypeStruct(x.shape[: int(x.group.stacked)], np.bool_)
      for x in self.layout.leaves
    )
    traced[_FOLD], _ = programs_lib.trace(
      mesh,
      _where,
      (specs, specs, specs),
      specs,
      (leaves, leaves, masks),
      donate=(0,),
    )
    traced[_PLACE], _ = programs_lib.trace(
      mesh, _copied, (specs,), specs, (leaves,)
    )
    return programs_lib.TracedPrograms(traced)

  def compile(
    self,
    on_program: Callable[[str], None] = lambda _: None,
    lowered: programs_lib.LoweredPrograms | None = None,
  ) -> None:
    """Compiles all programs.

    Args:
      on_program: called with each program's name before it is compiled.
      lowered: `trace`, lowered, if that was done ahead.
    """
    mesh = self.layout.mesh
    if mesh is None:  # the caller's own state: wherever it lies
      self._programs = {
        name: jax.jit(_row_of_each if shapes.stacked else _whole)
        for shapes, name in self._classes.items()
      }
      self._programs[_FOLD] = jax.jit(_where, donate_argnums=0)
      self._programs[_PLACE] = jax.jit(_copied)
      return
    if lowered is None:
      traced = self.trace(mesh.abstract_mesh)
      lowered = traced.lower(programs_lib.platform_of(mesh), on_program)
    self._programs = lowered.compile_each(mesh, on_program)

  def _class_of(self, group: str) -> _Class:
    leaves = [leaf for _, leaf in self._places[group]]
    return _Class(
      leaves[0].group.stacked, tuple((x.shape, x.dtype) for x in leaves)
    )

  # ---- capture -------------------------------------------------------------

  def capture(
    self,
    state: Any,
    compute: Mapping[str, jax.Array],
    state_operators: frozenset[base.OperatorId],
    compute_operators: frozenset[base.OperatorId],
  ) -> snapshot_lib.Captured:
    """Copies operators on the device; returns when the copies are dispatched.

    Args:
      state: the training state; may be donated as soon as this returned.
      compute: its compute weights, which nobody may donate.
      state_operators: the slot.
      compute_operators: those whose compute weights belong to the snapshot.
    """
    values = jax.tree.leaves(state)
    by_group: dict[str, list[base.OperatorId]] = {}
    for operator in sorted(state_operators):
      by_group.setdefault(operator.group, []).append(operator)
    rows = []
    for group, picked in by_group.items():
      leaves = [values[i] for i, _ in self._places[group]]
      program = self._programs[self._program_of[group]]
      if picked[0].expert < 0:
        rows.append(snapshot_lib.Rows(group, {0: picked[0]}, program(*leaves)))
        continue
      local = len(self.layout.partition.operators_of(group))
      local //= self.layout.expert_devices
      for call in _calls(picked, local):
        index = np.zeros(self.layout.expert_devices, np.int32)
        for device, operator in call.items():
          index[device] = operator.expert % local
        rows.append(snapshot_lib.Rows(group, call, program(index, *leaves)))
    return snapshot_lib.Captured(
      rows=tuple(rows),
      state_operators=state_operators,
      compute_operators=compute_operators,
      compute=compute,
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
    active: frozenset[base.OperatorId],
  ) -> Any:
    """Puts a snapshot into a partial state.

    Args:
      state: donated; None for the first fold.
      snapshot: of the state's iteration.
      active: operators that keep what they have.

    Returns:
      The state: the slot's operators whole, the other frozen ones on
      placeholders.

    Raises:
      StoreError: an operator is neither active nor in the snapshot.
    """
    values, masks = snapshot_lib.assemble(self.layout, snapshot, active)
    # Both programs copy: an argument may alias the mapped snapshot (FACTS).
    if state is None:
      new = self._programs[_PLACE](tuple(values))
    else:
      flat = tuple(jax.tree.leaves(state))
      new = self._programs[_FOLD](flat, tuple(values), tuple(masks))
    return self.layout.partition.unflatten(jax.block_until_ready(new))


def _row_of_each(index, *leaves):
  """Of each device's share of the leaves, the row that it is told."""
  return tuple(
    jax.lax.dynamic_index_in_dim(x, index[0], 0, keepdims=True) for x in leaves
  )


def _whole(*leaves):
  """The leaves, with a leading dim of one row."""
  return tuple(jnp.copy(x)[None] for x in leaves)


def _copied(leaves):
  return tuple(jnp.copy(x) for x in leaves)


def _where(state, values, masks):
  return tuple(
    jnp.where(
      mask.reshape(mask.shape + (1,) * (old.ndim - mask.ndim)), new, old
    )
    for old, new, mask in zip(state, values, masks, strict=True)
  )


def _calls(
  picked: Sequence[base.OperatorId], local: int
) -> list[dict[int, base.OperatorId]]:
  """Deals operators to calls, at most one a device; rows are devices."""
  calls: list[dict[int, base.OperatorId]] = []
  for operator in picked:
    device = operator.expert // local
    call = next((c for c in calls if device not in c), None)
    if call is None:
      calls.append(call := {})
    call[device] = operator
  return calls
