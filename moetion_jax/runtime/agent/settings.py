"""The settings of where and how a run runs, from flags."""

from __future__ import annotations

import dataclasses
import os

from moetion_jax import errors
from moetion_jax.hostmem import run_store
from moetion_jax.policies import settings as capture_settings
from moetion_jax.runtime import faults as faults_lib
from moetion_jax.runtime.records import own_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentSettings:
  """Settings of where and how a run runs; none changes what comes out.

  Attributes:
    workdir: the run's folder.
    fresh: whether an earlier run in it is removed.
    hostmem_dir: an existing directory in tmpfs.
    captures: the settings of how snapshots are taken.
    durable_dir: the directory for snapshots on disk; '': a folder in the
      workdir.
    max_skipped: updates in a row that the run leaves out at most, see
      `TrainConfig.skip_nonfinite`. A state that survived ten different batches
      without one usable gradient has gone bad itself, as a rule.
    max_failures: failures of one stage, without progress, that the run bears.
    hang_timeout_seconds: seconds after which a program that runs counts as
      hanging.
    standby: whether a process waits to take a dead worker's place.
    on_failure: the reaction when a worker cannot be replaced: 'stop' the run,
      or 'shrink' its stage, whose other replicas then do its microbatches.
    max_workers: the number of processes that may become workers, all in all;
      0: no limit.
    grow_after: iterations after which a shrunk stage gets its workers back; 0:
      never.
    compilation_cache_dir: folder in which compiled programs are kept. '' for
      none: then each process compiles all of its programs, and so does one
      that takes a dead worker's place, before it can recover.
    accept_changes: names of libraries, options, flags and variables that may
      be other ones than those with which the run was begun.
    extend: the schedule of a run that is trained longer: 'pin', 'stretch', or
      '' for none, see `config.trained_longer`.
    local_hosts: the number of virtual hosts on this machine over which the
      stages are spread; they talk over TCP.
    full_seconds: seconds that a full log waits before the run ends.
    faults: the script of faults.
  """

  workdir: str
  fresh: bool = False
  hostmem_dir: str = '/dev/shm'
  captures: capture_settings.CaptureSettings
  durable_dir: str = ''
  max_skipped: int = 10
  max_failures: int = 3
  hang_timeout_seconds: float = 600.0
  standby: bool = True
  on_failure: str = 'stop'
  max_workers: int = 0
  grow_after: int = 0
  compilation_cache_dir: str = ''
  accept_changes: tuple[str, ...] = ()
  extend: str = ''
  local_hosts: int = 1
  full_seconds: float = 60.0
  faults: tuple[faults_lib.Fault, ...] = ()

  def __post_init__(self) -> None:
    for name in ('max_failures', 'max_skipped'):
      if getattr(self, name) < 0:
        raise errors.ConfigError(
          name, getattr(self, name), 'must not be negative'
        )
    if self.hang_timeout_seconds <= 0:
      raise errors.ConfigError(
        'hang_timeout', self.hang_timeout_seconds, 'must be positive'
      )
    if self.local_hosts > 1 and not self.captures.policy.is_exact:
      # Another host's server may have outdated entries for a moment.
      raise errors.ConfigError(
        'local_hosts', self.local_hosts, 'must be 1 with --policy=partial'
      )
    run_store.check_hostmem_dir(self.hostmem_dir)

  def with_room_for_splice(self) -> AgentSettings:
    """Returns the same settings with room for snapshots of two windows.

    Until there is a start behind a splice, all is kept from its own start on: a
    window of the old software, and one of the new.
    """
    windows = max(2, self.captures.keep_windows)
    captures = dataclasses.replace(self.captures, keep_windows=windows)
    return dataclasses.replace(self, captures=captures)

  def durable_folder(self, workdir: str, run_id: str) -> str:
    """Returns a run's folder of snapshots on disk; '' if its policy has none.

    Args:
      workdir: the run's folder, absolute.
      run_id: the run's id.
    """
    if not self.captures.policy.is_durable:
      return ''
    if not self.durable_dir:
      return os.path.join(workdir, own_files.DURABLE_NAME)
    name = run_store.folder_name(run_id)
    return os.path.join(os.path.abspath(self.durable_dir), name)
