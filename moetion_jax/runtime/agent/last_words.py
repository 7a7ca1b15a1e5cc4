"""The last words of a run that did not finish."""

from __future__ import annotations

from moetion_jax import errors
from moetion_jax.runtime.records import workdir


def how_to_go_on(
  snapshots: str,
  checkpoint: str = '',
  *,
  has_begun: bool,
  starts_over: bool,
  is_removed: bool,
  cause_stays: bool,
  is_lost: bool = False,
) -> str:
  """Says what the same command does after a run that did not finish.

  Args:
    snapshots: the names of the folders of snapshots that stay; '' for none.
    checkpoint: path of the checkpoint from which the run goes on without any;
      '' for none.
    has_begun: whether the workers were told to train.
    starts_over: whether an earlier run was to be removed before that.
    is_removed: whether that was done.
    cause_stays: whether the same command meets the cause of the end again, as
      far as can be told: it does nothing else then, until that is gone.
    is_lost: whether the workdir is gone, and with it what leads to them.

  Returns:
    A line for people; '' where there is nothing to say.
  """
  if is_lost:
    rest = f'Without that nothing goes on from {snapshots}: remove them. '
    return f'{rest if snapshots else ""}The same command starts over.'
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
  if checkpoint and has_begun:
    return f'{command} goes on from {checkpoint}; --fresh starts over.'
  return f'{command} starts over.' if has_begun else ''


def of_system(error: OSError, folder: workdir.Workdir) -> errors.MoetionError:
  """Says of an error of the system what to do.

  Args:
    error: the error.
    folder: the run's workdir: if it is no longer there, that explains the
      error.
  """
  try:
    folder.check_in_place()
  except errors.StoreError as why:
    return why
  except OSError:
    pass  # it is the same one
  try:
    errors.check_limits(error)
  except errors.SystemRefusalError as why:
    return why
  what = error.filename or 'the operating system refused something'
  return errors.StoreError(
    f'{what}: {error.strerror}; make that possible, then start again'
  )
