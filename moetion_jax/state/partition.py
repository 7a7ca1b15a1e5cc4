"""Partition of a state: which leaf, and which row of it, is which operator's.

A partition rule maps a leaf's path to its group. A group is one operator, or,
when stacked, one operator for each index of its leaves' leading dim. The
training state that `Stage.initial_state` makes is two plain dicts deep,
`state[group][leaf]`, with leaves 'master/<parameter>' (fp32) and
'optimizer/<path in the optax state>', so that the rows of `state[group]` are
exactly its operators. The optimizer is applied to each operator on its own: see
`optimizer_update`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moetion_jax import keys
from moetion_jax.state import model

Rule = Callable[[str], model.Group]
# An operator's leaves by path; rows of stacked leaves lack the leading dim.
OperatorLeaves = dict[str, Any]
State = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One leaf of a partitioned tree."""

  path: str
  group: model.Group
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def operator_bytes(self) -> int:
    """Bytes of each operator in this leaf."""
    shape = self.shape[1:] if self.group.stacked else self.shape
    return int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize


class Partition:
  """A tree's structure together with the operators that it consists of.

  It works for any pytree of arrays, the user's own training state included.
  """

  def __init__(
    self,
    tree: Any,
    rule: Rule,
    experts: Mapping[str, Sequence[int]] | None = None,
  ):
    """Reads structure, shapes and dtypes of `tree`; keeps none of its arrays.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`s.
      rule: maps a leaf's path, its keys joined with '/', to its group.
      experts: operator index of each row, for stacked groups that are there in
        part; the rows of other groups are all their operators, in order.

    Raises:
      ValueError: leaves of a stacked group have unequal leading dims.
    """
    flat, self._structure = jax.tree.flatten(tree)
    leaves, counts, groups, paths = [], {}, {}, set()
    for path, leaf in zip(leaf_paths(tree), flat, strict=True):
      if path in paths:
        raise ValueError(f'two leaves have the path {path}')
      paths.add(path)
      group = rule(path)
      count = 1
      if group.stacked:
        if not leaf.shape:
          raise ValueError(f'{path} is a scalar in stacked group {group.name}')
        count = leaf.shape[0]
      if counts.setdefault(group.name, count) != count:
        raise ValueError(
          f'{path} stacks {count} operators, others of group {group.name} '
          f'stack {counts[group.name]}'
        )
      if groups.setdefault(group.name, group) != group:
        raise ValueError(f'group {group.name} is both stacked and not')
      leaves.append(Leaf(path, group, tuple(leaf.shape), np.dtype(leaf.dtype)))
    self.leaves: tuple[Leaf, ...] = tuple(leaves)
    self.groups: dict[str, model.Group] = dict(sorted(groups.items()))
    self._experts: dict[str, tuple[int, ...]] = {
      name: tuple((experts or {}).get(name, range(count)))
      for name, count in counts.items()
    }
    for name, found in self._experts.items():
      if len(found) != counts[name]:
        raise ValueError(f'{counts[name]} rows of {name} are not {found}')

  def operators_of(self, group: str) -> tuple[keys.OperatorId, ...]:
    """Lists the operators of one group, by index."""
    if not self.groups[group].stacked:
      return (keys.OperatorId(group),)
    return tuple(keys.OperatorId(group, e) for e in self._experts[group])

  def rows_of(self, group: str) -> dict[keys.OperatorId, int]:
    """Maps each operator of a stacked group to its row in the leaves."""
    return {o: row for row, o in enumerate(self.operators_of(group))}

  def devices(self, expert_devices: int) -> dict[keys.OperatorId, int | None]:
    """Maps each operator to its device on the 'expert' axis; None: on all."""
    found: dict[keys.OperatorId, int | None] = {}
    for name, group in self.groups.items():
      own = self.operators_of(name)
      for row, operator in enumerate(own):
        device = row * expert_devices // len(own)
        found[operator] = device if group.stacked else None
    return found

  @functools.cached_property
  def operators(self) -> tuple[keys.OperatorId, ...]:
    """All operators, ordered by group name and index."""
    return tuple(o for g in self.groups for o in self.operators_of(g))

  @functools.cached_property
  def stacked_groups(self) -> tuple[str, ...]:
    """Names of the stacked groups, numbers in them compared as numbers."""
    stacked = [name for name, group in self.groups.items() if group.stacked]
    parts = lambda name: re.split(r'(\d+)', name)  # noqa: E731
    return tuple(
      sorted(
        stacked,
        key=lambda name: [
          (int(x), '') if x.isdigit() else (-1, x) for x in parts(name)
        ],
      )
    )

  @functools.cached_property
  def operator_bytes(self) -> dict[keys.OperatorId, int]:
    """Bytes of each operator, from the leaves' real dtypes."""
    total = dict.fromkeys(self.operators, 0)
    for leaf in self.leaves:
      for operator in self.operators_of(leaf.group.name):
        total[operator] += leaf.operator_bytes
    return total

  def split(self, tree: Any) -> dict[keys.OperatorId, OperatorLeaves]:
    """Cuts `tree` into its operators' leaves (views where NumPy allows)."""
    out: dict[keys.OperatorId, OperatorLeaves] = {o: {} for o in self.operators}
    for leaf, value in zip(self.leaves, self._checked(tree), strict=True):
      for row, operator in enumerate(self.operators_of(leaf.group.name)):
        out[operator][leaf.path] = value[row] if leaf.group.stacked else value
    return out

  def merge(self, operators: Mapping[keys.OperatorId, OperatorLeaves]) -> Any:
    """Joins operators to a tree of NumPy arrays; inverts `split` bit for bit.

    Raises:
      KeyError: an operator or one of its leaves is missing.
    """
    values = []
    for leaf in self.leaves:
      rows = [
        np.asarray(operators[o][leaf.path])
        for o in self.operators_of(leaf.group.name)
      ]
      values.append(np.stack(rows) if leaf.group.stacked else rows[0])
    return self.unflatten(values)

  def unflatten(self, values: Sequence[Any]) -> Any:
    """Builds the tree from values in the order of `leaves`."""
    return jax.tree.unflatten(self._structure, values)

  def by_operator(
    self, rows: jax.typing.ArrayLike
  ) -> dict[keys.OperatorId, np.ndarray]:
    """Maps each operator to its row of an array [operators, ...]."""
    return dict(zip(self.operators, np.asarray(rows), strict=True))

  def _checked(self, tree: Any) -> list[Any]:
    values, structure = jax.tree.flatten(tree)
    if structure != self._structure:
      raise ValueError('the tree has another structure than the partition')
    for leaf, value in zip(self.leaves, values, strict=True):
      if tuple(value.shape) != leaf.shape:
        raise ValueError(
          f'{leaf.path} has shape {tuple(value.shape)}, not {leaf.shape}'
        )
    return values


def leaf_paths(tree: Any) -> list[str]:
  """Lists the paths of a tree's leaves, their keys joined with '/'."""
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
  ]


def group_parameters(
  names: Sequence[str], rule: Rule
) -> dict[model.Group, tuple[str, ...]]:
  """Lists parameter names by group, both sorted.

  Raises:
    ValueError: the rule calls a group both stacked and not.
  """
  out: dict[model.Group, list[str]] = {}
  for name in sorted(names):
    out.setdefault(rule(name), []).append(name)
  if len({g.name for g in out}) < len(out):
    raise ValueError('the rule calls a group both stacked and not')
  return {g: tuple(out[g]) for g in sorted(out)}


def state_rule(rule: Rule, names: Sequence[str]) -> Rule:
  """Makes the rule of a training state from that of its parameters."""
  groups = {g.name: g for g in group_parameters(names, rule)}

  def by_prefix(path: str) -> model.Group:
    # Group names contain '/' themselves; the longest one that fits is meant.
    fits = [g for g in groups if path.startswith(g + '/')]
    return groups[max(fits, key=len)]

  return by_prefix
