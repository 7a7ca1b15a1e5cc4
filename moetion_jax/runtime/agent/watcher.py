"""Finds workers that hang and kills them, which is then a death like others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from moetion_jax import errors
from moetion_jax.recovery import hang_detection
from moetion_jax.runtime.hosts import child_process

WATCH_SECONDS = 0.25  # between two looks
# The agent itself was stopped, or starved: what it did not hear says nothing.
_ASLEEP_SECONDS = 2.0


class Watcher:
  """Looks for hanging workers now and then; may be called often."""

  def __init__(
    self, hang_timeout_seconds: float, suspect: Callable[[str], str]
  ):
    """Stores the arguments.

    Args:
      hang_timeout_seconds: seconds after which a program that runs counts as
        hanging.
      suspect: checks the logs when everybody waits; returns '' if a damaged
        entry explains it and all go back once a worker is dead, else the error
        (`Comeback.suspect`).
    """
    self._suspect = suspect
    self._hang_timeout_seconds = hang_timeout_seconds
    self._looked_at = time.monotonic()

  def look(
    self, workers: Sequence[child_process.WorkerProcess], *, excused: bool
  ) -> None:
    """Kills a worker that hangs, and says why in its `reason`.

    Args:
      workers: all workers of the run.
      excused: whether no worker is to blame now, whatever it does.

    Raises:
      errors.MoetionError: everybody waits for somebody, and no damaged entry
        explains it.
    """
    now = time.monotonic()
    if now - self._looked_at < WATCH_SECONDS:
      return
    was_asleep = now - self._looked_at > _ASLEEP_SECONDS
    self._looked_at = now
    everyone = [w for w in workers if w.exit_code is None]
    if was_asleep or excused:
      for worker in everyone:
        worker.heard_at = worker.state_since = now
      return
    seen = [
      hang_detection.Seen(
        stage=worker.stage,
        replica=worker.replica,
        state=worker.state,
        detail=worker.detail,
        shortage=worker.shortage,
        state_seconds=now - worker.state_since,
        silent_seconds=now - worker.heard_at,
        is_stopped=hang_detection.is_stopped(worker.pid),
      )
      for worker in everyone
    ]
    for worker, one in zip(everyone, seen, strict=True):
      if why := hang_detection.hanging(one, self._hang_timeout_seconds, seen):
        worker.reason = why
        worker.kill()
        return
    if why := hang_detection.deadlock(seen):
      if text := self._suspect(why):
        raise errors.MoetionError(f'{text}; this is a defect of the program')
      everyone[0].reason = f'waits for an entry that was lost: {why}'
      everyone[0].kill()
