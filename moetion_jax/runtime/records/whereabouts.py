"""The places of a run's stores and snapshots on disk, in config.json.

A run may go on with another --hostmem_dir, --durable_dir or --policy. What it
leaves in a place stays good as long as the run goes on with the same software;
after an accepted change nothing of before may be folded, so that a place which
was left before is never gone on from. All of them are removed at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from moetion_jax import errors
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.runtime.records import own_files

FIELDS = 'hostmem_dir', 'on_disk', 'left', 'made'
HOSTMEM_DIR, ON_DISK, LEFT, MADE = FIELDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whereabouts:
  """Places of a run, now and before.

  Attributes:
    hostmem_dir: the directory of its stores, a real path; '' if not recorded.
    on_disk: the folder of its snapshots on disk, a real path, or a name in the
      workdir; '' for none; None if not recorded.
    left_hostmem: by directory of stores that it left, the number of changes of
      its environment that were finished by then.
    left_on_disk: the same by folder of snapshots on disk.
    made: directories that were not there before the run had folders of
      snapshots in them, real paths.
  """

  hostmem_dir: str = ''
  on_disk: str | None = None
  left_hostmem: Mapping[str, int] = dataclasses.field(default_factory=dict)
  left_on_disk: Mapping[str, int] = dataclasses.field(default_factory=dict)
  made: tuple[str, ...] = ()

  @classmethod
  def from_json(cls, config: Mapping[str, Any]) -> Whereabouts:
    """Reads them from the content of config.json.

    Raises:
      ValueError: they are damaged.
    """
    left, made = config.get(LEFT, {}), config.get(MADE, [])
    for name, value, kind in (
      (HOSTMEM_DIR, config.get(HOSTMEM_DIR, ''), str),
      (ON_DISK, config.get(ON_DISK, ''), str),
      (LEFT, left, dict),
      (MADE, made, list),
    ):
      if not isinstance(value, kind):
        raise ValueError(f'"{name}" in it is damaged')
    if not all(isinstance(path, str) for path in made):
      raise ValueError(f'"{MADE}" in it is damaged')
    if not {*left} <= {HOSTMEM_DIR, ON_DISK} or not all(
      isinstance(of_kind, dict)
      and all(type(number) is int for number in of_kind.values())
      for of_kind in left.values()
    ):
      raise ValueError(f'"{LEFT}" in it is damaged')
    return cls(
      hostmem_dir=config.get(HOSTMEM_DIR, ''),
      on_disk=config.get(ON_DISK),
      left_hostmem=left.get(HOSTMEM_DIR, {}),
      left_on_disk=left.get(ON_DISK, {}),
      made=tuple(made),
    )

  def to_json(self) -> dict[str, Any]:
    """Returns the fields of config.json; `from_json` is the inverse."""
    left = {
      name: dict(of_kind)
      for name, of_kind in (
        (HOSTMEM_DIR, self.left_hostmem),
        (ON_DISK, self.left_on_disk),
      )
      if of_kind
    }
    return {
      HOSTMEM_DIR: self.hostmem_dir,
      **({} if self.on_disk is None else {ON_DISK: self.on_disk}),
      **({LEFT: left} if left else {}),
      **({MADE: list(self.made)} if self.made else {}),
    }

  def of_copy(self) -> Whereabouts:
    """Returns the places of a copy of the workdir: those that lie in it."""
    name = own_files.DURABLE_NAME
    left = {k: v for k, v in self.left_on_disk.items() if k == name}
    return Whereabouts(
      on_disk=self.on_disk and (name if self.on_disk == name else ''),
      left_on_disk=left,
    )

  def moved_to(self, here: Whereabouts, changes: int) -> Whereabouts:
    """Returns the whereabouts of a run that goes on elsewhere.

    Args:
      here: where it is from now on.
      changes: the number of changes that were finished before.
    """
    return Whereabouts(
      hostmem_dir=here.hostmem_dir,
      on_disk=here.on_disk,
      left_hostmem=_left(
        self.left_hostmem, self.hostmem_dir, here.hostmem_dir, changes
      ),
      left_on_disk=_left(
        self.left_on_disk, self.on_disk, here.on_disk, changes
      ),
      made=tuple(dict.fromkeys((*self.made, *here.made))),
    )


def _left(
  left: Mapping[str, int], was: str | None, now: str | None, changes: int
) -> dict[str, int]:
  """Returns the places that a run left, once it has gone on elsewhere.

  Args:
    left: those that it had left before; see `Whereabouts`.
    was: where it was.
    now: where it is.
    changes: the number of changes that were finished before.
  """
  added = {was: changes} if was and was != now else {}
  return {k: v for k, v in ({**left, **added}).items() if k != now}


def of_run(hostmem_dir: str, on_disk: str, workdir: str) -> Whereabouts:
  """Returns where a run is that begins now.

  Args:
    hostmem_dir: the directory of its stores.
    on_disk: the folder of its snapshots on disk; '' for none.
    workdir: its workdir.
  """
  in_workdir = os.path.join(workdir, own_files.DURABLE_NAME)
  made: list[str] = []
  if on_disk == in_workdir:
    on_disk = own_files.DURABLE_NAME  # it is moved with the workdir
  elif on_disk:
    directory, name = os.path.split(on_disk)
    on_disk = os.path.join(os.path.realpath(directory), name)
    made = [
      str(path)
      for path in pathlib.Path(on_disk).parents
      if not os.path.lexists(path)
    ]
  return Whereabouts(
    hostmem_dir=os.path.realpath(hostmem_dir),
    on_disk=on_disk,
    made=tuple(made),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removal:
  """Remains of a removal.

  Attributes:
    others: paths of what is not the run's, and stays.
    failed: paths of what is, and could not be removed, each with the reason.
  """

  others: tuple[str, ...] = ()
  failed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """Traces of a run that it finds where it begins, and elsewhere.

  Attributes:
    workdir: the run's workdir.
    run_id: the run's id.
    known: its recorded whereabouts.
    here: those of the start that is made now.
    changes: the number of changes that were finished.
  """

  workdir: str
  run_id: str
  known: Whereabouts
  here: Whereabouts
  changes: int = 0

  def check(self) -> None:
    """Checks that nothing is here that the run must not go on from.

    Raises:
      errors.ConfigError: there is something of before an accepted change.
    """
    known, here = self.known, self.here
    found = self._stores(here.hostmem_dir)
    if found and self._is_stale(
      here.hostmem_dir, known.hostmem_dir or None, known.left_hostmem
    ):
      where = known.hostmem_dir
      flags = f'--hostmem_dir={where}'
      raise _refusal(HOSTMEM_DIR, here.hostmem_dir, found[0], where, flags)
    folder = self._folder(here.on_disk or '')
    if not here.on_disk or not has_snapshots(folder):
      return
    if self._is_stale(here.on_disk, known.on_disk, known.left_on_disk):
      where, flags = self._snapshots()
      if not known.on_disk:
        flags += ' and the --policy of then'
      is_outside = here.on_disk != own_files.DURABLE_NAME
      directory = folder.parent if is_outside else ''
      raise _refusal('durable_dir', directory, folder, where, flags)

  def _is_stale(
    self, here: str, known: str | None, left: Mapping[str, int]
  ) -> bool:
    """Tells whether what is here was left before an accepted change.

    Args:
      here: the place.
      known: the recorded place; None if it was not recorded.
      left: see `Whereabouts`.
    """
    is_elsewhere = known is not None and here != known and bool(self.changes)
    return is_elsewhere and left.get(here) != self.changes

  def note(self) -> str:
    """Says where the run's snapshots are, if they are not here; '' if so."""
    known, here = self.known, self.here
    where, flags = self._snapshots()
    if known.on_disk:
      is_there = known.on_disk != here.on_disk and has_snapshots(where)
    else:
      is_elsewhere = known.hostmem_dir not in ('', here.hostmem_dir)
      is_there = is_elsewhere and bool(self._stores(known.hostmem_dir))
    if not is_there:
      return ''
    return (
      f"The run's snapshots are in {where}: with {flags} it goes on from them."
    )

  def _snapshots(self) -> tuple[str, str]:
    """Returns where the snapshots last were, and the flags that lead there."""
    if not self.known.on_disk:
      where = self.known.hostmem_dir
      return where, f'--hostmem_dir={where}'
    folder = self._folder(self.known.on_disk)
    flags = '--policy=two_phase without --durable_dir'
    if self.known.on_disk != own_files.DURABLE_NAME:
      flags = f'--policy=two_phase --durable_dir={folder.parent}'
    return str(folder), flags

  def _folder(self, on_disk: str) -> pathlib.Path:
    return pathlib.Path(self.workdir, on_disk)

  def _stores(self, hostmem_dir: str) -> list[pathlib.Path]:
    if not os.path.isdir(hostmem_dir):
      return []
    return run_store.folders(hostmem_dir, self.run_id)

  def remove_elsewhere(self) -> Removal:
    """Removes the run's stores and snapshots on disk in all places but here."""
    others: list[str] = []
    failed: list[str] = []
    known, here = self.known, self.here
    for directory in sorted({*known.left_hostmem, known.hostmem_dir}):
      if os.path.isdir(directory) and not os.access(
        directory, os.X_OK, effective_ids=True
      ):
        failed.append(f'{directory}: may not be searched')
      elif directory not in ('', here.hostmem_dir):
        for path in self._stores(directory):
          try:
            store_folder.remove_store(path)
          except errors.StoreError as error:
            failed.append(f'{path}: {error}')
    for on_disk in sorted({*known.left_on_disk, known.on_disk or ''}):
      folder = self._folder(on_disk)
      if on_disk not in ('', here.on_disk) and self._is_its(folder):
        try:
          others += own_files.remove_durable(str(folder))
        except OSError as error:
          failed.append(f'{error.filename}: {error.strerror}')
    return Removal(others=tuple(others), failed=tuple(failed))

  def remove_made(self) -> None:
    """Removes the directories that the run made, as far as they are empty."""
    for path in sorted({*self.known.made, *self.here.made}, reverse=True):
      with contextlib.suppress(OSError):  # others have put something there
        os.rmdir(path)

  def _is_its(self, folder: pathlib.Path) -> bool:
    """Tells whether a folder has the run's id, or lies in its workdir."""
    is_inside = folder == self._folder(own_files.DURABLE_NAME)
    return is_inside or folder.name == run_store.folder_name(self.run_id)


def _refusal(
  flag: str, value: object, stale: pathlib.Path, where: str, flags: str
) -> errors.ConfigError:
  return errors.ConfigError(
    flag,
    value,
    f'{stale} is of before this run went on with other software, in {where}; '
    f'pass {flags}, or remove that folder',
  )


def has_snapshots(folder: str | os.PathLike[str]) -> bool:
  """Returns whether a run's folder on disk holds snapshots to go on with."""
  return any(pathlib.Path(folder).glob('*.snapshots/*'))
