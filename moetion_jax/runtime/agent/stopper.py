"""The agent's part in ending all stages after one iteration (`stopping`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moetion_jax.recovery import stopping
from moetion_jax.runtime import messages
from moetion_jax.runtime.hosts import child_process


class Stopper:
  """The proposals and answers of one run's end."""

  def __init__(
    self,
    iterations: int,
    workers: Callable[[], Sequence[child_process.WorkerProcess]],
  ):
    """Stores the arguments.

    Args:
      iterations: the number of the run's iterations.
      workers: returns the workers of the moment.
    """
    self._iterations = iterations
    self._workers = workers
    self._answers: dict[tuple[int, int], int] = {}
    self._decision: stopping.StopDecision | None = None

  def begin(self) -> None:
    """Proposes to stop soon."""
    newest = max(w.iteration for w in self._workers())
    self._decide(stopping.first_proposal(newest, self._iterations))

  def answer(
    self, worker: child_process.WorkerProcess, message: messages.Answer
  ) -> None:
    """Takes in the answer of a worker."""
    if self._decision is None or message.limit != self._decision.limit:
      return  # it answers an earlier proposal
    self._answers[worker.stage, worker.replica] = message.begun
    decision = stopping.decide(
      message.limit, self._answers, len(self._workers()), self._iterations
    )
    if decision:
      self._decide(decision)

  def tell(self, workers: Sequence[child_process.WorkerProcess]) -> None:
    """Tells workers, such as new ones, the decision, if there is one."""
    if self._decision is None:
      return
    kind = messages.Commit if self._decision.commit else messages.Propose
    for worker in workers:
      worker.send(kind(limit=self._decision.limit))

  def _decide(self, decision: stopping.StopDecision) -> None:
    self._decision = decision
    self._answers.clear()
    self.tell(self._workers())
