"""A snapshot in host memory: made from stored arrays, used in a fold.

During replay a frozen operator runs on placeholders. Where iterations are done
again its masters are its compute weights upcast (the cast back gives the same
bits), all else is zero; where recorded gradients are applied all is zero at
first, and nobody reads what updates make of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moetion_jax import errors, keys
from moetion_jax.snapshots import blocks, coverage, folders
from moetion_jax.state import layout as layout_lib, partition

STATE, COMPUTE, GRADIENTS = blocks.STATE, blocks.COMPUTE, blocks.GRADIENTS
# Name of the digests among the extras.
DIGESTS = folders.DIGESTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
  """A snapshot in host memory.

  Attributes:
    metadata: the JSON object of `transfer.Captured.metadata`.
    state: training state of the slot's operators, rows by path.
    compute: compute weights of other operators, rows by the path of their
      master.
    gradients: gradients of other operators, rows by the path of the master.
    shared: leaves that belong to no operator, by path.
    extras: other arrays (digests, partial norms), by name.
  """

  metadata: Mapping[str, Any]
  state: Mapping[keys.OperatorId, Mapping[str, np.ndarray]]
  compute: Mapping[keys.OperatorId, Mapping[str, np.ndarray]]
  gradients: Mapping[keys.OperatorId, Mapping[str, np.ndarray]]
  shared: Mapping[str, np.ndarray]
  extras: Mapping[str, np.ndarray]


def snapshot_bytes(
  layout: layout_lib.Layout, operators: coverage.Contents
) -> int:
  """Returns the bytes of a snapshot's operators."""
  state, compute = layout.state_bytes(), layout.compute_bytes()
  gradients = layout.gradient_bytes() if operators.gradients else {}
  return (
    sum(state[o] for o in operators.state)
    + sum(compute[o] for o in operators.compute)
    + sum(gradients[o] for o in operators.gradients)
  )


def from_arrays(
  layout: layout_lib.Layout,
  metadata: Mapping[str, Any],
  arrays: Mapping[str, np.ndarray],
) -> Snapshot:
  """Makes a snapshot from its stored arrays, which are not copied.

  Raises:
    StoreError: an array is missing or has another shape: the snapshot is of
      another model.
  """
  found: dict[str, dict[keys.OperatorId, dict[str, np.ndarray]]] = {
    kind: {o: {} for o in keys.operators_from_json(metadata.get(kind, []))}
    for kind in blocks.KINDS
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
    gradients=found[GRADIENTS],
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
  """Merges the shares of a stage's replicas into the stage's snapshot.

  `shared` and `extras`, which every share holds, are taken from the first
  share; digests of some operators only are taken from each.
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
    gradients={
      o: rows for share in shares for o, rows in share.gradients.items()
    },
  )


def names_of_digests(
  value: Sequence[Sequence[Any]],
) -> tuple[keys.OperatorId, ...]:
  """Returns the operators that metadata names, by row of the digests."""
  return tuple(keys.OperatorId(group, expert) for group, expert in value)


def folded(
  layout: layout_lib.Layout,
  snapshot: Snapshot,
  active: frozenset[keys.OperatorId],
) -> frozenset[keys.OperatorId]:
  """Returns the operators of which `fold` takes something from a snapshot.

  Raises:
    StoreError: an operator is neither active nor in the snapshot.
  """
  frozen = frozenset(layout.operators) - active
  held = snapshot.state.keys() | snapshot.compute.keys()
  for operator in sorted(frozen - held - snapshot.gradients.keys()):
    raise errors.StoreError(
      f'snapshot {snapshot.metadata.get("iteration")} has nothing of {operator}'
    )
  return frozen & held


def gradients_of(
  layout: layout_lib.Layout, snapshot: Snapshot
) -> dict[str, np.ndarray]:
  """Makes what `update` reads: gradients by parameter, of all operators.

  Those that the snapshot does not hold are zeros.
  """
  gradients = {}
  for leaf in layout.leaves:
    if leaf.path not in layout.compute:
      continue
    value = np.zeros(layout.compute_shape(leaf), layout_lib.GRADIENT_DTYPE)
    for operator in layout.partition.operators_of(leaf.group.name):
      if operator in snapshot.gradients:
        place = operator.expert if leaf.group.stacked else ...
        value[place] = snapshot.gradients[operator][leaf.path]
    gradients[layout.compute[leaf.path]] = value
  return gradients


def row(
  layout: layout_lib.Layout,
  snapshot: Snapshot,
  operator: keys.OperatorId,
  leaf: partition.Leaf,
) -> np.ndarray:
  """Returns one operator's row of a leaf: its own, or its placeholder.

  Args:
    layout: layout of the state.
    snapshot: the snapshot; it has the operator's state or compute weights.
    operator: the operator.
    leaf: one of its leaves.
  """
  if operator in snapshot.state:
    return snapshot.state[operator][leaf.path]
  if leaf.path in layout.compute:
    return snapshot.compute[operator][leaf.path].astype(leaf.dtype)
  return np.zeros(
    leaf.shape[1:] if leaf.group.stacked else leaf.shape, leaf.dtype
  )
