"""A snapshot on its way from the device to the host, and into buffers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moetion_jax import keys
from moetion_jax.capture import packed, rows
from moetion_jax.snapshots import blocks as blocks_lib, coverage, manifest

_HOSTS, _PINNED = frozenset({'cpu'}), 'pinned_host'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captured:
  """A snapshot on the device, in buffers that nobody donates.

  Attributes:
    parts: training state of the slot, compute weights and gradients.
    operators: the operators, by what the snapshot holds of them.
    shared: copies of the leaves that belong to no operator, by path.
    extras: further arrays by name.
  """

  parts: tuple[rows.Rows | packed.Packed, ...]
  operators: coverage.Contents
  shared: Mapping[str, jax.Array]
  extras: Mapping[str, jax.Array | np.ndarray] = dataclasses.field(
    default_factory=dict
  )

  def to_host(self) -> Captured:
    """Starts the copies that `buffers` waits for.

    Returns:
      The same snapshot, with the arrays of its parts in pinned host memory
      where devices can write to it: at 37 GB/s on an H100, for 64 MiB, not at 3
      through JAX's own staging, which moreover keeps the GIL. The other arrays
      go that way: they are small; jax caches the host copy for the next reader.
    """
    for array in (*self.shared.values(), *self.extras.values()):
      if isinstance(array, jax.Array):
        array.copy_to_host_async()
    moved = iter(_to_host([x for part in self.parts for x in part.outputs]))
    return dataclasses.replace(
      self,
      parts=tuple(
        dataclasses.replace(
          part, outputs=tuple(next(moved) for _ in part.outputs)
        )
        for part in self.parts
      ),
    )

  def buffers(self) -> list[manifest.Buffer]:
    """Returns the buffers to store; waits until their contents are on host."""
    return list(self._buffers())

  def metadata(self, **fields: Any) -> dict[str, Any]:
    """Returns the snapshot's JSON metadata: fields, and its operators."""
    found = {
      **fields,
      'state': keys.operators_to_json(self.operators.state),
      'compute': keys.operators_to_json(self.operators.compute),
    }
    if self.operators.gradients:  # as before there were any
      found['gradients'] = keys.operators_to_json(self.operators.gradients)
    return found

  def _buffers(self) -> Iterator[manifest.Buffer]:
    for part in self.parts:
      hosts = [np.asarray(output) for output in part.outputs]
      for block, pieces in part.blocks(hosts):
        yield manifest.Buffer(
          name=block.name,
          dtype=pieces[0].dtype,
          shape=(len(block.operators), *pieces[0].shape[1:]),
          pieces=[np.ascontiguousarray(piece) for piece in pieces],
        )
    for path, value in self.shared.items():
      yield _buffer(blocks_lib.SHARED + path, np.asarray(value))
    for name, value in self.extras.items():
      yield _buffer(name, np.asarray(value))


def _buffer(name: str, host: np.ndarray) -> manifest.Buffer:
  return manifest.Buffer(
    name=name,
    dtype=host.dtype,
    shape=host.shape,
    pieces=[np.ascontiguousarray(host)],
  )


def _to_host(arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
  """Starts copies; returns the arrays from which to read them."""
  if arrays and _has_pinned_host(next(iter(arrays[0].sharding.device_set))):
    pinned = [x.sharding.with_memory_kind(_PINNED) for x in arrays]
    return jax.device_put(list(arrays), pinned)
  for array in arrays:
    array.copy_to_host_async()
  return arrays


@functools.cache
def _has_pinned_host(device: Any) -> bool:
  """True if a device, not the host's CPU, can write to pinned host memory."""
  return device.platform not in _HOSTS and any(
    memory.kind == _PINNED for memory in device.addressable_memories()
  )
