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
# Names of programs; those of capture are 'capture GROUP', or 'N of GROUP'.
_FOLD, _PLACE = 'fold', 'fold the first one'
# How many operators of a stacked group one call may capture. XLA's CPU client
# lets 32 calls be under way: one more waits, and training with it.
_ROWS = (8, 2, 1)


class _Class(NamedTuple):
  """Groups whose rows one program captures."""

  stacked: bool
  leaves: tuple[tuple[tuple[int, ...], np.dtype], ...]  # shape, dtype


class CapturePrograms:
  """The compiled programs of capture and fold for one layout.

  `compile` first. For each class of groups whose leaves have equal shapes,
  capture is compiled once for each number of operators that a call may take;
  which operators is a dynamic index.
  """

  def __init__(self, layout: layout_lib.Layout):
    """Stores; `compile` does the work."""
    self.layout = layout
    self._programs: dict[str, Callable[..., Any]] = {}
    self._copy: Callable[..., Any] | None = None
    # The leaves of each group, found once: capture runs every iteration.
    self._places = {g: layout.leaves_of(g) for g in layout.partition.groups}
    # The programs of each class are named after its first group.
    self._classes: dict[_Class, str] = {}
    self._first_of = {
      group: self._classes.setdefault(self._class_of(group), group)
      for group in layout.partition.groups
    }

  # ---- compilation ---------------------------------------------------------

  def trace(
    self, mesh: jax.sharding.AbstractMesh
  ) -> programs_lib.TracedPrograms:
    """Traces all programs over a mesh; needs no backend."""
    traced = {}
    for shapes, group in self._classes.items():
      leaves = tuple(jax.ShapeDtypeStruct(*x) for x in shapes.leaves)
      if not shapes.stacked:
        specs = (_SAME,) * len(leaves)
        name = f'capture {group}'
        traced[name], _ = programs_lib.trace(mesh, _whole, specs, _SAME, leaves)
        continue
      specs = (_EXPERT,) * (1 + len(leaves))
      for rows in self._rows_of(group):
        index = jax.ShapeDtypeStruct((mesh.shape['expert'], rows), np.int32)
        name = f'capture {rows} of {group}'
        traced[name], _ = programs_lib.trace(
          mesh, _rows_of_each, specs, _EXPERT, (index, *leaves)
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
      whole, rows_of_each = jax.jit(_whole), jax.jit(_rows_of_each)
      for shapes, group in self._classes.items():
        self._programs[f'capture {group}'] = whole
        for rows in self._rows_of(group) if shapes.stacked else ():
          self._programs[f'capture {rows} of {group}'] = rows_of_each
      self._programs[_FOLD] = jax.jit(_where, donate_argnums=0)
      self._programs[_PLACE] = jax.jit(_copied)
      return
    if lowered is None:
      traced = self.trace(mesh.abstract_mesh)
      lowered = traced.lower(programs_lib.platform_of(mesh), on_program)
    self._programs = lowered.compile_each(mesh, on_program)

  def _rows_of(self, group: str) -> tuple[int, ...]:
    """How many of a stacked group's operators a call may take, falling."""
    number = len(self.layout.partition.operators_of(group))
    local = number // self.layout.expert_devices
    return tuple(rows for rows in _ROWS if rows <= max(local, 1))

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
      first = self._first_of[group]
      if picked[0].expert < 0:
        program = self._programs[f'capture {first}']
        rows.append(snapshot_lib.Rows(group, {0: picked[0]}, program(*leaves)))
        continue
      places = self.layout.partition.rows_of(group)
      local = len(places) // self.layout.expert_devices
      sizes = self._rows_of(group)
      for number, call in _calls(picked, places, local, sizes):
        index = np.zeros((self.layout.expert_devices, number), np.int32)
        for row, operator in call.items():
          index[row // number, row % number] = places[operator] % local
        program = self._programs[f'capture {number} of {first}']
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


def _rows_of_each(index, *leaves):
  """Of each device's share of the leaves, the rows that it is told."""

  def rows(x):
    return [
      jax.lax.dynamic_index_in_dim(x, index[0, k], 0, keepdims=True)
      for k in range(index.shape[1])
    ]

  return tuple(jnp.concatenate(rows(x)) for x in leaves)


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
  picked: Sequence[base.OperatorId],
  places: Mapping[base.OperatorId, int],
  local: int,
  sizes: Sequence[int],
) -> list[tuple[int, dict[int, base.OperatorId]]]:
  """Deals operators of a group to as few calls as possible.

  Args:
    picked: them.
    places: row of each operator of the group.
    local: how many of the group a device has.
    sizes: how many a call may take of every device, falling to 1.

  Returns:
    (rows of every device, operators by row) of each call; a device's rows are
    neighbours.
  """
  queues: dict[int, list[base.OperatorId]] = {}
  for operator in picked:
    queues.setdefault(places[operator] // local, []).append(operator)
  calls = []
  while most := max(map(len, queues.values())):
    number = next(size for size in sizes if size <= most)
    call = {}
    for device, queue in queues.items():
      for place, operator in enumerate(queue[:number]):
        call[device * number + place] = operator
      del queue[:number]
    calls.append((number, call))
  return calls
