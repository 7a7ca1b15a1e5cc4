"""Capture and fold on the device (DESIGN sections 4 and 5).

`capture` copies the operators of a slot into buffers of their own, so that the
training thread may donate the state right after. `fold` puts the operators of
one snapshot into a partial state. Both work on any pytree whose leaves a
`layout.Layout` explains.

Where devices have a memory of their own, what a call captures comes out packed,
one array for all numbers of a size, and so do the compute weights that belong
to the snapshot. Each transfer to the host takes 0.1 ms of the GIL, for which
training waits, whatever is in it. On CPU nothing is transferred, a packed copy
takes eight times as long, and compute weights need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from moetion_jax import (
  base,
  layout as layout_lib,
  operators,
  programs as programs_lib,
  snapshot as snapshot_lib,
  snapshot_blocks,
)

_EXPERT, _SAME = PartitionSpec('expert'), PartitionSpec()
# Names of programs; those of capture are 'capture GROUP', or 'N of GROUP'.
_FOLD, _PLACE = 'fold', 'fold the first one'
# How many operators of a stacked group one call may capture. XLA's CPU client
# lets 32 calls be under way: one more waits, and training with it. Where the
# device is not the host, each call takes the host half a millisecond.
_ROWS = (8, 2, 1)
_PACKED_ROWS = (64, 32, 16, 8, 4, 2, 1)


class _Class(NamedTuple):
  """Sources whose rows one program captures."""

  kind: str
  stacked: bool
  arrays: tuple[tuple[tuple[int, ...], np.dtype], ...]  # shape, dtype


class _Source(NamedTuple):
  """What one kind of block of a group is captured from.

  Attributes:
    kind: of `snapshot_blocks.KINDS`.
    group: of operators.
    leaves: of the group, those that have this kind of value, and its dtypes.
    keys: of each, its place in the flattened state, or the name of its compute
      weight.
    arrays: where these are found.
    rows: of each operator in a stacked group's arrays.
  """

  kind: str
  group: str
  leaves: Sequence[tuple[operators.Leaf, np.dtype]]
  keys: tuple[Any, ...]
  arrays: _Class
  rows: Mapping[base.OperatorId, int]

  @property
  def name(self) -> str:
    """In names of programs."""
    is_state = self.kind == snapshot_blocks.STATE
    return self.group if is_state else f'{self.kind} {self.group}'

  @property
  def stack(self) -> int:
    """How many rows a stacked group's arrays have."""
    return self.arrays.arrays[0][0][0]


