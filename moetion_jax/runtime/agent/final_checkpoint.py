"""How all stages' states become the final checkpoint, seen from the agent."""

from __future__ import annotations

import os
from collections.abc import Sequence

from moetion_jax.runtime.hosts import child_process


class FinalState:
  """Who is done, and who has put its state into the store.

  The first worker then saves everybody's. One that dies meanwhile is asked
  again, when it is back.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Stores where the checkpoint goes."""
    self._path = path
    self._done: set[tuple[int, int]] = set()
    self._asked: set[tuple[int, int]] = set()
    self._handed_over: set[tuple[int, int]] = set()

  def done(self, worker: child_process.WorkerProcess, workers: int) -> bool:
    """A worker has trained to the end of its run.

    Args:
      worker: that has.
      workers: that there are.

    Returns:
      Whether all have by now.
    """
    self._done.add(_name(worker))
    return len(self._done) == workers

  def hand_over(self, givers: Sequence[child_process.WorkerProcess]) -> None:
    """Asks those who were not asked yet; all have trained to the end.

    Args:
      givers: workers that together have everything, by stage and replica.
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
    """A worker's state is there; the last one has all saved.

    Args:
      worker: whose.
      givers: see `hand_over`.
      iteration: of the states.
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
    """The workers of a stage go back."""
    for names in (self._done, self._asked, self._handed_over):
      names.difference_update({name for name in names if name[0] == stage})


def _name(worker: child_process.WorkerProcess) -> tuple[int, int]:
  return worker.stage, worker.replica
