"""A snapshot in host memory: its parts, its form in a file, its use in a fold.

During replay a frozen operator runs on placeholders: masters are its compute
weights upcast (the cast back gives the same bits), everything else is zero
(DESIGN section 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moetion_jax import base, layout as layout_lib, operators, snapshot_file

# How the names of stored buffers begin.
STATE, COMPUTE, _SHARED = 'state', 'compute', 'shared'
_SEPARATOR = '|'
# Digests among the extras; where replicas share the training state, and each
# snapshot has those of some operators, metadata of the same name says of which.
DIGESTS = 'digests'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
  """A snapshot in host memory.

  Attributes:
    metadata: what `Captured` was given.
    state: training state of the slot's operators, rows by path.
    compute: compute weights of others, rows by the path of their master.
    shared: leaves that belong to no operator, by path.
    extras: other arrays (digests, partial norms), by name.
  """

  metadata: Mapping[str, Any]
  state: Mapping[base.OperatorId, Mapping[str, np.ndarray]]
  compute: Mapping[base.OperatorId, Mapping[str, np.ndarray]]
  shared: Mapping[str, np.ndarray]
  extras: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
  """One call of a capture program.

  Attributes:
    group: whose rows they are.
    picked: operators, by row of the outputs.
    outputs: one array a leaf of the group, with a leading dim of rows.
  """

  group: str
  picked: Mapping[int, base.OperatorId]
  outputs: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captured:
  """A snapshot on the device, in buffers that nobody donates.

  Attributes:
    rows: training state of the slot.
    state_operators: those of the slot.
    compute_operators: those whose compute weights belong to the snapshot.
    compute: compute weights of all, by name.
    shared: copies, by path.
  """

  rows: tuple[Rows, ...]
  state_operators: frozenset[base.OperatorId]
  compute_operators: frozenset[base.OperatorId]
  compute: Mapping[str, jax.Array]
  shared: Mapping[str, jax.Array]

  def copy_to_host_async(self) -> None:
    """Starts the copies that `buffers` waits for."""
    for rows in self.rows:
      for output in rows.outputs:
        output.copy_to_host_async()
    for weight in (*self.compute.values(), *self.shared.values()):
      weight.copy_to_host_async()


def to_buffers(
  layout: layout_lib.Layout,
  captured: Captured,
  extras: Mapping[str, Sequence[jax.Array | np.ndarray]],
) -> list[snapshot_file.Buffer]:
  """The buffers of a snapshot; waits until their contents are on the host.

  Args:
    layout: of the state.
    captured: the operators.
    extras: further arrays by name, in parts along their first dim.
  """
  buffers = []
  for rows in captured.rows:
    hosts = [np.asarray(output) for output in rows.outputs]
    for row, operator in rows.picked.items():
      for (_, leaf), host in zip(
        layout.leaves_of(rows.group), hosts, strict=True
      ):
        name = (STATE, operator.group, str(operator.expert), leaf.path)
        buffers.append(_buffer(_SEPARATOR.join(name), host[row], [host[row]]))
  for leaf in layout.leaves:
    if leaf.path not in layout.compute:
      continue
    host = np.asarray(captured.compute[layout.compute[leaf.path]])
    held = layout.experts_in(leaf, captured.compute_operators)
    name = f'{COMPUTE}{_SEPARATOR}{leaf.path}'
    if held and not leaf.group.stacked:
      buffers.append(_buffer(name, host, [host]))
    elif held:
      pieces = [host[start:end] for start, end in _runs(held)]
      buffers.append(
        snapshot_file.Buffer(
          name=name,
          dtype=host.dtype,
          shape=(len(held), *host.shape[1:]),
          pieces=pieces,
        )
      )
  for path, value in captured.shared.items():
    host = np.asarray(value)
    buffers.append(_buffer(f'{_SHARED}{_SEPARATOR}{path}', host, [host]))
  for name, parts in extras.items():
    host = np.concatenate([np.asarray(part) for part in parts])
    buffers.append(_buffer(name, host, [host]))
  return buffers


def metadata_of(captured: Captured, **fields: Any) -> dict[str, Any]:
  """What a snapshot says of itself in JSON."""
  return {
    **fields,
    'state': base.operators_to_json(captured.state_operators),
    'compute': base.operators_to_json(captured.compute_operators),
  }


def snapshot_bytes(
  layout: layout_lib.Layout,
  state_operators: frozenset[base.OperatorId],
  compute_operators: frozenset[base.OperatorId],
) -> int:
  """Bytes of the operators of a snapshot."""
  state, compute = layout.state_bytes(), layout.compute_bytes()
  return sum(state[o] for o in state_operators) + sum(
    compute[o] for o in compute_operators
  )


def from_arrays(
  layout: layout_lib.Layout,
  metadata: Mapping[str, Any],
  arrays: Mapping[str, np.ndarray],
) -> Snapshot:
  """A snapshot from its stored parts; the arrays are not copied.

  Raises:
    StoreError: a part is missing or has another shape: it is a snapshot of
      another model.
  """
  arrays = dict(arrays)
  state: dict[base.OperatorId, dict[str, np.ndarray]] = {}
  compute: dict[base.OperatorId, dict[str, np.ndarray]] = {}
  shared = {}
  slot = base.operators_from_json(metadata['state'])
  others = base.operators_from_json(metadata['compute'])

  def take(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    array = arrays.pop(name, None)
    if array is None or array.shape != shape or array.dtype != dtype:
      found = 'missing' if array is None else f'{array.dtype}{array.shape}'
      raise base.StoreError(
        f'snapshot {metadata.get("iteration")}: {name} is {found}, '
        f'not {dtype}{shape}: it is of another model'
      )
    return array

  for leaf in layout.leaves:
    if leaf.path in layout.shared:
      name = f'{_SHARED}{_SEPARATOR}{leaf.path}'
      shared[leaf.path] = take(name, leaf.shape, leaf.dtype)
      continue
    row_shape = leaf.shape[1:] if leaf.group.stacked else leaf.shape
    held = layout.experts_in(leaf, others)
    rows = None
    if leaf.path in layout.compute and held:
      dtype = layout.compute_dtypes[layout.compute[leaf.path]]
      shape = (len(held), *row_shape) if leaf.group.stacked else row_shape
      rows = take(f'{COMPUTE}{_SEPARATOR}{leaf.path}', shape, dtype)
    for operator in layout.partition.operators_of(leaf.group.name):
      if operator in slot:
        name = (STATE, operator.group, str(operator.expert), leaf.path)
        state.setdefault(operator, {})[leaf.path] = take(
          _SEPARATOR.join(name), row_shape, leaf.dtype
        )
      if operator in others:
        of = compute.setdefault(operator, {})
        if rows is not None and leaf.path in layout.compute:
          row = rows
          if leaf.group.stacked:
            row = rows[held.index(operator.expert)]
          of[leaf.path] = row
  return Snapshot(
    metadata=metadata,
    state=state,
    compute=compute,
    shared=shared,
    extras=arrays,
  )


def merge(shares: Sequence[Snapshot]) -> Snapshot:
  """A stage's snapshot from the shares of its replicas.

  What every share holds (`shared`, `extras`) is taken from the first, digests
  of some operators from each.
  """
  first = shares[0]
  metadata, extras = dict(first.metadata), dict(first.extras)
  if DIGESTS in metadata:
    metadata[DIGESTS] = [x for s in shares for x in s.metadata[DIGESTS]]
    extras[DIGESTS] = np.concatenate([s.extras[DIGESTS] for s in shares])
  return dataclasses.replace(
    first,
    metadata=metadata,
    extras=extras,
    state={o: rows for share in shares for o, rows in share.state.items()},
    compute={o: rows for share in shares for o, rows in share.compute.items()},
  )


def names_of_digests(
  value: Sequence[Sequence[Any]],
) -> tuple[base.OperatorId, ...]:
  """The operators that metadata names, by row of the digests."""
  return tuple(base.OperatorId(group, expert) for group, expert in value)


def assemble(
  layout: layout_lib.Layout,
  snapshot: Snapshot,
  active: frozenset[base.OperatorId],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Host leaves for `fold`, and masks that say which rows are theirs.

  Raises:
    StoreError: an operator is neither active nor in the snapshot.
  """
  values, masks = [], []
  for leaf in layout.leaves:
    if leaf.path in layout.shared:
      values.append(snapshot.shared[leaf.path])
      masks.append(np.asarray(not active))
      continue
    if not leaf.group.stacked:
      operator = base.OperatorId(leaf.group.name)
      taken = operator not in active
      value = np.zeros(leaf.shape, leaf.dtype)
      values.append(_row(layout, snapshot, operator, leaf) if taken else value)
      masks.append(np.asarray(taken))
      continue
    value = np.zeros(leaf.shape, leaf.dtype)
    mask = np.zeros(leaf.shape[0], bool)
    for row, operator in enumerate(
      layout.partition.operators_of(leaf.group.name)
    ):
      if operator not in active:
        mask[row] = True
        value[row] = _row(layout, snapshot, operator, leaf)
    values.append(value)
    masks.append(mask)
  return values, masks


