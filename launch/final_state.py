"""How all stages' states become the final checkpoint, seen from the agent.

No JAX here: the agent uses this module and never creates a JAX backend.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from launch import processes


class FinalState:
  """Who has put its state into the store, and who is about to.

  The worker of stage 0 then saves everybody's. One that dies meanwhile is asked
  again, when it is back.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Stores where the checkpoint goes."""
    self._path = path
    self._asked: set[int] = set()
    self._handed_over: set[int] = set()

  def hand_over(self, workers: Sequence[processes.WorkerProcess]) -> None:
    """Asks those who were not asked yet; all have trained to the end."""
    for worker in workers:
      if worker.stage not in self._asked:
        self._asked.add(worker.stage)
        worker.send('hand_over')

  def handed_over(
    self,
    stage: int,
    workers: Sequence[processes.WorkerProcess],
    iteration: int,
  ) -> None:
    """A stage's state is there; the last one has all saved.

    Args:
      stage: whose.
      workers: of all stages.
      iteration: of the states.
    """
    self._handed_over.add(stage)
    if len(self._handed_over) == len(workers):
      workers[0].send('save', path=str(self._path), iteration=iteration)

  def forget(self, stage: int) -> None:
    """A worker died."""
    self._asked.discard(stage)
    self._handed_over.discard(stage)
