"""Writing a segment: entries are put into it, and make room in order."""

from __future__ import annotations

import collections
import fcntl
import os
import time

import numpy as np

from moetion_jax import errors, keys
from moetion_jax.hostmem import (
  entry,
  locks,
  memory_limits,
  raw_bytes,
  segment,
  store_folder,
)

# Iterations after which an entry is verified once more. By then all programs
# that read it have ended, and states from before it are still there (with
# --keep_windows=1, or windows of one iteration, perhaps the initial one only).
_LOOK_BACK_ITERATIONS = 2
_LOOK_BACK_ENTRIES = 2  # for each new one, so that none has to wait
# Beside a thread that holds the GIL most of the time, 8 MiB take 8 to 15 ms in
# pieces of 256 KiB, which the second-level cache would hold, and 1.5 ms in
# these (alone 0.5 and 0.6 ms).
_PIECE_BYTES = 1 << 22


class SegmentFullError(errors.StoreError):
  """The segment has no room now: retained or leased entries fill it."""


class SegmentWriter:
  """The one writer of a segment. Not thread-safe, except `retain`.

  Call `start`, then `put` and `retain` in any order, then `close`. The file
  stays.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    worker: keys.WorkerId,
    size_bytes: int,
    cells: int = 4096,
  ):
    """Stores the settings.

    Args:
      folder: the store folder.
      worker: the worker that writes.
      size_bytes: size of the ring, see `ring_bytes`.
      cells: number of entries the segment can hold, whatever their size.
    """
    self.path = segment.segment_path(folder, worker.stage, worker.replica)
    self._worker = worker
    self._size_bytes = raw_bytes.whole_pages(size_bytes)
    self._cells = cells
    self._fd = -1
    self._first_iteration = 0
    self._live: collections.deque[entry.EntryHeader] = collections.deque()
    self._by_key: dict[keys.EntryKey, entry.EntryHeader] = {}
    self._unverified: collections.deque[entry.EntryHeader] = collections.deque()
    self._next_sequence = 0
    self._head = 0  # ring offset of the next payload

  def start(self, fresh: bool = False) -> None:
    """Adopts the segment a predecessor left, or creates one.

    With `fresh` the segment is replaced.

    Raises:
      FencedError: the segment belongs to a newer generation.
      StoreError: there is no room; the predecessor is alive; the segment is
        damaged, or smaller than asked for.
    """
    try:
      if self.path.exists():
        self._open()
      if fresh or self._fd < 0:
        self._create()
        self._open()
      self._adopt()
    except BaseException as error:
      self.close()
      if isinstance(error, errors.StoreError):
        raise type(error)(f'{self.path}: {error}') from None
      raise

  def check_fence(self) -> None:
    """Checks that what is written reaches somebody.

    Raises:
      FencedError: there is a newer generation of the worker.
      StoreError: somebody cut, removed or damaged the file.
    """
    status = os.fstat(self._fd)
    if status.st_size != self._layout.size_bytes or not status.st_nlink:
      raise errors.StoreError(
        f'{self.path.name}: was cut or removed while its worker lived: what '
        'was in it is lost'
      )
    mine = self._worker.generation
    try:
      generation = self._layout.generation
    except errors.StoreError as error:
      raise errors.StoreError(f'{self.path.name}: is lost: {error}') from None
    if generation > mine:
      raise errors.FencedError(f'generation {generation} fences off {mine}')

  def _open(self) -> None:
    """Opens the file for this process alone."""
    self.close()
    self._fd = segment.open_file(self.path, os.O_RDWR)
    if not locks.try_lock(self._fd, fcntl.F_WRLCK, 0):
      raise errors.StoreError('another living process writes it')

  def _create(self) -> None:
    ring_offset = raw_bytes.whole_pages(segment.cell_offset(self._cells))
    temporary = self.path.with_suffix('.new')
    temporary.unlink(missing_ok=True)
    fd = store_folder.reserve(temporary, ring_offset + self._size_bytes)
    header = segment.pack_header(
      self._worker, self._cells, ring_offset, self._size_bytes
    )
    os.pwrite(fd, header, 0)
    os.close(fd)
    temporary.rename(self.path)

  def _adopt(self) -> None:
    """Takes over what is committed, and the right to write."""
    self._layout = segment.SegmentLayout(self._fd, writable=True)
    self.check_fence()
    if (
      len(self._layout.ring) < self._size_bytes
      or self._layout.cells < self._cells
    ):
      raise errors.StoreError(
        'smaller than this run needs: the settings changed; start over with '
        '--fresh'
      )
    self._layout.generation = self._worker.generation
    headers = self._layout.headers()
    if headers:
      self._next_sequence = headers[-1].sequence + 1
      self._head = headers[-1].offset + segment.ring_size(headers[-1].nbytes)
    for header in headers:
      cell = header.sequence % self._layout.cells
      if self._layout.is_live(cell):
        self._by_key[header.key] = header
        self._unverified.append(header)
      elif self._is_free(cell):
        continue
      # Or retired, or of a damaged mark, and a reader still has it.
      self._live.append(header)

  def close(self) -> None:
    """Gives the segment up; its entries stay. May be called twice."""
    if self._fd >= 0:
      # The mapping holds the open file, and so the lock, beyond the close.
      locks.try_lock(self._fd, fcntl.F_UNLCK, 0)
      os.close(self._fd)
      self._fd = -1

  def retain(self, first_iteration: int) -> None:
    """Allows the space of entries of earlier iterations to be reused."""
    self._first_iteration = max(self._first_iteration, first_iteration)

  def put(self, key: keys.EntryKey, array: np.ndarray) -> bool:
    """Writes an entry; it is there for every reader when this returns.

    Returns:
      True, or False if an equal entry existed.

    Raises:
      FencedError, StoreError: see `check_fence`.
      EntryMismatchError: an unequal entry of this name exists.
      EntryDecayedError: this entry exists and is damaged; or an older one is,
        which is to make room.
      SegmentFullError: there is no room until `retain` advances or a lease
        ends.
      StoreError: the entry is larger than the segment, or not of a dtype of
        `raw_bytes.DTYPES`.
    """
    self.check_fence()
    data = raw_bytes.as_bytes(array)
    size = segment.ring_size(len(data))
    if size > len(self._layout.ring):
      raise errors.StoreError(
        f'{key}: {memory_limits.format_bytes(len(data))} do not fit into a '
        f'segment of {memory_limits.format_bytes(len(self._layout.ring))}'
      )
    if array.dtype not in raw_bytes.DTYPES:
      raise errors.StoreError(f'{key}: dtype {array.dtype} cannot be stored')
    if known := self._by_key.get(key):
      self._compare(known, array, data)
      return False
    offset = self._allocate(size)
    cell = self._next_sequence % self._layout.cells
    self._layout.reuse(cell)
    header = entry.EntryHeader(
      key=key,
      generation=self._worker.generation,
      sequence=self._next_sequence,
      dtype=array.dtype,
      shape=array.shape,
      offset=offset,
      nbytes=len(data),
      checksum=raw_bytes.copy_with_checksum(
        [data], self._layout.ring[offset : offset + len(data)], _PIECE_BYTES
      ),
      committed_nanoseconds=time.monotonic_ns(),
    )
    self.check_fence()  # as late as can be: copying may take long
    self._commit(cell, header)
    self._next_sequence += 1
    self._head = offset + size
    self._live.append(header)
    self._unverified.append(header)
    self._by_key[key] = header
    return True

  def look_back(self, iteration: int) -> None:
    """Verifies a few older entries once more; call after every `put`.

    Memory may be damaged between a reader's verification and the end of the
    program that reads.

    Args:
      iteration: the iteration of which entries are written now.

    Raises:
      EntryDecayedError: an entry is damaged.
    """
    last = iteration - _LOOK_BACK_ITERATIONS
    for _ in range(_LOOK_BACK_ENTRIES):
      if not self._unverified or self._unverified[0].key.iteration > last:
        return
      self._verify(self._unverified.popleft())

  def _verify(self, header: entry.EntryHeader) -> None:
    stored = self._layout.ring[header.offset : header.offset + header.nbytes]
    if raw_bytes.checksum(stored) != header.checksum:
      raise entry.EntryDecayedError(header.key)

  def _compare(
    self, known: entry.EntryHeader, array: np.ndarray, data: np.ndarray
  ) -> None:
    stored = self._layout.ring[known.offset : known.offset + known.nbytes]
    if known.dtype == array.dtype and known.shape == array.shape:
      if np.array_equal(stored, data):
        return
      if known.checksum == raw_bytes.checksum(data):
        raise entry.EntryDecayedError(known.key)
    raise errors.EntryMismatchError(
      f'{known.key}: published again with other contents: was '
      f'{known.dtype}{list(known.shape)} checksum {known.checksum:016x}, now '
      f'{array.dtype}{list(array.shape)} checksum '
      f'{raw_bytes.checksum(data):016x}'
    )

  def _commit(self, cell: int, header: entry.EntryHeader) -> None:
    packed = header.pack()
    start = segment.cell_offset(cell)
    self._layout.map[start : start + entry.COMMIT_OFFSET] = packed[
      : entry.COMMIT_OFFSET
    ]
    # A barrier on machines that reorder stores: whoever sees the commit word
    # and then takes the lease passes the same lock of the kernel after us.
    locks.try_lock(self._fd, fcntl.F_UNLCK, start)
    self._layout.commits[cell] = int.from_bytes(
      packed[entry.COMMIT_OFFSET :], 'little'
    )

  def _allocate(self, size: int) -> int:
    """Finds `size` free bytes in the ring, retiring old entries as needed."""
    while True:
      if self._has_cell():
        offset = self._gap(size)
        if offset is not None:
          return offset
      self._retire_oldest()

  def _has_cell(self) -> bool:
    if not self._live:
      return True
    used_cells = self._next_sequence - self._live[0].sequence
    return used_cells < self._layout.cells

  def _gap(self, size: int) -> int | None:
    """Finds `size` free bytes after the newest entry; None if there are not."""
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
    cell = oldest.sequence % self._layout.cells
    while self._unverified and (
      self._unverified[0].sequence <= oldest.sequence
    ):
      self._verify(self._unverified.popleft())
    self._layout.retire(cell)
    if not self._is_free(cell):
      raise SegmentFullError(f'{oldest.key}: a reader holds its memory')
    self._live.popleft()
    if self._by_key.get(oldest.key) is oldest:
      del self._by_key[oldest.key]

  def _is_free(self, cell: int) -> bool:
    """Returns whether no reader holds the retired entry of a cell."""
    start = segment.cell_offset(cell)
    if not locks.try_lock(self._fd, fcntl.F_WRLCK, start):
      return False
    locks.try_lock(self._fd, fcntl.F_UNLCK, start)
    return True
