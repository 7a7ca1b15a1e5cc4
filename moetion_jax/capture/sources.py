"""Sources of captures: the arrays of each group of operators, by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moetion_jax import keys as keys_lib
from moetion_jax.snapshots import blocks
from moetion_jax.state import layout as layout_lib, partition


class Program(NamedTuple):
  """A program to compile.

  Attributes:
    name: name of the program.
    function: function of one device's shard of the arguments.
    in_specs: mesh axes of the arguments.
    out_specs: mesh axes of the results.
    shapes: shapes of the arguments over the whole mesh.
    donate: positions of the arguments that are given away.
  """

  name: str
  function: Callable[..., Any]
  in_specs: tuple[Any, ...]
  out_specs: Any
  shapes: tuple[Any, ...]
  donate: tuple[int, ...] = ()


class Shapes(NamedTuple):
  """Shapes of a source's arrays; sources of equal shapes share a program.

  Attributes:
    kind: one of `blocks.KINDS`.
    stacked: whether the arrays have a row for each operator.
    arrays: shape and dtype of each.
  """

  kind: str
  stacked: bool
  arrays: tuple[tuple[tuple[int, ...], np.dtype], ...]


class Source(NamedTuple):
  """The arrays from which one kind of block of a group is captured.

  Attributes:
    kind: one of `blocks.KINDS`.
    group: group of operators.
    leaves: the group's leaves that have this kind of value, with the dtype of
      the value.
    keys: for each leaf, its place in the flattened state, or the name of its
      compute weight, which is that of its gradient.
    shapes: shapes of the arrays.
    rows: row of each operator in a stacked group's arrays.
  """

  kind: str
  group: str
  leaves: Sequence[tuple[partition.Leaf, np.dtype]]
  keys: tuple[Any, ...]
  shapes: Shapes
  rows: Mapping[keys_lib.OperatorId, int]

  @property
  def name(self) -> str:
    """Name of the source in names of programs."""
    is_state = self.kind == blocks.STATE
    return self.group if is_state else f'{self.kind} {self.group}'

  def local_rows(self, devices: int) -> int:
    """Returns how many rows of a stacked group's arrays one device has."""
    return max(self.shapes.arrays[0][0][0] // devices, 1)


def sources(
  layout: layout_lib.Layout, kinds: Sequence[str] = blocks.KINDS
) -> Iterator[Source]:
  """Yields all sources; ValueError for a group that no block can name.

  Args:
    layout: layout of the state.
    kinds: the kinds of blocks that are captured, of `blocks.KINDS`.
  """
  shared = {x.group.name for x in layout.leaves if x.path in layout.shared}
  places = {leaf.path: i for i, leaf in enumerate(layout.leaves)}
  for group, about in layout.partition.groups.items():
    if group in shared:
      continue
    blocks.check_group(group)
    for kind in kinds:
      leaves = blocks.leaves_of(layout, kind, group)
      if not leaves:
        continue
      if kind == blocks.STATE:
        keys = tuple(places[leaf.path] for leaf, _ in leaves)
        shapes = [leaf.shape for leaf, _ in leaves]
        rows = layout.partition.rows_of(group)
      else:
        keys = tuple(layout.compute[leaf.path] for leaf, _ in leaves)
        shapes = [layout.compute_shape(leaf) for leaf, _ in leaves]
        # Of all experts, also where replicas share the training state.
        rows = {
          o: o.expert if about.stacked else 0
          for o in layout.partition.operators_of(group)
        }
      arrays = tuple(
        (shape, dtype) for shape, (_, dtype) in zip(shapes, leaves, strict=True)
      )
      about_them = Shapes(kind, about.stacked, arrays)
      yield Source(kind, group, leaves, keys, about_them, rows)


class Call(NamedTuple):
  """The operators that a call of a program captures.

  Attributes:
    sources: places of the sources that it takes.
    rows: number of rows of each source and every device.
    picked: operators by place among its sources, device and row of that device.
  """

  sources: tuple[int, ...]
  rows: int
  picked: dict[tuple[int, int, int], keys_lib.OperatorId]


def deal(
  queues: Sequence[Sequence[Sequence[keys_lib.OperatorId]]],
  sizes: Sequence[int],
  *,
  may_pad: bool,
) -> list[Call]:
  """Deals operators of stacked sources to few calls.

  Args:
    queues: operators asked for, of each source and device.
    sizes: numbers of rows that a call may take, falling to 1.
    may_pad: whether calls may take several sources, and more rows than any
      device has operators left, if they are half full; else each takes as many
      rows of one source as some device can fill.
  """
  left = [[list(queue) for queue in of_source] for of_source in queues]
  calls = []
  while most := max(len(q) for of_source in left for q in of_source):
    everyone = tuple(range(len(left)))
    longest = max(everyone, key=lambda s: max(map(len, left[s])))
    fitting = [size for size in sizes if size >= most][-1:]
    fitting += [size for size in sizes if size < most][:1]
    sources, rows = next(
      (
        (chosen, rows)
        for chosen in (everyone, (longest,))
        for rows in fitting
        if may_pad
        if 2 * sum(min(rows, len(q)) for s in chosen for q in left[s])
        >= rows * sum(len(left[s]) for s in chosen)
      ),
      ((longest,), max(size for size in sizes if size <= most)),
    )
    picked = {}
    for place, source in enumerate(sources):
      for device, queue in enumerate(left[source]):
        for row, operator in enumerate(queue[:rows]):
          picked[place, device, row] = operator
        del queue[:rows]
    calls.append(Call(sources, rows, picked))
  return calls
