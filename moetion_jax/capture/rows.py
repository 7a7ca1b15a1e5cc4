"""Captures by leaf, for devices whose memory is the host's.

A call captures rows of one group, each leaf into an array of its own. Compute
weights and gradients are not copied: nobody donates them, so the snapshot
refers to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from moetion_jax import keys
from moetion_jax.capture import sources as sources_lib
from moetion_jax.programs import mesh
from moetion_jax.snapshots import blocks as blocks_lib

# How many operators of a stacked group one call may capture. XLA's CPU client
# lets 32 calls be under way: one more waits, and training waits with it.
_SIZES = (8, 2, 1)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of one group, by leaf.

  Attributes:
    kind: one of `blocks.KINDS`.
    columns: block column of each output, see `blocks.Block`.
    picked: operators by row of the outputs, ascending.
    outputs: arrays with a leading dim of rows, some of which may belong to no
      operator.
    is_single: whether the outputs lack that dim and are one operator's.
  """

  kind: str
  columns: tuple[str, ...]
  picked: Mapping[int, keys.OperatorId]
  outputs: tuple[jax.Array, ...]
  is_single: bool = False

  def blocks(
    self, hosts: Sequence[np.ndarray]
  ) -> Iterator[tuple[blocks_lib.Block, list[np.ndarray]]]:
    """Yields blocks and the pieces of their rows, cut from host outputs."""
    operators = tuple(self.picked.values())
    for column, host in zip(self.columns, hosts, strict=True):
      rows = host[None] if self.is_single else host
      block = blocks_lib.Block(self.kind, operators, column)
      yield block, [rows[a:b] for a, b in blocks_lib.runs(self.picked)]


class RowCaptures:
  """The capture of a state by leaf; see the module."""

  def __init__(
    self,
    sources: Sequence[sources_lib.Source],
    devices: int,
    is_spread: bool = False,
  ):
    """Stores the arguments.

    Args:
      sources: all sources of the state.
      devices: number of devices over which stacked groups are split evenly.
      is_spread: whether they are spread over devices in another way, which XLA
        knows.
    """
    self._devices = devices
    self._pick = _rows_of_all if is_spread else _rows_of_each
    self._sources = {(s.kind, s.group): s for s in sources}
    # Programs are named after the first source of equal shapes.
    self._first: dict[sources_lib.Shapes, str] = {}
    for source in sources:
      self._first.setdefault(source.shapes, source.name)

  def programs(self) -> Iterator[sources_lib.Program]:
    """Yields the programs that `capture` calls."""
    for source in self._sources.values():
      shapes = source.shapes
      is_first = self._first[shapes] == source.name
      if source.kind != blocks_lib.STATE or not is_first:
        continue
      arrays = tuple(jax.ShapeDtypeStruct(*x) for x in shapes.arrays)
      if not shapes.stacked:
        specs = (mesh.SAME,) * len(arrays)
        name = f'capture {source.name}'
        yield sources_lib.Program(name, _whole, specs, mesh.SAME, arrays)
        continue
      specs = (mesh.EXPERT,) * (1 + len(arrays))
      for size in self._sizes(source):
        index = jax.ShapeDtypeStruct((self._devices, size), np.int32)
        name = f'capture {size} of {source.name}'
        yield sources_lib.Program(
          name, self._pick, specs, mesh.EXPERT, (index, *arrays)
        )

  def capture(
    self,
    programs: Mapping[str, Callable[..., Any]],
    values: Mapping[str, Any],
    picked: Mapping[str, frozenset[keys.OperatorId]],
  ) -> list[Rows]:
    """Dispatches copies.

    Args:
      programs: compiled programs by name.
      values: for each kind, the arrays by the keys of their sources.
      picked: operators to capture, by kind.
    """
    captured = []
    for kind, operators in picked.items():
      by_group: dict[str, list[keys.OperatorId]] = {}
      for operator in sorted(operators):
        by_group.setdefault(operator.group, []).append(operator)
      for group, its in by_group.items():
        source = self._sources.get((kind, group))
        if source is None:
          continue  # none of this kind
        arrays = tuple(values[kind][key] for key in source.keys)
        if kind != blocks_lib.STATE:
          captured.append(_referred(source, its, arrays))
        else:
          captured += self._captured(programs, source, its, arrays)
    return captured

  def _captured(
    self,
    programs: Mapping[str, Callable[..., Any]],
    source: sources_lib.Source,
    operators: Sequence[keys.OperatorId],
    arrays: Sequence[jax.Array],
  ) -> Iterator[Rows]:
    columns = blocks_lib.columns(source.leaves)
    first = self._first[source.shapes]
    if not source.shapes.stacked:
      outputs = programs[f'capture {first}'](*arrays)
      yield Rows(source.kind, columns, {0: operators[0]}, outputs)
      return
    local = source.local_rows(self._devices)
    queues: list[list[keys.OperatorId]] = [[] for _ in range(self._devices)]
    for operator in operators:
      queues[source.rows[operator] // local].append(operator)
    for call in sources_lib.deal([queues], self._sizes(source), may_pad=False):
      index = np.zeros((self._devices, call.rows), np.int32)
      picked = {}
      for (_, device, row), operator in call.picked.items():
        index[device, row] = source.rows[operator] % local
        picked[device * call.rows + row] = operator
      outputs = programs[f'capture {call.rows} of {first}'](index, *arrays)
      yield Rows(source.kind, columns, picked, outputs)

  def _sizes(self, source: sources_lib.Source) -> tuple[int, ...]:
    """Returns how many rows of each device a call may take, falling."""
    local = source.local_rows(self._devices)
    return tuple(size for size in _SIZES if size <= local)


def _referred(
  source: sources_lib.Source,
  operators: Sequence[keys.OperatorId],
  arrays: tuple[jax.Array, ...],
) -> Rows:
  is_single = not source.shapes.stacked
  picked = {source.rows[o]: o for o in operators}
  columns = blocks_lib.columns(source.leaves)
  return Rows(
    source.kind, columns, dict(sorted(picked.items())), arrays, is_single
  )


def _rows_of_each(index, *leaves):
  """Gathers the requested rows of each device's local shard."""

  def rows(x):
    return [
      jax.lax.dynamic_index_in_dim(x, index[0, k], 0, keepdims=True)
      for k in range(index.shape[1])
    ]

  return tuple(jnp.concatenate(rows(x)) for x in leaves)


def _rows_of_all(index, *leaves):
  """Gathers the rows of leaves that are spread over devices in any way.

  XLA gathers on each device what it has and adds that up. The rows are added as
  bits, since the sum of -0.0 and the zeros of other devices would be 0.0.
  """

  def rows(x):
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      return jax.lax.complex(rows(x.real), rows(x.imag))
    if x.dtype == jnp.bool_:
      return rows(x.astype(jnp.uint8)).astype(jnp.bool_)
    bits = jax.lax.bitcast_convert_type(
      x, blocks_lib.packed_dtype(np.dtype(x.dtype))
    )
    taken = jnp.take(bits, index[0], axis=0, mode='clip')
    return jax.lax.bitcast_convert_type(taken, x.dtype)

  return tuple(rows(x) for x in leaves)


def _whole(*leaves):
  """Copies leaves, with a leading dim of one row."""
  return tuple(jnp.copy(x)[None] for x in leaves)
