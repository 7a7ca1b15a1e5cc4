"""The agent's part in making the final checkpoint of all stages' states."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence

from moetion_jax.runtime import messages
from moetion_jax.runtime.hosts import child_process
from moetion_jax.runtime.records import recorder as recorder_lib

_MAX_DAMAGED = 3  # hand-overs of one worker
_DAMAGED_MEMORY = (
  'host memory is damaged. Have it tested, or name another tmpfs with '
  '--hostmem_dir'
)
_DAMAGED_DEVICE = (
  'host memory brought what was sent, by its checksums: the memory of the '
  'device is damaged, or the way out of it (on CPU, the memory of the '
  'process). Have it tested, or go on on another machine'
)


class FinalCheckpoint:
  """Keeps who is done, and who has put its state into the store.

  Once all states are there, the first worker saves them. A worker that dies
  meanwhile is asked again, when it is back; and so is one whose state arrives
  damaged, which it still has.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Stores the path.

    Args:
      path: the folder that the checkpoint is saved to.
    """
    self._path = path
    self._done: set[tuple[int, int]] = set()
    self._asked: set[tuple[int, int]] = set()
    self._handed_over: set[tuple[int, int]] = set()
    self._damaged: collections.Counter[tuple[int, int]] = collections.Counter()

  def done(self, worker: child_process.WorkerProcess, workers: int) -> bool:
    """Notes that a worker has trained to the end of the run.

    Args:
      worker: the worker that has.
      workers: the number of all workers.

    Returns:
      Whether all have by now.
    """
    self._done.add(_name(worker))
    return len(self._done) == workers

  def hand_over(self, givers: Sequence[child_process.WorkerProcess]) -> None:
    """Asks each giver for its state, once; all have trained to the end.

    Args:
      givers: workers that together have the whole state, in the order of stage
        and replica.
    """
    for worker in givers:
      if _name(worker) not in self._asked:
        self._asked.add(_name(worker))
        worker.send(messages.HandOver())

  def handed_over(
    self,
    worker: child_process.WorkerProcess,
    givers: Sequence[child_process.WorkerProcess],
    recorder: recorder_lib.Recorder,
  ) -> None:
    """Notes that a worker's state is there; with the last, has all saved.

    Args:
      worker: the worker whose state it is.
      givers: see `hand_over`.
      recorder: the recorder, which knows the states' iteration and digest.

    Raises:
      OSError: the lines of metrics cannot be brought to disk.
    """
    self._handed_over.add(_name(worker))
    if self._handed_over.issuperset(map(_name, givers)):
      # Where a checkpoint is the run counts as finished, and its store goes.
      recorder.sync()
      replicas: dict[int, list[int]] = {}
      for giver in givers:
        replicas.setdefault(giver.stage, []).append(giver.replica)
      givers[0].send(
        messages.Save(
          path=str(self._path),
          iteration=recorder.iteration,
          digest=recorder.digest,
          replicas=tuple(tuple(x) for _, x in sorted(replicas.items())),
        )
      )

  def damaged(
    self,
    worker: child_process.WorkerProcess,
    message: messages.Damaged,
    givers: Sequence[child_process.WorkerProcess],
    recorder: recorder_lib.Recorder,
  ) -> None:
    """Asks a worker again whose state arrived damaged, a few times.

    Args:
      worker: the worker that was to save.
      message: its message.
      givers: see `hand_over`.
      recorder: the recorder, which notes it.

    Raises:
      child_process.WorkerError: that state has arrived damaged too often.
    """
    name = message.stage, message.replica
    if worker.is_going_back or name not in self._handed_over:
      return  # its worker goes back, and will hand over another one
    self._damaged[name] += 1
    count, what = self._damaged[name], message.what
    recorder.event(
      'final_state_damaged',
      stage=message.stage,
      replica=message.replica,
      error=what,
    )
    if count == _MAX_DAMAGED:
      raise child_process.WorkerError(
        message.stage,
        recorder.iteration,
        f'{what}; that was {count} times: '
        + (_DAMAGED_DEVICE if message.is_sent_so else _DAMAGED_MEMORY),
      )
    recorder.view.note(f'{what}; it is handed over again.')
    self._handed_over.discard(name)
    for giver in givers:
      if _name(giver) == name:
        giver.send(messages.HandOver())

  def rewritten(
    self,
    worker: child_process.WorkerProcess,
    message: messages.Rewritten,
    recorder: recorder_lib.Recorder,
  ) -> None:
    """Tells that the checkpoint was read back damaged, and is written again.

    Args:
      worker: the worker that saves.
      message: its message.
      recorder: the recorder, which notes it.
    """
    recorder.event(
      'final_checkpoint_damaged',
      stage=worker.stage,
      replica=worker.replica,
      error=message.what,
    )
    recorder.view.note(f'{message.what}; it is written once more.')

  def forget(self, stage: int) -> None:
    """Forgets what the workers of a stage did, since they go back."""
    for names in (self._done, self._asked, self._handed_over):
      names.difference_update({name for name in names if name[0] == stage})


def _name(worker: child_process.WorkerProcess) -> tuple[int, int]:
  return worker.stage, worker.replica
