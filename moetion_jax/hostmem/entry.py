"""One boundary log entry as bytes: its header, its payload, its checksum.

The same header stands in a segment's cell and in front of a payload on the
network. Its commit word is the checksum of its fields, so half a header is
recognised as none.
"""

from __future__ import annotations

import dataclasses
import math
import struct

import numpy as np
import xxhash

from moetion_jax import errors, keys
from moetion_jax.hostmem import raw_bytes

_FIELDS = struct.Struct('<QQqiiiiII8QQQQQ')
_COMMIT = struct.Struct('<Q')
_MAX_DIMS = 8
ITERATION_OFFSET = 2 * 8  # after sequence and generation
COMMIT_OFFSET = _FIELDS.size
HEADER_BYTES = _FIELDS.size + _COMMIT.size


class EntryCorruptError(errors.StoreError):
  """The bytes of a committed entry do not have its checksum.

  Attributes:
    key: name of the entry.
  """

  def __init__(
    self,
    key: keys.EntryKey,
    reason: str = 'stored bytes do not have the checksum written with them',
  ):
    """Makes the message of the entry's name and the reason.

    Args:
      key: name of the entry.
      reason: what is wrong with it, as the end of a sentence.
    """
    super().__init__(f'{key}: {reason}')
    self.key = key


class EntryDecayedError(errors.WrongBitsError):
  """An entry was damaged after it was written: somebody may have read that."""

  def __init__(self, key: keys.EntryKey):
    """Makes the message of the entry's name.

    Args:
      key: name of the entry.
    """
    super().__init__(f'{key}: damaged after it was written')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntryHeader:
  """Description of one entry; `pack` gives its form in files and messages.

  Attributes:
    key: name of the entry.
    generation: generation of the producer that wrote it.
    sequence: number of the entry in its segment, from 0.
    dtype: one of `raw_bytes.DTYPES`.
    shape: shape of the array, at most 8 dims.
    offset: offset of the payload in the ring, in bytes.
    nbytes: size of the payload in bytes.
    checksum: xxh3 of the payload, 64 bits.
    committed_nanoseconds: time of the commit, by the monotonic clock of the
      producer's machine; 0 if unknown.
  """

  key: keys.EntryKey
  generation: int
  sequence: int
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int
  nbytes: int
  checksum: int
  committed_nanoseconds: int = 0

  def pack(self) -> bytes:
    """Packs the fields and the commit word into HEADER_BYTES bytes."""
    key = self.key
    shape = self.shape + (0,) * (_MAX_DIMS - len(self.shape))
    fields = _FIELDS.pack(
      self.sequence,
      self.generation,
      key.iteration,
      key.stage,
      key.replica,
      key.kind,
      key.microbatch,
      raw_bytes.DTYPES.index(self.dtype),
      len(self.shape),
      *shape,
      self.offset,
      self.nbytes,
      self.checksum,
      self.committed_nanoseconds,
    )
    return fields + _COMMIT.pack(_commit_word(fields))

  @classmethod
  def unpack(cls, data: bytes) -> EntryHeader | None:
    """Inverts `pack`; returns None if `data` is no committed header."""
    if len(data) != HEADER_BYTES:
      return None
    fields, (commit,) = (
      data[: _FIELDS.size],
      _COMMIT.unpack_from(data, _FIELDS.size),
    )
    if commit != _commit_word(fields):
      return None
    (sequence, generation, iteration, stage, replica, kind, microbatch) = (
      values := _FIELDS.unpack(fields)
    )[:7]
    dtype, dims = values[7:9]
    offset, nbytes, checksum, committed = values[9 + _MAX_DIMS :]
    if dtype >= len(raw_bytes.DTYPES) or dims > _MAX_DIMS:
      return None
    shape = values[9 : 9 + dims]
    if math.prod(shape) * raw_bytes.DTYPES[dtype].itemsize != nbytes:
      return None
    try:
      kind = keys.EntryKind(kind)
    except ValueError:
      return None
    return cls(
      key=keys.EntryKey(iteration, stage, replica, kind, microbatch),
      generation=generation,
      sequence=sequence,
      dtype=raw_bytes.DTYPES[dtype],
      shape=shape,
      offset=offset,
      nbytes=nbytes,
      checksum=checksum,
      committed_nanoseconds=committed,
    )


def _commit_word(fields: bytes) -> int:
  return xxhash.xxh3_64_intdigest(fields) or 1  # 0: being written


def from_bytes(data: np.ndarray, header: EntryHeader) -> np.ndarray:
  """Views the bytes of an entry, u8[nbytes], as the array they stand for."""
  return data.view(header.dtype).reshape(header.shape)


def verify(header: EntryHeader, array: np.ndarray) -> None:
  """Raises EntryCorruptError unless `array` has the header's checksum."""
  if raw_bytes.checksum(array) != header.checksum:
    raise EntryCorruptError(header.key)
