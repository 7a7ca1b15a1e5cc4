"""Arrays as bytes: dtypes of the file formats, alignment, checksums, copies."""

from __future__ import annotations

import mmap

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
# Copy and checksum alternate on pieces that are still near a cache. Each asks
# for the GIL four times: beside a thread that holds it most of the time, 8 MiB
# take 8 to 15 ms in pieces of 256 KiB, which the second-level cache would hold,
# and 1.5 ms in these (alone 0.5 and 0.6 ms).
_PIECE_BYTES = 1 << 22


def whole_pages(nbytes: int) -> int:
  """Rounds up to whole pages of memory."""
  return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def padded(nbytes: int) -> int:
  """Rounds a payload up to ring units; at least one, so no two coincide."""
  return max(1, -(-nbytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES


def copy_with_checksum(source: np.ndarray, target: np.ndarray) -> int:
  """Copies u8[nbytes]; returns the checksum of what was copied."""
  digest = xxhash.xxh3_64()
  for start in range(0, len(source), _PIECE_BYTES):
    piece = source[start : start + _PIECE_BYTES]
    target[start : start + _PIECE_BYTES] = piece
    digest.update(piece.data)
  return digest.intdigest()
