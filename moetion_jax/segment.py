"""Segments: the entries of one producer in a preallocated, shared file.

```
file    header | slot 0 | slot 1 | ... | payload ring
slot    256 bytes: what the entry is, then the commit word, written last
ring    payloads at multiples of 64 bytes, so that JAX can alias them
```

Entry number n (the sequence) lies in slot n % slots; slots and payloads are
reused in order, so pages are touched once and then rewritten. A writer killed
at any point leaves either a committed entry or none, and the index is rebuilt
by reading the slots.

Leases are locks of open file descriptions (fcntl(2), F_OFD_SETLK) on one byte
of the slot. They end with the descriptor, so also with a kill -9 of the
reader. A writer retires an entry by marking the slot and then taking its lock;
a reader takes the lock and then looks at the mark: one of them sees the other.

No JAX here: the agent uses this module and never creates a JAX backend.
"""

from __future__ import annotations

import collections
import fcntl
import mmap
import os
import pathlib
import struct
import time
from collections.abc import Iterable

import numpy as np
import xxhash

from moetion_jax import base, entry, hostmem, room

ALIGNMENT_BYTES = 64  # what XLA needs to alias host memory
# Copy and checksum alternate on pieces that are still near a cache. Each asks
# for the GIL four times: beside a thread that holds it most of the time, 8 MiB
# take 8 to 15 ms in pieces of 256 KiB, which the second-level cache would hold,
# and 1.5 ms in these (alone 0.5 and 0.6 ms).
_PIECE_BYTES = 1 << 22

_MAGIC = b'MoEtion1'
_FILE = struct.Struct('<8sIiiIQQQ')
_GENERATION = struct.Struct('<Q')
_GENERATION_OFFSET = 24
_SLOTS_OFFSET = mmap.PAGESIZE
_SLOT_BYTES = 256
_FLOCK = struct.Struct('hhqqi4x')  # glibc's struct flock, 64-bit offsets


class SegmentFullError(base.StoreError):
  """No room now: what is retained or leased fills the segment."""


def ring_bytes(iteration_entry_bytes: Iterable[int], iterations: int) -> int:
  """Ring size that keeps whole iterations while the next one is written.

  Args:
    iteration_entry_bytes: payload size of each entry of one iteration.
    iterations: how many finished iterations are retained.
  """
  sizes = [_padded(nbytes) for nbytes in iteration_entry_bytes]
  # An entry is never split at the ring's end: up to the largest one is lost.
  return sum(sizes) * (iterations + 1) + max(sizes, default=0)


def file_bytes(size_bytes: int, slots: int) -> int:
  """Host memory that a segment takes, its slots included."""
  return _pages(slot_offset(slots)) + _pages(size_bytes)


def _pages(nbytes: int) -> int:
  return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def segment_path(
  folder: str | os.PathLike[str], stage: int, replica: int
) -> pathlib.Path:
  """Where the segment of one producer lies in a store folder."""
  return pathlib.Path(folder) / f'stage-{stage}.replica-{replica}.segment'


