"""Interfaces of a store of snapshots: of those who take them, and who read."""

from __future__ import annotations

import abc
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moetion_jax import errors
from moetion_jax.snapshots import (
  file as snapshot_file,
  manifest as manifest_lib,
)


class SnapshotFullError(errors.StoreError):
  """All room is in use, by snapshots that must be kept or by readers."""


class StoredSnapshots:
  """The snapshots of one worker, as any process reads them at any time.

  Its methods are right for a folder as `file` describes it; a store of another
  format overrides all of them.

  Attributes:
    folder: folder of this worker alone, which need not exist.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    """Stores the argument."""
    self.folder = pathlib.Path(folder)

  def paths(self) -> dict[int, pathlib.Path]:
    """Lists the committed snapshots, by iteration, ascending.

    Returns:
      The file or directory of each, in the folder. To remove it is to remove
      the snapshot.
    """
    return snapshot_file.list_snapshots(self.folder)

  def iterations(self) -> list[int]:
    """Returns the iterations of the committed snapshots, ascending."""
    return list(self.paths())

  def manifest(self, iteration: int) -> manifest_lib.Manifest:
    """Returns the description of a snapshot.

    Raises:
      SnapshotCorruptError: it is damaged, or there is no such snapshot.
    """
    return snapshot_file.read_manifest(self._find(iteration))

  def open(
    self, iteration: int, verify: bool = False
  ) -> snapshot_file.StoredSnapshot:
    """Leases a snapshot.

    Args:
      iteration: iteration of the snapshot.
      verify: whether to check all checksums first.

    Raises:
      SnapshotCorruptError: it is damaged, or there is no such snapshot.
    """
    return snapshot_file.open_snapshot(self._find(iteration), verify)

  def _find(self, iteration: int) -> pathlib.Path:
    return self.paths().get(iteration, self.folder / str(iteration))

  def forget(self, iteration: int) -> None:
    """Makes a snapshot no longer count, if there is one.

    Call while nobody writes. Its room may stay for whoever writes here next.
    """
    # Twice, where a writer died before it removed one that it had replaced.
    while (path := self.paths().get(iteration)) is not None:
      (path / snapshot_file.MANIFEST_NAME).unlink(missing_ok=True)

  def falsify(
    self,
    iteration: int,
    change: Callable[[dict[str, np.ndarray]], Iterable[str]],
  ) -> None:
    """Changes arrays of a snapshot in place, and their checksums accordingly.

    Only scripted faults do that: what they did must show by the content alone.

    Args:
      iteration: iteration of the snapshot.
      change: changes some of the arrays, and returns their names.

    Raises:
      SnapshotCorruptError: it is damaged, or there is no such snapshot.
    """
    snapshot_file.falsify(self._find(iteration), change)

  def tear(self, iteration: int) -> None:
    """Cuts a snapshot short, as a death while it is written does.

    Raises:
      SnapshotCorruptError: it is damaged, or there is no such snapshot.
    """
    snapshot_file.tear(self._find(iteration))

  def own_names(self) -> Mapping[str, Any]:
    """Returns the names of all that a store of this format puts in a folder.

    Returns:
      By pattern of a name: None for a file, or the same of the folder's own.
    """
    return snapshot_file.TREE

  def check_is_ours(self) -> None:
    """Checks that nobody else keeps checkpoints in the folder, which exists.

    Raises:
      StoreError: what may be a snapshot is something else.
    """
    snapshot_file.check_is_ours(self.folder)


class Store(StoredSnapshots, abc.ABC):
  """The snapshots of one worker, as it takes them.

  One thread uses it, except `retain` and `interrupt`, which any thread may
  call: `start`, then `save` and `retain` in any order, then `close`. The
  snapshots stay. `registry` names the store in use.
  """

  @abc.abstractmethod
  def start(self) -> None:
    """Takes over the snapshots that a predecessor committed, killed or not.

    Raises:
      StoreError: the store cannot be used, or there is no room.
    """

  @abc.abstractmethod
  def close(self) -> None:
    """Lets go of the store; its snapshots stay. May be called twice."""

  @abc.abstractmethod
  def retain(self, first_iteration: int) -> None:
    """Allows snapshots of earlier iterations to be removed when need be."""

  @abc.abstractmethod
  def enlarge(self, size_bytes: int) -> None:
    """Makes room for larger snapshots, fewer of them if need be.

    May be called before `start`.

    Args:
      size_bytes: size of a snapshot, see `manifest.data_bytes`.

    Raises:
      StoreError: not even one would fit.
    """

  def interrupt(self) -> None:
    """Gives up a save on its way that may take long; later ones fail."""

  @abc.abstractmethod
  def save(
    self,
    iteration: int,
    metadata: dict[str, Any],
    buffers: Sequence[manifest_lib.Buffer],
    *,
    replace: bool = False,
  ) -> int:
    """Saves a snapshot; when this returns, it is committed.

    If the iteration has a snapshot of the same buffers, it must be equal, and
    nothing is done. A snapshot of other buffers (a replay has another slot) is
    kept unless `replace`. A damaged one is replaced in any case.

    Args:
      iteration: iteration of the snapshot, from 0.
      metadata: any JSON object.
      buffers: the snapshot's arrays; pieces may be JAX arrays, which must not
        be donated before this returns.
      replace: whether a snapshot of other operators, or with other bits, takes
        the old one's place; the old one counts until then.

    Returns:
      The bytes written; 0 if the existing snapshot was kept.

    Raises:
      EntryMismatchError: bits diverged; names the buffer or the metadata.
      SnapshotFullError: there is no room until `retain` advances or a lease
        ends.
      OSError: with ENOSPC, somebody else took the memory.
      StoreError: buffers cannot be written, or are too large.
    """

  def _keeps(
    self,
    iteration: int,
    metadata: dict[str, Any],
    buffers: Sequence[manifest_lib.Buffer],
    replace: bool,
  ) -> bool:
    """Decides if the existing snapshot stays, by the rules of `save`.

    Raises:
      EntryMismatchError: it has other bits.
    """
    try:
      with self.open(iteration) as stored:
        old = {b.identity: b.checksum for b in stored.manifest.buffers.values()}
        if old.keys() == {b.identity for b in buffers}:
          try:
            for b in buffers:
              _compare(
                f'snapshot {iteration}, buffer {b.name}',
                f'{old[b.identity]:016x}',
                f'{b.checksum():016x}',
                'checksum ',
              )
            for key in sorted(stored.metadata.keys() | metadata.keys()):
              # As text: the file holds JSON, in which a NaN equals itself.
              _compare(
                f'snapshot {iteration}, metadata {key}',
                json.dumps(stored.metadata.get(key), sort_keys=True),
                json.dumps(metadata.get(key), sort_keys=True),
              )
          except errors.EntryMismatchError:
            if replace:  # it is not trusted
              return False
            raise
        elif replace:
          return False
        stored.verify()
        return True
    except manifest_lib.SnapshotCorruptError:
      return False


def _compare(what: str, was: str, now: str, kind: str = '') -> None:
  if was != now:
    raise errors.EntryMismatchError(
      f'{what}: captured again with other contents: was {kind}{was}, now {now}'
    )
