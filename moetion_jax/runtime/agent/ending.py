"""The end of a run: its exit code, its last words, and whether stores stay."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time

from moetion_jax import errors
from moetion_jax.recovery import hang_detection
from moetion_jax.runtime import messages
from moetion_jax.runtime.hosts import child_process, crew as crew_lib, hosts
from moetion_jax.runtime.records import recorder as recorder_lib

# How long a worker that was told to end may take before it is killed.
_GRACE_SECONDS = 10.0


class Ending:
  """The end of one run, once there is one.

  Attributes:
    result: the exit code, and the state for `workers.json`; None while the run
      goes on.
    kill_at: the time at which workers that live on are killed, of
      `time.monotonic`; None: they are not.
    keeps_store: whether the host stores stay, for a run that goes on from them.
  """

  def __init__(
    self,
    recorder: recorder_lib.Recorder,
    hosts: hosts.Hosts,
    crew: crew_lib.Crew,
    *,
    keeps_store: bool,
    starts_over: bool = False,
    durable_folder: str = '',
  ):
    """Stores the arguments.

    Args:
      recorder: the writer of the event.
      hosts: the hosts, whose stores stay or go.
      crew: the workers, which are told.
      keeps_store: whether an earlier run left something in the host stores.
      starts_over: whether that is removed before this run begins.
      durable_folder: the folder of snapshots on disk; '': they lie in the host
        stores.
    """
    self.result: tuple[int, hang_detection.WorkerState] | None = None
    self.kill_at: float | None = None
    self._recorder = recorder
    self._hosts = hosts
    self._crew = crew
    self.keeps_store = keeps_store
    self._starts_over = starts_over
    self._durable_folder = durable_folder

  def keep(self, keep: bool) -> None:
    """Sets whether the host stores stay, whatever ends the run from now on."""
    self.keeps_store = keep
    self._hosts.keep(keep)

  def end(self, code: int, state: hang_detection.WorkerState) -> None:
    """Ends the run: tells the workers to exit; they are killed later.

    Args:
      code: the exit code.
      state: the state of all workers for `workers.json`.
    """
    self.result = code, state
    self.kill_at = time.monotonic() + _GRACE_SECONDS
    for worker in self._crew.everyone():
      worker.send(messages.Exit())

  def end_now(self) -> None:
    """Has workers killed at once, whatever they do."""
    self.kill_at = time.monotonic()

  def stopped(self, *, has_begun: bool) -> None:
    """Ends a run that was told to stop, and says how to go on with it.

    Args:
      has_begun: whether the workers were told to train.
    """
    iteration = self._recorder.iteration
    self._recorder.event('stopped', iteration=iteration)
    self.end(0, hang_detection.WorkerState.STOPPED)
    note = 'Stopped before training began.'
    if has_begun:
      note = f'Stopped after iteration {iteration}.'
    how = self._how_to_go_on(has_begun=has_begun, cause_stays=False)
    self._recorder.view.note(f'{note} {how}'.rstrip())

  def finished(self, checkpoint: pathlib.Path) -> None:
    """Ends a run whose final checkpoint is written.

    Args:
      checkpoint: the path of that checkpoint.
    """
    self._recorder.event('finished', iteration=self._recorder.iteration)
    self.end(0, hang_detection.WorkerState.FINISHED)
    self.keep(False)
    self._recorder.view.note(f'Finished: {checkpoint}')

  def failed(
    self,
    error: errors.MoetionError,
    logs: list[pathlib.Path],
    *,
    has_begun: bool,
  ) -> None:
    """Ends a run that cannot go on, and says why and what can be done.

    Args:
      error: the reason.
      logs: the log files of the failed stage's workers, if a stage failed.
      has_begun: whether the workers were told to train.
    """
    self._crew.close()  # and passes on what workers still had to print
    self.result = 1, hang_detection.WorkerState.FAILED
    fields = {'error': str(error)}
    if isinstance(error, child_process.WorkerError):
      fields |= {'stage': error.stage, 'iteration': error.iteration}
    with contextlib.suppress(OSError):  # which may be why the run failed
      self._recorder.event('failed', **fields)
    print(f'The run ended: {error}', file=sys.stderr)
    if logs:
      names = ' and '.join(map(str, logs))
      print(f'What it printed is in {names}', file=sys.stderr)
    if how := self._how_to_go_on(
      has_begun=has_begun, cause_stays=not error.is_passing
    ):
      print(how, file=sys.stderr)

  def _how_to_go_on(self, *, has_begun: bool, cause_stays: bool) -> str:
    return how_to_go_on(
      self.snapshot_names() if self.keeps_store else '',
      has_begun=has_begun,
      starts_over=self._starts_over,
      is_removed=self._recorder.removed_earlier,
      cause_stays=cause_stays,
    )

  def snapshot_names(self) -> str:
    """Names the folders of the snapshots, for people."""
    return self._durable_folder or ' and '.join(map(str, self._hosts.stores()))


def how_to_go_on(
  snapshots: str,
  *,
  has_begun: bool,
  starts_over: bool,
  is_removed: bool,
  cause_stays: bool,
) -> str:
  """Says what the same command does after a run that did not finish.

  Args:
    snapshots: the names of the folders of snapshots that stay; '' for none.
    has_begun: whether the workers were told to train.
    starts_over: whether an earlier run was to be removed before that.
    is_removed: whether that was done.
    cause_stays: whether the same command meets the cause of the end again, as
      far as can be told: it does nothing else then, until that is gone.

  Returns:
    A line for people; '' where there is nothing to say.
  """
  command = 'Once the cause is gone, the' if cause_stays else 'The'
  command += ' same command'
  if starts_over and not has_begun:
    if is_removed:
      return f'{command} starts over.'
    return 'Nothing of the earlier run was removed.' if snapshots else ''
  if snapshots:
    return (
      f'{command} goes on from the snapshots in {snapshots}; --fresh, or '
      'removing them, starts over.'
    )
  return f'{command} starts over.' if has_begun else ''


def of_system(error: OSError, path: pathlib.Path) -> errors.StoreError:
  """Says of an error of the system what to do.

  Args:
    error: the error.
    path: the run's workdir, named where the error names no file.
  """
  return errors.StoreError(
    f'{error.filename or path}: {error.strerror}; make that possible, then '
    'start again'
  )
