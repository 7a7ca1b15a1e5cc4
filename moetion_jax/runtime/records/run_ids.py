"""Which store is a run's: by the id in its workdir, told from its copies'."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping

from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.runtime.records import copies, held_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
  """The id of a run that begins.

  Attributes:
    run_id: the id.
    earlier_id: the id of the run whose stores go; '' if there are none, or they
      may be those of another folder, of which this one is a copy.
    note: what to tell the user; '' for nothing.
  """

  run_id: str
  earlier_id: str = ''
  note: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunIds:
  """Chooses the id of the run in a workdir.

  Attributes:
    path: the workdir; to choose, locked and checked.
    hostmem_dir: the directory of the stores.
    locked_id: the id in its lock file; '' for none.
    durable_dir: the directory of snapshots on disk; '' for none.
  """

  path: str | os.PathLike[str]
  hostmem_dir: str
  locked_id: str = ''
  durable_dir: str = ''

  def choose(self) -> Chosen:
    """Chooses the id with which a run goes on: the stored one, or a new one.

    A copy of another workdir gets an id of its own: the store stays with the
    other one, which may live.
    """
    run_id = held_run.read_id(self.path) or self._former()
    run_id = run_id or self._begun()
    found = self.find_original(run_id)
    if found.original:
      return Chosen(
        run_id=held_run.new_id(),
        note=f'{self.path} is a copy of {found.original}. The store of that '
        'run is left alone: iterations of which this folder has no snapshots '
        'are done again, and compared with the lines it has.',
      )
    note = found.doubt and (
      f'Whether {self.path} is {found.doubt}, cannot be told: it goes on as '
      "the run's own folder, with its stores. If there is another one, that "
      'does its iterations again.'
    )
    return Chosen(run_id=run_id, note=note)

  def choose_new(self) -> Chosen:
    """Chooses the id of a run that begins anew where another one was.

    It is not the other one's: what that left, wherever, is never gone on with.
    """
    config = held_run.read_config(self.path)
    if config is None:
      return Chosen(run_id=self._begun())
    earlier = held_run.read_id(self.path) or self._former()
    is_other = self.locked_id != earlier
    run_id = self._begun() if is_other else held_run.new_id()
    found = self.find_original(earlier)
    if found.relation is copies.Relation.OWN:
      return Chosen(run_id=run_id, earlier_id=earlier)
    what = f'is a copy of {found.original}'
    if found.doubt:
      what = f'is {found.doubt}, which cannot be told'
    return Chosen(
      run_id=run_id,
      note=f'{self.path} {what}. The store of that run, if there is one, is '
      'left alone.',
    )

  def find(self) -> str:
    """Finds the id of the run in a folder that is not locked; changes nothing.

    Returns:
      The stored id. A version that stored none made one of the folder's path:
      that under which something lies, else that of the path as it is given.
    """
    found = held_run.read_id(self.path) or self._former()
    return found or run_store.former_id(os.path.abspath(self.path))

  def find_original(self, run_id: str) -> copies.Finding:
    """Finds out whether the folder is a copy of another one.

    Args:
      run_id: the id that the folder has.
    """
    stores = run_store.folders(self.hostmem_dir, run_id) if run_id else []
    config = None
    with contextlib.suppress(OSError, held_run.NotOursError):
      config = held_run.read_config(self.path)
    # The first host's is the one that every start opens.
    owner = store_folder.read_owner(stores[0]) if stores else None
    return copies.conclude(
      self._judge(owner, run_id), self._judge(config, run_id)
    )

  def _judge(
    self, record: Mapping[str, object] | None, run_id: str
  ) -> copies.Finding | None:
    """Judges the folder by one record; None if no folder is recorded there.

    Args:
      record: the content of config.json, or of a store's owner file.
      run_id: the id that the folder has.
    """
    path = (record or {}).get(held_run.WORKDIR)
    if not record or not isinstance(path, str) or not os.path.isabs(path):
      return None
    mark = copies.Mark(
      path=path,
      identity=copies.identity_from_json(record.get(held_run.FOLDER)),
    )
    at_path = self._at_path(mark, run_id)
    relation = copies.judge(store_folder.identity_of(self.path), mark, at_path)
    return copies.Finding(relation=relation, recorded=path, at_path=at_path)

  def _at_path(self, mark: copies.Mark, run_id: str) -> copies.AtPath:
    try:
      if os.path.samefile(self.path, mark.path):
        return copies.AtPath.HERE
      config = held_run.read_config(mark.path) or {}
      is_itself = store_folder.identity_of(mark.path) == mark.identity
    except (OSError, held_run.NotOursError):
      return copies.AtPath.GONE
    if run_id and config.get(held_run.RUN_ID) == run_id:
      return copies.AtPath.TWIN
    return copies.AtPath.LEFT if is_itself else copies.AtPath.GONE

  def _begun(self) -> str:
    """Returns the id of a run that was never accepted, or else a new one.

    It stands in the lock file alone, which stays behind when all else is moved
    away: what is stored under it is then the run's that was moved.
    """
    run_id = self.locked_id
    if not run_id:
      return held_run.new_id()
    stores = run_store.folders(self.hostmem_dir, run_id)
    is_ours = (
      bool(stores)
      and all(map(store_folder.is_empty, stores))
      and not self._is_on_disk(run_id)
      and self.find_original(run_id).relation is copies.Relation.OWN
    )
    return run_id if is_ours else held_run.new_id()

  def _is_on_disk(self, run_id: str) -> bool:
    """Tells whether the directory for snapshots on disk has a run's folder."""
    name = run_store.folder_name(run_id)
    return (
      bool(self.durable_dir) and pathlib.Path(self.durable_dir, name).is_dir()
    )

  def _former(self) -> str:
    """Finds what a version left that named stores after the workdir's path.

    Returns:
      The id under which something lies; '' if nothing does.
    """
    try:
      if held_run.read_config(self.path) is None:
        return ''
    except (OSError, held_run.NotOursError):
      return ''
    for spelling in (os.path.abspath(self.path), os.path.realpath(self.path)):
      run_id = run_store.former_id(spelling)
      stores = run_store.folders(self.hostmem_dir, run_id)
      if stores or self._is_on_disk(run_id):
        return run_id
    return ''
