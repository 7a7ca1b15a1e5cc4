"""Blocks: names and contents of the buffers of a snapshot's operators.

A block has the rows of some operators of one group, one row each. Its rows are
those of one leaf, or, packed, of all the group's leaves whose numbers have one
size, side by side in the order of the layout: their bits, as unsigned numbers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from moetion_jax import errors, keys
from moetion_jax.state import layout as layout_lib, partition

STATE, COMPUTE, GRADIENTS = 'state', 'compute', 'gradients'
KINDS = (STATE, COMPUTE, GRADIENTS)
SHARED = 'shared|'  # before the path of a leaf that belongs to no operator
_SEPARATOR = '|'
_PACKED = '*'  # then a dtype; no path begins like that
_WHOLE_KINDS = 'bc'  # dtype kinds whose bits are no numbers to JAX
_RUN = re.compile(r'([0-9]+)(?:-([0-9]+))?', re.ASCII)


@dataclasses.dataclass(frozen=True)
class Block:
  """A block's name, taken apart.

  Attributes:
    kind: STATE for training state; COMPUTE for compute weights and GRADIENTS
      for gradients, by the paths of their masters.
    operators: operators of the rows, in their order; all of one group.
    column: path of a leaf, or `packed_column` of several leaves.
  """

  kind: str
  operators: tuple[keys.OperatorId, ...]
  column: str

  @property
  def group(self) -> str:
    """Group of the operators."""
    return self.operators[0].group

  @property
  def name(self) -> str:
    """Name of the buffer; `parse` is the inverse."""
    which = ','.join(
      f'{start}-{end - 1}' if end - start > 1 else str(start)
      for start, end in runs(o.expert for o in self.operators)
      if start >= 0
    )
    return _SEPARATOR.join((self.kind, self.group, which, self.column))


def parse(name: str) -> Block | None:
  """Returns the block of this name; None if it names another buffer.

  Raises:
    StoreError: the name begins like a block's, but is none.
  """
  kind, *rest = name.split(_SEPARATOR, 3)
  if kind not in KINDS:
    return None
  if len(rest) == 3:
    group, which, column = rest
    if not which:
      return Block(kind, (keys.OperatorId(group),), column)
    matches = [_RUN.fullmatch(run) for run in which.split(',')]
    experts = [
      expert
      for run in matches
      if run
      for expert in range(int(run[1]), int(run[2] or run[1]) + 1)
    ]
    if all(matches) and experts:
      named = tuple(keys.OperatorId(group, e) for e in experts)
      return Block(kind, named, column)
  raise errors.StoreError(f'{name!r} does not name operators')


def check_group(group: str) -> None:
  """Raises ValueError for a group whose name no block can have."""
  if _SEPARATOR in group:
    raise ValueError(f'group {group!r}: its name may not have {_SEPARATOR!r}')


def leaves_of(
  layout: layout_lib.Layout, kind: str, group: str
) -> list[tuple[partition.Leaf, np.dtype]]:
  """Returns a group's leaves with a kind of value, and the values' dtypes."""
  leaves = layout.leaves_of(group)
  if kind == STATE:
    return [(leaf, leaf.dtype) for leaf in leaves]
  masters = [leaf for leaf in leaves if leaf.path in layout.compute]
  if kind == GRADIENTS:
    return [(leaf, layout_lib.GRADIENT_DTYPE) for leaf in masters]
  return [
    (leaf, layout.compute_dtypes[layout.compute[leaf.path]]) for leaf in masters
  ]


def packed_dtype(dtype: np.dtype) -> np.dtype:
  """Returns the dtype as which numbers of a dtype are packed."""
  if dtype.kind in _WHOLE_KINDS:
    return dtype
  return np.dtype(f'uint{8 * dtype.itemsize}')


def columns(
  leaves: Iterable[tuple[partition.Leaf, np.dtype]],
) -> tuple[str, ...]:
  """Returns the columns of the blocks of these leaves, one per leaf."""
  return tuple(leaf.path for leaf, _ in leaves)


def packed_column(dtype: np.dtype) -> str:
  """Returns the column of the block of all leaves packed like a dtype."""
  return _PACKED + packed_dtype(dtype).name


def rows_by_leaf(
  layout: layout_lib.Layout, block: Block, array: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns the rows of a block's leaves by path, as views of its array.

  Raises:
    StoreError: the layout has no such block, or one of another shape or dtype.
  """
  leaves = (
    leaves_of(layout, block.kind, block.group)
    if block.group in layout.partition.groups
    else []
  )
  is_packed = block.column.startswith(_PACKED)
  found = {
    leaf.path: (leaf.shape[1:] if leaf.group.stacked else leaf.shape, dtype)
    for leaf, dtype in leaves
    if block.column == (packed_column(dtype) if is_packed else leaf.path)
  }
  if not found:
    raise errors.StoreError(f'{block.name} is not in it')
  count = len(block.operators)
  if not is_packed:
    shape, dtype = found[block.column]
    _check(block, array, (count, *shape), dtype)
    return {block.column: array}
  widths = [math.prod(shape) for shape, _ in found.values()]
  (packed,) = {packed_dtype(dtype) for _, dtype in found.values()}
  _check(block, array, (count, sum(widths)), packed)
  # Each row stays contiguous: readers take one row of one leaf.
  parts = np.split(array, np.cumsum(widths)[:-1], axis=1)
  return {
    path: part.view(dtype).reshape(count, *shape)
    for (path, (shape, dtype)), part in zip(found.items(), parts, strict=True)
  }


def _check(
  block: Block, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype
) -> None:
  if array.shape != shape or array.dtype != dtype:
    raise errors.StoreError(
      f'{block.name} is {array.dtype}{array.shape}, not {dtype}{shape}'
    )


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
  """Splits numbers into ascending runs [start, end), in their order."""
  found: list[tuple[int, int]] = []
  for number in numbers:
    if found and found[-1][1] == number:
      found[-1] = found[-1][0], number + 1
    else:
      found.append((number, number + 1))
  return found
