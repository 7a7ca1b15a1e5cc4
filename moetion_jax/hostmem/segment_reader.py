"""Reading the segments of a store folder: find, lease, map.

A reader looks into the mapped cells, so an entry that is committed is found
without asking anybody, whether its producer lives or not.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pathlib
import re
import threading

import numpy as np

from moetion_jax import errors, keys
from moetion_jax.hostmem import entry, locks, raw_bytes, segment

_SEGMENT_NAME = re.compile(r'stage-(\d+)\.replica-(\d+)\.segment')


class SegmentReader:
  """One producer's entries, seen from any process of the host.

  Not thread-safe. Views outlive `close`.
  """

  def __init__(
    self, path: pathlib.Path, fd: int, layout: segment.SegmentLayout
  ):
    """Stores the arguments; `open` makes them."""
    self.path = path
    self._fd = fd
    self._layout = layout
    self._entries: dict[keys.EntryKey, entry.EntryHeader] = {}
    self._by_cell: dict[int, entry.EntryHeader] = {}
    self._next_sequence = 0

  @classmethod
  def open(cls, path: str | os.PathLike[str]) -> SegmentReader:
    """Maps a segment; `close` it, or use it as a context manager.

    Raises:
      FileNotFoundError: there is no file yet.
      StoreError: the file is no segment, or a damaged one.
    """
    fd = segment.open_file(path)
    try:
      layout = segment.SegmentLayout(fd, writable=False)
    except BaseException as error:
      os.close(fd)
      if isinstance(error, errors.StoreError):
        raise errors.StoreError(f'{path}: {error}') from None
      raise
    return cls(pathlib.Path(path), fd, layout)

  def close(self) -> None:
    """Forgets the file; once."""
    os.close(self._fd)

  def __enter__(self) -> SegmentReader:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  @property
  def generation(self) -> int:
    """Generation of the newest writer."""
    return self._layout.generation

  def is_current(self) -> bool:
    """Returns whether the path still names the file that is mapped."""
    with contextlib.suppress(FileNotFoundError):
      return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
    return False

  def find(self, key: keys.EntryKey) -> entry.EntryHeader | None:
    """Returns the header of a committed entry that is still there, or None.

    Of a file that somebody cut, none is.
    """
    if os.fstat(self._fd).st_size != self._layout.size_bytes:
      return None
    header = self._entries.get(key)
    if header is None or not self._is_live(header):
      self._advance()
      header = self._entries.get(key)
      if header is None or not self._is_live(header):
        return None
    return header

  def entries(self) -> list[entry.EntryHeader]:
    """Lists every entry that is there, oldest first, by reading the cells."""
    self._rescan()
    return list(self._entries.values())

  def view(self, header: entry.EntryHeader) -> np.ndarray | None:
    """Returns an entry's memory, read-only; None if it vanished meanwhile.

    The entry stays while the array, or anything that aliases it, exists.
    """
    if not header.nbytes:
      return np.empty(header.shape, header.dtype)
    # A descriptor of its own, so that the lease has an owner of its own.
    lease_fd = os.open(f'/proc/self/fd/{self._fd}', os.O_RDONLY | os.O_CLOEXEC)
    start = segment.cell_offset(self._cell(header))
    if not locks.try_lock(lease_fd, fcntl.F_RDLCK, start) or not self._is_live(
      header
    ):
      os.close(lease_fd)
      return None
    payload = self._layout.ring[header.offset : header.offset + header.nbytes]
    data = raw_bytes.lend(payload, functools.partial(os.close, lease_fd))
    return entry.from_bytes(data, header)

  def _cell(self, header: entry.EntryHeader) -> int:
    return header.sequence % self._layout.cells

  def _is_live(self, header: entry.EntryHeader) -> bool:
    cell = self._cell(header)
    return self._layout.is_live(cell) and self._layout.header(cell) == header

  def _advance(self) -> None:
    """Indexes what was committed since the last look."""
    while self._layout.commits[self._next_sequence % self._layout.cells]:
      header = self._layout.header(self._next_sequence % self._layout.cells)
      if header is not None and header.sequence < self._next_sequence:
        return
      # Damaged, which hides nothing but itself; or overtaken by a whole round.
      if header is None or header.sequence > self._next_sequence:
        self._rescan()
        return
      cell = self._cell(header)
      old = self._by_cell.get(cell)
      if old is not None and self._entries.get(old.key) is old:
        del self._entries[old.key]
      self._by_cell[cell] = self._entries[header.key] = header
      self._next_sequence += 1

  def _rescan(self) -> None:
    headers = self._layout.headers()
    self._entries = {
      header.key: header for header in headers if self._is_live(header)
    }
    self._by_cell = {self._cell(header): header for header in headers}
    if headers:
      self._next_sequence = headers[-1].sequence + 1


class StoreIndex:
  """The entries of every segment in a store folder. Thread-safe.

  It needs no `start`: segments are opened when they are first asked for.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    """Stores the folder's path."""
    self._folder = pathlib.Path(folder)
    self._lock = threading.Lock()
    self._readers: dict[tuple[int, int], SegmentReader] = {}

  def close(self) -> None:
    """Forgets all segments; arrays that were taken stay valid."""
    with self._lock:
      for reader in self._readers.values():
        reader.close()
      self._readers.clear()

  def take(
    self, key: keys.EntryKey, *, is_current: bool = False
  ) -> tuple[entry.EntryHeader, np.ndarray] | None:
    """Returns an entry's header and memory, leased; None if it is not there.

    Args:
      key: name of the entry.
      is_current: whether only a segment counts that was not replaced since the
        last `refresh`.

    Raises:
      StoreError: the segment is damaged.
    """
    with self._lock:
      if is_current:
        self._forget_replaced((key.stage, key.replica))
      reader = self._reader(key.stage, key.replica)
      if reader is None or (header := reader.find(key)) is None:
        return None
      array = reader.view(header)
      return None if array is None else (header, array)

  def refresh(self) -> None:
    """Lets go of segments whose file was replaced or removed."""
    with self._lock:
      self._forget_replaced(*self._readers)

  def _forget_replaced(self, *names: tuple[int, int]) -> None:
    for name in names:
      reader = self._readers.get(name)
      if reader is not None and not reader.is_current():
        reader.close()
        del self._readers[name]

  def entries(self) -> list[entry.EntryHeader]:
    """Lists every committed entry of the folder, segment by segment.

    Raises:
      StoreError: a segment is damaged.
    """
    self.refresh()
    with self._lock:
      headers = []
      for path in sorted(self._folder.glob('*.segment')):
        name = _SEGMENT_NAME.fullmatch(path.name)
        if name and (reader := self._reader(int(name[1]), int(name[2]))):
          headers.extend(reader.entries())
      return headers

  def _reader(self, stage: int, replica: int) -> SegmentReader | None:
    reader = self._readers.get((stage, replica))
    if reader is None:
      path = segment.segment_path(self._folder, stage, replica)
      try:
        reader = SegmentReader.open(path)
      except FileNotFoundError:
        return None
      self._readers[stage, replica] = reader
    return reader
