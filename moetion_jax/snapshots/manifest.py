"""Contents of a snapshot: its buffers, and the manifest describing them.

Pure values, no I/O: `file` puts them into files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from moetion_jax import errors
from moetion_jax.hostmem import raw_bytes

_FORMAT = 2
# Beside a thread that holds the GIL most of the time, 160 MB take 125 ms in
# pieces of 1 MiB and 21 ms in these (alone: 12 and 13).
_PIECE_BYTES = 1 << 24
_DTYPES = {dtype.name: dtype for dtype in raw_bytes.DTYPES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}  # .name is slow
# The checksum covers the bytes between them, so every bit of the file counts.
_HEAD = b'{"manifest": '
_TAIL = b', "xxh3_64": "%016x"}\n'
_TAIL_BYTES = len(_TAIL % 0)


class SnapshotCorruptError(errors.StoreError):
  """A snapshot is not what was written; the message names file and damage."""


@dataclasses.dataclass(frozen=True)
class Buffer:
  """One array of a snapshot to be written.

  Attributes:
    name: unique within the snapshot. Snapshots of one iteration that hold
      different operators must differ in a name or a shape.
    dtype: one of `raw_bytes.DTYPES`.
    shape: shape of the whole buffer.
    pieces: arrays (NumPy or JAX) whose bytes one after another are the buffer,
      so that rows of a larger array need no temporary.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  pieces: Sequence[Any]

  @functools.cached_property
  def nbytes(self) -> int:
    """Size of the buffer in bytes."""
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize

  @property
  def identity(self) -> tuple[Any, ...]:
    """Name, dtype and shape; equal for two buffers that hold the same thing."""
    return self.name, np.dtype(self.dtype), tuple(self.shape)

  def checksum(self, target: np.ndarray | None = None) -> int:
    """Computes the checksum; copies the bytes to any `target`, u8[nbytes]."""
    return raw_bytes.copy_with_checksum(
      map(np.asarray, self.pieces), target, _PIECE_BYTES
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredBuffer:
  """A manifest's description of one buffer.

  Attributes:
    name: unique within the snapshot.
    dtype: dtype of the array.
    shape: shape of the array.
    offset: position in the data file, in bytes.
    nbytes: size in bytes.
    checksum: xxh3 of the bytes, 64 bits.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int
  nbytes: int
  checksum: int

  @property
  def identity(self) -> tuple[Any, ...]:
    """Name, dtype and shape, as `Buffer.identity`."""
    return self.name, self.dtype, self.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """The description of a snapshot.

  Attributes:
    metadata: the JSON object that the writer gave.
    buffers: stored buffers by name.
    used_bytes: used bytes of the data file.
  """

  metadata: dict[str, Any]
  buffers: dict[str, StoredBuffer]
  used_bytes: int

  def pack(self) -> bytes:
    """Returns the contents of the manifest file."""
    body = json.dumps(
      {
        'format': _FORMAT,
        'metadata': self.metadata,
        'used_bytes': self.used_bytes,
        'buffers': [
          {
            'name': buffer.name,
            'dtype': _NAMES[buffer.dtype],
            'shape': buffer.shape,
            'offset': buffer.offset,
            'nbytes': buffer.nbytes,
            'checksum': f'{buffer.checksum:016x}',
          }
          for buffer in self.buffers.values()
        ],
      }
    ).encode()
    return _HEAD + body + _TAIL % xxhash.xxh3_64_intdigest(body)

  def with_checksums(
    self, arrays: Mapping[str, np.ndarray], names: Iterable[str]
  ) -> Manifest:
    """Returns this one with the checksums of arrays that were changed.

    Args:
      arrays: the arrays, by the names of the buffers.
      names: the names of those that were changed.
    """
    changed = {
      name: dataclasses.replace(
        self.buffers[name], checksum=raw_bytes.checksum(arrays[name])
      )
      for name in names
    }
    return dataclasses.replace(self, buffers={**self.buffers, **changed})

  @classmethod
  def unpack(cls, data: bytes) -> Manifest:
    """Inverts `pack`; raises ValueError with a reason for anything else."""
    body = data[len(_HEAD) : -_TAIL_BYTES]
    if data != _HEAD + body + _TAIL % xxhash.xxh3_64_intdigest(body):
      raise ValueError('torn or damaged: it does not have its own checksum')
    value = json.loads(body)
    if value['format'] != _FORMAT:
      raise ValueError(f'format {value["format"]} is not known')
    buffers = {}
    for fields in value['buffers']:
      buffer = StoredBuffer(
        **fields
        | {
          'dtype': _DTYPES[fields['dtype']],
          'shape': tuple(fields['shape']),
          'checksum': int(fields['checksum'], 16),
        }
      )
      if (
        math.prod(buffer.shape) * buffer.dtype.itemsize != buffer.nbytes
        or buffer.offset % raw_bytes.ALIGNMENT_BYTES
        or not 0 <= buffer.offset <= value['used_bytes'] - buffer.nbytes
      ):
        raise ValueError(f'buffer {buffer.name} cannot lie where it says')
      buffers[buffer.name] = buffer
    return cls(
      metadata=value['metadata'],
      buffers=buffers,
      used_bytes=value['used_bytes'],
    )


def data_bytes(sizes: Iterable[int]) -> int:
  """Returns the bytes that a data file needs for buffers of these sizes."""
  return sum(map(raw_bytes.padded, sizes))


def fill(
  memory: np.ndarray, buffers: Sequence[Buffer], metadata: dict[str, Any]
) -> Manifest:
  """Copies buffers into u8[at least their `data_bytes`], and describes them."""
  stored, offset = {}, 0
  for buffer in buffers:
    end = offset + buffer.nbytes
    stored[buffer.name] = StoredBuffer(
      name=buffer.name,
      dtype=np.dtype(buffer.dtype),
      shape=tuple(buffer.shape),
      offset=offset,
      nbytes=buffer.nbytes,
      checksum=buffer.checksum(memory[offset:end]),
    )
    offset = raw_bytes.padded(end)
  return Manifest(metadata=metadata, buffers=stored, used_bytes=offset)


def check(buffers: Sequence[Buffer]) -> None:
  """Raises StoreError, naming the first buffer that cannot be written."""
  names = set()
  for buffer in buffers:
    if buffer.name in names:
      raise errors.StoreError(
        f'{buffer.name}: there are two buffers of this name'
      )
    names.add(buffer.name)
    if np.dtype(buffer.dtype) not in _NAMES:
      raise errors.StoreError(
        f'{buffer.name}: dtype {buffer.dtype} cannot be stored'
      )
    for piece in buffer.pieces:
      if piece.dtype != buffer.dtype:
        raise errors.StoreError(
          f'{buffer.name}: a piece of dtype {piece.dtype}, not {buffer.dtype}'
        )
    if sum(piece.nbytes for piece in buffer.pieces) != buffer.nbytes:
      raise errors.StoreError(
        f'{buffer.name}: its pieces are not {buffer.nbytes} bytes'
      )
