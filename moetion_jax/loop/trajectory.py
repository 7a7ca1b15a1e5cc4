"""The environment of a loop's snapshots, and the places where it changed.

`environment.json` in the folder holds it. A loop that goes on with other
software, options or flags comes to other bits; that is refused by name, or
accepted: then nothing that is captured from then on is folded together with
what was there (`recovery/splice`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from moetion_jax import errors
from moetion_jax.recovery import splice as splice_lib
from moetion_jax.runtime import environment, read_environment
from moetion_jax.runtime.records import changes as changes_lib
from moetion_jax.snapshots import coverage, registry

_NAME = 'environment.json'
_STAGE = 0  # a loop is one stage
# The section of a record that is made up where none was written.
_UNRECORDED = 'unrecorded'

_log = logging.getLogger(__name__)


class Trajectory:
  """The bits that a loop's snapshots belong to.

  Call `check` before anything is restored, `go_on` once it is, before the store
  opens the folder, and `record` when it has.
  """

  def __init__(self, folder: pathlib.Path, accepted: Sequence[str]):
    """Stores the arguments.

    Args:
      folder: the folder of the snapshots, which may not exist yet.
      accepted: see `LoopSettings.accept_changes`.
    """
    self._folder = folder
    self._changes = changes_lib.Changes(folder / _NAME, accepted, 0o600)

  def check(self) -> None:
    """Compares what this process computes with.

    Raises:
      errors.ConfigError: an accepted name is unknown.
      errors.StoreError: something has changed that is not accepted, or what is
        recorded cannot be read, or nothing is.
    """
    here = read_environment.read()
    known = _read(self._folder / _NAME)
    if not known and registry.stored(self._folder).iterations():
      # It may be anything: to go on is to accept a change.
      known = {changes_lib.ENVIRONMENT: here | {_UNRECORDED: {_NAME: 'gone'}}}
    self._changes.known = known
    refused = self._changes.refused(here)
    if any(one.name == _NAME for one in refused):
      raise errors.StoreError(
        f'{self._folder} holds snapshots, and no {_NAME}, which says what they '
        'were taken with (earlier versions wrote none): other bits may follow. '
        'Put it back; or, to go on all the same, name it in LoopSettings: '
        f'accept_changes={(_NAME,)}'
      )
    if refused:
      raise errors.StoreError(
        f'{self._folder} holds snapshots taken with '
        f'{environment.describe(refused)}: other bits would follow. Go on with '
        'what they were taken with, or name what may differ in LoopSettings: '
        f'accept_changes={tuple(one.name for one in refused)}'
      )

  def allows(self, start: coverage.Start) -> bool:
    """Returns whether a conversion from `start` folds one trajectory only."""
    return splice_lib.allows(
      self._splices, _STAGE, start.iteration, is_running=False
    )

  def unverified_until(self, start: coverage.Start) -> int:
    """Returns the last iteration whose digests a replay does not come to."""
    if self._changes.is_due(start.iteration):
      return start.complete_at
    return splice_lib.unverified_until(self._splices, _STAGE)

  def go_on(self, start: coverage.Start) -> None:
    """Goes on with what was restored.

    After a change all snapshots are removed that its conversion did not fold.

    Args:
      start: the start of the restoration; iteration 0 for the initial state.

    Raises:
      errors.StoreError: another living process writes there.
    """
    if not self._changes.is_due(start.iteration):
      return
    with _locked(self._folder):
      self._changes.begin(
        splice_lib.Splice(
          exact_until=start.iteration, complete_at=(start.complete_at,)
        )
      )
      stored = registry.stored(self._folder)
      for iteration in stored.iterations():
        if iteration > start.complete_at:
          stored.forget(iteration)
      done = self._changes.finish()
    _log.warning(
      '%s: other bits than before from iteration %d on: %s changed',
      self._folder,
      start.iteration + 1,
      ', '.join(done['names']),
    )

  def record(self) -> None:
    """Writes down what the snapshots are taken with."""
    self._changes.write({})

  @property
  def _splices(self) -> tuple[splice_lib.Splice, ...]:
    return splice_lib.in_force(self._changes.splices)


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Returns what is recorded; {} if nothing is.

  Raises:
    errors.StoreError: the file cannot be read, or is damaged.
  """
  try:
    known = json.loads(path.read_text())
    if not isinstance(known, dict):
      raise ValueError(f'is {str(known)[:40]}, and no JSON object')
    if not isinstance(known.get(changes_lib.ENVIRONMENT), dict):
      raise ValueError(f'has no object {changes_lib.ENVIRONMENT!r}')
    changes_lib.check_content(known, stages=1)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise errors.StoreError(
      f'{path}: {error}; without it nothing says what the snapshots were '
      'taken with: remove the folder'
    ) from error
  return known


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other processes from opening the folder's store meanwhile.

  Raises:
    errors.StoreError: one has opened it already.
  """
  fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  except BlockingIOError as error:
    raise errors.StoreError(
      f'{folder}: another living process writes snapshots here'
    ) from error
  finally:
    os.close(fd)