def _padded(nbytes: int) -> int:
  """Ring bytes of a payload; at least one unit, so that no two coincide."""
  return max(1, -(-nbytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES


def slot_offset(slot: int) -> int:
  """Where a slot lies in the file; a lease locks its first byte."""
  return _SLOTS_OFFSET + slot * _SLOT_BYTES


def try_lock(fd: int, kind: int, offset: int) -> bool:
  """Takes (or with F_UNLCK returns) the lock of one byte; False if held."""
  lock = _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)
  try:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
  except (BlockingIOError, PermissionError):
    return False
  return True


class Layout:
  """A mapped segment file, seen as header, slots and ring."""

  def __init__(self, fd: int, writable: bool):
    """Maps the file; StoreError if it is no segment or a damaged one."""
    size_bytes = os.fstat(fd).st_size
    if size_bytes < _SLOTS_OFFSET:
      raise base.StoreError('not a segment: too short')
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    # Never closed by hand: it is unmapped when the last view of it is gone.
    self.map = mmap.mmap(
      fd, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, protection
    )
    magic, slots, stage, replica, _, _, ring_offset, size = _FILE.unpack_from(
      self.map
    )
    if (
      magic != _MAGIC
      or not slots
      or ring_offset < slot_offset(slots)
      or ring_offset % mmap.PAGESIZE
      or ring_offset + size != size_bytes
    ):
      raise base.StoreError('not a segment, or its header is damaged')
    self.slots, self.stage, self.replica = slots, stage, replica
    self.ring = np.frombuffer(self.map, np.uint8, size, ring_offset)
    words = np.frombuffer(
      self.map, np.uint64, slots * _SLOT_BYTES // 8, _SLOTS_OFFSET
    ).reshape(slots, -1)
    # Aligned words of their own: a store or a load of one is never torn.
    self.commits = words[:, entry.COMMIT_OFFSET // 8]
    self.retired = words[:, entry.HEADER_BYTES // 8]
    self._words = words

  @property
  def generation(self) -> int:
    """Of the newest writer."""
    return _GENERATION.unpack_from(self.map, _GENERATION_OFFSET)[0]

  def header(self, slot: int) -> entry.EntryHeader | None:
    """The committed entry of a slot, retired or not; None if there is none."""
    start = slot_offset(slot)
    header = entry.EntryHeader.unpack(
      self.map[start : start + entry.HEADER_BYTES]
    )
    if (
      header is None
      or header.sequence % self.slots != slot
      or (header.key.stage, header.key.replica) != (self.stage, self.replica)
      or header.offset % ALIGNMENT_BYTES
      or header.offset + header.nbytes > len(self.ring)
    ):
      return None
    return header

  @property
  def newest_iteration(self) -> int:
    """Of the committed entries; 0 when there are none."""
    iterations = self._words[:, entry.ITERATION_OFFSET // 8]
    return int(np.max(iterations, initial=0, where=self.commits != 0))

  def headers(self) -> list[entry.EntryHeader]:
    """The committed entries, retired ones included, oldest first."""
    found = map(self.header, np.flatnonzero(self.commits).tolist())
    return sorted(filter(None, found), key=lambda header: header.sequence)


def newest_iteration(path: str | os.PathLike[str]) -> int:
  """Of a segment's entries; 0 if there are none, or no readable segment."""
  try:
    with open(path, 'rb') as file:
      return Layout(file.fileno(), writable=False).newest_iteration
  except (OSError, base.StoreError):
    return 0


def drop_damaged(
  path: str | os.PathLike[str], first_iteration: int
) -> list[base.EntryKey]:
  """Retires entries without their checksum, so that they are written again.

  Only while nobody writes the segment.

  Args:
    path: of the segment.
    first_iteration: older entries are not looked at.

  Returns:
    Their names.

  Raises:
    StoreError: it is no segment; its writer lives.
    OSError: it cannot be opened.
  """
  dropped = []
  with open(path, 'r+b') as file:
    if not try_lock(file.fileno(), fcntl.F_WRLCK, 0):
      raise base.StoreError(f'{path}: its writer lives')
    layout = Layout(file.fileno(), writable=True)
    for header in layout.headers():
      slot = header.sequence % layout.slots
      if header.key.iteration < first_iteration or layout.retired[slot]:
        continue
      data = layout.ring[header.offset : header.offset + header.nbytes]
      if entry.checksum(data) != header.checksum:
        layout.retired[slot] = 1
        dropped.append(header.key)
    # The mapping holds the open file, and so the lock, beyond the close.
    try_lock(file.fileno(), fcntl.F_UNLCK, 0)
  return dropped


class SegmentWriter:
  """The one writer of a segment. Not thread-safe, except `retain`.

  `start`, then `put` and `retain` in any order, then `close`. The file stays.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    worker: hostmem.WorkerId,
    size_bytes: int,
    slots: int = 4096,
  ):
    """Stores the settings.

    Args:
      folder: the store folder.
      worker: who writes.
      size_bytes: of the ring, see `ring_bytes`.
      slots: how many entries the segment can hold, whatever their size.
    """
    self.path = segment_path(folder, worker.stage, worker.replica)
    self._worker = worker
    self._size_bytes = _pages(size_bytes)
    self._slots = slots
    self._fd = -1
    self._first_iteration = 0
    self._live: collections.deque[entry.EntryHeader] = collections.deque()
    self._by_key: dict[base.EntryKey, entry.EntryHeader] = {}
    self._next_sequence = 0
    self._head = 0  # ring offset of the next payload

  def start(self, fresh: bool = False) -> None:
    """Adopts the segment a predecessor left, or creates one.

    With `fresh` it is replaced.

    Raises:
      StoreError: no room; the predecessor lives; the segment belongs to a newer
        generation, is damaged, or is smaller than asked for.
    """
    try:
      if self.path.exists():
        self._open()
      if fresh or self._fd < 0:
        self._create()
        self._open()
      self._adopt()
    except base.StoreError as error:
      self.close()
      raise base.StoreError(f'{self.path}: {error}') from None

  def _open(self) -> None:
    """Opens the file for this process alone."""
    self.close()
    self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not try_lock(self._fd, fcntl.F_WRLCK, 0):
      raise base.StoreError('another living process writes it')

  def _create(self) -> None:
    ring_offset = _pages(slot_offset(self._slots))
    temporary = self.path.with_suffix('.new')
    temporary.unlink(missing_ok=True)
    fd = hostmem.reserve(temporary, ring_offset + self._size_bytes)
    header = _FILE.pack(
      _MAGIC,
      self._slots,
      self._worker.stage,
      self._worker.replica,
      0,
      self._worker.generation,
      ring_offset,
      self._size_bytes,
    )
    os.pwrite(fd, header, 0)
    os.close(fd)
    temporary.rename(self.path)

  def _adopt(self) -> None:
    """Takes over what is committed, and the right to write."""
    self._layout = Layout(self._fd, writable=True)
    generation, mine = self._layout.generation, self._worker.generation
    if generation > mine:
      raise base.StoreError(f'generation {generation} fences off {mine}')
    if (
      len(self._layout.ring) < self._size_bytes
      or self._layout.slots < self._slots
    ):
      raise base.StoreError(
        'smaller than this run needs: the settings changed; start over with '
        '--fresh'
      )
    _GENERATION.pack_into(self._layout.map, _GENERATION_OFFSET, mine)
    headers = self._layout.headers()
    if headers:
      self._next_sequence = headers[-1].sequence + 1
      self._head = headers[-1].offset + _padded(headers[-1].nbytes)
    for header in headers:
      slot = header.sequence % self._layout.slots
      if not self._layout.retired[slot]:
        self._by_key[header.key] = header
      elif self._is_free(slot):
        continue
      self._live.append(header)  # or retired, and a reader still has it

  def close(self) -> None:
    """Gives the segment up; its entries stay. May be called twice."""
    if self._fd >= 0:
      # The mapping holds the open file, and so the lock, beyond the close.
      try_lock(self._fd, fcntl.F_UNLCK, 0)
      os.close(self._fd)
      self._fd = -1

  def retain(self, first_iteration: int) -> None:
    """Allows the space of entries of earlier iterations to be reused."""
    self._first_iteration = max(self._first_iteration, first_iteration)

  def put(self, key: base.EntryKey, array: np.ndarray) -> bool:
    """Writes an entry; it is there for every reader when this returns.

    A damaged payload of an entry that exists is rewritten when `array` has the
    checksum that the entry was written with.

    Returns:
      True; False if an equal entry existed.

    Raises:
      EntryMismatchError: an unequal entry of this name exists.
      SegmentFullError: no room until `retain` advances or a lease ends.
      StoreError: the entry is larger than the segment, or not of a dtype of
        `entry.DTYPES`.
    """
    data = entry.as_bytes(array)
    if _padded(len(data)) > len(self._layout.ring):
      raise base.StoreError(
        f'{key}: {room.format_bytes(len(data))} do not fit into a segment '
        f'of {room.format_bytes(len(self._layout.ring))}'
      )
    if array.dtype not in entry.DTYPES:
      raise base.StoreError(f'{key}: dtype {array.dtype} cannot be stored')
    if known := self._by_key.get(key):
      self._compare(known, array, data)
      return False
    offset = self._allocate(_padded(len(data)))
    slot = self._next_sequence % self._layout.slots
    self._layout.commits[slot] = 0
    self._layout.retired[slot] = 0
    header = entry.EntryHeader(
      key=key,
      generation=self._worker.generation,
      sequence=self._next_sequence,
      dtype=array.dtype,
      shape=array.shape,
      offset=offset,
      nbytes=len(data),
      checksum=_copy(data, self._layout.ring[offset : offset + len(data)]),
      committed_nanoseconds=time.monotonic_ns(),
    )
    self._commit(slot, header)
    self._next_sequence += 1
    self._head = offset + _padded(len(data))
    self._live.append(header)
    self._by_key[key] = header
    return True

  def _compare(
    self, known: entry.EntryHeader, array: np.ndarray, data: np.ndarray
  ) -> None:
    stored = self._layout.ring[known.offset : known.offset + known.nbytes]
    if known.dtype == array.dtype and known.shape == array.shape:
      if np.array_equal(stored, data):
        return
      if known.checksum == entry.checksum(data):
        stored[:] = data
        return
    raise base.EntryMismatchError(
      f'{known.key}: published again with other contents: was '
      f'{known.dtype}{list(known.shape)} checksum {known.checksum:016x}, now '
      f'{array.dtype}{list(array.shape)} checksum {entry.checksum(data):016x}'
    )

  def _commit(self, slot: int, header: entry.EntryHeader) -> None:
    packed = header.pack()
    start = slot_offset(slot)
    self._layout.map[start : start + entry.COMMIT_OFFSET] = packed[
      : entry.COMMIT_OFFSET
    ]
    # A barrier on machines that reorder stores: whoever sees the commit word
    # and then takes the lease passes the same lock of the kernel after us.
    try_lock(self._fd, fcntl.F_UNLCK, start)
    self._layout.commits[slot] = int.from_bytes(
      packed[entry.COMMIT_OFFSET :], 'little'
    )

  def _allocate(self, size: int) -> int:
    """Ring offset of `size` free bytes, retiring old entries as needed."""
    while True:
      if self._has_slot():
        offset = self._gap(size)
        if offset is not None:
          return offset
      self._retire_oldest()

  def _has_slot(self) -> bool:
    if not self._live:
      return True
    used_slots = self._next_sequence - self._live[0].sequence
    return used_slots < self._layout.slots

  def _gap(self, size: int) -> int | None:
    """Where `size` bytes are free after the newest entry, if anywhere."""
    if not self._live:
      return 0
    tail = self._live[0].offset
    if self._head <= tail:  # wrapped around; equal: full
      return self._head if self._head + size <= tail else None
    if self._head + size <= len(self._layout.ring):
      return self._head
    return 0 if size <= tail else None

  def _retire_oldest(self) -> None:
    oldest = self._live[0]
    if oldest.key.iteration >= self._first_iteration:
      raise SegmentFullError(
        f'{self.path.name}: full of entries since iteration '
        f'{oldest.key.iteration}, which must be kept; give more host memory or '
        'keep less with --log_iterations'
      )
    slot = oldest.sequence % self._layout.slots
    self._layout.retired[slot] = 1
    if not self._is_free(slot):
      raise SegmentFullError(f'{oldest.key}: a reader holds its memory')
    self._live.popleft()
    if self._by_key.get(oldest.key) is oldest:
      del self._by_key[oldest.key]

  def _is_free(self, slot: int) -> bool:
    """Whether no reader holds an entry that is retired."""
    start = slot_offset(slot)
    if not try_lock(self._fd, fcntl.F_WRLCK, start):
      return False
    try_lock(self._fd, fcntl.F_UNLCK, start)
    return True


def _copy(source: np.ndarray, target: np.ndarray) -> int:
  """Copies u8[nbytes]; returns the checksum of what was copied."""
  digest = xxhash.xxh3_64()
  for start in range(0, len(source), _PIECE_BYTES):
    piece = source[start : start + _PIECE_BYTES]
    target[start : start + _PIECE_BYTES] = piece
    digest.update(piece.data)
  return digest.intdigest()
