"""The host stores of a run, as the leader sees them.

All hosts are on this machine for now.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence

from moetion_jax import errors, keys, report
from moetion_jax.hostmem import segment, segment_check
from moetion_jax.recovery import events
from moetion_jax.runtime.hosts import hosts as hosts_lib
from moetion_jax.runtime.records import own_files
from moetion_jax.snapshots import folders, registry


class Stores:
  """The file-system view of every stage's logs and snapshots."""

  def __init__(
    self,
    stages: int,
    replicas: int,
    hosts: hosts_lib.Hosts,
    durable_folder: str = '',
  ):
    """Stores the arguments.

    Args:
      stages: number of stages of the run.
      replicas: number of replicas of each stage.
      hosts: the run's hosts.
      durable_folder: folder of the snapshots; '': they lie in the hosts'
        stores.
    """
    self._durable_folder = durable_folder
    self._stages = range(stages)
    self._replicas = range(replicas)
    self._hosts = hosts
    self._orphans: set[pathlib.Path] = set()

  @property
  def is_durable(self) -> bool:
    """True if the snapshots lie on disk."""
    return bool(self._durable_folder)

  def snapshot_names(self) -> str:
    """Names the folders of the snapshots, for people."""
    return self._durable_folder or ' and '.join(map(str, self._hosts.stores()))

  def log_paths(self, stage: int) -> list[pathlib.Path]:
    """Returns the paths of the logs of a stage's replicas."""
    folder = self._hosts.store_of(stage)
    return [segment.segment_path(folder, stage, r) for r in self._replicas]

  def _snapshots_of(self, stage: int) -> pathlib.Path:
    """Returns the folder of the snapshots of a stage's workers."""
    if self._durable_folder:
      return pathlib.Path(self._durable_folder)
    return self._hosts.store_of(stage)

  def scan(self, stages: Iterable[int]) -> events.Scanned:
    """Reads what the stores hold.

    Args:
      stages: the stages whose snapshots are read.
    """
    unreadable: list[str] = []
    shares, newest, whole_from = {}, {}, {}
    for stage in stages:
      folder = self._snapshots_of(stage)
      found = folders.read_shares(folder, stage, unreadable.append)
      shares[stage], newest[stage] = tuple(found), self._newest_entry(stage)
      whole_from[stage] = max(
        map(segment.whole_from, self.log_paths(stage)), default=0
      )
    return events.Scanned(
      shares=shares,
      log_bytes=tuple(map(self._log_bytes, self._stages)),
      newest=newest,
      whole_from=whole_from,
      unreadable=tuple(unreadable),
      gone=' and '.join(map(str, self._hosts.gone())),
    )

  def digests(
    self,
    iterations: Iterable[int],
    operators: Sequence[Collection[keys.OperatorId]],
  ) -> dict[int, str]:
    """Reads the digests of whole states that snapshots carry.

    Args:
      iterations: the iterations of the states.
      operators: by stage, all operators.

    Returns:
      By iteration, those that the snapshots of all stages tell; what is damaged
      is left out.
    """
    found = {}
    for iteration in iterations:
      of_stages = [
        folders.read_digests(
          self._snapshots_of(stage), stage, iteration, operators[stage]
        )
        for stage in self._stages
      ]
      if all(of_stages):
        merged = {o: d for one in of_stages for o, d in one.items()}
        found[iteration] = report.combine(merged)
    return found

  def _log_bytes(self, stage: int) -> int:
    """Returns the size of a stage's smallest log; 0 if one is not whole."""
    return min(map(segment.whole_bytes, self.log_paths(stage)))

  def _newest_entry(self, stage: int) -> int:
    """Returns the newest iteration of which a stage has an entry."""
    return max(map(segment.newest_iteration, self.log_paths(stage)))

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

  def forget_newer(self, iterations: Mapping[int, int]) -> None:
    """Invalidates all later snapshots, which will be different.

    Call while nobody writes. The pages stay for whoever writes here next.

    Args:
      iterations: by stage, the newest snapshot that still counts.
    """
    for stage, iteration in iterations.items():
      for folder in folders.snapshots_folders(self._snapshots_of(stage), stage):
        stored = registry.stored(folder)
        for newer in stored.iterations():
          if newer > iteration:
            stored.forget(newer)

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
        there = list(path.iterdir())
        # After it: what is committed meanwhile was not there by that name.
        committed = registry.stored(path).paths().values()
        for other in there:
          if other not in committed:
            self._remove(other)

  def line_moved(self, line: int) -> None:
    """Removes snapshots before the line that have no writer to do so.

    Call it before writers are told of the line.

    Args:
      line: the recovery line.
    """
    for folder in self._orphans:
      for iteration, path in registry.stored(folder).paths().items():
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

  def drop_damaged(self, stage: int, first_iteration: int) -> events.Dropped:
    """Drops a stage's damaged entries, which its new worker publishes again.

    Call before anybody reads them again. A log that is gone has none.
    """
    dropped = []
    for path in self.log_paths(stage):
      with contextlib.suppress(FileNotFoundError):
        dropped += segment_check.drop_damaged(path, first_iteration)
    return events.Dropped(
      entries=tuple(
        segment_check.Damage(key.iteration, stage, key.replica, str(key))
        for key in dropped
      )
    )

  def check_logs(self, drops_unreadable: bool) -> events.LogsChecked:
    """Reads all entries of all logs; their writers may go on.

    Args:
      drops_unreadable: whether a log that cannot be read at all is removed, as
        is right before anybody trains.
    """
    checks, unreadable = [], []
    newest = tuple(map(self._newest_entry, self._stages))
    for stage in self._stages:
      for replica, path in enumerate(self.log_paths(stage)):
        try:
          checks.append(segment_check.check(path, stage, replica))
        except FileNotFoundError:
          continue
        except errors.StoreError as error:
          if drops_unreadable:
            path.unlink()
          else:
            unreadable.append((stage, replica, str(error)))
    return events.LogsChecked(
      checks=tuple(checks), unreadable=tuple(unreadable), newest=newest
    )
