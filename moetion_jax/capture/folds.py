"""Folds on the device: rows of a snapshot go into a partial state.

A call writes rows of one group into leaves that are donated. What is not
written is neither read nor sent: a fold takes time by the bytes of its slot,
whatever the size of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from moetion_jax import keys
from moetion_jax.capture import sources as sources_lib
from moetion_jax.programs import mesh
from moetion_jax.snapshots import snapshot as snapshot_lib
from moetion_jax.state import layout as layout_lib, partition

_PLACEHOLDERS = 'placeholders'
# How many rows of each device one call may write; the host holds copies of so
# many operators.
_SIZES = (8, 1)


class Folds:
  """The programs that fold snapshots into states of one layout."""

  def __init__(self, layout: layout_lib.Layout, devices: int):
    """Stores the arguments.

    Args:
      layout: layout of the state.
      devices: number of devices over which stacked groups are split evenly.
    """
    self._layout = layout
    self._devices = devices
    self._places = {leaf.path: i for i, leaf in enumerate(layout.leaves)}
    # Programs are named after the first group of equal shapes.
    self._first: dict[Any, str] = {}
    for group in layout.partition.groups:
      self._first.setdefault(self._shapes(group), group)

  def programs(self) -> Iterator[sources_lib.Program]:
    """Yields the programs that `placeholders` and `fold` call."""
    layout = self._layout
    leaves = tuple((self._local(x), x.dtype) for x in layout.leaves)
    yield sources_lib.Program(
      _PLACEHOLDERS,
      lambda: tuple(jnp.zeros(*x) for x in leaves),
      (),
      tuple(map(_spec, layout.leaves)),
      (),
    )
    for group in self._first.values():
      old = tuple(
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in layout.leaves_of(group)
      )
      if not layout.partition.groups[group].stacked:
        yield sources_lib.Program(
          f'fold {group}', _copied, (mesh.SAME,), mesh.SAME, (old,)
        )
        continue
      for size in self._sizes(group):
        count = self._devices * size
        index = jax.ShapeDtypeStruct((count,), np.int32)
        rows = tuple(
          jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) for x in old
        )
        yield sources_lib.Program(
          f'fold {size} of {group}',
          _written,
          (mesh.EXPERT,) * 3,
          mesh.EXPERT,
          (old, index, rows),
          donate=(0,),
        )

  def placeholders(
    self, programs: Mapping[str, Callable[..., Any]]
  ) -> list[jax.Array]:
    """Makes the leaves of a state in which everything is zero."""
    return list(programs[_PLACEHOLDERS]())

  def fold(
    self,
    programs: Mapping[str, Callable[..., Any]],
    values: list[jax.Array],
    snapshot: snapshot_lib.Snapshot,
    operators: Iterable[keys.OperatorId],
  ) -> None:
    """Replaces leaves by those with rows of a snapshot in them.

    Args:
      programs: compiled programs by name.
      values: leaves of the state; those that change are donated.
      snapshot: the snapshot.
      operators: the operators to fold; shared leaves always are.
    """
    layout = self._layout
    by_group: dict[str, list[keys.OperatorId]] = {}
    for operator in sorted(operators):
      by_group.setdefault(operator.group, []).append(operator)
    for leaf in layout.leaves:
      if leaf.path in layout.shared:
        by_group.setdefault(leaf.group.name, [])
    for group, its in by_group.items():
      leaves = layout.leaves_of(group)
      name = self._first[self._shapes(group)]
      places = [self._places[x.path] for x in leaves]
      if not layout.partition.groups[group].stacked:
        new = tuple(self._value(snapshot, its, x) for x in leaves)
        _put(values, places, programs[f'fold {name}'](new))
        continue
      for size, index, rows in self._calls(group, its, snapshot):
        old = tuple(values[place] for place in places)
        new = programs[f'fold {size} of {name}'](old, index, rows)
        _put(values, places, new)

  def _value(
    self,
    snapshot: snapshot_lib.Snapshot,
    operators: Sequence[keys.OperatorId],
    leaf: partition.Leaf,
  ) -> np.ndarray:
    """Returns the new value of a leaf that is not stacked."""
    if leaf.path in self._layout.shared:
      return snapshot.shared[leaf.path]
    return snapshot_lib.row(self._layout, snapshot, operators[0], leaf)

  def _calls(
    self,
    group: str,
    operators: Iterable[keys.OperatorId],
    snapshot: snapshot_lib.Snapshot,
  ) -> Iterator[tuple[int, np.ndarray, tuple[np.ndarray, ...]]]:
    """Yields the calls that write operators of a stacked group.

    Yields:
      The size of each, i32[devices * size] with the rows of each device's
      leaves, and by leaf what to write there.
    """
    leaves = self._layout.leaves_of(group)
    rows_of = self._layout.partition.rows_of(group)
    local = self._local_rows(group)
    queues: list[list[keys.OperatorId]] = [[] for _ in range(self._devices)]
    for operator in operators:
      queues[rows_of[operator] // local].append(operator)
    sizes = self._sizes(group)
    for call in sources_lib.deal([queues], sizes, may_pad=False):
      count = self._devices * call.rows
      index = np.full(count, local, np.int32)  # where nothing is written
      rows = tuple(np.zeros((count, *x.shape[1:]), x.dtype) for x in leaves)
      for (_, device, row), operator in call.picked.items():
        place = device * call.rows + row
        index[place] = rows_of[operator] % local
        for leaf, value in zip(leaves, rows, strict=True):
          value[place] = snapshot_lib.row(
            self._layout, snapshot, operator, leaf
          )
      yield call.rows, index, rows

  def _shapes(self, group: str) -> Any:
    leaves = self._layout.leaves_of(group)
    is_stacked = self._layout.partition.groups[group].stacked
    return is_stacked, tuple((x.shape, x.dtype) for x in leaves)

  def _sizes(self, group: str) -> tuple[int, ...]:
    local = self._local_rows(group)
    return tuple(size for size in _SIZES if size <= local)

  def _local_rows(self, group: str) -> int:
    return self._layout.leaves_of(group)[0].shape[0] // self._devices

  def _local(self, leaf: partition.Leaf) -> tuple[int, ...]:
    if not leaf.group.stacked:
      return leaf.shape
    return (leaf.shape[0] // self._devices, *leaf.shape[1:])


def _spec(leaf: partition.Leaf) -> jax.sharding.PartitionSpec:
  return mesh.EXPERT if leaf.group.stacked else mesh.SAME


def _put(
  values: list[jax.Array], places: Iterable[int], new: Iterable[jax.Array]
) -> None:
  for place, value in zip(places, new, strict=True):
    values[place] = value


def _copied(leaves):
  """Copies: an argument may alias the mapped snapshot."""
  return tuple(jnp.copy(x) for x in leaves)


def _written(old, index, rows):
  """Writes rows; an index behind the last row writes nothing."""
  return tuple(
    x.at[index].set(value, mode='drop')
    for x, value in zip(old, rows, strict=True)
  )
