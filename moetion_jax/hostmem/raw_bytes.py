"""Arrays as bytes: dtypes of the file formats, alignment, checksums, copies."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np
import xxhash

# The position in this tuple is part of the file format: append only.
DTYPES: tuple[np.dtype, ...] = tuple(
  np.dtype(scalar)
  for scalar in (
    np.bool_,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.uint8,
    np.uint16,
    np.uint32,
    np.uint64,
    np.float16,
    np.float32,
    np.float64,
    np.complex64,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
  )
)


def checksum(array: np.ndarray) -> int:
  """Computes the checksum that headers hold, from the bytes of `array`."""
  return xxhash.xxh3_64_intdigest(as_bytes(array).data)


def as_bytes(array: np.ndarray) -> np.ndarray:
  """Returns the bytes of `array`, u8[nbytes]; a view if it is contiguous."""
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


ALIGNMENT_BYTES = 64  # what XLA needs to alias host memory


def whole_pages(nbytes: int) -> int:
  """Rounds up to whole pages of memory."""
  return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def padded(nbytes: int) -> int:
  """Rounds up to a multiple of the alignment."""
  return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class _Loan:
  """Memory as NumPy sees it; every array that aliases it holds this object."""

  def __init__(self, memory: np.ndarray):
    self.memory = memory
    address, _ = memory.__array_interface__['data']
    self.__array_interface__ = {
      'data': (address, True),
      'shape': memory.shape,
      'typestr': '|u1',
      'version': 3,
    }


def lend(memory: np.ndarray, on_return: Callable[[], object]) -> np.ndarray:
  """Returns a read-only view of u8[nbytes] that tells when it is read no more.

  Args:
    memory: the memory.
    on_return: called when every view and every JAX array that aliases the
      memory is gone, so that nothing, not even a running program, can read it.
  """
  loan = _Loan(memory)
  weakref.finalize(loan, on_return).atexit = False
  return np.asarray(loan)


def copy_with_checksum(
  arrays: Iterable[np.ndarray],
  target: np.ndarray | None,
  piece_bytes: int,
) -> int:
  """Copies arrays one after another; returns the checksum of their bytes.

  Args:
    arrays: the arrays.
    target: u8[their bytes]; None for the checksum alone.
    piece_bytes: copy and checksum alternate on pieces of this size. A small one
      is still near a cache when its checksum is computed, but each piece asks
      for the GIL four times.
  """
  digest = xxhash.xxh3_64()
  offset = 0
  for array in arrays:
    data = as_bytes(array)
    for start in range(0, len(data), piece_bytes):
      piece = data[start : start + piece_bytes]
      if target is not None:
        target[offset : offset + len(piece)] = piece
        offset += len(piece)
      digest.update(piece.data)
  return digest.intdigest()
