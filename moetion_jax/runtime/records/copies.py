"""Tells a run's own folder from copies of it.

A folder that is moved inside a file system keeps its device and inode; a copy
has others. Both are recorded, with the path: in the folder's config.json, and
by the owner of each store.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


class Relation(enum.Enum):
  """The relation of a folder to the one in which its run last began."""

  OWN = 'own'
  COPY = 'copy'
  UNTOLD = 'untold'


class AtPath(enum.Enum):
  """Finding at a recorded path."""

  HERE = 'here'  # the folder in question
  TWIN = 'twin'  # another folder, with a run of the same id
  LEFT = 'left'  # the recorded folder itself, which the run has left
  GONE = 'gone'  # none of these


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
  """A folder, as it is recorded.

  Attributes:
    path: its absolute path.
    identity: its device and inode; None if they were not recorded.
  """

  path: str
  identity: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """The result of a search for what a folder is a copy of.

  Attributes:
    relation: the relation.
    recorded: the recorded path that says so; '' for `OWN`.
    at_path: what is found there.
  """

  relation: Relation = Relation.OWN
  recorded: str = ''
  at_path: AtPath = AtPath.HERE

  @property
  def original(self) -> str:
    """The folder of which it is a copy, in words; '' if it is none."""
    if self.relation is not Relation.COPY:
      return ''
    if self.at_path is AtPath.TWIN:
      return self.recorded
    return f'the folder that was {self.recorded}, and is elsewhere now, or gone'

  @property
  def doubt(self) -> str:
    """What cannot be told, in words; '' if all can."""
    if self.relation is not Relation.UNTOLD:
      return ''
    if self.at_path is AtPath.HERE:
      return 'its own folder, put back where it was, or a copy'
    return f'its own folder, moved from {self.recorded}, or a copy'


def identity_from_json(value: Any) -> tuple[int, int] | None:
  """Makes the identity of what JSON has; None for anything else."""
  if not isinstance(value, list) or [type(x) for x in value] != [int, int]:
    return None
  return value[0], value[1]


def judge(here: tuple[int, int], recorded: Mark, at_path: AtPath) -> Relation:
  """Judges a folder that holds a run, by one record of that run's folder.

  Args:
    here: the folder's device and inode.
    recorded: the record.
    at_path: what is at the recorded path.
  """
  known = recorded.identity
  # The number of a device may change when it is mounted again.
  is_there = at_path is AtPath.HERE
  if known and (known == here or (is_there and known[1] == here[1])):
    return Relation.OWN
  if at_path is AtPath.TWIN:
    return Relation.COPY
  if not known:  # of a version that recorded the path alone
    return Relation.OWN if is_there else Relation.UNTOLD
  # Moved inside its file system it would have its inode still; put back in its
  # place, or moved between file systems, it cannot have.
  # Where its contents were moved, or copied and removed, it is there still.
  is_moved_inside = known[0] == here[0] and at_path is AtPath.GONE
  return Relation.COPY if is_moved_inside else Relation.UNTOLD


def conclude(of_store: Finding | None, of_folder: Finding | None) -> Finding:
  """Concludes from what the run's store and its folder say.

  Args:
    of_store: what the owner of the store says; None if there is none.
    of_folder: what config.json in the folder says; None if there is none.
  """
  # Whoever took the store last is recorded there, later than in the folder.
  if of_store and of_store.at_path is AtPath.TWIN:
    return of_store
  # The store may have been left since then, as in another --hostmem_dir.
  if of_folder and of_folder.relation is Relation.OWN:
    return of_folder
  found = [one for one in (of_folder, of_store) if one]
  for relation in (Relation.COPY, Relation.UNTOLD):
    for one in found:
      if one.relation is relation:
        return one
  return Finding()
