"""A check of all that a segment holds, while its writer may go on."""

from __future__ import annotations

import dataclasses
import os

from moetion_jax.hostmem import entry, segment_reader


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
    headers, damaged = reader.entries(), []
    for header in headers:
      if (array := reader.view(header)) is None:
        continue
      try:
        entry.verify(header, array)
      except entry.EntryCorruptError:
        damaged.append(
          Damage(header.key.iteration, stage, replica, str(header.key))
        )
    cells = reader.damaged_cells()
    for cell in cells:
      if (iteration := reader.oldest_iteration(cell)) is not None:
        what = f'cell {cell} of {os.fspath(path)}'
        damaged.append(Damage(iteration, stage, replica, what))
    return SegmentCheck(len(headers) + len(cells), tuple(damaged))