def _row(
  layout: layout_lib.Layout,
  snapshot: Snapshot,
  operator: base.OperatorId,
  leaf: operators.Leaf,
) -> np.ndarray:
  """One operator's share of one leaf: its own, or its placeholder."""
  if operator in snapshot.state:
    return snapshot.state[operator][leaf.path]
  if operator not in snapshot.compute:
    raise base.StoreError(
      f'snapshot {snapshot.metadata.get("iteration")} has nothing of {operator}'
    )
  if leaf.path in layout.compute:
    return snapshot.compute[operator][leaf.path].astype(leaf.dtype)
  return np.zeros(
    leaf.shape[1:] if leaf.group.stacked else leaf.shape, leaf.dtype
  )


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
  """Ascending indices as [start, end) runs."""
  runs: list[tuple[int, int]] = []
  for index in indices:
    if runs and runs[-1][1] == index:
      runs[-1] = (runs[-1][0], index + 1)
    else:
      runs.append((index, index + 1))
  return runs


def _buffer(
  name: str, like: np.ndarray, pieces: Sequence[np.ndarray]
) -> snapshot_file.Buffer:
  return snapshot_file.Buffer(
    name=name,
    dtype=like.dtype,
    shape=like.shape,
    pieces=[np.ascontiguousarray(p) for p in pieces],
  )
