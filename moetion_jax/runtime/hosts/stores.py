"""The host stores of a run, as the leader sees them.

All hosts are on this machine for now.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping

from moetion_jax import errors
from moetion_jax.hostmem import segment, segment_check
from moetion_jax.recovery import recoverer as recoverer_lib
from moetion_jax.runtime.hosts import hosts as hosts_lib
from moetion_jax.runtime.records import own_files, recorder as recorder_lib
from moetion_jax.snapshots import file as snapshot_file, folders


class Stores:
  """The file-system view of every stage's logs and snapshots."""

  def __init__(
    self,
    stages: int,
    replicas: int,
    hosts: hosts_lib.Hosts,
    recoverer: recoverer_lib.Recoverer,
    recorder: recorder_lib.Recorder,
    durable_folder: str = '',
  ):
    """Stores the arguments.

    Args:
      stages: number of stages of the run.
      replicas: number of replicas of each stage.
      hosts: the run's hosts.
      recoverer: the recoverer, which is told what the stores hold.
      recorder: the recorder, which writes an event for each dropped entry.
      durable_folder: folder of the snapshots; '': they lie in the hosts'
        stores.
    """
    self._durable_folder = durable_folder
    self._stages = range(stages)
    self._replicas = range(replicas)
    self._hosts = hosts
    self._recoverer = recoverer
    self._recorder = recorder
    self._orphans: set[pathlib.Path] = set()

  def log_paths(self, stage: int) -> list[pathlib.Path]:
    """Returns the paths of the logs of a stage's replicas."""
    folder = self._hosts.store_of(stage)
    return [segment.segment_path(folder, stage, r) for r in self._replicas]

  def _snapshots_of(self, stage: int) -> pathlib.Path:
    """Returns the folder of the snapshots of a stage's workers."""
    if self._durable_folder:
      return pathlib.Path(self._durable_folder)
    return self._hosts.store_of(stage)

  def rescan(
    self,
    stages: Iterable[int] | None = None,
    on_unreadable: Callable[[str], None] = lambda reason: None,
  ) -> frozenset[int]:
    """Tells the recoverer which snapshots the stores hold of stages.

    Args:
      stages: the stages to scan; None: all.
      on_unreadable: see `folders.read_shares`.

    Returns:
      Those of all stages that miss a log.
    """
    for stage in self._stages if stages is None else stages:
      folder = self._snapshots_of(stage)
      shares = folders.read_shares(folder, stage, on_unreadable)
      self._recoverer.rescan(stage, shares)
    return frozenset(
      stage
      for stage in self._stages
      if not all(path.exists() for path in self.log_paths(stage))
    )

  def too_small(self) -> frozenset[int]:
    """Returns the stages that have a log smaller than this run needs."""
    small = set()
    for stage in self._stages:
      need = self._recoverer.log_size(stage)
      for path in self.log_paths(stage):
        if path.exists() and path.stat().st_size < need.file_bytes:
          small.add(stage)
    return frozenset(small)

  def newest_entry(self, stages: Iterable[int] | None = None) -> int:
    """Returns the newest iteration of which the stages have an entry."""
    return max(
      segment.newest_iteration(path)
      for stage in (self._stages if stages is None else stages)
      for path in self.log_paths(stage)
    )

  def reached(self, stage: int) -> int:
    """Newest iteration that a stage's logs and snapshots have."""
    newest = self._recoverer.newest_snapshot(stage)
    return max(self.newest_entry([stage]), newest)

  def drop_logs(self) -> None:
    """Removes all logs; call when nobody writes or may still read them."""
    for stage in self._stages:
      for path in self.log_paths(stage):
        path.unlink(missing_ok=True)

  def forget_snapshots(self, stages: Collection[int]) -> None:
    """Removes all snapshots of stages that begin anew; they only take room."""
    for stage in stages:
      for path in folders.snapshots_folders(self._snapshots_of(stage), stage):
        self._remove(path)
      self._recoverer.rescan(stage, ())

  def forget_newer(self, iterations: Mapping[int, int]) -> None:
    """Invalidates all later snapshots, which will be different.

    Call while nobody writes. The pages stay for whoever writes here next. Of
    snapshots on disk the copies in memory go too: with them the next ones of
    the same iterations are compared.

    Args:
      iterations: by stage, the newest snapshot that still counts.
    """
    for stage, iteration in iterations.items():
      for root in {self._snapshots_of(stage), self._hosts.store_of(stage)}:
        for folder in folders.snapshots_folders(root, stage):
          for newer, path in snapshot_file.list_snapshots(folder).items():
            if newer > iteration:
              (path / snapshot_file.MANIFEST_NAME).unlink(missing_ok=True)
    self.rescan()

  def orphan(self, stage: int, team: Collection[int]) -> None:
    """Notes that of a stage only the replicas in `team` write snapshots now.

    The others' committed snapshots stay until `line_moved`; their room for more
    is given back.
    """
    folder = self._snapshots_of(stage)
    written = {folders.snapshots_folder(folder, stage, r) for r in team}
    self._orphans -= written
    for path in folders.snapshots_folders(folder, stage):
      if path not in written:
        self._orphans.add(path)
        for other in path.iterdir():
          if not snapshot_file.is_snapshot_name(other.name):
            self._remove(other)

  def line_moved(self, line: int) -> None:
    """Removes snapshots before the line that have no writer to do so.

    Call it before writers are told of the line. Snapshots on disk that begin at
    the line are of use only with the lines of metrics up to it.

    Args:
      line: the recovery line.
    """
    if self._durable_folder:
      self._recorder.sync()
    for folder in self._orphans:
      for iteration, path in snapshot_file.list_snapshots(folder).items():
        if iteration < line:
          self._remove(path)

  def _remove(self, path: pathlib.Path) -> None:
    """Removes a file or folder among the snapshots.

    On disk, where others may have put files, only what a run makes.
    """
    if self._durable_folder:
      with contextlib.suppress(OSError):
        own_files.remove_snapshots(self._durable_folder, path)
    elif path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)

  def drop_damaged(
    self, stage: int, first_iteration: int
  ) -> list[segment_check.Damage]:
    """Drops a stage's damaged entries, which its new worker publishes again.

    Call before anybody reads them again. A log that is gone has none.

    Returns:
      The dropped entries.
    """
    dropped = []
    for path in self.log_paths(stage):
      keys = []
      with contextlib.suppress(FileNotFoundError):
        keys = segment.drop_damaged(path, first_iteration)
      for key in keys:
        self._recorder.event(
          'entry_dropped',
          stage=stage,
          replica=key.replica,
          iteration=key.iteration,
          entry=str(key),
        )
        dropped.append(
          segment_check.Damage(key.iteration, stage, key.replica, str(key))
        )
    return dropped

  def check_logs(
    self, settled_until: int, *, drops_unreadable: bool = False
  ) -> list[segment_check.SegmentCheck]:
    """Reads all entries of all logs; their writers may go on.

    Args:
      settled_until: the last iteration whose entries were read whole.
      drops_unreadable: whether a log that cannot be read at all is removed, as
        is right before anybody trains; else all of it counts as damaged.

    Returns:
      The result for each log.
    """
    found = []
    for stage in self._stages:
      for replica, path in zip(
        self._replicas, self.log_paths(stage), strict=True
      ):
        try:
          found.append(segment_check.check(path, stage, replica))
        except FileNotFoundError:
          continue
        except errors.StoreError as error:
          if drops_unreadable:
            path.unlink()
            continue
          damage = segment_check.Damage(
            settled_until + 1, stage, replica, str(error)
          )
          found.append(segment_check.SegmentCheck(1, (damage,)))
    return found
