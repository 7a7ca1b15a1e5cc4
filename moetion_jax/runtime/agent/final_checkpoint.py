"""The agent's part in making the final checkpoint of all stages' states."""

from __future__ import annotations

import os
from collections.abc import Sequence

from moetion_jax.runtime.hosts import child_process


class FinalCheckpoint:
  """Keeps who is done, and who has put its state into the store.

  Once all states are there, the first worker saves them. A worker that dies
  meanwhile is asked again, when it is back.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Stores the path of the checkpoint."""
    self._path = path
    self._done: set[tuple[int, int]] = set()
    self._asked: set[tuple[int, int]] = set()
    self._handed_over: set[tuple[int, int]] = set()

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
        worker.send('hand_over')

  def handed_over(
    self,
    worker: child_process.WorkerProcess,
    givers: Sequence[child_process.WorkerProcess],
    iteration: int,
  ) -> None:
    """Notes that a worker's state is there; with the last, has all saved.

    Args:
      worker: the worker whose state it is.
      givers: see `hand_over`.
      iteration: the iteration of the states.
    """
    self._handed_over.add(_name(worker))
    if self._handed_over.issuperset(map(_name, givers)):
      replicas: dict[int, list[int]] = {}
      for giver in givers:
        replicas.setdefault(giver.stage, []).append(giver.replica)
      givers[0].send(
        'save',
        path=str(self._path),
        iteration=iteration,
        replicas=[of_stage for _, of_stage in sorted(replicas.items())],
      )

  def forget(self, stage: int) -> None:
    """Forgets what the workers of a stage did, since they go back."""
    for names in (self._done, self._asked, self._handed_over):
      names.difference_update({name for name in names if name[0] == stage})


def _name(worker: child_process.WorkerProcess) -> tuple[int, int]:
  return worker.stage, worker.replica
