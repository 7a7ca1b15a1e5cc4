"""Sources of captures: the arrays of each group of operators, by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
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
  """

  name: str
  function: Callable[..., Any]
  in_specs: tuple[Any, ...]
  out_specs: Any
  shapes: tuple[jax.ShapeDtypeStruct, ...]


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
      compute weight.
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


def sources(layout: layout_lib.Layout) -> Iterator[Source]:
  """Yields all sources; ValueError for a group that no block can name."""
  shared = {x.group.name for x in layout.leaves if x.path in layout.shared}
  places = {leaf.path: i for i, leaf in enumerate(layout.leaves)}
  for group, about in layout.partition.groups.items():
    if group in shared:
      continue
    blocks.check_group(group)
    for kind in blocks.KINDS:
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
