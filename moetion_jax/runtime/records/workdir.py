"""The folder of a run: its lock, and the check that it holds this run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moetion_jax import (
  codec,
  config as config_lib,
  disk,
  errors,
  job_spec,
)
from moetion_jax.hostmem import locks, store_folder
from moetion_jax.runtime import environment as environment_lib
from moetion_jax.runtime.records import (
  changes as changes_lib,
  checkpoint_folder,
  files as record_files,
  held_run,
  own_files,
  whereabouts as whereabouts_lib,
)

_DYING_SECONDS = 2.0
_LOCK_BYTES = 64  # more than an id takes


class Workdir:
  """A run's folder, locked while the run lives.

  Call `lock`, `check`, `take_id`, then, once the run is known to be able to
  begin, `accept`; `close` last. Before `accept` nothing is removed, and nothing
  is written but the run's id, and with it in a copy whose folder it is.

  Attributes:
    path: the folder, absolute.
    lock_fds: the descriptors of the locks, of the folder and of a file in it,
      which may be removed; a process that inherits them keeps the locks. ()
      when closed.
    locked_id: the run's id that stands in the lock file; '' for none.
    run_id: the run's id, from `take_id` on.
    earlier_id: the id of the run that `accept` removes; '' for none.
    whereabouts: the places of the run's stores, which `accept` records.
    remove_elsewhere: removes what an earlier run left outside the folder, and
      returns what is not the run's and stays; `accept` calls it if the run
      begins anew.
    removed_earlier: whether the removal of what an earlier run left has begun,
      and perhaps ended.
    changes: the environments that the run had; call `check` first.
    base: the checkpoint from which a run that is trained longer goes on; None
      for none. Call `check` first.
    ended_at: the last iteration that it had before; 0: it is not trained
      longer by this start.
  """

  def __init__(
    self,
    path: str,
    *,
    fresh: bool,
    accept_changes: Sequence[str] = (),
    extend: str = '',
  ):
    """Stores the arguments.

    Args:
      path: the folder.
      fresh: whether an earlier run in it is removed.
      accept_changes: names of what may have changed in the run's environment.
      extend: the schedule of a run that is trained longer, see
        `config.trained_longer`.
    """
    self.path = pathlib.Path(os.path.abspath(path))
    self.changes = changes_lib.Changes(
      self.path / 'config.json', accept_changes
    )
    self.lock_fds: tuple[int, ...] = ()
    self.locked_id = ''
    self.run_id = ''
    self.earlier_id = ''
    self.whereabouts = whereabouts_lib.Whereabouts()
    self._made: tuple[str, ...] = ()  # by the run that `fresh` removes
    self._id_before = ''
    self.remove_elsewhere: Callable[[], Sequence[str]] = lambda: ()
    self.removed_earlier = False
    self.base: job_spec.Base | None = None
    self.ended_at = 0
    self._fresh = fresh
    self._extend = extend
    self._iterations = 0  # as asked for; 0: as it has
    self._created: list[pathlib.Path] = []  # what goes again without a run

  @property
  def checkpoint(self) -> pathlib.Path:
    """Path of the final checkpoint, written or not."""
    return self.path / own_files.CHECKPOINT_NAME

  def log_path(self, worker: str) -> pathlib.Path:
    """Path of the log file for a worker's output.

    Args:
      worker: the worker's name, as in `WorkerProcess.name`.
    """
    name = worker.replace(' ', '-').replace('-replica', '.replica')
    return self.path / own_files.LOGS_NAME / f'{name}.log'

  def lock(self) -> None:
    """Creates the folder if need be, and locks it.

    Raises:
      errors.ConfigError: a living run uses it, it cannot be created, or its
        lock file is another program's.
    """
    lock = self.path / own_files.LOCK
    try:
      missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
      self.path.mkdir(parents=True, exist_ok=True)
      self._created = missing
    except OSError as error:
      raise self._of_system(error) from error
    try:
      # The folder first: who holds that one is not told by the file, which may
      # have been removed, and stays as it is.
      flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
      self.lock_fds = (os.open(self.path, flags),)
      _lock(self.lock_fds[0])
      if self._open_lock(lock):
        self._created = [lock, *missing]
      folder_fd, lock_fd = self.lock_fds
      _lock(lock_fd)
      in_place = record_files.is_in_place(
        self.path, folder_fd
      ) and record_files.is_in_place(lock, lock_fd)
      content = os.pread(lock_fd, _LOCK_BYTES, 0)
    except (BlockingIOError, FileNotFoundError):
      in_place, content = False, b''  # or its run just removed it
    except OSError as error:
      self.close()
      raise self._of_system(error) from error
    if not in_place:
      self._created = []
      self.close()
      raise self._error('a living run uses it; stop that one first')
    text = content.decode(errors='replace').strip('\0\n ')
    self.locked_id = held_run.valid_id(text)
    # Versions before the id was stored left it empty, beside a config.json.
    is_old = not text and os.path.lexists(self.path / own_files.CONFIG)
    if not self.locked_id and not is_old:
      self.close()
      what = 'is not of a run of ours'
      if not text:
        what = f'is empty, and there is no {own_files.CONFIG}: it may be of '
        what += 'another program'
      raise self._error(
        f'{own_files.LOCK} in it {what}; name another --workdir, or move that '
        'file away'
      )

  def _open_lock(self, lock: pathlib.Path) -> bool:
    """Opens the lock file; returns True if it was made here.

    A new one has an id from the first moment on: an empty one is no sign of a
    run.
    """
    is_new = False
    if not os.path.lexists(lock):
      # Not buffered: a full disk is told at once, and the file goes.
      with tempfile.NamedTemporaryFile(
        buffering=0, dir=self.path, prefix=record_files.TEMPORARY_PREFIX
      ) as new:
        new.write(f'{held_run.new_id()}\n'.encode())
        os.chmod(new.name, 0o644)
        try:
          os.link(new.name, lock)
          is_new = True
        except FileExistsError:
          pass  # another start was quicker
        except OSError:  # a file system without hard links
          with contextlib.suppress(FileExistsError), open(lock, 'xb') as file:
            file.write(pathlib.Path(new.name).read_bytes())
            is_new = True
    record_files.unshare(lock)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    self.lock_fds += (os.open(lock, flags),)
    return is_new

  def close(self) -> None:
    """Gives the lock back; removes what `lock` created for no run."""
    with contextlib.suppress(OSError):  # somebody else put something there
      if self.lock_fds and self._fresh and self._id_before:
        self._write_lock(self._id_before)  # the earlier run was not removed
      for path in filter(os.path.lexists, self._created):
        path.rmdir() if path.is_dir() else path.unlink()
    self._created = []
    for fd in self.lock_fds:
      os.close(fd)
    self.lock_fds = ()

  @property
  def is_gone(self) -> bool:
    """True if the folder was removed while the run lived."""
    path = os.readlink(f'/proc/self/fd/{self.lock_fds[0]}')
    return not record_files.is_in_place(path, self.lock_fds[0])

  def check_in_place(self) -> None:
    """Checks that what is written to the path is written to the folder.

    Raises:
      errors.StoreError: it was moved or removed while the run lived.
      OSError: the path cannot be looked up.
    """
    if record_files.is_in_place(self.path, self.lock_fds[0]):
      return
    if self.is_gone:
      raise errors.StoreError(
        f'{self.path}: was removed while its run lived, or moved to another '
        'file system: then start it there, with --workdir'
      )
    now = os.readlink(f'/proc/self/fd/{self.lock_fds[0]}')
    raise errors.StoreError(
      f'{self.path}: was moved to {now} while its run lived; move it back, or '
      f'start it there, with --workdir={now}'
    )

  @property
  def begins_anew(self) -> bool:
    """True if nothing of an earlier run is gone on with."""
    return self._fresh or not os.path.lexists(self.path / own_files.CONFIG)

  def settings_of(self, train: config_lib.TrainConfig) -> dict[str, Any]:
    """Returns the settings of training, as they go on for the run here.

    Args:
      train: the user's settings.

    Raises:
      errors.ConfigError: the folder holds no run of ours, but something else.
    """
    known = None if self._fresh else self._known()
    return codec.encode(held_run.settings_of(known, train, self._extend))

  def check(self, config: dict[str, Any]) -> None:
    """Checks that `config` describes the run that the folder holds, if any.

    Args:
      config: the content of config.json; the fields that a worker finds out
        may be missing.

    Raises:
      errors.ConfigError: the folder holds another run, or something else.
    """
    known = self._known()
    if known is None:
      return
    if self._fresh:
      self._made = whereabouts_lib.Whereabouts.from_json(known).made
      return
    self.changes.known = dict(known)
    had = held_run.check(known, config, str(self.path), self._extend)
    wanted = config['train']['iterations']
    is_finished = self.is_finished()
    self._iterations = wanted
    self.ended_at = had if wanted > had else 0
    self.base = checkpoint_folder.base(self.path, wanted)
    if self.ended_at and is_finished and self.base is None:
      raise self._error(
        f'{self.checkpoint} carries no digest: it is of an earlier version, '
        'and nothing proves what it is. --init_from begins a new run with it'
      )

  def _known(self) -> dict[str, Any] | None:
    """Returns the config.json of the folder's run; None if it holds none.

    Raises:
      errors.ConfigError: what is there is no run of ours, or in the way of one.
    """
    away = 'name another --workdir, or move that away first'
    try:
      known = held_run.read_config(self.path)
      names = own_files.run_names(self.path) if known is None else []
    except held_run.NotOursError as error:
      raise self._error(
        f'{own_files.CONFIG} in it is not of a run of ours ({error}); {away}'
      ) from error
    except OSError as error:
      raise own_files.config_error(error, 'workdir', self.path) from error
    if names:
      raise self._error(
        f'holds {own_files.name_some(names)}, but no {own_files.CONFIG} of a '
        f'run of ours; {away}'
      )
    reason = own_files.in_the_way(self.path, fresh=self._fresh)
    if reason and not self.is_finished():
      raise self._error(f'{reason}; {away}')
    doubt = '' if self.begins_anew else self._doubt(known)
    if doubt and not self._base_of(known):
      raise self._error(
        f'{self.checkpoint} is not the end of the run there: {doubt}. Nothing '
        'was removed: move that checkpoint away, then the same command goes on'
      )
    return known

  def take_id(self, run_id: str) -> None:
    """Writes the run's id where the same command finds it, whatever happens.

    Raises:
      errors.ConfigError: it cannot be written.
    """
    self.run_id = run_id
    try:
      if run_id != self.locked_id:
        self._id_before = self.locked_id
        self._write_lock(run_id)
        self.locked_id = run_id
      known = held_run.read_config(self.path) or {}
      is_other = known.get(held_run.RUN_ID, run_id) != run_id
      if is_other and not self._fresh:  # it is its original's
        kept = whereabouts_lib.Whereabouts.from_json(known).of_copy()
        for name in whereabouts_lib.FIELDS:
          known.pop(name, None)
        self._write_config(known | self._marks() | kept.to_json())
    except OSError as error:
      raise self._of_system(error) from error

  def _write_lock(self, run_id: str) -> None:
    data = f'{run_id}\n'.encode()
    _, fd = self.lock_fds
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, len(data))

  def accept(
    self, config: dict[str, Any], environment: environment_lib.Record
  ) -> list[str]:
    """Makes the folder that of the run which `config` describes.

    If the run begins anew, what an earlier one left is removed, by name; last
    of all its config.json is replaced. So a death on the way leaves the earlier
    run, or a part of it, which `fresh` removes.

    Args:
      config: see `check`.
      environment: what the workers compute with.

    Returns:
      Names of what --fresh did not remove since it is not a run's.

    Raises:
      errors.ConfigError: see `check`; the environment has changed; or something
        cannot be removed.
    """
    self.check(config)
    self.changes.check(environment)
    kept = self._remove_earlier() if self.begins_anew else []
    # Whoever was killed while it wrote a file left a part of that.
    own_files.remove(own_files.find(self.path, own_files.TEMPORARY))
    self._fresh = False
    self._created = []
    (self.path / own_files.LOGS_NAME).mkdir(exist_ok=True)
    known = whereabouts_lib.Whereabouts.from_json(self.changes.known)
    known = dataclasses.replace(known, made=(*self._made, *known.made))
    now = known.moved_to(self.whereabouts, self.changes.accepted_before)
    marks = self._marks() | now.to_json()
    marks |= {n: config[n] for n in held_run.KEPT_UP if n in config}
    self.changes.write(config, marks, whereabouts_lib.FIELDS)
    return kept

  def _marks(self) -> dict[str, Any]:
    """Returns what tells the folder from others."""
    return {
      held_run.RUN_ID: self.run_id,
      held_run.WORKDIR: str(self.path),
      held_run.FOLDER: list(store_folder.identity_of(self.path)),
    }

  def _remove_earlier(self) -> list[str]:
    """Removes all that an earlier run left; returns what else there is."""
    self.removed_earlier = True
    try:
      kept = list(self.remove_elsewhere())
      if not self._fresh:
        return kept
      found = own_files.find_run(self.path)
      own_files.remove(found)
    except OSError as error:
      raise own_files.config_error(error, 'workdir', self.path) from error
    return [*found.others, *kept]

  def _write_config(self, value: dict[str, Any]) -> None:
    record_files.write_json(str(self.path / own_files.CONFIG), value)

  def is_finished(self) -> bool:
    """Tells whether the folder holds a finished run that is kept."""
    return (
      not self.begins_anew
      and checkpoint_folder.is_committed(self.checkpoint)
      and not self._doubt(held_run.read_config(self.path))
    )

  def is_proven(self) -> bool:
    """Tells whether the checkpoint of a finished run says that it is the run's.

    One of an earlier version does not.
    """
    return checkpoint_folder.stated(self.checkpoint) is not None

  def _doubt(self, known: dict[str, Any] | None) -> str:
    """Says why a committed checkpoint is not that of the run `known`."""
    if known is None or not checkpoint_folder.is_committed(self.checkpoint):
      return ''
    return checkpoint_folder.doubt(self.path, self._iterations_of(known))

  def _base_of(self, known: Mapping[str, Any] | None) -> job_spec.Base | None:
    """Returns the checkpoint from which the run `known` goes on, if any."""
    iterations = self._iterations_of(known) if known else 0
    return checkpoint_folder.base(self.path, iterations)

  def _iterations_of(self, known: Mapping[str, Any]) -> int:
    return self._iterations or known['train'].get('iterations')

  def sync_finished(self) -> None:
    """Returns once the files of a finished run are on disk, and no others.

    Call it before its stores go: it may have been killed while it wrote them,
    or removed the checkpoint that was there before.

    Raises:
      errors.ConfigError: they cannot be.
    """
    try:
      checkpoint_folder.clear_rest(self.checkpoint)
      disk.sync_tree(self.checkpoint)
      with contextlib.suppress(FileNotFoundError):
        disk.sync_file(self.path / own_files.METRICS)
      disk.sync_folder(self.path)
    except OSError as error:
      raise own_files.config_error(error, 'workdir', self.path) from error

  def _of_system(self, error: OSError) -> errors.ConfigError:
    errors.check_limits(error)
    what = error.strerror or str(error)
    return self._error(f'{what}; make that possible, or name another --workdir')

  def _error(self, reason: str) -> errors.ConfigError:
    return errors.ConfigError('workdir', str(self.path), reason)


def _lock(fd: int) -> None:
  """Locks a file or folder; raises BlockingIOError if another run keeps it.

  Workers of an agent that was just killed hold the lock until they are gone.
  """
  deadline = time.monotonic() + _DYING_SECONDS
  while True:
    try:
      return locks.lock(fd)
    except BlockingIOError:
      if time.monotonic() > deadline:
        raise
    time.sleep(0.05)
