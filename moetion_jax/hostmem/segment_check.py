"""Damage in a segment: finding it all, and dropping it."""

from __future__ import annotations

import dataclasses
import fcntl
import os

from moetion_jax import errors, keys
from moetion_jax.hostmem import locks, raw_bytes, segment, segment_reader


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
  with segment_reader.SegmentReader.open(path) as reader:
    headers = reader.entries()
    damaged = [
      Damage(error.key.iteration, stage, replica, str(error.key))
      for error in reader.damaged_entries(headers)
    ]
    cells = reader.damaged_cells()
    for cell in cells:
      if (iteration := reader.oldest_iteration(cell)) is not None:
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
  dropped = []
  with open(path, 'r+b') as file:
    if not locks.try_lock(file.fileno(), fcntl.F_WRLCK, 0):
      raise errors.StoreError(f'{path}: its writer lives')
    layout = segment.SegmentLayout(file.fileno(), writable=True)
    for header in layout.headers():
      cell = header.sequence % layout.cells
      if header.key.iteration < first_iteration or layout.is_retired(cell):
        continue
      data = layout.ring[header.offset : header.offset + header.nbytes]
      is_whole = raw_bytes.checksum(data) == header.checksum
      if not is_whole or not layout.is_live(cell):
        layout.retire(cell)
        dropped.append(header.key)
    # The mapping holds the open file, and so the lock, beyond the close.
    locks.try_lock(file.fileno(), fcntl.F_UNLCK, 0)
  return dropped
