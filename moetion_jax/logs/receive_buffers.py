"""Aligned receive buffers that are reused once nobody reads them.

A fresh buffer costs a page fault every 4 KiB, more than the copy into it (2.4
against 20 GB/s, measured), and JAX aliases host memory only if it is aligned.
"""

from __future__ import annotations

import collections
import functools

import numpy as np

from moetion_jax.hostmem import entry, raw_bytes


class BufferPool:
  """Buffers by size; as many as were ever in use at once."""

  def __init__(self):
    """Makes an empty pool."""
    self._free: dict[int, collections.deque[np.ndarray]] = (
      collections.defaultdict(collections.deque)
    )

  def take(self, header: entry.EntryHeader) -> tuple[np.ndarray, np.ndarray]:
    """Takes a buffer for an entry.

    Returns:
      The memory to fill, u8[nbytes], and the entry in it, read-only. Nothing
      may be written once the latter is handed on; while it, or an array that
      aliases it, exists, the memory is not taken again.
    """
    free = self._free[header.nbytes]
    memory = free.popleft() if free else _aligned(header.nbytes)
    data = raw_bytes.lend(memory, functools.partial(free.append, memory))
    return memory, entry.from_bytes(data, header)


def _aligned(nbytes: int) -> np.ndarray:
  """Allocates u8[nbytes] at a multiple of what XLA needs to alias it."""
  raw = np.empty(nbytes + raw_bytes.ALIGNMENT_BYTES, np.uint8)
  start = -raw.__array_interface__['data'][0] % raw_bytes.ALIGNMENT_BYTES
  return raw[start : start + nbytes]
