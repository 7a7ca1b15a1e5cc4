"""Captures packed into few arrays, for devices with a memory of their own.

Each transfer to the host, and each call of a program, takes the host 0.1 to 0.5
ms whatever is in it, most of them with the GIL, for which training waits. So
one call captures operators of all groups that are alike, and returns one array
for all numbers of a size, as bits. On CPU such copies take eight times as long
as by leaf, and nothing is transferred: `rows` is for CPU.

Groups that are alike are a family: stacked groups with arrays of equal shapes
and dtypes, of each of which a call captures the same number of rows; or all
groups that are not stacked. The arrays may have rows that nobody asked for;
these are in no block. A call is made if half of it is asked for: where slots
are balanced over devices, a snapshot takes at most twice its bytes of their
memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from moetion_jax import keys as keys_lib
from moetion_jax.capture import sources as sources_lib
from moetion_jax.programs import mesh
from moetion_jax.snapshots import blocks as blocks_lib

# How many operators of each stacked group a call may capture.
_SIZES = (64, 16, 4, 1)


@dataclasses.dataclass(frozen=True)
class Segment:
  """The place of a source's rows in the outputs of a call.

  Attributes:
    source: place of the source in the call.
    kind: kind of block, one of `blocks.KINDS`.
    column: column of the block, see `blocks.Block`.
    output: index of the output array, [devices, numbers].
    offset: offset of the first row on every device, in numbers.
    rows: number of rows of every device.
    width: numbers in a row.
  """

  source: int
  kind: str
  column: str
  output: int
  offset: int
  rows: int
  width: int


@dataclasses.dataclass(frozen=True)
class Packed:
  """One call of a packed capture program.

  Attributes:
    segments: places of the rows in the outputs.
    picked: operators by source, device and row of that device.
    outputs: arrays [devices, numbers].
  """

  segments: tuple[Segment, ...]
  picked: Mapping[tuple[int, int, int], keys_lib.OperatorId]
  outputs: tuple[jax.Array, ...]

  def blocks(
    self, hosts: Sequence[np.ndarray]
  ) -> Iterator[tuple[blocks_lib.Block, list[np.ndarray]]]:
    """Yields blocks and the pieces of their rows, cut from host outputs."""
    places: dict[int, dict[int, list[int]]] = {}  # rows by source and device
    for source, device, row in sorted(self.picked):
      places.setdefault(source, {}).setdefault(device, []).append(row)
    for segment in self.segments:
      by_device = places.get(segment.source)
      if by_device is None:
        continue
      host = hosts[segment.output]
      end = segment.offset + segment.rows * segment.width
      rows = host[:, segment.offset : end].reshape(
        host.shape[0], segment.rows, segment.width
      )
      named = tuple(
        self.picked[segment.source, device, row]
        for device, its in by_device.items()
        for row in its
      )
      block = blocks_lib.Block(segment.kind, named, segment.column)
      yield (
        block,
        [
          rows[device, start:end]
          for device, its in by_device.items()
          for start, end in blocks_lib.runs(its)
        ],
      )


@dataclasses.dataclass(frozen=True)
class _Planned:
  """A call that is ready to be made.

  Attributes:
    name: name of the program.
    keys: keys of the arrays.
    index: rows of every device and source; None for sources without rows.
    segments: places of the rows in the outputs.
    picked: operators as in `Packed`.
  """

  name: str
  keys: tuple[Any, ...]
  index: np.ndarray | None
  segments: tuple[Segment, ...]
  picked: Mapping[tuple[int, int, int], keys_lib.OperatorId]


class Family:
  """Sources that one call can capture from; see the module."""

  def __init__(self, sources: Sequence[sources_lib.Source], devices: int):
    """Stores the arguments.

    Args:
      sources: sources that are stacked and alike, or none stacked.
      devices: number of devices over which stacked groups are spread.
    """
    self._sources = tuple(sources)
    self._is_stacked = sources[0].shapes.stacked
    self._devices = devices if self._is_stacked else 1
    self._local = sources[0].local_rows(devices) if self._is_stacked else 1
    self._sizes = tuple(s for s in _SIZES if s <= self._local)
    # Slots come again in every window; planning one takes a millisecond.
    self._planned = functools.lru_cache(maxsize=128)(self._plan)
    # Sources of equal shapes share a program, named after the first of them.
    self._first: dict[sources_lib.Shapes, int] = {}
    for place, source in enumerate(self._sources):
      self._first.setdefault(source.shapes, place)

  def programs(self) -> Iterator[sources_lib.Program]:
    """Yields the programs that `capture` calls."""
    chosen: set[tuple[int, ...]] = {(i,) for i in self._first.values()}
    chosen.add(tuple(range(len(self._sources))))
    for sources in sorted(chosen):
      for rows in self._sizes:
        yield self._program(sources, rows)

  def capture(
    self,
    programs: Mapping[str, Callable[..., Any]],
    values: Any,
    picked: frozenset[keys_lib.OperatorId],
  ) -> list[Packed]:
    """Dispatches copies.

    Args:
      programs: compiled programs by name.
      values: arrays by the keys of the sources.
      picked: operators to capture; those of other groups are passed over.
    """
    captured = []
    for planned in self._planned(picked):
      arrays = [values[key] for key in planned.keys]
      if planned.index is not None:
        arrays.insert(0, planned.index)
      outputs = programs[planned.name](*arrays)
      captured.append(Packed(planned.segments, planned.picked, outputs))
    return captured

  def _plan(self, picked: frozenset[keys_lib.OperatorId]) -> list[_Planned]:
    """Plans the calls that capture operators."""
    queues: list[list[list[keys_lib.OperatorId]]] = [
      [[] for _ in range(self._devices)] for _ in self._sources
    ]
    place_of = {source.group: i for i, source in enumerate(self._sources)}
    for operator in sorted(picked):
      place = place_of.get(operator.group)
      if place is not None:
        row = self._sources[place].rows[operator]
        queues[place][row // self._local].append(operator)
    if not any(any(of_source) for of_source in queues):
      return []
    calls = (
      sources_lib.deal(queues, self._sizes, may_pad=True)
      if self._is_stacked
      else self._all(queues)
    )
    return [self._planned_call(call) for call in calls]

  def _all(
    self, queues: Sequence[Sequence[Sequence[keys_lib.OperatorId]]]
  ) -> list[sources_lib.Call]:
    """Deals sources that are not stacked to calls, half full in bytes."""
    asked = {i: queue[0] for i, (queue,) in enumerate(queues) if queue}
    sizes = [_row_bytes(source) for source in self._sources]
    everyone = tuple(range(len(sizes)))
    if len(asked) > 1 and 2 * sum(sizes[i] for i in asked) >= sum(sizes):
      return [
        sources_lib.Call(everyone, 1, {(i, 0, 0): o for i, o in asked.items()})
      ]
    return [sources_lib.Call((i,), 1, {(0, 0, 0): o}) for i, o in asked.items()]

  def _planned_call(self, call: sources_lib.Call) -> _Planned:
    sources = [self._sources[i] for i in call.sources]
    index = None
    if self._is_stacked:
      index = np.zeros((self._devices, len(sources), call.rows), np.int32)
      for (place, device, row), operator in call.picked.items():
        index[device, place, row] = sources[place].rows[operator] % self._local
    chosen = call.sources
    if len(chosen) == 1:
      chosen = (self._first[sources[0].shapes],)
    return _Planned(
      self._name(chosen, call.rows),
      tuple(key for source in sources for key in source.keys),
      index,
      tuple(_segments(sources, call.rows)),
      call.picked,
    )

  def _name(self, sources: tuple[int, ...], rows: int) -> str:
    name = self._sources[sources[0]].name
    if len(sources) > 1:
      name += ' and those like it' if self._is_stacked else ' and others'
    return (
      f'capture {rows} of {name}' if self._is_stacked else f'capture {name}'
    )

  def _program(self, chosen: tuple[int, ...], rows: int) -> sources_lib.Program:
    sources = [self._sources[i] for i in chosen]
    counts = [len(source.keys) for source in sources]
    shapes = [
      jax.ShapeDtypeStruct(*x)
      for source in sources
      for x in source.shapes.arrays
    ]
    is_stacked = self._is_stacked

    def capture(*arrays):
      """Packs rows of each source, or all of it; one [1, numbers] per size."""
      index = None
      if is_stacked:
        index, *arrays = arrays
      packed: dict[np.dtype, list[jax.Array]] = {}
      first = 0
      for place, count in enumerate(counts):
        own: dict[np.dtype, list[jax.Array]] = {}
        for x in arrays[first : first + count]:
          if index is not None:
            x = jnp.take(x, index[0, place], axis=0, mode='clip')
          bits = _bits(x).reshape(rows, -1)
          own.setdefault(np.dtype(bits.dtype), []).append(bits)
        for dtype, columns in own.items():
          flat = jnp.concatenate(columns, axis=1).reshape(-1)
          packed.setdefault(dtype, []).append(flat)
        first += count
      return tuple(jnp.concatenate(flats)[None] for flats in packed.values())

    spec = mesh.EXPERT if is_stacked else mesh.SAME
    if is_stacked:
      index_shape = self._devices, len(sources), rows
      shapes.insert(0, jax.ShapeDtypeStruct(index_shape, np.int32))
    return sources_lib.Program(
      self._name(chosen, rows),
      capture,
      (spec,) * len(shapes),
      spec,
      tuple(shapes),
    )


class PackedCaptures:
  """The packed capture of a state; see the module."""

  def __init__(self, sources: Sequence[sources_lib.Source], devices: int):
    """Groups the sources into families.

    Args:
      sources: all sources of the state.
      devices: number of devices over which stacked groups are spread.
    """
    alike: dict[Any, list[sources_lib.Source]] = {}
    for source in sources:
      shapes = source.shapes if source.shapes.stacked else None
      alike.setdefault((source.kind, shapes), []).append(source)
    self._families = [
      (kind, Family(found, devices)) for (kind, _), found in alike.items()
    ]

  def programs(self) -> Iterator[sources_lib.Program]:
    """Yields the programs that `capture` calls."""
    for _, family in self._families:
      yield from family.programs()

  def capture(
    self,
    programs: Mapping[str, Callable[..., Any]],
    values: Mapping[str, Any],
    picked: Mapping[str, frozenset[keys_lib.OperatorId]],
  ) -> list[Packed]:
    """Dispatches copies; see `rows.RowCaptures.capture`."""
    return [
      packed
      for kind, family in self._families
      for packed in family.capture(programs, values[kind], picked[kind])
    ]


def _segments(
  sources: Sequence[sources_lib.Source], rows: int
) -> Iterator[Segment]:
  """Yields the segments of the outputs of `Family._program`, in its order."""
  outputs: dict[np.dtype, int] = {}
  offsets: dict[np.dtype, int] = {}
  for place, source in enumerate(sources):
    widths: dict[np.dtype, int] = {}
    for shape, dtype in source.shapes.arrays:
      packed = blocks_lib.packed_dtype(dtype)
      width = math.prod(shape[1:] if source.shapes.stacked else shape)
      widths[packed] = widths.get(packed, 0) + width
    for packed, width in widths.items():
      offset = offsets.get(packed, 0)
      offsets[packed] = offset + rows * width
      yield Segment(
        place,
        source.kind,
        blocks_lib.packed_column(packed),
        outputs.setdefault(packed, len(outputs)),
        offset,
        rows,
        width,
      )


def _bits(x: jax.Array) -> jax.Array:
  packed = blocks_lib.packed_dtype(np.dtype(x.dtype))
  if x.dtype == packed:
    return x
  return jax.lax.bitcast_convert_type(x, packed)


def _row_bytes(source: sources_lib.Source) -> int:
  return sum(
    math.prod(shape) * dtype.itemsize for shape, dtype in source.shapes.arrays
  )
