"""A snapshot in host memory: out of what is stored, and its use in a fold.

During replay a frozen operator runs on placeholders: masters are its compute
weights upcast (the cast back gives the same bits), everything else is zero
(DESIGN section 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moetion_jax import errors, keys
from moetion_jax.snapshots import blocks
from moetion_jax.state import layout as layout_lib, partition

STATE, COMPUTE = blocks.STATE, blocks.COMPUTE
# Digests among the extras; where replicas share the training state, and each
# snapshot has those of some operators, metadata of the same name says of which.
DIGESTS = 'digests'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
  """A snapshot in host memory.

  Attributes:
    metadata: as of `captured.Captured`.
    state: training state of the slot's operators, rows by path.
    compute: compute weights of others, rows by the path of their master.
    shared: leaves that belong to no operator, by path.
    extras: other arrays (digests, partial norms), by name.
  """

  metadata: Mapping[str, Any]
  state: Mapping[keys.OperatorId, Mapping[str, np.ndarray]]
  compute: Mapping[keys.OperatorId, Mapping[str, np.ndarray]]
  shared: Mapping[str, np.ndarray]
  extras: Mapping[str, np.ndarray]


def snapshot_bytes(
  layout: layout_lib.Layout,
  state_operators: frozenset[keys.OperatorId],
  compute_operators: frozenset[keys.OperatorId],
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
  slot = keys.operators_from_json(metadata['state'])
  others = keys.operators_from_json(metadata['compute'])
  found: dict[str, dict[keys.OperatorId, dict[str, np.ndarray]]] = {
    STATE: {o: {} for o in slot},
    COMPUTE: {o: {} for o in others},
  }
  shared, extras = {}, {}
  paths = {leaf.path: leaf for leaf in layout.leaves}
  try:
    for name, array in arrays.items():
      block = blocks.parse(name)
      if block is not None:
        rows = blocks.rows_by_leaf(layout, block, array)
        for row, operator in enumerate(block.operators):
          if operator in found[block.kind]:
            found[block.kind][operator].update(
              {path: of_leaf[row] for path, of_leaf in rows.items()}
            )
      elif name.startswith(blocks.SHARED):
        leaf = paths.get(name.removeprefix(blocks.SHARED))
        if leaf and (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
          raise errors.StoreError(
            f'{name} is {array.dtype}{array.shape}, '
            f'not {leaf.dtype}{leaf.shape}'
          )
        shared[name.removeprefix(blocks.SHARED)] = array
      else:
        extras[name] = array
    _check_complete(layout, found, shared)
  except errors.StoreError as error:
    raise errors.StoreError(
      f'snapshot {metadata.get("iteration")}: {error}: it is of another model'
    ) from error
  return Snapshot(
    metadata=metadata,
    state=found[STATE],
    compute=found[COMPUTE],
    shared=shared,
    extras=extras,
  )


def _check_complete(
  layout: layout_lib.Layout,
  found: Mapping[str, Mapping[keys.OperatorId, Mapping[str, np.ndarray]]],
  shared: Mapping[str, np.ndarray],
) -> None:
  """Raises StoreError for the first value that an operator lacks."""
  for kind, operators_found in found.items():
    needed: dict[str, set[str]] = {}
    for operator, values in operators_found.items():
      group = operator.group
      if group not in needed:
        leaves = blocks.leaves_of(layout, kind, group)
        needed[group] = {leaf.path for leaf, _ in leaves}
      if missing := needed[group] - values.keys():
        raise errors.StoreError(
          f'{kind} of {operator}, {min(missing)}, is missing'
        )
  if missing := layout.shared - shared.keys():
    raise errors.StoreError(f'{blocks.SHARED}{min(missing)} is missing')


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
) -> tuple[keys.OperatorId, ...]:
  """The operators that metadata names, by row of the digests."""
  return tuple(keys.OperatorId(group, expert) for group, expert in value)


def assemble(
  layout: layout_lib.Layout,
  snapshot: Snapshot,
  active: frozenset[keys.OperatorId],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Host leaves for `fold`, and masks that say which rows are theirs.

  Raises:
    StoreError: an operator is neither active nor in the snapshot.
  """
  values, masks = [], []
  for leaf in layout.leaves:
    if leaf.path in layout.shared:
      # Every snapshot has it as it was; a replay on placeholders may not.
      values.append(snapshot.shared[leaf.path])
      masks.append(np.asarray(True))
      continue
    if not leaf.group.stacked:
      operator = keys.OperatorId(leaf.group.name)
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
  operator: keys.OperatorId,
  leaf: partition.Leaf,
) -> np.ndarray:
  """One operator's share of one leaf: its own, or its placeholder."""
  if operator in snapshot.state:
    return snapshot.state[operator][leaf.path]
  if operator not in snapshot.compute:
    raise errors.StoreError(
      f'snapshot {snapshot.metadata.get("iteration")} has nothing of {operator}'
    )
  if leaf.path in layout.compute:
    return snapshot.compute[operator][leaf.path].astype(leaf.dtype)
  return np.zeros(
    leaf.shape[1:] if leaf.group.stacked else leaf.shape, leaf.dtype
  )
