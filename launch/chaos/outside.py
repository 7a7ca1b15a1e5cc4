"""Faults done to a run from outside: a table of the kinds and their acts."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

from moetion_jax.hostmem import segment
from moetion_jax.runtime import linux_process

_POLL_SECONDS = 0.02
_BALLAST = 'ballast'


class Kind(enum.StrEnum):
  """Kind of a fault from outside; `TABLE` says how it acts."""

  KILL_WORKER = 'kill a worker'
  STOP_WORKER = 'stop a worker'
  KILL_STANDBY = 'kill the standby'
  KILL_AGENT = 'kill the agent'
  STOP_AGENT = 'stop the agent'
  CUT_SEGMENT = 'cut a segment'
  DELETE_SEGMENT = 'delete a segment'
  CLOSE_STREAMS = 'close the streams'
  FILL_DISK = 'fill the disk'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
  """A fault from outside.

  Attributes:
    kind: what happens.
    stage: the stage of the worker or segment, where it is one.
    replica: its replica.
    after_seconds: seconds since the fault before, or since the run trains.
    for_seconds: how long it lasts, if it ends.
  """

  kind: Kind
  stage: int
  after_seconds: float
  replica: int = 0
  for_seconds: float = 0.0


class Target(Protocol):
  """A command that runs, as faults see it.

  Attributes:
    workdir: the run's folder.
    hostmem: the folder of its stores.
    agent: the process that was started.
    reader: the process that reads what it prints.
  """

  workdir: pathlib.Path
  hostmem: pathlib.Path
  agent: subprocess.Popen[bytes]
  reader: subprocess.Popen[bytes]

  def workers(self) -> list[dict[str, Any]]:
    """Reads the workers of workers.json."""
    ...

  def living(self) -> Collection[int]:
    """Returns the pids of the run's processes."""
    ...


Act = Callable[[Target, Fault], bool]  # True if it could happen


def _signal_worker(number: signal.Signals, *, is_standby: bool = False) -> Act:
  def act(run: Target, fault: Fault) -> bool:
    for one in run.workers():
      name = one['stage'], one['replica']
      is_meant = name == (fault.stage, fault.replica)
      if is_standby:
        is_meant = one['stage'] is None
      if is_meant and one['pid'] in run.living():
        return linux_process.send_signal(one['pid'], number)
    return False

  return act


def _kill_agent(run: Target, fault: Fault) -> bool:
  del fault
  run.agent.kill()
  return True


def _stop_agent(run: Target, fault: Fault) -> bool:
  run.agent.send_signal(signal.SIGSTOP)
  try:
    time.sleep(fault.for_seconds)
  finally:
    run.agent.send_signal(signal.SIGCONT)
  return True


def _cut(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


def _damage_segment(damage: Callable[[pathlib.Path], None]) -> Act:
  def act(run: Target, fault: Fault) -> bool:
    for folder in run.hostmem.iterdir():
      path = segment.segment_path(folder, fault.stage, fault.replica)
      with contextlib.suppress(FileNotFoundError):
        damage(path)
        return True
    return False

  return act


def _close_streams(run: Target, fault: Fault) -> bool:
  del fault
  run.reader.kill()
  run.reader.wait()
  return True


def _fill_disk(run: Target, fault: Fault) -> bool:
  """Leaves no room for some time; the run may end of it."""
  path = run.workdir / _BALLAST
  until = time.monotonic() + fault.for_seconds
  with open(path, 'wb') as ballast:
    try:
      while time.monotonic() < until and run.agent.poll() is None:
        free = os.statvfs(run.workdir)
        if free.f_bavail:
          with contextlib.suppress(OSError):  # it wrote meanwhile
            size_bytes = ballast.seek(0, os.SEEK_END)
            os.posix_fallocate(
              ballast.fileno(), size_bytes, free.f_bavail * free.f_frsize
            )
        time.sleep(_POLL_SECONDS)
    finally:
      path.unlink()
  return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """Weight and act of the faults of one kind.

  Attributes:
    weight: how often they are drawn; for faults of scripts see `faults.TABLE`.
    act: does it to a run.
    of_stage: whether it is done to a worker of a stage, or to its log.
    for_seconds: how long it lasts at least and at most.
  """

  weight: int
  act: Act
  of_stage: bool = False
  for_seconds: tuple[float, float] = (0.0, 0.0)


TABLE: Mapping[Kind, Rule] = {
  Kind.KILL_WORKER: Rule(
    weight=6, act=_signal_worker(signal.SIGKILL), of_stage=True
  ),
  Kind.STOP_WORKER: Rule(
    weight=2, act=_signal_worker(signal.SIGSTOP), of_stage=True
  ),
  Kind.KILL_STANDBY: Rule(
    weight=2, act=_signal_worker(signal.SIGKILL, is_standby=True)
  ),
  Kind.KILL_AGENT: Rule(weight=1, act=_kill_agent),
  Kind.STOP_AGENT: Rule(weight=2, act=_stop_agent, for_seconds=(1.0, 8.0)),
  Kind.CUT_SEGMENT: Rule(weight=2, act=_damage_segment(_cut), of_stage=True),
  Kind.DELETE_SEGMENT: Rule(
    weight=2, act=_damage_segment(os.unlink), of_stage=True
  ),
  Kind.CLOSE_STREAMS: Rule(weight=1, act=_close_streams),
  Kind.FILL_DISK: Rule(weight=1, act=_fill_disk, for_seconds=(1.0, 4.0)),
}


# ---- a disk that can be filled -----------------------------------------------


def possible(folder: pathlib.Path) -> list[Kind]:
  """Returns the kinds that can happen here: not everybody may mount a disk."""
  kinds = list(TABLE)
  with tempfile.TemporaryDirectory(dir=folder) as path:
    try:
      with own_disk(pathlib.Path(path), 1):
        pass
    except (OSError, subprocess.CalledProcessError):
      kinds.remove(Kind.FILL_DISK)
  return kinds


@contextlib.contextmanager
def own_disk(folder: pathlib.Path, size_mib: int) -> Iterator[None]:
  """Gives a folder a file system of its own; what was written there stays.

  Args:
    folder: an empty folder.
    size_mib: the size of the file system.

  Raises:
    OSError, subprocess.CalledProcessError: that is not allowed.
  """
  option = f'size={size_mib}m,mode=755'
  mount = ['mount', '-t', 'tmpfs', '-o', option, 'chaos', str(folder)]
  subprocess.run(mount, check=True, capture_output=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as kept:
    try:
      yield
    finally:
      shutil.copytree(folder, kept, symlinks=True, dirs_exist_ok=True)
      subprocess.run(['umount', '--lazy', str(folder)], check=True)
      shutil.copytree(kept, folder, symlinks=True, dirs_exist_ok=True)