class CapturePrograms:
  """The compiled programs of capture and fold for one layout.

  `compile` first. For each class of groups whose leaves have equal shapes,
  capture is compiled once for each number of operators that a call may take;
  which operators is a dynamic index.
  """

  def __init__(self, layout: layout_lib.Layout, is_packed: bool | None = None):
    """Stores; `compile` does the work.

    Args:
      layout: of the state.
      is_packed: see the module; None: what suits the platform.
    """
    self.layout = layout
    self._programs: dict[str, Callable[..., Any]] = {}
    self._copy: Callable[..., Any] | None = None
    self._asked_packed = is_packed
    self._is_packed = bool(is_packed)
    # Found once: capture runs every iteration.
    self._sources = {
      (source.kind, source.group): source for source in _sources(layout)
    }
    # The programs of each class are named after its first source.
    self._classes: dict[_Class, str] = {}
    self._first_of = {
      key: self._classes.setdefault(source.arrays, source.name)
      for key, source in self._sources.items()
    }

  # ---- compilation ---------------------------------------------------------

  def trace(
    self, mesh: jax.sharding.AbstractMesh, platform: str
  ) -> programs_lib.TracedPrograms:
    """Traces all programs over a mesh; needs no backend.

    Args:
      mesh: to trace over.
      platform: that it will be compiled for, as JAX calls it.
    """
    self._settle(platform)
    whole, rows_of_each = self._functions()
    traced = {}
    for name, rows, shapes in self._captures():
      arrays = tuple(jax.ShapeDtypeStruct(*x) for x in shapes.arrays)
      if not rows:
        specs = (_SAME,) * len(arrays)
        traced[name], _ = programs_lib.trace(mesh, whole, specs, _SAME, arrays)
        continue
      specs = (_EXPERT,) * (1 + len(arrays))
      index = jax.ShapeDtypeStruct((mesh.shape['expert'], rows), np.int32)
      traced[name], _ = programs_lib.trace(
        mesh, rows_of_each, specs, _EXPERT, (index, *arrays)
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
      self._settle(jax.default_backend())
      whole, rows_of_each = map(jax.jit, self._functions())
      for name, rows, _ in self._captures():
        self._programs[name] = rows_of_each if rows else whole
      self._programs[_FOLD] = jax.jit(_where, donate_argnums=0)
      self._programs[_PLACE] = jax.jit(_copied)
      return
    platform = programs_lib.platform_of(mesh)
    self._settle(platform)
    if lowered is None:
      traced = self.trace(mesh.abstract_mesh, platform)
      lowered = traced.lower(platform, on_program)
    self._programs = lowered.compile_each(mesh, on_program)

  def _settle(self, platform: str) -> None:
    if self._asked_packed is None:
      self._is_packed = platform != 'cpu'

  def _functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """That capture an operator of its own, and rows of a stack."""
    if self._is_packed:
      return _whole_packed, _rows_of_each_packed
    return _whole, _rows_of_each

  def _captures(self) -> Iterable[tuple[str, int, _Class]]:
    """Names of the programs, with the rows that they take (0: not stacked)."""
    for source in self._sources.values():
      if self._classes[source.arrays] != source.name:
        continue
      if source.kind == snapshot_blocks.COMPUTE and not self._is_packed:
        continue
      if not source.arrays.stacked:
        yield f'capture {source.name}', 0, source.arrays
        continue
      for rows in self._rows_of(source):
        yield f'capture {rows} of {source.name}', rows, source.arrays

  def _rows_of(self, source: _Source) -> tuple[int, ...]:
    """How many of a stack's operators a call may take, falling."""
    local = source.stack // self.layout.expert_devices
    sizes = _PACKED_ROWS if self._is_packed else _ROWS
    return tuple(rows for rows in sizes if rows <= max(local, 1))

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
    rows = self._capture(snapshot_blocks.STATE, values, state_operators)
    if self._is_packed:
      rows += self._capture(snapshot_blocks.COMPUTE, compute, compute_operators)
      compute = {}
    return snapshot_lib.Captured(
      rows=tuple(rows),
      state_operators=state_operators,
      compute_operators=compute_operators,
      compute=compute,
      shared=self._copy_shared(values),
    )

  def _capture(
    self, kind: str, values: Any, picked: frozenset[base.OperatorId]
  ) -> list[snapshot_lib.Rows]:
    """Copies of one kind.

    Args:
      kind: of block.
      values: by the keys of its sources.
      picked: operators.
    """
    by_group: dict[str, list[base.OperatorId]] = {}
    for operator in sorted(picked):
      by_group.setdefault(operator.group, []).append(operator)
    captured = []
    for group, its in by_group.items():
      source = self._sources.get((kind, group))
      if source is None:
        continue  # no compute weights
      arrays = [values[key] for key in source.keys]
      columns = snapshot_blocks.columns(source.leaves, self._is_packed)
      first = self._first_of[kind, group]

      if not source.arrays.stacked:
        outputs = self._programs[f'capture {first}'](*arrays)
        captured.append(snapshot_lib.Rows(kind, columns, {0: its[0]}, outputs))
        continue
      local = source.stack // self.layout.expert_devices
      sizes = self._rows_of(source)
      for number, call in _calls(its, source.rows, local, sizes):
        index = np.zeros((self.layout.expert_devices, number), np.int32)
        for row, operator in call.items():
          index[row // number, row % number] = source.rows[operator] % local
        outputs = self._programs[f'capture {number} of {first}'](index, *arrays)
        captured.append(snapshot_lib.Rows(kind, columns, call, outputs))
    return captured

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


def _sources(layout: layout_lib.Layout) -> Iterable[_Source]:
  """All that can be captured; ValueError for a group that cannot be named."""
  shared = {x.group.name for x in layout.leaves if x.path in layout.shared}
  places = {leaf.path: i for i, leaf in enumerate(layout.leaves)}
  for group, about in layout.partition.groups.items():
    if group in shared:
      continue
    snapshot_blocks.check_group(group)
    for kind in snapshot_blocks.KINDS:
      leaves = snapshot_blocks.leaves_of(layout, kind, group)
      if not leaves:
        continue
      if kind == snapshot_blocks.STATE:
        keys = tuple(places[leaf.path] for leaf, _ in leaves)
        shapes = [leaf.shape for leaf, _ in leaves]
        rows = layout.partition.rows_of(group)
      else:
        keys = tuple(layout.compute[leaf.path] for leaf, _ in leaves)
        shapes = [layout.compute_shape(leaf) for leaf, _ in leaves]
        # Of all experts, also where replicas share the training state.
        rows = {o: o.expert for o in layout.partition.operators_of(group)}
      arrays = tuple(
        (shape, dtype) for shape, (_, dtype) in zip(shapes, leaves, strict=True)
      )
      yield _Source(
        kind, group, leaves, keys, _Class(kind, about.stacked, arrays), rows
      )


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


def _rows_of_each_packed(index, *leaves):
  """The same, one array a packed dtype: [rows, ...]."""
  rows = index.shape[1]
  picked = [jnp.take(x, index[0], axis=0, mode='clip') for x in leaves]
  return _side_by_side(x.reshape(rows, -1) for x in picked)


def _whole_packed(*leaves):
  """All leaves, one array a packed dtype, of one row."""
  # A copy: what no function changes, JAX passes on, and it may be donated.
  return _side_by_side(jnp.copy(x).reshape(1, -1) for x in leaves)


def _side_by_side(arrays):
  by_dtype: dict[np.dtype, list[jax.Array]] = {}
  for x in arrays:
    packed = snapshot_blocks.packed_dtype(x.dtype)
    if x.dtype != packed:
      x = jax.lax.bitcast_convert_type(x, packed)
    by_dtype.setdefault(packed, []).append(x)
  return tuple(jnp.concatenate(same, axis=1) for same in by_dtype.values())


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
