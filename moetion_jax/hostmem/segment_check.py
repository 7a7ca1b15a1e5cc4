"""Damage in a segment: finding it all, and dropping it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterable, Iterator

import numpy as np
import xxhash

from moetion_jax import errors, keys
from moetion_jax.hostmem import entry, locks, segment

_PIECE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, order=True)
class Damage:
  """A damaged entry.

  Attributes:
    iteration: its iteration; where that is damaged too, one that is not newer.
    stage: the stage that published it.
    replica: the replica that published it.
    entry: what is damaged, for people.
  """

  iteration: int
  stage: int
  replica: int
  entry: str


@dataclasses.dataclass(frozen=True)
class SegmentCheck:
  """The result of a check.

  Attributes:
    entries: number of entries that were checked, damaged ones included.
    damaged: those that are damaged.
  """

  entries: int
  damaged: tuple[Damage, ...]


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
  """Puts a file's path before what is wrong with it."""
  try:
    yield
  except errors.StoreError as error:
    raise errors.StoreError(f'{path}: {error}') from None


class SegmentFile:
  """A segment all bits of which are read, and none is mapped.

  Whoever touches mapped memory that somebody cut off dies of SIGBUS; here that
  raises StoreError. The segment's writer may live.
  """

  def __init__(self, path: str, fd: int):
    """Stores the arguments; `open` makes them."""
    self._path = path
    self._fd = fd
    self._piece = memoryview(bytearray(_PIECE_BYTES))

  @classmethod
  def open(
    cls, path: str | os.PathLike[str], flags: int = os.O_RDONLY
  ) -> SegmentFile:
    """Opens a segment; `close` it, or use it as a context manager.

    Raises:
      OSError: the file cannot be opened, or there is none.
    """
    return cls(os.fspath(path), segment.open_file(path, flags))

  def close(self) -> None:
    """Closes the file; once."""
    os.close(self._fd)

  def __enter__(self) -> SegmentFile:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def entries(self) -> list[entry.EntryHeader]:
    """Lists every entry that is there, oldest first.

    Raises:
      StoreError: the file is no segment, or a damaged one.
    """
    cells = self._cells()
    return [h for h in cells.headers() if cells.is_live(_cell(cells, h))]

  def damaged_entries(
    self, headers: Iterable[entry.EntryHeader]
  ) -> list[entry.EntryHeader]:
    """Lists the damaged ones among entries; none that was retired meanwhile.

    Raises:
      StoreError: the file is cut or damaged by now.
    """
    cells = self._cells()
    damaged = [one for one in headers if not self._is_whole(one, cells)]
    # Before a writer overwrites an entry, it retires it.
    live = {header.sequence: header for header in self.entries()}
    return [header for header in damaged if live.get(header.sequence) == header]

  def damaged_cells(self) -> list[int]:
    """Lists the cells whose commit word does not match their fields.

    Or whose mark is none that a writer makes.

    Raises:
      StoreError: the file is cut or damaged by now.
    """
    first, second = self._cells(), self._cells()
    # Twice: a living writer may have been between two words.
    return [
      cell
      for cell in np.flatnonzero(first.commits).tolist()
      if _is_damaged(first, cell) and _is_damaged(second, cell)
    ]

  def oldest_iteration(self, cell: int) -> int | None:
    """Returns the first iteration that a damaged cell's entry can be of.

    Exact if no more than a bit of its fields is damaged. Otherwise: entries are
    written in order: it is not older than the one before it, or, if
    that is gone, not older by more than one than the oldest one.

    Args:
      cell: a damaged cell.

    Returns:
      The iteration, at least 1; None if nobody needs the entry any more.

    Raises:
      StoreError: the file is cut or damaged by now.
    """
    cells = self._cells()
    if cells.is_retired(cell):
      return None
    # A guess that is too old would count for nothing, see `suspicion`.
    if (known := cells.mended_header(cell)) is not None:
      return known.key.iteration
    live = self.entries()
    sequence = cells.sequence(cell)
    for header in live:
      is_before = _cell(cells, header) == (cell - 1) % cells.cells
      if is_before and header.sequence == sequence - 1:
        return header.key.iteration
    return max(1, min((h.key.iteration for h in live), default=1) - 1)

  def drop_damaged(self, first_iteration: int) -> list[keys.EntryKey]:
    """See `drop_damaged`; the file is open for writing."""
    if not locks.try_lock(self._fd, fcntl.F_WRLCK, 0):
      raise errors.StoreError(f'{self._path}: its writer lives')
    dropped = []
    cells = self._cells()
    for header in cells.headers():
      cell = _cell(cells, header)
      if header.key.iteration < first_iteration or cells.is_retired(cell):
        continue
      if not cells.is_live(cell) or not self._is_whole(header, cells):
        segment.write_retired(self._fd, cell)
        dropped.append(header.key)
    return dropped

  def _cells(self) -> segment.Cells:
    with _named(self._path):
      return segment.read_cells(self._fd)

  def _is_whole(self, header: entry.EntryHeader, cells: segment.Cells) -> bool:
    """Reads an entry's payload; returns whether it has its checksum."""
    digest = xxhash.xxh3_64()
    first = cells.ring_offset + header.offset
    end = first + header.nbytes
    for start in range(first, end, _PIECE_BYTES):
      piece = self._piece[: end - start]
      with _named(self._path):
        segment.read_bytes(self._fd, piece, start)
      digest.update(piece)
    return digest.intdigest() == header.checksum


def _cell(cells: segment.Cells, header: entry.EntryHeader) -> int:
  return header.sequence % cells.cells


def _is_damaged(cells: segment.Cells, cell: int) -> bool:
  return bool(cells.commits[cell]) and (
    cells.header(cell) is None
    or not (cells.is_live(cell) or cells.is_retired(cell))
  )


def check(
  path: str | os.PathLike[str], stage: int, replica: int
) -> SegmentCheck:
  """Reads every entry of a segment, headers and payloads.

  An entry that its writer retires meanwhile is passed over.

  Args:
    path: path of the segment.
    stage: stage of its producer.
    replica: replica of its producer.

  Raises:
    FileNotFoundError: there is no such segment.
    StoreError: the file is no segment, or a damaged one.
  """
  with SegmentFile.open(path) as file:
    headers = file.entries()
    damaged = [
      Damage(header.key.iteration, stage, replica, str(header.key))
      for header in file.damaged_entries(headers)
    ]
    cells = file.damaged_cells()
    for cell in cells:
      if (iteration := file.oldest_iteration(cell)) is not None:
        what = f'cell {cell} of {os.fspath(path)}'
        damaged.append(Damage(iteration, stage, replica, what))
    return SegmentCheck(len(headers) + len(cells), tuple(damaged))


def drop_damaged(
  path: str | os.PathLike[str], first_iteration: int
) -> list[keys.EntryKey]:
  """Retires entries with damaged bytes or marks, to be written again.

  Call it only while nobody writes the segment.

  Args:
    path: path of the segment.
    first_iteration: first iteration to check; older entries are left alone.

  Returns:
    Names of the retired entries.

  Raises:
    StoreError: the file is no segment, or its writer is alive.
    OSError: the file cannot be opened.
  """
  with SegmentFile.open(path, os.O_RDWR) as file:
    return file.drop_damaged(first_iteration)
