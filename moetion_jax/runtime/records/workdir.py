"""The folder of a run: its lock, and the check that it holds this run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

from launch.lm import settings as run_settings
from moetion_jax import errors
from moetion_jax.runtime import environment as environment_lib
from moetion_jax.runtime.records import changes as changes_lib

_LOCK = '.lock'
_DYING_SECONDS = 2.0
# Fields of config.json known only once a worker has a backend and the data.
_FOUND_OUT = (
  'data_fingerprint',
  changes_lib.ENVIRONMENT,
  changes_lib.CHANGES,
  changes_lib.SOFTWARE,
)


class Workdir:
  """A run's folder, locked while the run lives.

  Call `lock`, `check`, then, once the run is known to be able to begin,
  `accept`; `close` last. Nothing but the lock is written before `accept`.

  Attributes:
    path: the folder, absolute.
    lock_fd: the descriptor of the lock; a process that inherits it keeps the
      lock. -1 when closed.
    changes: the environments that the run had; call `check` first.
  """

  def __init__(
    self, path: str, *, fresh: bool, accept_changes: Sequence[str] = ()
  ):
    """Stores the arguments.

    Args:
      path: the folder.
      fresh: whether an earlier run in it is removed.
      accept_changes: names of what may have changed in the run's environment.
    """
    self.path = pathlib.Path(os.path.abspath(path))
    self.changes = changes_lib.Changes(
      self.path / 'config.json', accept_changes
    )
    self.lock_fd = -1
    self._fresh = fresh
    self._created: list[pathlib.Path] = []

  @property
  def checkpoint(self) -> pathlib.Path:
    """Path of the final checkpoint, written or not."""
    return self.path / 'checkpoint'

  def log_path(self, worker: str) -> pathlib.Path:
    """Path of the log file for a worker's output.

    Args:
      worker: the worker's name, as in `WorkerProcess.name`.
    """
    name = worker.replace(' ', '-').replace('-replica', '.replica')
    return self.path / 'logs' / f'{name}.log'

  def lock(self) -> None:
    """Creates the folder if need be, and locks it.

    Raises:
      errors.ConfigError: a living run uses it, or it cannot be created.
    """
    missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._created = missing
      flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
      self.lock_fd = os.open(self.path / _LOCK, flags, 0o644)
      _lock(self.lock_fd)
      in_place = os.path.samestat(
        os.stat(self.path / _LOCK), os.fstat(self.lock_fd)
      )
    except BlockingIOError:
      in_place = False
    except OSError as error:
      self._created = []
      self.close()
      raise self._error(error.strerror or str(error)) from error
    if not in_place:
      self._created = []
      self.close()
      raise self._error('a living run uses it; stop that one first')

  def close(self) -> None:
    """Gives the lock back; removes what `lock` created for no run."""
    if self.lock_fd < 0:
      return
    if self._created:
      with contextlib.suppress(OSError):  # somebody else put something there
        (self.path / _LOCK).unlink()
        for folder in self._created:
          folder.rmdir()
    os.close(self.lock_fd)
    self.lock_fd = -1

  def check(self, config: dict[str, Any]) -> None:
    """Checks that `config` describes the run that the folder holds, if any.

    Args:
      config: the content of config.json; the fields that a worker finds out
        may be missing.

    Raises:
      errors.ConfigError: the folder holds another run, or something else.
    """
    path = self.path / 'config.json'
    if self._fresh:
      if set(os.listdir(self.path)) - {_LOCK} and not path.exists():
        raise errors.ConfigError(
          'fresh', True, f'{self.path} holds no run of ours; remove it by hand'
        )
      return
    if not path.exists():
      return
    try:
      known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
      raise self._error(
        f'config.json is damaged ({error}); pass --fresh'
      ) from error
    self.changes.known = dict(known)
    for name in _FOUND_OUT:
      if name not in config:
        known.pop(name, None)
    if changed := run_settings.differences(known, config):
      raise self._error(
        f'holds a run with other settings ({", ".join(changed[:5])}); pass '
        '--fresh to remove it, or another --workdir'
      )

  def accept(
    self, config: dict[str, Any], environment: environment_lib.Record
  ) -> None:
    """Makes the folder that of the run which `config` describes.

    Args:
      config: see `check`.
      environment: what the workers compute with.

    Raises:
      errors.ConfigError: see `check`; or the environment has changed.
    """
    self.check(config)
    self.changes.check(environment)
    if self._fresh:
      for entry in self.path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
          shutil.rmtree(entry)
        elif entry.name != _LOCK:
          entry.unlink()
      self._fresh = False
    self._created = []
    (self.path / 'logs').mkdir(exist_ok=True)
    self.changes.write(config)

  def is_finished(self) -> bool:
    """Tells whether the folder holds a finished run that is kept."""
    return not self._fresh and self.checkpoint.is_dir()

  def _error(self, reason: str) -> errors.ConfigError:
    return errors.ConfigError('workdir', str(self.path), reason)


def read_run(
  path: str | os.PathLike[str],
) -> tuple[run_settings.RunConfig, dict[str, Any]]:
  """Reads which run a folder holds.

  Args:
    path: the folder, which is not locked.

  Returns:
    The run's settings, and what its workers found out: `data_fingerprint`,
    `environment`, `changes`; of an earlier version, `software`.

  Raises:
    errors.ConfigError: the folder holds no run, or one of another version of
      this program.
  """
  file = pathlib.Path(path) / 'config.json'
  try:
    value = json.loads(file.read_text())
    found_out = {name: value.pop(name) for name in _FOUND_OUT if name in value}
    return run_settings.RunConfig.from_json(value), found_out
  except FileNotFoundError:
    reason = f'holds no run: there is no {file}; name the --workdir of one'
  except OSError as error:
    reason = f'{file}: {error.strerror}'
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    reason = f'{file} is damaged, or of another version: {error}'
  raise errors.ConfigError('workdir', str(path), reason)


def _lock(fd: int) -> None:
  """Locks a file; raises BlockingIOError if another run keeps it locked.

  Workers of an agent that was just killed hold the lock until they are gone.
  """
  deadline = time.monotonic() + _DYING_SECONDS
  while True:
    try:
      return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if time.monotonic() > deadline:
        raise
    time.sleep(0.05)
