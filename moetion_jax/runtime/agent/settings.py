"""Where a run runs, as flags say it."""

from __future__ import annotations

import dataclasses
import os

from moetion_jax import errors
from moetion_jax.hostmem import run_store
from moetion_jax.policies import settings as capture_settings
from moetion_jax.runtime import faults as faults_lib

_DURABLE_NAME = 'durable'  # of a folder in the workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentSettings:
  """Where a run runs; none of it changes what comes out.

  Attributes:
    workdir: its folder.
    fresh: whether an earlier run in it is removed.
    hostmem_dir: existing directory in tmpfs.
    captures: how snapshots are taken.
    durable_dir: for snapshots on disk; '': a folder in the workdir.
    max_failures: of one stage, without progress, before the run ends.
    hang_timeout_seconds: a program that runs longer than this hangs.
    standby: whether a process waits to take a dead worker's place.
    on_failure: of a worker that cannot be replaced: 'stop' the run, or 'shrink'
      its stage, whose other replicas then do its microbatches.
    max_workers: processes that may become workers, all in all; 0: no limit.
    grow_after: iterations after which a shrunk stage gets its workers back; 0:
      never.
    compilation_cache_dir: see `runtime.configure`.
    local_hosts: over how many virtual hosts on this machine the stages are
      spread; those talk over TCP.
    full_seconds: how long a log that is full waits before the run ends.
    faults: a script of what goes wrong.
  """

  workdir: str
  fresh: bool = False
  hostmem_dir: str = '/dev/shm'
  captures: capture_settings.CaptureSettings = (
    capture_settings.CaptureSettings()
  )
  durable_dir: str = ''
  max_failures: int = 3
  hang_timeout_seconds: float = 600.0
  standby: bool = True
  on_failure: str = 'stop'
  max_workers: int = 0
  grow_after: int = 0
  compilation_cache_dir: str = ''
  local_hosts: int = 1
  full_seconds: float = 60.0
  faults: tuple[faults_lib.Fault, ...] = ()

  def __post_init__(self) -> None:
    if self.max_failures < 0:
      raise errors.ConfigError(
        'max_failures', self.max_failures, 'must not be negative'
      )
    if self.hang_timeout_seconds <= 0:
      raise errors.ConfigError(
        'hang_timeout', self.hang_timeout_seconds, 'must be positive'
      )
    if self.local_hosts > 1 and not self.captures.rules.is_exact:
      # Another host's server may have entries of before for a moment.
      raise errors.ConfigError(
        'local_hosts', self.local_hosts, 'must be 1 with --policy=partial'
      )
    run_store.check_hostmem_dir(self.hostmem_dir)

  def durable_folder(self, workdir: str) -> str:
    """The folder of a run's snapshots on disk; '' if its policy has none.

    Args:
      workdir: of the run, absolute.
    """
    if not self.captures.rules.is_durable:
      return ''
    if not self.durable_dir:
      return os.path.join(workdir, _DURABLE_NAME)
    name = f'moetion-{run_store.run_id(workdir)}'
    return os.path.join(os.path.abspath(self.durable_dir), name)
